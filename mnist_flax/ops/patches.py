"""Convolution as one matrix product of all patches with the kernel."""

import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax.ops.pool import max_of
from mnist_flax.ops.window import Pair, Window, batch_first, rows_first


def patches(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Convolves and max-pools: f32[B,H,W,C] -> f32[n,m,B,K] -> f32[n,m,B,pool*pool,D] -> f32[B,n,m,D].

    A pooling window depends on one larger patch, and each entry of the window on a part of that patch. The patch is
    multiplied by one zero-padded copy of the kernel per entry, which gives the entries side by side. With few channels
    this is faster than products a quarter as large followed by slicing (0.75 of the time, for the first layer here).
    """
    strides, pads, pool = window
    x = rows_first(x)
    h, w, _, channels = kernel.shape
    shifts = [(i * strides[0], j * strides[1]) for i in range(pool) for j in range(pool)]
    last_row, last_column = shifts[-1]
    placed = [jnp.pad(kernel, ((i, last_row - i), (j, last_column - j), (0, 0), (0, 0))) for i, j in shifts]
    matrix = jnp.stack(placed, 3).reshape(-1, pool * pool * channels)
    rows, columns = (window.output_size(axis, x.shape[axis], kernel.shape[axis]) // pool for axis in (0, 1))
    patch_size = (h + last_row, w + last_column)
    gathered = _gather(x, (rows, columns), patch_size, (strides[0] * pool, strides[1] * pool), pads)
    y = _product(gathered, matrix).reshape(*gathered.shape[:3], pool * pool, channels)
    y = max_of(y, (3,)) if pool > 1 else y[:, :, :, 0]
    return batch_first(y)


def _gather(x: jax.Array, outputs: Pair, patch_size: Pair, strides: Pair, pads: tuple[Pair, Pair]) -> jax.Array:
    """Concatenates one shifted slice per position in a patch: f32[H,W,B,C] -> f32[n,m,B,h*w*C]."""
    x = lax.pad(x, jnp.zeros((), x.dtype), ((*pads[0], 0), (*pads[1], 0), (0, 0, 0), (0, 0, 0)))
    (rows, columns), (down, right) = outputs, strides
    slices = [
        x[i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        for i in range(patch_size[0])
        for j in range(patch_size[1])
    ]
    if x.shape[3] > 1:
        return jnp.concatenate(slices, 3)
    # Concatenating single numbers is slow: with one channel, it is faster to copy whole slices and to transpose them.
    stacked: jax.Array = lax.optimization_barrier(jnp.stack([part[..., 0] for part in slices]))
    return stacked.transpose(1, 2, 3, 0)


@jax.custom_vjp
def _product(patches: jax.Array, matrix: jax.Array) -> jax.Array:
    """f32[n,m,B,K], f32[K,D] -> f32[n,m,B,D]."""
    return lax.dot_general(patches, matrix, (((3,), (0,)), ((), ())))


def _product_forward(patches: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(patches, matrix), (patches, matrix)


def _product_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    patches, matrix = saved
    # Written out, because JAX's own rule computes the second product in an order that is 1.9 times slower. The operands
    # are flattened, because contracting three axes makes XLA transpose the patches in memory.
    dpatches = lax.dot_general(dy, matrix, (((3,), (1,)), ((), ())))
    flat_patches, flat_dy = patches.reshape(-1, patches.shape[3]), dy.reshape(-1, dy.shape[3])
    dmatrix = lax.dot_general(flat_patches, flat_dy, (((0,), (0,)), ((), ())))
    return dpatches, dmatrix


_product.defvjp(_product_forward, _product_backward)
