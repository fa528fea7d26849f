"""A dataset in memory."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from mnist_flax.data.registry import IMAGE_SIZE
from mnist_flax.errors import DataError


class Examples(NamedTuple):
    """Images `u8[N,28,28,1]`, white on black, and labels `i32[N]`, on the host or on the device."""

    image: Any  # np.ndarray or jax.Array: most functions take either
    label: Any

    def select(self, rows: Any) -> "Examples":
        """Returns the examples in these rows, `i32[R]`."""
        return Examples(self.image[rows], self.label[rows])


def check_images(images: Any) -> None:
    """Checks that images are `u8[N,28,28,1]`.

    Raises:
      TypeError, ValueError: they have another type, as after scaling, or another shape.
    """
    kind = getattr(images, "dtype", type(images).__name__)
    if kind != np.uint8:
        raise TypeError(f"images are of type {kind}; pass grey values from 0 to 255, of type uint8")
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 1):
        raise ValueError(f"images are of shape {images.shape}; pass an array of [N,{IMAGE_SIZE},{IMAGE_SIZE},1]")


class Splits(NamedTuple):
    """A dataset in memory, in the order of the original files.

    Attributes:
      name: the loaded dataset, a key of `registry.DATASETS`; it may differ from the one that the config asks for.
      fingerprint: SHA-256 of the dtypes, shapes and values of all images and labels, in hexadecimal.
      source: where it was loaded from: `tfds` (a copy that was already prepared), `raw` (files in a folder),
        `download`, or `embedded`.
    """

    name: str
    train: Examples
    test: Examples
    fingerprint: str
    source: str


def make_splits(name: str, train: Examples, test: Examples, source: str) -> Splits:
    """Returns the splits with their fingerprint."""
    return Splits(name, train, test, fingerprint(train, test), source)


def check_fingerprint(splits: Splits, expected: str, place: object, remedy: str) -> None:
    """Raises DataError if data from `place` do not have the `expected` fingerprint; an empty one is not checked."""
    if expected and splits.fingerprint != expected:
        raise DataError(
            f"{place}: its images and labels are not those of {splits.name} (fingerprint {splits.fingerprint[:12]}"
            f" instead of {expected[:12]}); {remedy}"
        )


def fingerprint(train: Examples, test: Examples) -> str:
    """Returns the SHA-256 of the dtypes, shapes and values of all images and labels, in hexadecimal."""
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
