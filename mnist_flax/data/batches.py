"""Which rows are trained on, in which order, and the batches they make.

A row set (hold-out, subset, fold) is an array of row numbers; the order of an epoch is a permutation of it, computed
from the key and the epoch wherever it is needed. A batch has always the same shape: places that no row is left for
carry the label -1, weigh nothing in the loss, and are counted nowhere.
"""

from collections.abc import Iterator
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from mnist_flax import rng, sharding
from mnist_flax.config import DataConfig
from mnist_flax.data.datasets import Examples
from mnist_flax.errors import ConfigError

NO_LABEL = -1  # the label of a place in a batch that holds no example
FOLDS_SEED = 0  # of the shuffle before rows are divided into folds: the folds are the same for every run


class Batch(TypedDict):
    """Images `u8[B,28,28,1]` and labels `i32[B]`, `NO_LABEL` where there is no example."""

    image: Array
    label: Array


def spread_rows(labels: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Picks `count` of `rows` evenly: over the classes, and within each over the file.

    Systematic sampling of the rows sorted by class. It is stratified (no class is off by more than one row), and needs
    no random numbers, so it is the same for every seed and with every version of every library.

    Args:
      labels: `i32[N]`, of the whole split.
      rows: `i32[R]`, the candidates.
      count: how many to pick, at most R.

    Returns:
      `i32[count]`, ascending.
    """
    by_class = rows[np.argsort(labels[rows], kind="stable")]
    places = (np.arange(count) + 0.5) * (len(rows) / max(count, 1))
    return np.sort(by_class[places.astype(np.int64)])


def split_rows(labels: np.ndarray, num_train: int, holdout: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides the training split into the rows to train on and those held out.

    Args:
      labels: `i32[N]`, of the training split.
      num_train: use only this many rows, hold-out included; 0 means all.
      holdout: of those, keep this many for validation.

    Returns:
      `i32[R]` rows to train on and `i32[H]` held out, disjoint, ascending.
    """
    rows = np.arange(len(labels), dtype=np.int32)
    if num_train:
        rows = spread_rows(labels, rows, num_train)
    held_out = spread_rows(labels, rows, holdout)
    return np.setdiff1d(rows, held_out, assume_unique=True), held_out


def rows_of(labels: np.ndarray, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Divides the training split as a config says: into the rows to train on and those held out.

    Args:
      labels: `i32[N]`, of the training split.
      data: how many rows, and which of them are held out.

    Returns:
      `i32[R]` rows to train on and `i32[H]` held out, disjoint, ascending.

    Raises:
      ConfigError: a class has fewer rows than there are folds.
    """
    if not data.folds:
        return split_rows(labels, data.num_train, data.holdout)
    rows, _ = split_rows(labels, data.num_train, 0)
    held_out = fold_rows(labels, rows, data.folds)[data.fold]
    return np.setdiff1d(rows, held_out, assume_unique=True), held_out


def fold_rows(labels: np.ndarray, rows: np.ndarray, folds: int) -> list[np.ndarray]:
    """Divides rows at random into K parts with equal shares of each class, `i32[R] -> K times i32[R/K]`.

    Args:
      labels: `i32[N]`, of the whole split.
      rows: `i32[R]`, those to divide.
      folds: K. The first R mod K parts have one row more.

    Raises:
      ConfigError: a class has fewer rows than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    classes, counts = np.unique(labels[rows], return_counts=True)
    if counts.min() < folds:
        raise ConfigError(
            f"config.data.folds = {folds}: class {classes[counts.argmin()]} has only {counts.min()} of the {len(rows)}"
            f" rows; use at most {max(2, counts.min())} folds, or more rows (config.data.num_train)"
        )
    splitter = StratifiedKFold(folds, shuffle=True, random_state=FOLDS_SEED)
    return [rows[places] for _, places in splitter.split(rows, labels[rows])]


def epoch_order(key: Array, epoch: Array | int, rows: Array, batch_size: int) -> Array:
    """Returns the rows of every batch of an epoch: a permutation of `rows`, `i32[R] -> i32[S,B]`.

    Args:
      key: the run's root key.
      epoch: its number, from 0.
      rows: the row numbers to train on.
      batch_size: B. Places after the last row hold -1.
    """
    order = jax.random.permutation(rng.stream(key, "order", epoch), rows)
    padding = -len(rows) % batch_size
    return jnp.pad(order, (0, padding), constant_values=-1).reshape(-1, batch_size)


jit_epoch_order = jax.jit(epoch_order, static_argnames="batch_size")


def epochs_order(key: Array, first_epoch: int, num_epochs: int, rows: Array, batch_size: int) -> Array:
    """Returns the orders of some epochs that follow each other, one after the other: `i32[R] -> i32[num_epochs*S,B]`.

    Made by the program that makes one epoch's, whatever their number.
    """
    numbers = range(first_epoch, first_epoch + num_epochs)
    orders = [jit_epoch_order(key, jax.device_put(np.int32(epoch)), rows, batch_size) for epoch in numbers]
    return jnp.concatenate(orders)


def take(examples: Examples, rows: Array) -> Batch:
    """Gathers a batch on the device, `i32[B] -> u8[B,28,28,1], i32[B]`; row -1 is a place without an example."""
    image = jnp.take(examples.image, rows, axis=0, mode="clip")
    label = jnp.take(examples.label, rows, axis=0, mode="clip")
    return {"image": image, "label": jnp.where(rows < 0, NO_LABEL, label)}


def stream(
    examples: Examples,
    rows: Array,
    key: Array,
    start_step: int,
    batch_size: int,
    placement: NamedSharding | None = None,
) -> Iterator[Batch]:
    """Yields, from `start_step` on and without end, the very batches that the scan driver takes on the device.

    Args:
      examples: on the host.
      rows: `i32[R]`, the row numbers to train on.
      key: the run's root key.
      start_step: finished updates.
      batch_size: B.
      placement: of a batch; on the default device, if not given. Only this process's rows are read.
    """
    steps_per_epoch = -(-len(rows) // batch_size)
    placement = placement or sharding.split(sharding.make_mesh(1))
    own = sharding.own_rows(placement, batch_size)
    epoch, skip = divmod(start_step, steps_per_epoch)
    while True:
        index = jax.device_put(np.int32(epoch))
        for batch_rows in jax.device_get(jit_epoch_order(key, index, rows, batch_size))[skip:, own]:
            label = np.where(batch_rows < 0, NO_LABEL, examples.label[batch_rows])
            batch = {"image": examples.image[np.maximum(batch_rows, 0)], "label": label}
            # JAX copies while the step before is still running: the transfer costs no waiting.
            yield sharding.place_rows(batch, placement, batch_size)
        epoch, skip = epoch + 1, 0
