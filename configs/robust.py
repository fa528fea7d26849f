"""For pens and cameras as well as the test set: a network that cleans its image first, with dropout in every layer.

Trained with affine distortion and pieces of strokes beside the digit, and no corruption of MNIST-C but the affine
ones; `docs/trust.md` says what it scores on the others.

Measured: not yet.

    scripts/train --config=configs/robust.py
"""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict("cleaned_cnn")
    config.data.holdout = 2_000
    config.model.widths = (48, 96, 96)
    config.model.conv_dropout = 0.2
    config.model.dropout = 0.4
    config.model.dense = (128,)
    config.model.init = "he_normal"
    config.augment.shift = 2
    config.augment.rotate = 10.0
    config.augment.scale = 0.1
    config.augment.clutter = 10
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "one_cycle"
    config.train.epochs = 20
    config.train.label_smoothing = 0.05
    return config
