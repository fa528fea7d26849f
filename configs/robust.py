"""For pens and cameras as well as the test set: `accurate.py`'s network with stronger distortions of shape.

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
    config.model.kernel_sizes = (5, 3, 3, 3)
    config.model.paddings = ("SAME",)
    config.model.pools = (2, 1, 2, 1)
    config.model.dense = ()
    config.model.batch_norm = True
    config.model.dropout = 0.4
    config.model.init = "he_normal"
    config.augment.shift = 3
    config.augment.rotate = 20.0
    config.augment.scale = 0.3
    config.augment.shear = 20.0
    config.augment.elastic = 0.8
    config.augment.stroke = 0.7
    config.augment.erase = 8
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 1e-2
    config.optimizer.schedule = "one_cycle"
    config.train.batch_size = 128
    config.train.epochs = 24
    config.eval.batch_size = 500
    return config
