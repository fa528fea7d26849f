"""What the programs of `bench_peers.py` share: the recipe, the data, and the protocol.

Each program runs in its own environment, so this module needs only numpy. A program trains an epoch for each line on
standard input, and answers with a line of JSON. When the input ends, it evaluates the test set and answers with the
accuracy.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

SPLITS = ("train", "holdout", "test")


class Examples(NamedTuple):
    """Images `u8[N,28,28,1]` and labels `i32[N]`."""

    image: np.ndarray
    label: np.ndarray


class Recipe(NamedTuple):
    """The part of a config that the peers support.

    Attributes:
      model: the fields of `config.model`; `blocks` returns the convolutions of a `cnn`.
      augment: the fields of `config.augment`; only the PyTorch peer supports rotate, scale and shear.
    """

    seed: int
    epochs: int
    batch_size: int
    label_smoothing: float
    learning_rate: float
    weight_decay: float
    one_cycle: bool
    peak_at: float
    start_fraction: float
    he_init: bool
    shift: int
    num_steps: int
    model: dict[str, Any]
    augment: dict[str, Any]

    @classmethod
    def of(cls, config: dict[str, Any], num_train: int) -> Self:
        """Extracts the recipe from the JSON form of one of our configs."""
        train, optimizer = config["train"], config["optimizer"]
        return cls(
            seed=config["seed"],
            epochs=train["epochs"],
            batch_size=train["batch_size"],
            label_smoothing=train["label_smoothing"],
            learning_rate=optimizer["learning_rate"],
            weight_decay=optimizer["weight_decay"],
            one_cycle=optimizer["schedule"] == "one_cycle",
            peak_at=optimizer["peak_at"],
            start_fraction=optimizer["start_fraction"],
            he_init=config["model"]["init"] == "he_normal",
            shift=config["augment"]["shift"],
            num_steps=-(-num_train // train["batch_size"]) * train["epochs"],
            model=config["model"],
            augment=config["augment"],
        )

    def blocks(self) -> list[tuple[int, int, int, str, int]]:
        """Returns width, kernel size, stride, padding and pooling of each convolution of a `cnn`."""
        names = ("kernel_sizes", "strides", "paddings", "pools")
        count = len(self.model["widths"])
        columns = [self.model[name] * (count if len(self.model[name]) == 1 else 1) for name in names]
        return list(zip(self.model["widths"], *columns, strict=True))


class Program(Protocol):
    """A network in training."""

    def epoch(self) -> float:
        """Trains one epoch, waits until it has finished, and returns the mean loss."""

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Computes the accuracy on `u8[N,28,28,1]`, `i32[N]`."""


def pixels(images: np.ndarray) -> np.ndarray:
    """Scales grey values, `u8[...] -> f32[...]` in [0, 1]."""
    return images.astype(np.float32) / 255


def shifted(images: np.ndarray, shift: int, generator: np.random.Generator) -> np.ndarray:
    """Shifts each image by up to `shift` pixels in x and y, a whole epoch at once: f32[N,28,28,1] -> f32[N,28,28,1]."""
    if not shift:
        return images
    padded = np.pad(images[..., 0], ((0, 0), (shift, shift), (shift, shift)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    down, right = generator.integers(0, 2 * shift + 1, (2, len(images)))
    return windows[np.arange(len(images)), down, right][..., None]


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="a config of ours, as JSON")
    parser.add_argument("--data", required=True, help="an .npz with the images and labels of each split")
    parser.add_argument("--variant", default="", help="one of the program's own")
    return parser.parse_args()


def serve(make: Callable[[argparse.Namespace, Recipe, Examples], Program], packages: Sequence[str]) -> None:
    """Trains one epoch for each line of standard input, and answers in JSON."""
    given = arguments()
    with np.load(given.data) as arrays:
        splits = {split: Examples(arrays[f"{split}_image"], arrays[f"{split}_label"]) for split in SPLITS}
    recipe = Recipe.of(json.loads(given.config), len(splits["train"].label))
    program = make(given, recipe, splits["train"])
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = program.epoch()
        answer = {"seconds": time.perf_counter() - started, "loss": loss}
        if len(splits["holdout"].label):
            answer["holdout_accuracy"] = program.accuracy(*splits["holdout"])
        print(json.dumps(answer), flush=True)
    versions = {name: importlib.metadata.version(name) for name in packages}
    last = {"test_accuracy": program.accuracy(*splits["test"]), "python": platform.python_version(), **versions}
    print(json.dumps(last), flush=True)
