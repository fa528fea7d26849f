"""The network: it equals a plain version, uses the right types, and keeps examples independent."""

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit_train_step
from jax import Array

from mnist_flax import rng
from mnist_flax.config import Config, replace
from mnist_flax.data.splits import Examples
from mnist_flax.drivers import jit_forward, jit_init_state
from mnist_flax.errors import ConfigError
from mnist_flax.models.cnn import CNN
from mnist_flax.models.layers import INITIALIZERS, Dropout, cosine_patterns
from mnist_flax.step import eval_variables, forward, init_state, scale_pixels, train_step
from mnist_flax.train import fit

SMALL = replace(Config(), model__widths=(4, 6), model__pools=(2, 1), model__dense=(8,))


def variables_of(config: Config) -> dict[str, Any]:
    state = jit_init_state(config.program, rng.root_key(0))
    # Biases start at 0; adding to all weights shows a misplaced bias.
    params = jax.tree.map(
        lambda leaf: leaf + np.float32(0.1) * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape),
        jax.device_get(state.params),
    )
    return {"params": params, "batch_stats": state.batch_stats}


def by_the_book(config: Config, variables: dict[str, Any], images: Array) -> Array:
    """The same network in plain lax and in textbook order: convolution, bias, activation, pooling."""
    params = variables["params"]
    model: Any = config.model
    x = images.astype(jnp.float32) / 255
    for i, block in enumerate(model.blocks()):
        kernel = params[f"Conv_{i}"]["kernel"]
        x = jax.lax.conv_general_dilated(
            x, kernel, (block.stride,) * 2, block.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = getattr(nn, model.activation)(x + params[f"Conv_{i}"]["bias"].reshape(1, 1, 1, -1))
        pool = nn.max_pool if model.pooling == "max" else nn.avg_pool
        x = pool(x, (block.pool,) * 2, (block.pool,) * 2)
    x = x.reshape(len(x), -1)
    for i in range(len(model.dense) + 1):
        layer = params[f"Dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"].reshape(1, -1)
        x = getattr(nn, model.activation)(x) if i < len(model.dense) else x
    return x


jit_by_the_book = jax.jit(by_the_book, static_argnums=0)


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_network_equals_a_plain_textbook_version(examples: Examples, pooling: str, activation: str) -> None:
    config = replace(SMALL, model__pooling=pooling, model__activation=activation, model__dense=(8, 7))
    variables = variables_of(config)
    images = jnp.asarray(examples.image[:5])
    # The sums run in another order: f32 rounding of numbers around 1.
    np.testing.assert_allclose(
        jit_forward(config.program, variables, images), jit_by_the_book(config, variables, images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "fields", [{"kernel_sizes": (5, 2), "strides": (2, 1), "paddings": ("SAME", "VALID")}, {"kernel_sizes": (1,)}]
)
def test_sizes_strides_and_paddings_equal_a_plain_textbook_version(examples: Examples, fields: dict[str, Any]) -> None:
    config = replace(SMALL, **{f"model__{name}": value for name, value in fields.items()})
    variables = variables_of(config)
    images = jnp.asarray(examples.image[:3])
    np.testing.assert_allclose(
        jit_forward(config.program, variables, images), jit_by_the_book(config, variables, images), rtol=1e-4, atol=1e-5
    )


def test_the_default_network_has_the_published_number_of_parameters() -> None:
    params = jit_init_state(Config().program, rng.root_key(0)).params
    # 3*3*1*32+32, 3*3*32*64+64, 3*3*64*64+64, 576*64+64, 64*10+10
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 320 + 18_496 + 36_928 + 36_928 + 650


def test_logits_follow_the_number_of_classes() -> None:
    config = replace(SMALL, data__name="emnist/byclass")
    assert jit_forward(config.program, variables_of(config), jnp.zeros((2, 28, 28, 1), jnp.uint8)).shape == (2, 62)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda logits: logits[:, :5], r"returns an array of shape \(1, 5\) for one image; .* each of the 10 classes"),
        (lambda logits: logits.mean(1), r"returns an array of shape \(1,\) for one image; .* each of the 10 classes"),
        (lambda logits: {"logits": logits}, r"returns a dict for one image; .* each of the 10 classes"),
        (lambda logits: (logits, logits), r"returns a tuple for one image; .* each of the 10 classes"),
    ],
)
def test_a_network_with_other_outputs_than_the_classes_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, wrong: Callable[[Any], Any], message: str
) -> None:
    call = CNN.__call__
    monkeypatch.setattr(CNN, "__call__", lambda self, x, mask=None: wrong(call(self, x, mask)))
    config = replace(Config(), data__name="digits", model__widths=(3,), model__pools=(4,), train__batch_size=99)
    with pytest.raises(ConfigError, match="the network of CNNConfig " + message):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_without_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CNN, "__call__", lambda self, x, mask=None: jnp.zeros((len(x), self.num_classes)))
    with pytest.raises(ConfigError, match="the network of CNNConfig has no weights to train"):
        init_state(SMALL.program, rng.root_key(0))


