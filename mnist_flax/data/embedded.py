"""The small dataset that needs no files: scikit-learn's 8x8 digits in MNIST's format."""

import functools

import numpy as np

from mnist_flax.data.framing import frame
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Examples


@functools.cache
def embedded_digits() -> tuple[Examples, Examples]:
    """Returns scikit-learn's 1,797 handwritten digits as a training and a test split, framed like MNIST's.

    After sorting by digit, about every fifth row goes to the test split. The split is therefore stratified, and it is
    the same everywhere because it uses no random numbers. Both splits keep the original order.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.stack([frame((image * 255 / 16).astype(np.uint8)) for image in digits.images])[..., None]
    labels = digits.target.astype(np.int32)
    num_test = DATASETS["digits"].num_test
    by_digit = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), bool)
    is_test[by_digit[(2 * np.arange(num_test) + 1) * len(labels) // (2 * num_test)]] = True
    return Examples(images[~is_test], labels[~is_test]), Examples(images[is_test], labels[is_test])
