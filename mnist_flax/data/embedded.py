"""The small dataset that needs no files: scikit-learn's 8x8 digits in MNIST's format."""

import functools

import numpy as np

from mnist_flax.data.batches import rows_of
from mnist_flax.data.framing import frame
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Examples
from mnist_flax.sections import DataConfig


@functools.cache
def embedded_digits() -> tuple[Examples, Examples]:
    """Returns scikit-learn's 1,797 handwritten digits as a training and a test split, framed like MNIST's.

    About every fifth row goes to the test split (`rows_of`), which is stratified and uses no random numbers. Both
    splits keep the original order.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.stack([frame((image * 255 / 16).astype(np.uint8)) for image in digits.images])[..., None]
    labels = digits.target.astype(np.int32)
    train, test = rows_of(labels, DataConfig(holdout=DATASETS["digits"].num_test))
    return Examples(images[train], labels[train]), Examples(images[test], labels[test])
