"""The drivers agree: which one runs is a choice of speed, never of result."""

import itertools

import jax
import numpy as np
import pytest

from mnist_flax import rng
from mnist_flax.config import Config, replace
from mnist_flax.datasets import Examples
from mnist_flax.step import jit_init_state
from mnist_flax.train import DRIVERS

CONFIG = replace(
    Config(),
    model__widths=(4, 6),
    model__pools=(2,),
    model__dense=(8,),
    model__dropout=0.2,
    augment__shift=1,
    data__num_train=96,
    train__batch_size=20,
    train__epochs=3,
    optimizer__ema_decay=0.9,
)
KEY = rng.root_key(0)


@pytest.mark.parametrize("cuts", [[0, 5, 10], [0, 2, 5, 6, 10], [7, 10, 12]])
def test_scan_and_stream_agree(examples: Examples, cuts: list[int]) -> None:
    rows = np.arange(96, dtype=np.int32)
    results = {}
    for name, driver in DRIVERS.items():
        state = jit_init_state(CONFIG, KEY)
        state = state.replace(step=state.step + cuts[0])
        advance = driver(CONFIG, state, examples, rows, KEY)
        history = []
        for start, stop in itertools.pairwise(cuts):
            state, fetch = advance(state, start, stop - start)
            history.append(fetch())
        results[name] = jax.device_get(state), jax.tree.map(lambda *columns: np.concatenate(columns), *history)
    (state, sums), (other_state, other_sums) = results["scan"], results["stream"]
    np.testing.assert_array_equal(sums.examples, other_sums.examples)
    assert len(sums.loss) == cuts[-1] - cuts[0]
    # Two programs: XLA fuses a loop's body and a lone step differently, so the last bits of f32 differ, and Adam's
    # first steps, which divide by the gradient's own size, carry that into the weights.
    np.testing.assert_allclose(sums.loss, other_sums.loss, rtol=1e-4)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4)
