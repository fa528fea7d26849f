"""The MNIST example of Flax: two convolutions, average pooling, SGD with momentum, batch 128, 10 epochs.

Measured: 98.99 +- 0.16 % test accuracy (mean and sd, n = 5), 81 s of training on two cores of an AMD EPYC with AVX-512.

    scripts/train --config=configs/flax_example.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.model.widths = (32, 64)
    config.model.paddings = ("SAME",)
    config.model.pools = (2,)
    config.model.pooling = "avg"
    config.model.dense = (256,)
    config.model.init = "lecun_normal"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.train.batch_size = 128
    config.train.epochs = 10
    return config
