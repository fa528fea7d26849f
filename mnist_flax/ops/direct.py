"""Convolution by XLA's own, with gradients that XLA:CPU computes fast inside loops.

It packs patches into the cache as it multiplies, where the other forms write them, or what they transform, to memory.
"""

import functools

import jax
from jax import lax

from mnist_flax.ops.window import Pair, Window

NHWC = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def direct(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """f32[B,H,W,C], f32[h,w,C,D] -> f32[B,n,m,D]; does not pool."""
    return lax.conv_general_dilated(x, kernel, window.strides, window.pads, dimension_numbers=NHWC)


def _forward(x: jax.Array, kernel: jax.Array, window: Window) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return direct(x, kernel, window), (x, kernel)


def _backward(window: Window, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # Both are convolutions in the order of axes of the forward pass. XLA:CPU turns others into it only outside loops,
    # and computes them 25 times slower inside.
    dx_pads, dkernel_pads = zip(*(_gradient_pads(axis, x, kernel, dy, window) for axis in (0, 1)), strict=True)
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    dx = lax.conv_general_dilated(dy, flipped, (1, 1), dx_pads, lhs_dilation=window.strides, dimension_numbers=NHWC)
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        dkernel_pads,
        rhs_dilation=window.strides,
        dimension_numbers=NHWC,
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


direct.defvjp(_forward, _backward)


def _gradient_pads(axis: int, x: jax.Array, kernel: jax.Array, dy: jax.Array, window: Window) -> tuple[Pair, Pair]:
    """Returns the padding of the two gradients along a spatial axis; what no output has seen is cut or padded."""
    size, kernel_size, low = x.shape[1 + axis], kernel.shape[axis], window.pads[axis][0]
    spread = (dy.shape[1 + axis] - 1) * window.strides[axis] + 1
    before = kernel_size - 1 - low
    return (before, size - spread - before + kernel_size - 1), (low, spread + kernel_size - 1 - size - low)
