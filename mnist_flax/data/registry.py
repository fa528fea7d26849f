"""The datasets: what is known of each before it is loaded."""

from typing import NamedTuple

IMAGE_SIZE = 28  # every dataset here is of grey images of 28x28 pixels


class DatasetInfo(NamedTuple):
    """What is known of a dataset before it is loaded."""

    num_classes: int
    num_train: int
    num_test: int


# The sizes are the publishers' own, and those that TFDS has (so 37 classes for EMNIST letters, of which 26 occur).
DATASETS: dict[str, DatasetInfo] = {
    "mnist": DatasetInfo(10, 60_000, 10_000),
    "fashion_mnist": DatasetInfo(10, 60_000, 10_000),
    "kmnist": DatasetInfo(10, 60_000, 10_000),
    "emnist/byclass": DatasetInfo(62, 697_932, 116_323),
    "emnist/bymerge": DatasetInfo(47, 697_932, 116_323),
    "emnist/balanced": DatasetInfo(47, 112_800, 18_800),
    "emnist/letters": DatasetInfo(37, 88_800, 14_800),
    "emnist/digits": DatasetInfo(10, 240_000, 40_000),
    "emnist/mnist": DatasetInfo(10, 60_000, 10_000),
    "digits": DatasetInfo(10, 1_437, 360),
}
