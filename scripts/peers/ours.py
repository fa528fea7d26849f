"""The recipe in this project, through the driver that `train.fit` uses.

python -m scripts.peers.ours ...
"""

import argparse

import jax
import numpy as np

from mnist_flax import rng
from mnist_flax.analysis.evaluation import evaluate
from mnist_flax.config import Config
from mnist_flax.data import splits
from mnist_flax.step import eval_variables, jit_init_state
from mnist_flax.train import DRIVERS
from scripts.peers.harness import Examples, Recipe, serve


class Ours:
    """Training as this project does it."""

    def __init__(self, given: argparse.Namespace, recipe: Recipe, train: Examples) -> None:
        self._config = Config.from_json(given.config)
        key = rng.root_key(recipe.seed)
        self._state = jit_init_state(self._config, key)
        rows = np.arange(len(train.label), dtype=np.int32)
        driver = DRIVERS[self._config.train.driver]
        self._advance = driver(self._config, self._state, splits.Examples(*train), rows, key)
        self._done = 0

    def epoch(self) -> float:
        """Trains one epoch."""
        count = self._config.steps_per_epoch
        self._state, fetch = self._advance(self._state, self._done, count)
        self._done += count
        sums = fetch()
        return float(sums.loss.sum() / sums.examples.sum())

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Judges the network."""
        return evaluate(self._config, eval_variables(self._state), splits.Examples(images, labels)).accuracy


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    serve(Ours, ["jax", "jaxlib", "flax", "optax"])
