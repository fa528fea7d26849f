"""The default: three convolutions, one-cycle AdamW, label smoothing, random shifts of up to one pixel.

Measured: 99.53 +- 0.05 % test accuracy (mean and sd, n = 5), 18 s of training on two cores of an AMD EPYC with AVX-512.

    scripts/train --config=configs/default.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.data.holdout = 2_000
    config.checkpoint.keep_latest = 6  # all six epochs, so that the demo page compares the first with the last
    config.model.init = "he_normal"
    config.augment.shift = 1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "one_cycle"
    config.train.epochs = 6
    config.train.label_smoothing = 0.05
    return config
