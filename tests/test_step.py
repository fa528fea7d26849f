"""The update: what it learns from, what it leaves unchanged, and that calls of any length give the same bits."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import gradient, jit_train_step, jit_train_steps, step_once
from jax import Array

from mnist_flax import rng
from mnist_flax.analysis.evaluation import make_predictor, predict_logits
from mnist_flax.config import Config, replace
from mnist_flax.data import batches
from mnist_flax.data.batches import NO_LABEL
from mnist_flax.data.splits import Examples
from mnist_flax.drivers import jit_forward, jit_init_state
from mnist_flax.errors import ConfigError
from mnist_flax.logged import METRICS, StepView
from mnist_flax.losses import LOSSES, cross_entropy
from mnist_flax.step import (
    Metrics,
    TrainState,
    eval_variables,
    init_state,
    loss_fn,
    moving_average,
    scale_pixels,
    train_step,
    train_steps,
)

KEY = rng.root_key(0)
SMALL = replace(
    Config(),
    model__widths=(4, 6),
    model__pools=(2,),
    model__dense=(8,),
    data__num_train=96,
    train__batch_size=20,
    optimizer__learning_rate=0.01,
)
# Everything random, stateful or averaged, at once.
RICH = replace(
    SMALL,
    model__batch_norm=True,
    model__dropout=0.2,
    model__conv_dropout=0.1,
    augment__shift=1,
    augment__rotate=5.0,
    optimizer__ema_decay=0.9,
    train__label_smoothing=0.1,
)


def batch_of(examples: Examples, count: int) -> Examples:
    return Examples(jnp.asarray(examples.image[:count]), jnp.asarray(examples.label[:count]))


def assert_equal(one: Any, other: Any) -> None:
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves) == len(others) > 0
    for leaf, other_leaf in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, other_leaf)


def whole_network(config: Config) -> Any:
    """The network on uncropped images."""
    module = config.model.module(config.num_classes)
    return jax.jit(lambda variables, images: module.apply(variables, scale_pixels(config.program, images)))


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 26),
        ({"kernel_sizes": (5,), "widths": (4,), "pools": (5,)}, 24),  # 24 outputs, of which pooling uses 20
        ({"strides": (2, 1)}, 25),
        ({"kernel_sizes": (4,), "strides": (2, 1), "pools": (1, 2)}, 28),  # nothing is left over
        ({"paddings": ("SAME", "VALID")}, 28),
        ({"paddings": ("VALID", "SAME")}, 28),
        ({"batch_norm": True}, 28),  # it normalises over all pixels
    ],
)
def test_only_pixels_that_no_logit_depends_on_are_cropped(fields: dict[str, Any], size: int) -> None:
    fields = {"pooling": "avg", "activation": "tanh", **fields}  # so every pixel that is used changes the logits
    config = replace(SMALL, **{f"model__{name}": value for name, value in fields.items()})
    assert config.model.seen_size(28) == size
    variables = eval_variables(jit_init_state(config.program, KEY))
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    network = whole_network(config)
    whole = network(variables, images)
    np.testing.assert_allclose(jit_forward(config.program, variables, images), whole, rtol=1e-4, atol=1e-5)
    for line in (size - 1, size):
        for index in (np.s_[:, line:], np.s_[:, :, line:]):
            other = images.copy()
            other[index] ^= 255
            changes = np.any(network(variables, other) != whole)
            assert changes == (line < size and "batch_norm" not in fields)


def test_a_predictor_refuses_scaled_and_flat_images() -> None:
    predictor = make_predictor(SMALL, eval_variables(jit_init_state(SMALL.program, KEY)))
    for images, kind in ((np.zeros((3, 28, 28, 1)), TypeError), (np.zeros((3, 28, 28), np.uint8), ValueError)):
        with pytest.raises(kind, match="pass"):
            predict_logits(predictor, images)


def test_images_that_are_scaled_already_are_refused(examples: Examples) -> None:
    batch = batch_of(examples, 20)
    scaled = Examples(batch.image / 255, batch.label)
    with pytest.raises(TypeError, match="images are of type float32; pass grey values from 0 to 255, of type uint8"):
        jax.eval_shape(functools.partial(train_step, SMALL.program), jit_init_state(SMALL.program, KEY), scaled, KEY)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_crop_changes_no_gradient(examples: Examples, batch_norm: bool) -> None:
    config = replace(SMALL, model__batch_norm=batch_norm)
    state, batch = jit_init_state(config.program, KEY), batch_of(examples, 20)
    grads, (_, _, _, statistics) = gradient(config.program, state.params, state.batch_stats, batch, KEY)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def of_whole_images(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        network = config.model.module(config.num_classes, train=True)
        images = scale_pixels(config.program, batch.image)
        logits, updates = network.apply(variables, images, mutable=["batch_stats"])
        return jnp.mean(cross_entropy(logits, batch.label)), updates.get("batch_stats", {})

    for one, other in zip(
        jax.tree.leaves((grads, statistics)), jax.tree.leaves(of_whole_images(state.params)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("fields", [{"name": "adam"}, {"name": "adamw"}, {"name": "sgd", "learning_rate": 0.1}])
def test_a_batch_is_memorised(examples: Examples, fields: dict[str, Any]) -> None:
    config = replace(SMALL, **{f"optimizer__{name}": value for name, value in fields.items()})
    state, batch = jit_init_state(config.program, KEY), batch_of(examples, 20)
    losses = []
    for _ in range(150):
        state, sums = jit_train_step(config.program, state, batch, KEY)
        losses.append(float(sums["loss"]) / 20)
    assert losses[0] > 2
    assert losses[-1] < 0.1
    assert (np.argmax(jit_forward(config.program, eval_variables(state), batch.image), -1) == batch.label).all()


@pytest.mark.parametrize("config", [SMALL, RICH])
def test_every_parameter_gets_a_gradient(config: Config, examples: Examples) -> None:
    state = jit_init_state(config.program, KEY)
    grads, _ = gradient(config.program, state.params, state.batch_stats, batch_of(examples, 60), KEY)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(grad), jax.tree_util.keystr(path)


def test_the_metrics_are_those_of_the_weights_before_the_step(examples: Examples) -> None:
    state, batch = jit_init_state(SMALL.program, KEY), batch_of(examples, 20)
    logits = jit_forward(SMALL.program, eval_variables(state), batch.image)
    _, sums = step_once(SMALL.program, state, batch, KEY)
    assert float(sums["loss"]) == pytest.approx(float(cross_entropy(logits, batch.label).sum()), rel=1e-5)
    assert int(sums["accuracy"]) == int((jnp.argmax(logits, -1) == batch.label).sum())
    assert int(sums["examples"]) == 20


@pytest.mark.parametrize("config", [SMALL, RICH])
def test_padding_changes_no_result(config: Config, examples: Examples) -> None:
    state = jit_init_state(config.program, KEY)
    alone = batch_of(examples, 12)
    padded = Examples(
        jnp.concatenate([alone.image, jnp.full((8, 28, 28, 1), 200, jnp.uint8)]),
        jnp.concatenate([alone.label, jnp.full(8, NO_LABEL)]),
    )
    new, sums = step_once(config.program, state, alone, KEY)
    new_padded, sums_padded = step_once(config.program, state, padded, KEY)
    assert int(sums_padded["examples"]) == 12
    for one, other in zip(jax.tree.leaves((new, sums)), jax.tree.leaves((new_padded, sums_padded)), strict=True):
        # Sums over other shapes round differently, and Adam's first step divides by the size of the gradient, which
        # magnifies the rounding error of a gradient near 0.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4)


def test_randomness_of_a_step_depends_only_on_seed_and_step(examples: Examples) -> None:
    state, batch = jit_init_state(RICH.program, KEY), batch_of(examples, 20)
    assert_equal(step_once(RICH.program, state, batch, KEY), step_once(RICH.program, state, batch, KEY))
    _, sums = step_once(RICH.program, state, batch, KEY)
    _, of_other_seed = step_once(RICH.program, state, batch, rng.root_key(1))
    _, of_other_step = step_once(RICH.program, state.replace(step=state.step + 1), batch, KEY)
    assert len({float(s["loss"]) for s in (sums, of_other_seed, of_other_step)}) == 3


def test_the_last_steps_train_on_the_original_images(examples: Examples) -> None:
    plain = replace(SMALL, train__augment_until=0.5)
    config = replace(plain, augment__rotate=10.0)
    state, batch = jit_init_state(config.program, KEY), batch_of(examples, 20)

    def loss(config: Config, step: int) -> float:
        _, sums = step_once(config.program, state.replace(step=jnp.int32(step)), batch, KEY)
        return float(sums["loss"])

    assert config.num_steps == 25
    for step in (0, 11, 12, 24):
        assert (loss(config, step) == pytest.approx(loss(plain, step), rel=1e-5)) == (step >= 12)


def run_epochs(config: Config, examples: Examples, cuts: list[int]) -> tuple[TrainState, list[Metrics]]:
    """Trains from each cut to the next, in calls that never cross the end of an epoch."""
    rows, on_device = jnp.arange(96), jax.device_put(examples)
    state, history = jit_init_state(config.program, KEY), []
    for start, stop in itertools.pairwise(cuts):
        order = batches.jit_epoch_order(KEY, jnp.int32(start // 5), rows, config.train.batch_size)
        state, sums = jit_train_steps(config.program, state, on_device, order, KEY, jnp.int32(stop - start))
        history.append(jax.tree.map(lambda column, n=stop - start: column[:n], sums))
    return state, history


def test_the_loop_gives_the_same_bits_however_it_is_cut(examples: Examples) -> None:
    whole, history = run_epochs(RICH, examples, [0, 5, 10])
    pieces, history_of_pieces = run_epochs(RICH, examples, [0, 1, 3, 5, 9, 10])
    assert_equal(whole, pieces)
    join = [jax.tree.map(lambda *columns: jnp.concatenate(columns), *part) for part in (history, history_of_pieces)]
    assert_equal(*join)
    assert np.asarray(join[0]["examples"]).tolist() == [20, 20, 20, 20, 16] * 2


def test_two_epochs_two_seeds_and_other_paths_share_one_trace(examples: Examples) -> None:
    config = replace(SMALL, optimizer__learning_rate=0.0123)  # a program that no other test compiles
    on_device = jax.device_put(examples)
    compiled: Any = jit_train_steps
    traces = compiled._cache_size()
    for seed in (0, 1):
        program = replace(config, seed=seed, data__raw_dir=str(seed), checkpoint__every_steps=seed).program
        key = rng.root_key(seed)
        state = jit_init_state(program, key)
        for epoch in range(2):
            order = batches.jit_epoch_order(key, jnp.int32(epoch), jnp.arange(96), program.batch_size)
            state, _ = jit_train_steps(program, state, on_device, order, key, jnp.int32(5))
    assert compiled._cache_size() == traces + 1


def test_a_loop_of_steps_traces_the_step_once(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[StepView] = []

    def traced(view: StepView) -> jax.Array:
        traces.append(view)
        return jnp.float32(0)

    monkeypatch.setitem(METRICS, "traced", traced)
    state, order = jit_init_state(SMALL.program, KEY), jnp.zeros((5, 20), jnp.int32)
    jax.eval_shape(lambda *arrays: train_steps(SMALL.program, *arrays), state, examples, order, KEY, jnp.int32(5))
    assert len(traces) == 1


def test_the_moving_average_warms_up_and_is_evaluated(examples: Examples) -> None:
    params, ema = {"w": jnp.array([1.0])}, {"w": jnp.array([0.0])}
    assert float(moving_average(0.99, ema, params, jnp.int32(0))["w"][0]) == pytest.approx(0.9)
    assert float(moving_average(0.99, ema, params, jnp.int32(10**6))["w"][0]) == pytest.approx(0.01)
    state, _ = step_once(RICH.program, jit_init_state(RICH.program, KEY), batch_of(examples, 20), KEY)
    assert_equal(eval_variables(state)["params"], state.ema)
    state, _ = step_once(SMALL.program, jit_init_state(SMALL.program, KEY), batch_of(examples, 20), KEY)
    assert_equal(eval_variables(state)["params"], state.params)


def test_the_state_is_arrays_only_and_its_memory_is_reused(examples: Examples) -> None:
    state = jit_init_state(RICH.program, KEY)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    jit_train_step(RICH.program, state, batch_of(examples, 20), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("step", lambda view: view.losses.sum(), r"METRICS\['step'\]: every log line has this entry already"),
        ("mine", lambda view: view.losses, r"METRICS\['mine'\]: has the shape \(20,\); return a scalar"),
    ],
)
def test_a_metric_that_cannot_be_logged_is_refused(
    name: str, metric: Any, message: str, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, name, metric)
    state = jit_init_state(SMALL.program, KEY)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(functools.partial(train_step, SMALL.program), state, batch_of(examples, 20), KEY)


def test_a_truth_value_is_logged_as_a_number(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "mine", lambda view: jnp.any(view.losses > 0))
    state = jit_init_state(SMALL.program, KEY)
    _, metrics = jax.eval_shape(functools.partial(train_step, SMALL.program), state, batch_of(examples, 20), KEY)
    assert metrics["mine"].dtype == jnp.int32


@pytest.mark.parametrize("shape", [(20, 1), ()])
def test_a_loss_without_one_value_for_each_example_is_refused(
    shape: tuple[int, ...], examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column would be broadcast against the labels, and its gradient would be too large."""

    def column(logits: Array, labels: Array, *, label_smoothing: float) -> Array:
        return jnp.zeros(shape) + logits.sum()

    monkeypatch.setitem(LOSSES, "column", column)
    program = replace(SMALL, train__loss="column").program
    with pytest.raises(ConfigError, match=r"config.train.loss = 'column': returns .* of shape \(20,\)"):
        jax.eval_shape(lambda: train_step(program, init_state(program, KEY), batch_of(examples, 20), KEY))


def test_a_loss_that_is_undefined_for_padding_has_a_gradient(
    examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def likelihood(logits: Array, labels: Array, *, label_smoothing: float) -> Array:
        right = jnp.sum(jax.nn.softmax(logits) * jax.nn.one_hot(labels, 10), axis=-1)
        return -jnp.log(right)  # infinite for a label that is not a class

    monkeypatch.setitem(LOSSES, "likelihood", likelihood)
    batch = batch_of(examples, 20)
    padded = Examples(batch.image, batch.label.at[-1].set(NO_LABEL))
    grads = []
    for loss in ("likelihood", "cross_entropy"):
        program = replace(SMALL, train__loss=loss).program
        state = init_state(program, KEY)
        # Not compiled, because XLA may drop a product with 0, and with it the NaN.
        grad = jax.grad(loss_fn, argnums=1, has_aux=True)
        grads.append(grad(program, state.params, state.batch_stats, padded, KEY)[0])
    for mine, ours in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(mine, ours, atol=1e-5)  # the same loss, but rounded differently
