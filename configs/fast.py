"""Reaches 99 % on a CPU as fast as possible: one epoch on 45,000 images, a fixed first layer.

Measured: 99.10 +- 0.06 % test accuracy (mean and sd, n = 30), 0.6 and 1.0 s of training (two series) on two
cores of an AMD EPYC with AVX-512.

    scripts/train --config=configs/fast.py

Why it works: the cosine stem needs no gradient, and within one epoch it beats a learned one. Its stride replaces a
pooling. Low b1 and b2 let Adam follow a gradient that changes quickly. Label smoothing gains 0.2 points, and averaging
over an image and its four shifts at test time gains 0.13 points. All of this was chosen on rows held out of the
training set. The report would take longer than the training; write it with `python -m mnist_flax.report`.
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.data.num_train = 45_000
    config.model.stem = "cosine"
    config.model.widths = (16, 24)
    config.model.kernel_sizes = (4,)
    config.model.strides = (2, 1)
    config.model.pools = (1, 2)
    config.model.dense = (256,)
    config.model.init = "he_normal"
    config.eval.views = 5
    config.model.pixel_mean = 0.1307
    config.model.pixel_std = 0.3081
    config.optimizer.learning_rate = 1e-2
    config.optimizer.b1 = 0.7
    config.optimizer.b2 = 0.9
    config.optimizer.schedule = "one_cycle"
    config.train.batch_size = 256
    config.train.epochs = 1
    config.train.label_smoothing = 0.1
    config.eval.batch_size = 250
    config.train.report = False
    config.train.demo = False
    return config
