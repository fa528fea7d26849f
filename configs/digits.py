"""The small handwritten digits that ship with scikit-learn: no download, trains in seconds.

1,797 images, 360 of them for testing. This is not MNIST, and the accuracy says nothing about accuracy on MNIST.

Measured: 99.56 +- 0.15 % test accuracy (mean and sd, n = 5), 2.3 s of training on two cores of an AMD
EPYC with AVX-512.

    scripts/train --config=configs/digits.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict()
    config.data.name = "digits"
    config.model.widths = (16, 32)
    config.model.pools = (2,)
    config.augment.shift = 1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "one_cycle"
    config.train.batch_size = 32
    config.train.epochs = 30
    return config
