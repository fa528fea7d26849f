"""Reaches 99.5 % on a CPU as fast as possible: a fixed first layer, a wide second one, one-pixel shifts, 7 epochs.

Measured: 99.54 +- 0.03 % test accuracy (mean and sd, n = 10), 10 s of training on two cores of an AMD EPYC.

    scripts/train --config=configs/fast_995.py

As accurate as `default.py` in half the time, for the reasons given in `fast.py`. All of it was chosen on rows held out
of the training set. To write the report, run `python -m mnist_flax.report`.
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.model.stem = "cosine"
    config.model.widths = (16, 48)
    config.model.kernel_sizes = (4,)
    config.model.strides = (2, 1)
    config.model.pools = (1, 2)
    config.model.dense = (256,)
    config.model.init = "he_normal"
    config.eval.views = 5
    config.model.pixel_mean = 0.1307
    config.model.pixel_std = 0.3081
    config.augment.shift = 1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "one_cycle"
    config.optimizer.peak_at = 0.15
    config.train.batch_size = 256
    config.train.epochs = 7
    config.train.label_smoothing = 0.1
    config.eval.batch_size = 250
    config.train.report = False
    config.train.demo = False
    return config
