"""A network for photographs and other handwriting: it cleans its images first, and trains with clutter around digits.

It trains with weak shifts, rotations and scaling, pieces of strokes beside the digit, and ones and sevens as in much of
Europe. It trains with no other corruption of MNIST-C; `docs/trust.md` has its scores.

Measured: 99.62 +- 0.04 % test accuracy, 96.14 +- 0.28 % over the corruptions of MNIST-C (mean and sd, n = 3);
23 minutes of training on one core of an AMD EPYC.

    scripts/train --config=configs/robust.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict
from mnist_flax.preset import preset_dict


def get_config() -> ConfigDict:
    """Returns what differs from `accurate.py`."""
    config = preset_dict("accurate")
    config.data.holdout = 2_000
    config.model = default_config_dict("cleaned_cnn").model
    config.model.widths = (48, 96, 96)
    config.model.dense = (128,)
    config.model.batch_norm = True
    config.model.conv_dropout = 0.15
    config.model.dropout = 0.4
    config.model.init = "he_normal"
    config.augment.shear = 0.0
    config.augment.clutter = 10
    config.augment.pens = 0.3
    config.train.epochs = 14
    config.train.augment_until = 0.7
    return config
