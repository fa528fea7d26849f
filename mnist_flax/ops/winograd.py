"""Winograd's minimal filtering: convolution by multiplying the values of polynomials at a few points.

S. Winograd, Arithmetic complexity of computations, 1980; for networks: A. Lavin and S. Gray, Fast algorithms for
convolutional neural networks, 2015.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax.ops.pool import max_of
from mnist_flax.ops.window import Window, batch_first, rows_first, split_windows


class _Axis(NamedTuple):
    """One spatial axis as three small matrices: y = outputs @ ((inputs @ x) * (kernel @ w))."""

    tiles: int
    inputs: np.ndarray  # [points * tiles, size]
    kernel: np.ndarray  # [points, kernel_size]
    outputs: np.ndarray  # [output_size, points * tiles]


# The finite evaluation points; one more lies at infinity. Points in small reciprocal pairs minimise the float32 error:
# with all eight it is about 2e-6 of the result's scale (root mean square; 2e-7 for a plain sum, 4e-3 for bfloat16).
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0, 2.0, -0.5)

# With nine points, these are the best ones found by search; the error is 6.5e-6. A 3x3 kernel then has tiles of 7x7,
# which fit maps of 28, 14 and 7 pixels: a layer takes 0.5 to 0.8 of the time that it takes with up to eight points.
_NINE_POINTS = (0.0, 0.85, -0.85, 0.5, -0.5, 1.4, -1.4, 4.0)
_MAX_POINTS = 1 + len(_NINE_POINTS)


@functools.cache
def _winograd_axis(size: int, kernel_size: int, output_size: int, pad: int) -> _Axis:
    """Chooses the tile size that needs the fewest products, and builds the matrices."""
    choices = range(2, _MAX_POINTS + 2 - kernel_size)
    tile = min(choices, key=lambda tile: -(-output_size // tile) * (tile + kernel_size - 1))
    points, tiles = tile + kernel_size - 1, -(-output_size // tile)
    finite = _NINE_POINTS if points == _MAX_POINTS else _POINTS[: points - 1]

    def values(terms: int) -> np.ndarray:
        """Returns the matrix that evaluates a polynomial at the points; at infinity it picks the last coefficient."""
        powers = np.array(finite)[:, None] ** np.arange(terms)
        return np.vstack([powers, np.eye(terms)[-1]])

    filtering, weights, data = values(tile), values(kernel_size), _interpolation(np.array(finite))
    # The three rows of a point can be rescaled if their product stays the same. Balanced norms reduce rounding errors.
    norms = [np.linalg.norm(m, axis=1, keepdims=True) for m in (filtering, weights, data)]
    scale = np.sqrt(norms[0] * norms[1] * norms[2])
    filtering, weights, data = filtering / norms[0] * scale, weights / norms[1] * scale, data / norms[2]

    inputs, outputs = np.zeros((points, tiles, size)), np.zeros((output_size, points, tiles))
    for t in range(tiles):
        for i in range(points):
            if 0 <= (position := t * tile + i - pad) < size:  # padding is zero, so it needs no column
                inputs[:, t, position] = data[:, i]
        for i in range(min(tile, output_size - t * tile)):
            outputs[t * tile + i, :, t] = filtering[:, i]
    return _Axis(tiles, inputs.reshape(-1, size), weights, outputs.reshape(output_size, -1))


def _interpolation(finite: np.ndarray) -> np.ndarray:
    """Returns the Lagrange polynomials of the points, with infinity last: their coefficients, `f64[points,points]`.

    This is the transposed inverse of the matrix that evaluates a polynomial at the points. `np.linalg.inv` would lose
    four digits with nine points, and round differently on different CPUs.
    """
    others = [np.delete(finite, i) for i in range(len(finite))]
    rows = [np.poly(rest) / np.prod(point - rest) for point, rest in zip(finite, others, strict=True)]
    return np.vstack([*(np.append(row[::-1], 0.0) for row in rows), np.poly(finite)[::-1]])


def is_faster(kernel_shape: Sequence[int], window: Window) -> bool:
    """Returns whether Winograd is faster than patches.

    Measured with kernels of 3 to 7, it takes 0.3 to 0.8 of the time for 4 to 64 channels, but 3 times as long for one.
    """
    h, w, c, d = kernel_shape
    return window.strides == (1, 1) and min(h, w) >= 2 and max(h, w) <= len(_POINTS) and min(c, d) >= 4


def _winograd_axes(x: jax.Array, kernel: jax.Array, window: Window) -> tuple[_Axis, _Axis]:
    def axis(i: int) -> _Axis:
        size, kernel_size = x.shape[i], kernel.shape[i]
        return _winograd_axis(size, kernel_size, window.output_size(i, size, kernel_size), window.pads[i][0])

    return axis(0), axis(1)


def _transform(rows: np.ndarray, columns: np.ndarray, x: jax.Array) -> jax.Array:
    """Transforms rows by f32[p,H] and columns by f32[q,W], on contiguous memory: f32[H,W,...] -> f32[p,q,...]."""
    first = lax.dot_general(jnp.asarray(rows, x.dtype), x, (((1,), (0,)), ((), ())))
    # Batched, because an unbatched product would give [q,p,...], and the whole array would have to be transposed.
    repeated = jnp.broadcast_to(jnp.asarray(columns, x.dtype), (rows.shape[0], *columns.shape))
    return lax.dot_general(repeated, first, (((2,), (1,)), ((0,), (0,))))


def winograd(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Convolves and max-pools: f32[B,H,W,C] -> f32[n,m,B,D] -> f32[B,n,m,D].

    In between, rows and columns come first, so that each transform is one matrix product.
    """
    y = _winograd_conv(rows_first(x), kernel, window)
    return batch_first(max_of(split_windows(y, window.pool), (1, 3)) if window.pool > 1 else y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _winograd_conv(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """f32[H,W,B,C], f32[h,w,C,D] -> f32[n,m,B,D]."""
    return _winograd_forward(x, kernel, window)[0]


def _winograd_forward(x: jax.Array, kernel: jax.Array, window: Window) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rows, columns = _winograd_axes(x, kernel, window)
    batch, c, d = x.shape[2], *kernel.shape[2:]
    # One product over the channels for each point and row of tiles; the tiles within a row are folded into the batch.
    data = _transform(rows.inputs, columns.inputs, x).reshape(-1, columns.tiles * batch, c)
    weights = _transform(rows.kernel, columns.kernel, kernel)
    p, q = weights.shape[:2]
    weights = jnp.broadcast_to(weights[:, None], (p, rows.tiles, q, c, d)).reshape(-1, c, d)
    products = lax.dot_general(data, weights, (((2,), (1,)), ((0,), (0,))))
    y = _transform(rows.outputs, columns.outputs, products.reshape(p * rows.tiles, q * columns.tiles, batch, d))
    return y, (x, kernel, data, weights)


def _winograd_backward(window: Window, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, data, weights = saved  # only the shapes of x and kernel are used, so neither is kept
    rows, columns = _winograd_axes(x, kernel, window)
    batch, c, d = x.shape[2], *kernel.shape[2:]
    p, q = rows.kernel.shape[0], columns.kernel.shape[0]
    # The transposes of the forward products; both use the transformed dy.
    dproducts = _transform(rows.outputs.T, columns.outputs.T, dy).reshape(*data.shape[:2], d)
    # The data is transposed in memory first: XLA gives products that contract rows to Eigen, which is slow for many
    # small ones. The second layer takes 0.8 ms with the copy and the sum instead of 1.05 ms (64 images, jax 0.10). The
    # barrier keeps XLA from undoing the transpose, and from fusing the transform of dy into it.
    turned, dproducts = lax.optimization_barrier((data.transpose(0, 2, 1), dproducts))
    dweights = lax.dot_general(turned, dproducts, (((2,), (1,)), ((0,), (0,)))).reshape(p, rows.tiles, q, c, d).sum(1)
    ddata = lax.dot_general(dproducts, weights, (((2,), (2,)), ((0,), (0,))))
    dx = _transform(rows.inputs.T, columns.inputs.T, ddata.reshape(p * rows.tiles, q * columns.tiles, batch, c))
    return dx, _transform(rows.kernel.T, columns.kernel.T, dweights)


_winograd_conv.defvjp(_winograd_forward, _winograd_backward)
