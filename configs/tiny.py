"""A small network on 1,800 rows of MNIST that trains in seconds, for tests and quick experiments.

Measured: 89.27 +- 1.10 % test accuracy (mean and sd, n = 5), 0.2 s of training on two cores of an AMD
EPYC with AVX-512.

    scripts/train --config=configs/tiny.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.data.num_train = 2_000
    config.data.holdout = 200
    config.model.widths = (8, 16)
    config.model.pools = (2,)
    config.model.dense = (32,)
    config.optimizer.learning_rate = 3e-3
    config.train.epochs = 3
    return config
