"""Convolution and convolution blocks, lowered per platform: XLA:CPU gets forms that stay fast inside loops.

Inside a loop (`lax.scan`, `lax.fori_loop`) XLA:CPU lowers the gradient of a convolution to plain nested loops, 25 times
slower than a matrix product (jax issue 12868), so on CPU a convolution becomes matrix products, in one of two forms:

- `winograd`, for a stride of 1 and enough channels: the fewest multiplications, in well-shaped matrix products.
- `patches` otherwise (one input channel, strides, large kernels): one matrix product of all patches with the kernel.

Other platforms get XLA's own convolution.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax.ops import winograd
from mnist_flax.ops.patches import patches
from mnist_flax.ops.pool import POOLINGS, Activation, pooling_order, xla_max_pool
from mnist_flax.ops.window import Pair, Window

SMALL_BATCH = 32  # from this size on, inference uses the forms of training: faster for most networks (docs/speed.md)


def conv_block(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: Pair = (1, 1),
    padding: str | Sequence[Pair] = "SAME",
    activation: Activation | None = None,
    pool: int = 1,
    pooling: str = "max",
    precision: Any = "default",
    inference: bool = False,
) -> jax.Array:
    """Computes pool(activation(conv(x) + bias)): f32[B,H,W,C], f32[h,w,C,D] -> f32[B,H',W',D].

    Pooling comes before bias and activation where possible (`pooling_order`). Rows and columns that do not fill a
    window are dropped. `padding` is `SAME`, `VALID`, or a pair for rows and one for columns; the bias is added in
    float32.

    The CPU forms compute in float32 whatever the `precision`, and support reverse-mode gradients only. With
    `inference`, small batches use XLA's own convolution on CPU too: its forward pass takes 0.5 to 0.7 of the time for
    one image, but 1.3 to 1.8 times as long for 100 images.
    """
    before, after = pooling_order(activation, pool, pooling)
    y = _conv(x, kernel, strides, padding, precision, inference, before)
    if bias is not None:
        y = (y + jnp.expand_dims(bias, range(y.ndim - 1))).astype(y.dtype)
    return POOLINGS[pooling](activation(y) if activation else y, after)


def _conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[Pair],
    precision: Any,
    inference: bool,
    pool: int,
) -> jax.Array:
    """Convolves and max-pools; XLA's own form or ours is chosen when lowered, when the platform is known."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    pads = ((int(top), int(bottom)), (int(left), int(right)))
    window = Window((int(strides[0]), int(strides[1])), pads, pool)

    def default(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(
            x, kernel, window.strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
        )
        return xla_max_pool(y, pool)

    def cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Half precision is cast up: Winograd's sums would lose accuracy, and few CPUs multiply it faster.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        form = winograd.winograd if winograd.is_faster(kernel.shape, window) else patches
        return form(x.astype(wide), kernel.astype(wide), window).astype(x.dtype)

    outputs = (window.output_size(axis, x.shape[1 + axis], kernel.shape[axis]) for axis in (0, 1))
    is_small = not isinstance(x.shape[0], int) or x.shape[0] < SMALL_BATCH  # in exports, the batch size is symbolic
    if (inference and is_small) or 0 in (*x.shape, *kernel.shape, *outputs):
        return default(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=default)
