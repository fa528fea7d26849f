"""What the numbers of the classes mean, and which labels are known to be doubtful."""

import string

from mnist_flax.config import DATASETS

_DIGITS = tuple(string.digits)
_UPPER = tuple(string.ascii_uppercase)
_LOWER = tuple(string.ascii_lowercase)
# The lower-case letters that look unlike their capitals; EMNIST merges the other fifteen (Cohen et al., 2017).
_UNLIKE = tuple("abdefghnqrt")

_NAMES = {
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "emnist/byclass": _DIGITS + _UPPER + _LOWER,
    "emnist/bymerge": _DIGITS + _UPPER + _UNLIKE,
    "emnist/balanced": _DIGITS + _UPPER + _UNLIKE,
    # Its labels begin at 1, and each stands for both cases; the other numbers are never used.
    "emnist/letters": ("unused 0", *_UPPER, *(f"unused {number}" for number in range(27, 37))),
}

# Test images of MNIST on whose label fewer than 3 of 5 people agree (Northcutt, Athalye and Mueller, "Pervasive Label
# Errors in Test Sets Destabilize Machine Learning Benchmarks", 2021), counted from 0 in the order of the official file.
MNIST_TEST_DOUBTS = (
    947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729
)  # fmt: skip


def class_names(dataset: str) -> tuple[str, ...]:
    """Returns a short name for each class, in the order of its number."""
    return _NAMES.get(dataset) or tuple(map(str, range(DATASETS[dataset].num_classes)))


def doubtful_rows(dataset: str, split: str) -> tuple[int, ...]:
    """Returns the rows of a split, in the original order, whose labels are known to be doubtful."""
    return MNIST_TEST_DOUBTS if (dataset, split) == ("mnist", "test") else ()
