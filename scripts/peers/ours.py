"""The recipe in this project, through the driver that `train.fit` uses.

python -m scripts.peers.ours ...
"""

import argparse
import json

import jax
import numpy as np

from mnist_flax import rng
from mnist_flax.analysis.evaluation import evaluate, make_predictor
from mnist_flax.config import Config
from mnist_flax.data import splits
from mnist_flax.drivers import Job, compile_driver, jit_init_state, stack
from mnist_flax.run import machine
from mnist_flax.step import eval_variables
from scripts.peers.harness import Examples, Recipe, serve


class Ours:
    """Training in this project."""

    def __init__(self, given: argparse.Namespace, recipe: Recipe, train: Examples) -> None:
        config = self._config = Config.from_dict(json.loads(given.config))
        rows = np.arange(len(train.label), dtype=np.int32)
        job = Job(config.program, [recipe.seed], [rows], splits.Examples(*train))
        self._states = stack([jit_init_state(config.program, rng.root_key(recipe.seed))], job)
        self._advance = compile_driver(config.train.driver, job, self._states)

    def epoch(self) -> float:
        """Trains one epoch."""
        self._states, sums = self._advance(self._states, self._config.steps_per_epoch)
        return float(sums["loss"].sum() / sums["examples"].sum())

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Computes the accuracy."""
        state = jax.tree.map(lambda leaf: leaf[0], self._states)
        predictor = make_predictor(self._config, eval_variables(state))
        return evaluate(predictor, splits.Examples(images, labels)).accuracy


if __name__ == "__main__":
    machine.keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    serve(Ours, ["jax", "jaxlib", "flax", "optax"])
