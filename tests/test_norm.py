"""Batch norm fused with activation and pooling equals the textbook formula: alone, in loops and over devices."""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from nearness import assert_near, normal

from mnist_flax.ops import conv as ops
from mnist_flax.ops import norm


def plain_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array | None, activation: Any, pool: int, pooling: str
) -> tuple[jax.Array, ...]:
    """The textbook formula: statistics over the unmasked examples, normalisation, activation, pooling."""
    rows = jnp.ones(x.shape[0], bool) if mask is None else mask
    where, axes = jnp.expand_dims(rows, range(1, x.ndim)), tuple(range(x.ndim - 1))
    mean = x.mean(axes, where=where)
    var = x.var(axes, where=where)
    y = (x - jnp.expand_dims(mean, axes)) / jnp.sqrt(jnp.expand_dims(var, axes) + 1e-5)
    y = y * jnp.expand_dims(scale, axes) + jnp.expand_dims(bias, axes)
    y = activation(y) if activation else y
    if pool > 1:
        y = {"max": nn.max_pool, "avg": nn.avg_pool}[pooling](y, (pool, pool), (pool, pool))
    return y, mean, var


NORMS = [
    (None, 1, "max", False),
    (nn.relu, 2, "max", True),
    (nn.tanh, 3, "max", True),
    (nn.gelu, 2, "max", False),
    (nn.elu, 2, "avg", True),
]


@pytest.mark.parametrize(("activation", "pool", "pooling", "masked"), NORMS)
def test_batch_norm_equals_the_plain_formula(activation: Any, pool: int, pooling: str, masked: bool) -> None:
    """Values and gradients, with scales of both signs, and rows and columns that do not fill a pooling window."""
    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, (5, 7, 8, 6)).astype(np.float32))  # no ties in pooling
    scale, bias = jnp.array([1.0, -1.5, 0.5, -0.1, 2.0, 1.0]), normal(2, 6)
    mask = jnp.array([True, True, False, True, False]) if masked else None
    after = {"activation": activation, "pool": pool, "pooling": pooling}

    def loss(f: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
        def weighed(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            outputs = f(x, scale, bias, mask, **after)
            return sum(((normal(9, *out.shape) * out).sum() for out in outputs), jnp.zeros(())), outputs

        return jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))

    actual, expected = (loss(f)(x, scale, bias) for f in (norm.norm_activate_pool, plain_norm))
    jax.tree.map(lambda a, b: assert_near(a, b, 2e-5), actual, expected)


def test_batch_norm_of_a_flat_channel_is_finite() -> None:
    """A constant channel has no variance, and all entries of a pooling window tie."""
    x, one = jnp.full((2, 4, 4, 1), 3.0), jnp.ones(1)
    f = functools.partial(norm.norm_activate_pool, activation=nn.relu, pool=2)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: f(x, one, one)[0].sum()))(x)
    assert value == 8.0
    assert_near(gradient, jnp.zeros_like(x))


def test_batch_norm_of_vectors_agrees_in_loops_and_in_bfloat16() -> None:
    """Inputs of shape f32[B,C]; results under vmap, in lax.map and in bfloat16 equal those of a plain call."""
    x, scale, bias = normal(0, 3, 8, 5), normal(1, 5), normal(2, 5)
    mask = jnp.arange(8) < 6

    @jax.jit
    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: (norm.norm_activate_pool(x, scale, bias, mask, activation=nn.relu)[0] ** 2).sum())(x)

    alone = jnp.stack([gradient(row) for row in x])
    assert_near(jax.jit(jax.vmap(gradient))(x), alone, 1e-5)
    assert_near(jax.jit(lambda x: lax.map(gradient, x))(x), alone, 1e-5)
    batch_norm = jax.jit(norm.norm_activate_pool)
    y, mean, _ = batch_norm(x[0].astype(jnp.bfloat16), scale, bias)
    assert y.dtype == jnp.bfloat16
    assert mean.dtype == jnp.float32
    assert_near(y.astype(jnp.float32), batch_norm(x[0], scale, bias)[0], 2.0**-8)


def test_mask_marks_examples_whatever_the_number_of_axes() -> None:
    x, scale, bias, mask = normal(0, 6, 4, 5), normal(1, 5), normal(2, 5), jnp.arange(6) < 4
    jit_norm = jax.jit(norm.norm_activate_pool)
    y, mean, var = jit_norm(x, scale, bias, mask)
    expected = jit_norm(x[:4], scale, bias)
    for actual, wanted in zip((y[:4], mean, var), expected, strict=True):
        assert_near(actual, wanted, 1e-5)


def test_batch_norm_takes_statistics_over_all_devices() -> None:
    x, scale, bias, mask = normal(0, 8, 4, 4, 3), normal(1, 3), normal(2, 3), jnp.arange(8) < 7
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    @jax.jit
    def outputs(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
        f = functools.partial(norm.norm_activate_pool, activation=nn.relu, pool=2)
        return (*f(x, scale, bias, mask), jax.grad(lambda x: (f(x, scale, bias, mask)[0] ** 2).sum())(x))

    for actual, expected in zip(
        outputs(jax.device_put(x, split), jax.device_put(mask, split)), outputs(x, mask), strict=True
    ):
        assert_near(actual, expected, 1e-5)


def test_nothing_is_transposed_between_layers() -> None:
    """In two convolutions with batch norm, the compiled program transposes no feature map."""
    x = normal(0, 16, 12, 12, 8)
    kernels = [normal(i, 3, 3, 8, 8) for i in (1, 2)]

    def loss(kernels: list[jax.Array], x: jax.Array) -> jax.Array:
        for kernel in kernels:
            x = norm.norm_activate_pool(ops.conv_block(x, kernel), jnp.ones(8), jnp.zeros(8), activation=nn.relu)[0]
        return (x**2).mean()

    text = jax.jit(jax.grad(loss)).lower(kernels, x).compile().as_text() or ""
    turned = [line for line in text.splitlines() if re.search(r"f32\[16,12,12,8\]\S* (copy|transpose)\(", line)]
    assert len(turned) <= 1, turned  # only the images, once