def test_a_network_without_convolutions_is_a_perceptron() -> None:
    config = replace(SMALL, model__widths=(), model__pools=(1,))
    variables = variables_of(config)
    assert variables["params"]["Dense_0"]["kernel"].shape == (784, 8)
    assert jit_forward(config.program, variables, jnp.zeros((2, 28, 28, 1), jnp.uint8)).shape == (2, 10)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_examples_logits_do_not_depend_on_its_batch_mates(examples: Examples, batch_norm: bool) -> None:
    config = replace(SMALL, model__batch_norm=batch_norm)
    variables = variables_of(config)
    batch = jnp.asarray(examples.image[:8])
    np.testing.assert_array_equal(
        jit_forward(config.program, variables, batch)[3],
        jit_forward(config.program, variables, batch.at[4:].set(255))[3],
    )
    # The gradient of one example's logits with respect to another's pixels is exactly zero.
    floats = batch.astype(jnp.float32)
    gradient = jax.jit(jax.grad(lambda images: forward(config.program, variables, images)[3].sum()))(floats)
    assert not np.asarray(gradient)[np.arange(8) != 3].any()
    assert np.asarray(gradient)[3].any()


def test_pixels_are_scaled_in_one_place() -> None:
    images = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 3, 1)
    np.testing.assert_allclose(scale_pixels(Config().program, images).ravel(), [0, 0.2, 1], rtol=1e-6)
    standard = replace(Config(), model__pixel_mean=0.2, model__pixel_std=0.5).program
    np.testing.assert_allclose(scale_pixels(standard, images).ravel(), [-0.4, 0, 1.6], rtol=1e-6, atol=1e-7)


