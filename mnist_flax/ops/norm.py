"""Batch normalisation, and activation with pooling after it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mnist_flax.ops.conv import NON_DECREASING
from mnist_flax.ops.pool import avg_pool, max_pool


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, mask: jax.Array | None = None, *, eps: float = 1e-5
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel over a batch (Ioffe and Szegedy, 2015): f32[B,...,C] -> f32[B,...,C], f32[C], f32[C].

    Args:
      x: of any rank above 1.
      scale: `f32[C]`.
      bias: `f32[C]`.
      mask: `bool[B]`, which rows are examples; all, if None. Other rows do not count for the statistics.
      eps: added to the variance.

    Returns:
      What became of `x`, in its type, and the mean and the (biased) variance of the batch, in float32.
    """
    axes = tuple(range(x.ndim - 1))
    where = None if mask is None else mask.reshape(-1, *[1] * (x.ndim - 1))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(axes, where=where)
    var = jnp.maximum(0, jnp.square(wide).mean(axes, where=where) - jnp.square(mean))
    return normalize(x, scale, bias, mean, var, eps=eps), mean, var


def activate_pool(x: jax.Array, activation: Callable[[jax.Array], jax.Array], pool: int, pooling: str) -> jax.Array:
    """Computes pool(activation(x)): f32[B,H,W,C] -> f32[B,H//pool,W//pool,C].

    The maximum commutes with a non-decreasing activation, which then touches a quarter of the values.
    """
    if pooling == "max" and activation in NON_DECREASING:
        return activation(max_pool(x, pool))
    x = activation(x)
    return max_pool(x, pool) if pooling == "max" else avg_pool(x, pool)


def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array, *, eps: float = 1e-5
) -> jax.Array:
    """Normalises each channel by a given mean and variance, `f32[B,...,C] -> f32[B,...,C]`, in the type of `x`."""
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    expanded = [jnp.expand_dims(v, axes) for v in (mean, jax.lax.rsqrt(var + eps) * scale, bias)]
    return ((wide - expanded[0]) * expanded[1] + expanded[2]).astype(x.dtype)
