"""Convolution and pooling, lowered per platform: XLA:CPU gets forms that stay fast inside loops, others XLA's own."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[Pair],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Convolves as `lax.conv_general_dilated` does; plain 2-D NHWC convolutions take a faster form on CPU."""
    plain = (
        lhs.ndim == 4
        and 0 not in lhs.shape
        and 0 not in rhs.shape
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and set(lhs_dilation or ()) <= {1}
        and set(rhs_dilation or ()) <= {1}
        and feature_group_count == batch_group_count == 1
        and preferred_element_type in (None, lhs.dtype)
        and dimension_numbers is not None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == _NHWC
    )
    if plain:
        kernel_size = rhs.shape[:2]
        pads = (
            lax.padtype_to_pads(lhs.shape[1:3], kernel_size, window_strides, padding)
            if isinstance(padding, str)
            else padding
        )
        padded = [size + lo + hi for size, (lo, hi) in zip(lhs.shape[1:3], pads, strict=True)]
        if all(size >= kernel for size, kernel in zip(padded, kernel_size, strict=True)):
            strides = (int(window_strides[0]), int(window_strides[1]))
            (top, bottom), (left, right) = pads
            return _conv(
                lhs,
                rhs,
                strides,
                ((int(top), int(bottom)), (int(left), int(right))),
                precision,
            )
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    pads: tuple[Pair, Pair],
    precision: Any,
) -> jax.Array:
    """f32[B,H,W,C], f32[h,w,C,D] -> f32[B,H',W',D]."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _patches_conv(x, kernel, strides, pads, precision),
        default=lambda x, kernel: _xla_conv(x, kernel, strides, pads, precision),
    )


def _conv_forward(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    pads: tuple[Pair, Pair],
    precision: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv(x, kernel, strides, pads, precision), (x, kernel)


def _conv_backward(
    strides: Pair,
    pads: tuple[Pair, Pair],
    precision: Any,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def cpu(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        h, w, c, d = kernel.shape
        patches = _patches(x, (h, w), strides, pads)
        dkernel = lax.dot_general(patches, dy, (((0, 1, 2), (0, 1, 2)), ((), ())), precision)
        if strides == (1, 1):
            back = tuple((k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip((h, w), pads, strict=True))
            flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
            dx = _patches_conv(dy, flipped, (1, 1), (back[0], back[1]), precision)
        else:
            dpatches = lax.dot_general(dy, kernel.reshape(h * w * c, d), (((3,), (1,)), ((), ())), precision)
            (dx,) = jax.linear_transpose(lambda x: _patches(x, (h, w), strides, pads), x)(dpatches)
        return dx, dkernel.reshape(kernel.shape)

    def default(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, vjp = jax.vjp(lambda x, kernel: _xla_conv(x, kernel, strides, pads, precision), x, kernel)
        dx, dkernel = vjp(dy)
        return dx, dkernel

    return lax.platform_dependent(*saved, dy, cpu=cpu, default=default)


_conv.defvjp(_conv_forward, _conv_backward)


def _xla_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    pads: tuple[Pair, Pair],
    precision: Any,
) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_NHWC, precision=precision)


def _patches(x: jax.Array, kernel_size: Pair, strides: Pair, pads: tuple[Pair, Pair]) -> jax.Array:
    """f32[B,H,W,C] -> f32[B,H',W',h*w*C], one shifted slice beside the other."""
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0)))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel_size, strides, strict=True))
    return jnp.concatenate(
        [
            lax.slice(
                x,
                (0, i, j, 0),
                (
                    x.shape[0],
                    i + (rows - 1) * strides[0] + 1,
                    j + (columns - 1) * strides[1] + 1,
                    x.shape[3],
                ),
                (1, *strides, 1),
            )
            for i in range(kernel_size[0])
            for j in range(kernel_size[1])
        ],
        axis=3,
    )


def _patches_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    pads: tuple[Pair, Pair],
    precision: Any,
) -> jax.Array:
    h, w, c, d = kernel.shape
    patches = _patches(x, (h, w), strides, pads)
    return lax.dot_general(patches, kernel.reshape(h * w * c, d), (((3,), (0,)), ((), ())), precision)


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """Takes the maximum of each `size` x `size` window: f32[B,H,W,C] -> f32[B,H//size,W//size,C]."""
    return _max_pool(x, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, size: int) -> jax.Array:
    y, *others = _phases(x, size)
    return functools.reduce(jnp.maximum, others, y)


def _max_pool_forward(x: jax.Array, size: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _max_pool(x, size)
    return y, (x, y)


def _max_pool_backward(size: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    x, y = saved
    _, h, w, _ = x.shape
    rows, columns = y.shape[1] * size, y.shape[2] * size

    def up(a: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(a, size, 1), size, 2)

    dx = jnp.where(x[:, :rows, :columns] == up(y), up(dy), jnp.zeros((), dy.dtype))
    return (jnp.pad(dx, ((0, 0), (0, h - rows), (0, w - columns), (0, 0))),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Takes the mean of each `size` x `size` window: f32[B,H,W,C] -> f32[B,H//size,W//size,C]."""
    return sum(_phases(x, size)) / (size * size)


def _phases(x: jax.Array, size: int) -> list[jax.Array]:
    b, h, w, c = x.shape
    rows, columns = h // size * size, w // size * size
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (b, max(rows - size + i + 1, i), max(columns - size + j + 1, j), c),
            (1, size, size, 1),
        )
        for i in range(size)
        for j in range(size)
    ]
