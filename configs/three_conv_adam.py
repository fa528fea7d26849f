"""The classic three convolutions (32, 64, 64) and a dense layer of 64; Adam, batch 64, 5 epochs.

Measured: 99.05 +- 0.12 % test accuracy (mean and sd, n = 5), 17 s of training on two cores of an AMD EPYC with AVX-512.

    scripts/train --config=configs/three_conv_adam.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.model.widths = (32, 64, 64)
    config.model.pools = (2, 2, 1)
    config.model.dense = (64,)
    return config
