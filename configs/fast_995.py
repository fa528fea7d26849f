"""Reaches 99.5 % on a CPU as fast as possible: a fixed first layer, a wide second one, one-pixel shifts, 7 epochs.

Measured: 99.54 +- 0.03 % test accuracy (mean and sd, n = 10), 10 s of training on two cores of an AMD
EPYC with AVX-512.

    scripts/train --config=configs/fast_995.py

As accurate as `default.py` in half the time, for the reasons given in `fast.py`. All of it was chosen on rows held out
of the training set. To write the report, run `python -m mnist_flax.report`.
"""

from ml_collections import ConfigDict

from mnist_flax.preset import preset_dict


def get_config() -> ConfigDict:
    """Returns what differs from `fast.py`."""
    config = preset_dict("fast")
    config.data.num_train = 0
    config.model.widths = (16, 48)
    config.augment.shift = 1
    config.optimizer.name = "adamw"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 1e-4
    config.optimizer.peak_at = 0.15
    config.train.epochs = 7
    return config
