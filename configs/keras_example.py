"""The MNIST example of Keras: two convolutions, dropout, no hidden dense layer; Adam, batch 128, 15 epochs.

A tenth of the training rows is held out, as in the original.

Measured: 99.23 +- 0.04 % test accuracy (mean and sd, n = 5), 39 s of training on two cores of an AMD EPYC with AVX-512.

    scripts/train --config=configs/keras_example.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.data.holdout = 6_000
    config.model.widths = (32, 64)
    config.model.pools = (2,)
    config.model.dense = ()
    config.model.dropout = 0.5
    config.train.batch_size = 128
    config.train.epochs = 15
    return config
