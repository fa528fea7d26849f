"""Measures whether neighbouring rows of a dataset look alike, as those of one writer do.

    python scripts/study_writers.py >> scripts/results/study_writers.jsonl

For each image, finds its nearest neighbour in its class (by cosine of the pixels), and prints how often the two are
within 10, 50, 200, 1,000 and 5,000 rows of each other (`share`), and how often two random rows of the file would be
(`chance`). One JSON line for each split.
"""

import datetime
import json
from collections.abc import Sequence

import numpy as np

from mnist_flax import cli
from mnist_flax.data.load import load_splits
from mnist_flax.data.splits import Examples
from mnist_flax.sections import DataConfig

DISTANCES = (10, 50, 200, 1000, 5000)  # rows


def neighbour_distances(examples: Examples) -> np.ndarray:
    """Returns how many rows each image is from its nearest neighbour in its class, `i64[N]`, ordered by class."""
    labels = np.asarray(examples.label)
    distances = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        pixels = np.asarray(examples.image)[rows].reshape(len(rows), -1).astype(np.float32)
        pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
        cosines = pixels @ pixels.T
        np.fill_diagonal(cosines, -1)
        distances.append(np.abs(rows[cosines.argmax(axis=1)] - rows))
    return np.concatenate(distances)


def main(_: Sequence[str]) -> None:
    """Prints the shares for both splits of MNIST."""
    splits = load_splits(DataConfig(on_missing="error"))
    for name, examples in (("train", splits.train), ("test", splits.test)):
        distances, count = neighbour_distances(examples), len(examples.label)
        shares = {limit: round(float(np.mean(distances <= limit)), 4) for limit in DISTANCES}
        chances = {limit: round(1 - (1 - limit / count) ** 2, 4) for limit in DISTANCES}
        made = {"date": datetime.date.today().isoformat(), "dataset": splits.name, "split": name, "examples": count}
        print(json.dumps({**made, "share": shares, "chance": chances}))


if __name__ == "__main__":
    cli.run(main)