def test_batch_norm_in_training_sees_examples_only() -> None:
    config = replace(SMALL, model__batch_norm=True)
    variables = variables_of(config)
    images = jax.random.randint(rng.root_key(1), (6, 28, 28, 1), 0, 256).astype(jnp.uint8)
    apply = jax.jit(partial(config.model.module(10, train=True).apply, mutable=["batch_stats"]))
    alone, alone_stats = apply(variables, images[:4] / 255.0)
    padded, padded_stats = apply(variables, images / 255.0, jnp.arange(6) < 4)
    np.testing.assert_allclose(padded[:4], alone, rtol=1e-4, atol=1e-5)  # sums over 6 rows round differently
    for one, other in zip(jax.tree.leaves(alone_stats), jax.tree.leaves(padded_stats), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_dropout_zeroes_its_share_and_rescales_the_rest() -> None:
    x = jnp.ones((64, 999))  # odd: a random word serves two features
    y = np.asarray(Dropout(0.3, train=True).apply({}, x, rngs={"dropout": rng.root_key(0)}))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs((y == 0).mean() - 0.3) < 0.01  # five standard deviations
    assert len({row.tobytes() for row in y}) == 64


def test_dropout_near_1_drops_nearly_everything() -> None:
    y = np.asarray(Dropout(1 - 1e-6, train=True).apply({}, jnp.ones((8, 1000)), rngs={"dropout": rng.root_key(0)}))
    assert np.count_nonzero(y) < 10


def test_dropout_of_a_place_does_not_depend_on_the_batch_size() -> None:
    drop = Dropout(0.5, train=True)
    key = {"dropout": rng.root_key(0)}
    np.testing.assert_array_equal(
        drop.apply({}, jnp.ones((8, 20)), rngs=key)[:4], drop.apply({}, jnp.ones((4, 20)), rngs=key)
    )


def test_dropout_is_off_at_test_time(examples: Examples) -> None:
    config = replace(SMALL, model__dropout=0.5, model__conv_dropout=0.5)
    variables = variables_of(config)
    images = jnp.asarray(examples.image[:3])
    np.testing.assert_array_equal(
        jit_forward(config.program, variables, images), jit_forward(SMALL.program, variables, images)
    )


@pytest.mark.parametrize(
    ("name", "variance"),
    [("glorot", 2 / (9 * 16 + 9 * 48)), ("he", 2 / (9 * 16)), ("lecun", 1 / (9 * 16))],
)
@pytest.mark.parametrize("shape", ["uniform", "normal"])
def test_kernels_start_with_the_published_variance(name: str, shape: str, variance: float) -> None:
    kernel = INITIALIZERS[f"{name}_{shape}"](rng.root_key(0), (3, 3, 16, 48), jnp.float32)
    assert float(kernel.var()) == pytest.approx(variance, rel=0.1)  # 6,912 draws: about five standard deviations


def test_cosine_patterns_are_an_orthonormal_basis_in_both_signs() -> None:
    kernel = np.asarray(cosine_patterns(4, 32))
    assert kernel.shape == (4, 4, 1, 32)
    positive, negative = kernel.reshape(16, 16, 2).transpose(2, 1, 0)
    np.testing.assert_allclose(positive @ positive.T, np.eye(16), atol=1e-6)
    assert np.array_equal(positive, -negative)
    assert np.ptp(kernel[..., 0]) < 1e-7  # the first pattern is constant: a mean
    assert np.array_equal(kernel[..., :5], cosine_patterns(4, 5))
    assert cosine_patterns(300, 2).shape == (300, 300, 1, 2)  # all of its patterns would need 130 GB


def test_a_cosine_stem_has_no_weights_and_is_not_trained(examples: Examples) -> None:
    program = replace(SMALL, model__stem="cosine").program
    state = jit_init_state(program, rng.root_key(0))
    assert "Conv_0" not in state.params
    _, captured = jax.jit(partial(program.model.module(10).apply, mutable=["intermediates"]))(
        eval_variables(state), examples.image[:2] / np.float32(255)
    )
    (kernel,) = captured["intermediates"]["Conv_0"]["kernel"]
    np.testing.assert_array_equal(kernel, cosine_patterns(3, 4))


def products(config: Config) -> list[tuple[str, ...]]:
    """The operand types of all convolutions and matrix products in a training step, in program order."""
    state = jit_init_state(config.program, rng.root_key(0))
    batch = Examples(jnp.zeros((4, 28, 28, 1), jnp.uint8), jnp.zeros(4, jnp.int32))
    closed = jax.make_jaxpr(train_step, static_argnums=0)(config.program, state, batch, rng.root_key(0))
    found: list[tuple[str, ...]] = []

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("conv_general_dilated", "dot_general"):
                found.append(tuple(str(operand.aval.dtype) for operand in equation.invars))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                walk(inner)

    walk(closed.jaxpr)
    return found


def test_bfloat16_is_used_for_all_products_but_the_last_layer() -> None:
    on_accelerator = replace(SMALL, model__dtype="bfloat16", model__batch_norm=True)
    float32 = [operands for operands in products(replace(SMALL, model__batch_norm=True)) if "bfloat16" in operands]
    assert not float32
    found = products(on_accelerator)
    assert found.count(("bfloat16", "bfloat16")) >= 3 * 3 - 1  # 3 layers: forward, 2 gradients; none for pixels
    assert ("bfloat16", "float32") not in found
    assert ("float32", "bfloat16") not in found


def test_weights_statistics_and_logits_stay_float32_with_bfloat16_products(examples: Examples) -> None:
    config = replace(SMALL, model__dtype="bfloat16", model__batch_norm=True, optimizer__ema_decay=0.9)
    batch = Examples(jnp.asarray(examples.image[:8]), jnp.asarray(examples.label[:8]))
    state, sums = jit_train_step(
        config.program, jit_init_state(config.program, rng.root_key(0)), batch, rng.root_key(0)
    )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state, sums))} == {"float32", "int32"}
    assert jit_forward(config.program, eval_variables(state), batch.image).dtype == jnp.float32


@pytest.mark.parametrize("fields", [{}, {"model__batch_norm": True}, {"model__pooling": "avg"}])
def test_bfloat16_agrees_with_float32_to_its_own_rounding(examples: Examples, fields: dict[str, Any]) -> None:
    config = replace(SMALL, **fields)
    variables = variables_of(config)
    images = jnp.asarray(examples.image[:8])
    exact = np.asarray(jit_forward(config.program, variables, images))
    rounded = np.asarray(jit_forward(replace(config, model__dtype="bfloat16"), variables, images))
    # bfloat16 has 8 bits of precision: rounding changes an operand by up to 2^-9, or a percent over three layers.
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.02


def test_matmul_precision_comes_from_the_config_and_not_from_a_global_setting(examples: Examples) -> None:
    def text(precision: str) -> str:
        config = replace(SMALL, model__matmul_precision=precision)
        with jax.default_matmul_precision("bfloat16"):
            lowered = jit_forward.lower(config.program, variables_of(config), examples.image[:4])
        return str(lowered.as_text())

    assert "precision = [HIGHEST, HIGHEST]" in text("highest")
    assert "HIGHEST" not in text("default")
