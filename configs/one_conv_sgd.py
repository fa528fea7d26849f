"""The classic single convolution with He initialisation; SGD with momentum, batch 32, 10 epochs.

Measured: 98.80 +- 0.05 % test accuracy (mean and sd, n = 5), 26 s of training on two cores of an AMD EPYC with AVX-512.

    scripts/train --config=configs/one_conv_sgd.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.model.widths = (32,)
    config.model.pools = (2,)
    config.model.dense = (100,)
    config.model.init = "he_uniform"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.train.batch_size = 32
    config.train.epochs = 10
    return config
