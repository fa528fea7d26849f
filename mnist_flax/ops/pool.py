"""Pooling, with a gradient that XLA:CPU computes in parallel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """Takes the maximum of each window, with a stride of its size: f32[B,H,W,C] -> f32[B,H//size,W//size,C].

    Rows and columns that fill no window are cut. Entries that tie for the maximum share the gradient equally on CPU, as
    in `jnp.max`; on other platforms the first one gets all of it, as in `lax.reduce_window`.
    """
    if 0 in (*x.shape, x.shape[1] // size, x.shape[2] // size):
        return xla_max_pool(x, size)
    y: jax.Array = lax.platform_dependent(
        x,
        cpu=lambda x: max_of(_split_windows(x, size), (2, 4)),
        default=lambda x: xla_max_pool(x, size),
    )
    return y


def avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Takes the mean of each window, with a stride of its size: f32[B,H,W,C] -> f32[B,H//size,W//size,C]."""
    return _split_windows(x, size).mean((2, 4))


def _split_windows(x: jax.Array, size: int) -> jax.Array:
    """f32[B,H,W,C] -> f32[B,H//size,size,W//size,size,C]."""
    b, h, w, c = x.shape
    rows, columns = h // size, w // size
    return x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)


def xla_max_pool(x: jax.Array, size: int) -> jax.Array:
    if size == 1:
        return x
    window = (1, size, size, 1)
    return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, window, window, "VALID")


# The maximum over window axes, with a mask for a gradient: that of reduce_window (select-and-scatter) is a serial loop.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_of(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return x.max(axes)


def max_of_forward(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The gradient compares x with y. Were x computed anew for that, as XLA may choose, it could be rounded differently.
    x = lax.optimization_barrier(x)
    y = max_of(x, axes)
    return y, (x, y)


def max_of_backward(axes: tuple[int, ...], saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    x, y = saved
    # A blank background makes ties everywhere. Each gets an equal share, or the gradient would count several times.
    entries = [x]
    for axis in sorted(axes, reverse=True):
        entries = [lax.index_in_dim(e, i, axis, keepdims=False) for e in entries for i in range(e.shape[axis])]
    ties = functools.reduce(jnp.add, [(entry == y).astype(dy.dtype) for entry in entries])
    share, y = jnp.expand_dims(dy / ties, axes), jnp.expand_dims(y, axes)
    return (jnp.where(x == y, share, jnp.zeros((), dy.dtype)),)


max_of.defvjp(max_of_forward, max_of_backward)
