"""An accurate network that trains in minutes: a residual network, distorted images, five views.

Measured: 99.70 +- 0.03 % test accuracy (mean and sd, n = 13), NLL 0.0089, ECE 0.10 %;
3 minutes of training on two cores of an AMD EPYC with AVX-512.

    scripts/train --config=configs/accurate.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict("resnet")
    config.model.dropout = 0.2
    config.augment.shift = 2
    config.augment.rotate = 10.0
    config.augment.scale = 0.1
    config.augment.shear = 5.0
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.momentum = 0.95
    config.optimizer.weight_decay = 1e-2
    config.optimizer.schedule = "one_cycle"
    config.train.batch_size = 128
    config.train.epochs = 12
    config.train.augment_until = 0.8
    config.eval.batch_size = 500
    config.eval.views = 5
    return config
