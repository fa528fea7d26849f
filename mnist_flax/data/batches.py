"""Chooses the training rows and their order, and forms batches.

A set of rows (training, hold-out, fold) is an array of row numbers. The order of an epoch is a permutation of it,
computed from the key and the epoch whenever it is needed. All batches have the same shape: the last one is padded with
label -1, which the loss and the metrics ignore.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from mnist_flax import rng, sharding
from mnist_flax.data.splits import Examples
from mnist_flax.errors import ConfigError
from mnist_flax.sections import DataConfig

NO_LABEL = -1  # the label of padding in a batch
FOLDS_SEED = 0  # seeds the shuffle before rows are split into folds, so that all runs have the same folds


def spread_rows(labels: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Picks a stratified sample of `count` rows, evenly spread over the file in each class: `i32[R] -> i32[count]`.

    This is systematic sampling of the rows sorted by class: no class is off by more than one row. It uses no random
    numbers, so the sample is the same for every seed and library version. `labels` are those of the whole split.
    """
    by_class = rows[np.argsort(labels[rows], kind="stable")]
    places = (np.arange(count) + 0.5) * (len(rows) / max(count, 1))
    return np.sort(by_class[places.astype(np.int64)])


def rows_of(labels: np.ndarray, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the training rows and the hold-out rows of a config, both ascending: `i32[N] -> i32[R], i32[H]`.

    Raises:
      ConfigError: a class has fewer rows than there are folds.
    """
    rows = np.arange(len(labels), dtype=np.int32)
    if data.num_train:
        rows = spread_rows(labels, rows, data.num_train)
    if data.folds:
        held_out = fold_rows(labels, rows, data.folds)[data.fold]
    elif data.holdout_rows == "spread":
        held_out = spread_rows(labels, rows, data.holdout)
    else:
        held_out = rows[len(rows) - data.holdout :]
    return np.setdiff1d(rows, held_out, assume_unique=True), held_out


def fold_rows(labels: np.ndarray, rows: np.ndarray, folds: int) -> list[np.ndarray]:
    """Splits rows at random into K stratified folds: `i32[R] -> K times i32[R/K]`.

    If R is not divisible by K, the first folds have one more row.

    Raises:
      ConfigError: a class has fewer rows than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    classes, counts = np.unique(labels[rows], return_counts=True)
    if counts.min() < folds:
        fewer = f"at most {counts.min()} folds, or " if counts.min() > 1 else ""
        raise ConfigError(
            f"config.data.folds = {folds}: class {classes[counts.argmin()]} has only {counts.min()} of the {len(rows)}"
            f" rows; use {fewer}more rows (config.data.num_train)"
        )
    splitter = StratifiedKFold(folds, shuffle=True, random_state=FOLDS_SEED)
    return [rows[places] for _, places in splitter.split(rows, labels[rows])]


def epoch_order(key: Array, epoch: Array | int, rows: Array, batch_size: int) -> Array:
    """Returns the rows of each batch of an epoch: a permutation, padded with -1 at the end, `i32[R] -> i32[S,B]`.

    `key` is the run's root key, and epochs are counted from 0.
    """
    order = jax.random.permutation(rng.stream(key, "order", epoch), rows)
    padding = -len(rows) % batch_size
    return jnp.pad(order, (0, padding), constant_values=-1).reshape(-1, batch_size)


jit_epoch_order = jax.jit(epoch_order, static_argnames="batch_size")


def consecutive_orders(key: Array, first_epoch: int, num_epochs: int, rows: Array, batch_size: int) -> Array:
    """Returns the orders of consecutive epochs, one after the other: `i32[R] -> i32[num_epochs*S,B]`.

    They are computed one epoch at a time, so one compiled program serves any number of epochs.
    """
    numbers = range(first_epoch, first_epoch + num_epochs)
    orders = [jit_epoch_order(key, jax.device_put(np.int32(epoch)), rows, batch_size) for epoch in numbers]
    return jnp.concatenate(orders)


def take(examples: Examples, rows: Array) -> Examples:
    """Gathers a batch on the device: `i32[B] -> u8[B,28,28,1], i32[B]`; row -1 is padding."""
    image = jnp.take(examples.image, rows, axis=0, mode="clip")
    label = jnp.take(examples.label, rows, axis=0, mode="clip")
    return Examples(image, jnp.where(rows < 0, NO_LABEL, label))


def stream_batches(
    examples: Examples, rows: Array, key: Array, start_step: int, batch_size: int, placement: NamedSharding
) -> Iterator[Examples]:
    """Yields the same batches as `epoch_order` and `take`, without end, starting after `start_step` updates.

    The examples are on the host. Only the rows that `placement` assigns to this process are read.
    """
    own = sharding.own_rows(placement, batch_size)
    epoch, skip = divmod(start_step, -(-len(rows) // batch_size))
    while True:
        index = jax.device_put(np.int32(epoch))
        for batch_rows in jax.device_get(jit_epoch_order(key, index, rows, batch_size))[skip:, own]:
            label = np.where(batch_rows < 0, NO_LABEL, examples.label[batch_rows])
            batch = Examples(examples.image[np.maximum(batch_rows, 0)], label)
            # JAX copies the batch while the previous step is still running, so the step does not wait for the transfer.
            yield sharding.place_rows(batch, placement)
        epoch, skip = epoch + 1, 0
