"""The classic first CNN: two convolutions, two poolings, a dense layer; Adam.

Measured: 98.97 +- 0.04 % test accuracy (mean and sd, n = 5), 18 s of training on two cores of an AMD EPYC with AVX-512.

    scripts/train --config=configs/two_conv_adam.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.model.widths = (32, 64)
    config.model.pools = (2,)
    config.model.dense = (128,)
    return config
