"""Learning rates and updates, compared with values computed by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_flax.config import Config, replace
from mnist_flax.errors import ConfigError
from mnist_flax.optimizer import OPTIMIZERS, Optimizer, optimizer, schedule

pytestmark = pytest.mark.smoke

# 100 steps an epoch, 4 epochs.
BASE = replace(Config(), data__num_train=1000, train__batch_size=10, train__epochs=4, optimizer__learning_rate=0.1)


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"schedule": "constant"}, {0: 0.1, 399: 0.1}),
        ({"schedule": "constant", "warmup_epochs": 0.5}, {0: 0.0, 25: 0.05, 50: 0.1, 399: 0.1}),
        ({"schedule": "cosine"}, {0: 0.1, 200: 0.05, 400: 0.0}),
        ({"schedule": "cosine", "end_fraction": 0.2, "warmup_epochs": 1.0}, {50: 0.05, 100: 0.1, 250: 0.06, 400: 0.02}),
        ({"schedule": "one_cycle"}, {0: 0.004, 50: 0.052, 100: 0.1, 250: 0.05, 400: 0.0}),
        ({"schedule": "one_cycle", "peak_at": 0.5, "start_fraction": 0.1}, {0: 0.01, 200: 0.1, 300: 0.05}),
        ({"schedule": "one_cycle", "end_fraction": 0.1}, {400: 0.01}),
        ({"schedule": "linear", "end_fraction": 0.5}, {0: 0.1, 200: 0.075, 400: 0.05}),
        ({"schedule": "exponential", "decay_rate": 0.5}, {0: 0.1, 50: 0.1 * 0.5**0.5, 100: 0.05, 200: 0.025}),
        ({"schedule": "step", "decay_rate": 0.5, "decay_epochs": 2.0}, {0: 0.1, 199: 0.1, 200: 0.05, 399: 0.05}),
    ],
)
def test_learning_rates_equal_values_by_hand(fields: dict[str, Any], values: dict[int, float]) -> None:
    config = replace(BASE, **{f"optimizer__{name}": value for name, value in fields.items()})
    rate = schedule(config.optimizer, config.num_steps, config.steps_per_epoch)
    for step, expected in values.items():
        assert float(rate(step)) == pytest.approx(expected, abs=1e-7), step


def test_step_schedule_decays_at_the_start_of_an_epoch_in_compiled_code() -> None:
    # In float32, 235 * (1 / 235) is below 1: a compiled division may round 235 / 235 down to 0.
    o = replace(BASE, optimizer__schedule="step", optimizer__decay_rate=0.5, optimizer__learning_rate=1.0).optimizer
    rate = schedule(o, 1000, 235)
    assert jax.jit(jax.vmap(rate))(jnp.array([0, 234, 235, 236, 470])).tolist() == [1, 1, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("name", ["step", "exponential"])
def test_the_slowest_decay_can_be_compiled(name: str) -> None:
    config = replace(BASE, optimizer__schedule=name, optimizer__decay_epochs=(2**31 - 1) // BASE.steps_per_epoch)
    rate = schedule(config.optimizer, config.num_steps, config.steps_per_epoch)
    assert float(jax.jit(rate)(jnp.int32(399))) == pytest.approx(0.1)


@pytest.mark.parametrize("fields", ["momentum", ("momentun",)])
def test_an_entry_that_names_no_config_fields_is_refused(fields: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "own", Optimizer(lambda config, rate: optax.sgd(rate), fields))
    with pytest.raises(ConfigError, match=r"OPTIMIZERS\['own'\]: fields = .*: must name config fields, such as"):
        replace(BASE, seed=1)


PARAMS = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}
GRADS = {"kernel": jnp.array([[0.3, 0.4]]), "bias": jnp.array([0.0])}


def update(count: int = 1, **fields: Any) -> dict[str, np.ndarray]:
    """The change of the weights after `count` updates with the same gradient."""
    config = replace(BASE, **{f"optimizer__{name}": value for name, value in fields.items()})
    chain = optimizer(config.optimizer, config.num_steps, config.steps_per_epoch)
    state, params = chain.init(PARAMS), PARAMS
    for _ in range(count):
        updates, state = chain.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(params[name] - PARAMS[name]) for name in PARAMS}


def test_sgd_with_momentum_equals_values_by_hand() -> None:
    g = np.array([[0.3, 0.4]])
    np.testing.assert_allclose(update(name="sgd", momentum=0.0)["kernel"], -0.1 * g, rtol=1e-5)
    np.testing.assert_allclose(update(2, name="sgd", momentum=0.9)["kernel"], -0.1 * g * (1 + 1.9), rtol=1e-5)
    nesterov = update(2, name="sgd", momentum=0.9, nesterov=True)
    np.testing.assert_allclose(nesterov["kernel"], -0.1 * g * (1.9 + 1 + 0.9 * 1.9), rtol=1e-5)


def test_adam_starts_with_steps_of_the_learning_rate() -> None:
    np.testing.assert_allclose(update(name="adam")["kernel"], [[-0.1, -0.1]], rtol=1e-5)


def test_weight_decay_spares_biases() -> None:
    decoupled = update(name="adamw", weight_decay=0.5)
    np.testing.assert_allclose(decoupled["kernel"], [[-0.1 - 0.05, -0.1 + 0.1]], rtol=1e-4, atol=1e-6)
    l2 = update(name="sgd", momentum=0.0, weight_decay=0.5)
    np.testing.assert_allclose(l2["kernel"], [[-0.1 * (0.3 + 0.5), -0.1 * (0.4 - 1.0)]], rtol=1e-5)
    assert decoupled["bias"] == l2["bias"] == 0


def test_clipping_shortens_only_gradients_above_the_limit() -> None:
    np.testing.assert_allclose(update(name="sgd", momentum=0.0, clip_norm=0.25)["kernel"], [[-0.015, -0.02]], rtol=1e-5)
    np.testing.assert_allclose(update(name="sgd", momentum=0.0, clip_norm=1.0)["kernel"], [[-0.03, -0.04]], rtol=1e-5)


def test_muon_orthogonalises_kernels_and_leaves_biases_to_adam() -> None:
    params = {
        "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 8)), jnp.float32),
        "bias": jnp.ones(8),
    }
    grads = jax.tree.map(lambda leaf: leaf**2 + 0.1, params)
    config = replace(BASE, optimizer__name="muon")
    chain = optimizer(config.optimizer, config.num_steps, config.steps_per_epoch)
    updates, _ = chain.update(grads, chain.init(params), params)
    singular = np.linalg.svd(np.asarray(updates["kernel"]).reshape(36, 8), compute_uv=False)
    assert singular.max() / singular.min() < 2.5  # five Newton-Schulz iterations bring them near to each other
    raw = np.linalg.svd(np.asarray(grads["kernel"]).reshape(36, 8), compute_uv=False)
    assert raw.max() / raw.min() > 3
    np.testing.assert_allclose(updates["bias"], -0.025 * (1 + 0.9 / 1.9), rtol=1e-4)  # Adam with Nesterov momentum
