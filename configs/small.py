"""As accurate as possible with fewer than 25,000 weights: four narrow convolutions with batch norm, three poolings.

Measured: 99.65 +- 0.05 % test accuracy (mean and sd, n = 12), NLL 0.0105, ECE 0.12 %;
3.5 minutes of training on one core of an AMD EPYC with AVX-512.

    scripts/train --config=configs/small.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict
from mnist_flax.preset import preset_dict


def get_config() -> ConfigDict:
    """Returns what differs from `accurate.py`."""
    config = preset_dict("accurate")
    config.model = default_config_dict("cnn").model
    config.model.widths = (16, 24, 24, 40)
    config.model.kernel_sizes = (5, 3, 3, 3)
    config.model.paddings = ("SAME",)
    config.model.pools = (2, 1, 2, 2)
    config.model.dense = ()
    config.model.batch_norm = True
    config.model.dropout = 0.1
    config.model.init = "he_normal"
    config.train.epochs = 20
    config.train.augment_until = 1.0
    config.eval.batch_size = 1000
    return config
