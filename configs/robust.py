"""For pens and cameras as well as the test set: a network that cleans its image first, trained on distorted shapes.

No corruption of MNIST-C is trained on but the affine ones; `docs/trust.md` says what it scores on the others.

Measured: not yet.

    scripts/train --config=configs/robust.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict("cleaned_cnn")
    config.data.holdout = 2_000
    config.model.widths = (32, 64, 64, 128)
    config.model.pools = (2, 1, 2, 1)
    config.model.paddings = ("SAME",)
    config.model.dropout = 0.3
    config.model.init = "he_normal"
    config.augment.shift = 2
    config.augment.rotate = 15.0
    config.augment.scale = 0.2
    config.augment.shear = 15.0
    config.augment.elastic = 0.6
    config.augment.stroke = 0.5
    config.augment.erase = 6
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 1e-3
    config.optimizer.schedule = "one_cycle"
    config.train.epochs = 20
    return config
