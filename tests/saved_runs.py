"""Checkpoints of made-up states, saved without training, and ways to damage their files."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
from small_run import SMALL

from mnist_flax import rng
from mnist_flax.config import Config
from mnist_flax.drivers import jit_init_state
from mnist_flax.run.store import Store, open_store
from mnist_flax.step import TrainState

FINGERPRINT = "f" * 64


def at(state: TrainState, step: int) -> TrainState:
    """A state whose leaves all depend on its step."""
    moved = jax.tree.map(lambda leaf: leaf + np.asarray(step, leaf.dtype), state)
    return moved.replace(step=jax.numpy.int32(step))


def record(step: int) -> dict[str, Any]:
    """The snapshot that a log would return at a step."""
    return {
        "step": step,
        "seconds": 0.5,
        "restarts": 0,
        "origin": {"fork": None, "versions": {"python": "3.11.7"}},
        "versions": [{"python": "3.11.7"}],
        "log": [{"step": 1, "epoch": 1 / 7, "split": "train", "loss": 2.0, "grad_norm": None, "seconds": 0.1}],
        "window": [{"loss": 0.1, "accuracy": 2, "examples": 3}],
        "epoch_sums": {"loss": 0.1, "accuracy": 2, "examples": 3},
    }


def save(store: Store, state: TrainState, step: int, accuracy: float | None = None) -> None:
    holdout = None if accuracy is None else {"loss": 1.0 - accuracy, "accuracy": accuracy, "examples": 20}
    store.save(at(state, step), record(step), holdout=holdout)


def same(left: Any, right: Any) -> bool:
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right)
    return all(jax.tree.leaves(equal))


def restored(workdir: pathlib.Path, config: Config = SMALL) -> tuple[int | None, list[str]]:
    """The step of the checkpoint that is restored, and messages about those that were skipped."""
    with open_store(config, FINGERPRINT, workdir) as store:
        found, skipped = store.restore_latest()
    return (int(found.state.step) if found else None), skipped


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: pathlib.Path) -> None:
    file.write_bytes(b"")


def zero(file: pathlib.Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@functools.cache
def initial_state() -> TrainState:
    """The state before the first step."""
    return jit_init_state(SMALL.program, rng.root_key(0))


def save_two(workdir: pathlib.Path) -> pathlib.Path:
    """Writes checkpoints at 3 and 6."""
    with open_store(SMALL, FINGERPRINT, workdir) as store:
        save(store, initial_state(), 3, 0.5)
        save(store, initial_state(), 6)
    return workdir
