"""The drivers agree: the choice changes the speed, and the result only by rounding."""

import itertools
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from small_run import SMALL, lines

from mnist_flax import rng
from mnist_flax.analysis.evaluation import evaluate, make_predictor
from mnist_flax.config import Config, Program, replace
from mnist_flax.data import batches
from mnist_flax.data.load import load_splits
from mnist_flax.data.splits import Examples
from mnist_flax.drivers import Job, compile_driver, jit_init_state, stack
from mnist_flax.logged import METRICS
from mnist_flax.run import checkpoint
from mnist_flax.run.log import RunLog
from mnist_flax.step import eval_variables
from mnist_flax.train import fit

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


def train_with(name: str, program: Program, examples: Examples, cuts: list[int]) -> tuple[Any, dict[str, np.ndarray]]:
    """Trains one run with a driver; each call goes from one cut to the next."""
    job = Job(program, [0], [np.arange(96, dtype=np.int32)], examples)
    state = jit_init_state(program, KEY)
    states = stack([state.replace(step=state.step + cuts[0])], job)
    advance, history = compile_driver(name, job, states), []
    for start, stop in itertools.pairwise(cuts):
        states, metrics = advance(states, stop - start)
        history.append(metrics)
    return jax.device_get(states), jax.tree.map(lambda *columns: np.concatenate(columns, 1), *history)


@pytest.mark.parametrize("cuts", [[0, 2, 5, 6, 10], [7, 10, 12]])
def test_scan_and_stream_agree(examples: Examples, cuts: list[int]) -> None:
    state, sums = train_with("scan", CONFIG.program, examples, cuts)
    other_state, other_sums = train_with("stream", CONFIG.program, examples, cuts)
    np.testing.assert_array_equal(sums["examples"], other_sums["examples"])
    assert sums["loss"].shape == (1, cuts[-1] - cuts[0])
    # XLA fuses the body of a loop and a single step differently, so the last bits of f32 differ. Adam's first steps
    # divide by the size of the gradient, which carries the difference into the weights.
    np.testing.assert_allclose(sums["loss"], other_sums["loss"], rtol=1e-4)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "counts"), [("scan", (0, 1, 2)), pytest.param("stream", (0, 2), marks=pytest.mark.slow)]
)
def test_several_epochs_in_a_call_give_the_same_bits_and_training_curve(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str, counts: tuple[int, ...]
) -> None:
    calls, take_in = list[int](), RunLog.add_steps
    curves: dict[int, list[dict[str, Any]]] = {}

    def count_and_take_in(log: RunLog, metrics: dict[str, np.ndarray], seconds: float) -> None:
        calls.append(len(metrics["loss"]))
        take_in(log, metrics, seconds)

    monkeypatch.setattr(RunLog, "add_steps", count_and_take_in)
    for count in counts:
        config = replace(SMALL, train__driver=name, train__epochs=5, train__epochs_per_dispatch=count)
        calls.clear()
        fit(config, tmp_path / str(count))
        if count:
            assert calls == [count * 7] * (5 // count) + [5 % count * 7] * (5 % count > 0)
        curves[count] = [line for line in lines(tmp_path / str(count)) if line["split"] != "holdout"]
    assert len(curves[0]) == 5 * 3 + 1  # per epoch, lines of 3, 3 and 1 steps; and one line for the test set
    state = checkpoint.load_run(tmp_path / "0").state
    for count in counts[1:]:
        assert curves[count] == curves[0]
        other = checkpoint.load_run(tmp_path / str(count)).state
        for one, another in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("name", ["scan", "stream"])
def test_a_metric_is_logged_even_if_the_same_program_ran_without_it(
    name: str, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_with(name, CONFIG.program, examples, [0, 3])
    monkeypatch.setitem(METRICS, "largest_loss", lambda view: view.losses.max())
    _, metrics = train_with(name, CONFIG.program, examples, [0, 3])
    assert metrics["largest_loss"].all()


def test_an_order_is_no_longer_than_the_run(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawn(Exception):
        """Raised with the number of epochs in an order."""

    def draw(key: jax.Array, first: int, num_epochs: int, *_: Any) -> None:
        raise Drawn(num_epochs)

    monkeypatch.setattr(batches, "consecutive_orders", draw)
    rows = np.arange(96, dtype=np.int32)
    for asked, epochs in ((0, 1), (2, 2), (10**6, 3)):
        job = Job(CONFIG.program, [0], [rows], examples, epochs_per_dispatch=asked)
        with pytest.raises(Drawn, match=str(epochs)):
            compile_driver("scan", job, stack([jit_init_state(CONFIG.program, KEY)], job))


def test_call_of_several_epochs_saves_if_a_checkpoint_was_due_within_it(tmp_path: pathlib.Path) -> None:
    config = replace(SMALL, train__epochs=7, train__epochs_per_dispatch=2, checkpoint__every_epochs=3)
    fit(replace(config, checkpoint__keep_latest=9), tmp_path)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [4 * 7, 6 * 7, 7 * 7]


def test_a_run_resumes_in_the_middle_of_a_call_of_several_epochs(tmp_path: pathlib.Path) -> None:
    config = replace(SMALL, train__epochs=4, optimizer__schedule="constant")
    fit(replace(config, train__epochs=3), tmp_path / "in two")
    fit(replace(config, train__epochs_per_dispatch=2), tmp_path / "in two")
    fit(config, tmp_path / "at once")
    one, other = (checkpoint.load_run(tmp_path / name).state for name in ("in two", "at once"))
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), one, other))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MNIST_FLAX_RAW_DIR"), reason="needs the files of MNIST")
def test_bfloat16_trains_to_within_a_tenth_of_a_point() -> None:
    # The mean over three seeds on 40,000 hold-out rows, with the same initial weights and order in both types: chance
    # changes the difference by about 0.03 points.
    base = replace(
        Config(),
        data__holdout=40_000,
        model__widths=(8, 16),
        model__pools=(2,),
        model__dense=(32,),
        optimizer__learning_rate=4e-3,
        optimizer__schedule="one_cycle",
        train__epochs=2,
    )
    splits = load_splits(base.data)
    rows, held_out = batches.rows_of(splits.train.label, base.data)
    judged = Examples(splits.train.image[held_out], splits.train.label[held_out])
    accuracy = {}
    for dtype in ("float32", "bfloat16"):
        config = replace(base, model__dtype=dtype)
        found = []
        for seed in range(3):
            job = Job(config.program, [seed], [rows], splits.train)
            states = stack([jit_init_state(config.program, rng.root_key(seed))], job)
            advance = compile_driver("scan", job, states)
            for _ in range(config.train.epochs):
                states, _ = advance(states, config.steps_per_epoch)
            state = jax.tree.map(lambda leaf: leaf[0], states)
            found.append(evaluate(make_predictor(config, eval_variables(state)), judged).accuracy)
        accuracy[dtype] = np.mean(found)
    assert accuracy["float32"] > 0.97
    assert accuracy["bfloat16"] == pytest.approx(accuracy["float32"], abs=0.001)
