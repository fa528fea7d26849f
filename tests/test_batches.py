"""Selecting rows, the order of an epoch, and the batches made from them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax import rng, sharding
from mnist_flax.data import batches
from mnist_flax.data.batches import NO_LABEL
from mnist_flax.data.splits import Examples
from mnist_flax.sections import DataConfig

KEY = rng.root_key(0)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (12, 4), (1, 1), (5, 5), (7, 64)])
def test_order_is_a_permutation_of_the_rows(num_rows: int, batch_size: int) -> None:
    rows = np.arange(100, 100 + 2 * num_rows, 2)
    order = np.asarray(batches.epoch_order(KEY, 0, jnp.asarray(rows), batch_size))
    assert order.shape == (-(-num_rows // batch_size), batch_size)
    assert sorted(order.ravel()[:num_rows]) == rows.tolist()
    assert (order.ravel()[num_rows:] == -1).all()


def test_order_differs_by_epoch_and_by_seed() -> None:
    rows = jnp.arange(64)
    orders = [batches.epoch_order(key, epoch, rows, 8) for key in (KEY, rng.root_key(1)) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert (one != other).any()


def test_order_is_the_same_inside_and_outside_jit() -> None:
    rows = jnp.arange(50)
    np.testing.assert_array_equal(
        batches.epoch_order(KEY, 2, rows, 8), batches.jit_epoch_order(KEY, jnp.int32(2), rows, 8)
    )


def test_take_gives_padding_no_label(examples: Examples) -> None:
    batch = batches.take(jax.device_put(examples), jnp.array([5, 2, -1]))
    assert batch.label.tolist() == [5, 2, NO_LABEL]
    np.testing.assert_array_equal(batch.image[:2], examples.image[[5, 2]])
    assert batch.image.dtype == jnp.uint8


@pytest.mark.parametrize("start_step", [0, 3, 7, 8, 20])
def test_stream_yields_the_same_batches_as_take(examples: Examples, start_step: int) -> None:
    rows = np.arange(3, 90, dtype=np.int32)  # 87 rows: 7 batches of 12 and one of 3
    placement = sharding.split(sharding.make_mesh(1))
    stream = batches.stream_batches(examples, jnp.asarray(rows), KEY, start_step, 12, placement)
    on_device = jax.device_put(examples)
    for step, batch in zip(range(start_step, start_step + 10), stream, strict=False):
        order = batches.epoch_order(KEY, step // 8, jnp.asarray(rows), 12)
        expected = batches.take(on_device, order[step % 8])
        np.testing.assert_array_equal(batch.label, expected.label)
        is_example = np.asarray(batch.label) != NO_LABEL
        np.testing.assert_array_equal(np.asarray(batch.image)[is_example], np.asarray(expected.image)[is_example])


def test_spread_rows_is_stratified_and_deterministic() -> None:
    labels = np.repeat(np.arange(10, dtype=np.int32), np.arange(50, 150, 10))
    labels = np.random.default_rng(0).permutation(labels)
    rows = np.arange(len(labels), dtype=np.int32)
    picked = batches.spread_rows(labels, rows, 95)
    assert len(set(picked.tolist())) == 95
    assert (np.diff(picked) > 0).all()
    expected = np.bincount(labels) * 95 / len(labels)
    assert (abs(np.bincount(labels[picked], minlength=10) - expected) <= 1).all()


def test_spread_rows_can_pick_none_or_all() -> None:
    labels = np.array([1, 0, 1, 2], np.int32)
    rows = np.arange(4, dtype=np.int32)
    assert batches.spread_rows(labels, rows, 0).tolist() == []
    assert batches.spread_rows(labels, rows, 4).tolist() == [0, 1, 2, 3]


def test_the_holdout_is_taken_out_of_num_train() -> None:
    labels = np.tile(np.arange(10, dtype=np.int32), 100)
    train, held_out = batches.rows_of(labels, DataConfig(num_train=500, holdout=100))
    assert (len(train), len(held_out)) == (400, 100)
    assert not set(train.tolist()) & set(held_out.tolist())
    assert np.bincount(labels[held_out]).tolist() == [10] * 10
    everything, nothing = batches.rows_of(labels, DataConfig())
    assert (everything.tolist(), nothing.tolist()) == (list(range(1000)), [])
    assert everything.dtype == train.dtype == held_out.dtype == np.int32


def test_the_last_rows_can_be_held_out() -> None:
    labels = np.tile(np.arange(10, dtype=np.int32), 100)
    train, held_out = batches.rows_of(labels, DataConfig(holdout=30, holdout_rows="last"))
    assert (train.tolist(), held_out.tolist()) == (list(range(970)), list(range(970, 1000)))
    train, held_out = batches.rows_of(labels, DataConfig(num_train=500, holdout=30, holdout_rows="last"))
    assert (len(train), len(held_out)) == (470, 30)
    assert train.max() < held_out.min()
    train, held_out = batches.rows_of(labels, DataConfig(holdout_rows="last"))
    assert (len(train), len(held_out)) == (1000, 0)
