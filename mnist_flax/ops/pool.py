"""Pooling, with a gradient that XLA:CPU computes in parallel."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax.ops.window import batch_first, rows_first, split_windows

Activation = Callable[[jax.Array], jax.Array]

# Max pooling commutes with these activations, so it may come first.
NON_DECREASING: frozenset[Activation | None] = frozenset(
    {None, jax.nn.relu, jax.nn.leaky_relu, jax.nn.elu, jnp.tanh, jax.nn.sigmoid, jax.nn.softplus}
)


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """Takes the maximum of each non-overlapping window: f32[B,H,W,C] -> f32[B,H//size,W//size,C].

    Incomplete windows are dropped. On CPU, entries that tie for the maximum share the gradient equally, as in
    `jnp.max`; on other platforms the first one gets all of it, as in `lax.reduce_window`.
    """
    if size == 1:
        return x
    if 0 in (*x.shape, x.shape[1] // size, x.shape[2] // size):
        return xla_max_pool(x, size)
    return lax.platform_dependent(
        x,
        cpu=lambda x: batch_first(max_of(split_windows(rows_first(x), size), (1, 3))),
        default=lambda x: xla_max_pool(x, size),
    )


def avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Takes the mean of each non-overlapping window: f32[B,H,W,C] -> f32[B,H//size,W//size,C]."""
    if size == 1:
        return x
    return lax.platform_dependent(
        x,
        cpu=lambda x: batch_first(split_windows(rows_first(x), size).mean((1, 3))),
        default=lambda x: nn.avg_pool(x, (size, size), (size, size)),
    )


POOLINGS = {"max": max_pool, "avg": avg_pool}


def pooling_order(activation: Activation | None, pool: int, pooling: str) -> tuple[int, int]:
    """Returns the sizes of the pooling before the activation and of the pooling after it; one of them is 1.

    Max pooling commutes with a non-decreasing activation, so it comes first: the activation then processes fewer values
    (a quarter with 2x2 windows).
    """
    return (pool, 1) if pooling == "max" and activation in NON_DECREASING else (1, pool)


def activate_pool(x: jax.Array, activation: Activation | None, pool: int, pooling: str) -> jax.Array:
    """Computes pool(activation(x)): f32[B,H,W,C] -> f32[B,H//pool,W//pool,C], or any rank without pooling."""
    before, after = pooling_order(activation, pool, pooling)
    x = max_pool(x, before)
    return POOLINGS[pooling](activation(x) if activation else x, after)


def xla_max_pool(x: jax.Array, size: int) -> jax.Array:
    """Max-pools with XLA's own `reduce_window`."""
    return x if size == 1 else nn.max_pool(x, (size, size), (size, size))


# The gradient uses a mask, because reduce_window's own gradient (select-and-scatter) is a serial loop on XLA:CPU.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_of(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Takes the maximum over some axes."""
    return x.max(axes)


def _max_of_forward(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The gradient compares x with y, so XLA must not recompute x, which could round it differently.
    x = lax.optimization_barrier(x)
    y = max_of(x, axes)
    return y, (x, y)


def _max_of_backward(axes: tuple[int, ...], saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    return (spread(*saved, dy, axes),)


max_of.defvjp(_max_of_forward, _max_of_backward)


def spread(x: jax.Array, y: jax.Array, dy: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the gradient of y = x.max(axes) with respect to x, given the gradient `dy` with respect to y.

    Ties are common, because the background is blank. Tied entries share the gradient equally; otherwise it would be
    counted several times.
    """
    entries = [x]
    for axis in sorted(axes, reverse=True):
        entries = [lax.index_in_dim(e, i, axis, keepdims=False) for e in entries for i in range(e.shape[axis])]
    ties = functools.reduce(jnp.add, [(entry == y).astype(dy.dtype) for entry in entries])
    share, y = jnp.expand_dims(dy / ties, axes), jnp.expand_dims(y, axes)
    return jnp.where(x == y, share, jnp.zeros((), dy.dtype))
