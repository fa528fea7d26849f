"""Convolution and pooling, lowered per platform: XLA:CPU gets forms that stay fast inside loops, others XLA's own.

Inside a loop (`lax.scan`, `lax.fori_loop`) XLA:CPU lowers the gradient of a convolution to plain nested loops, 25 times
slower than a matrix product (jax issue 12868), so on CPU a convolution becomes matrix products, in one of two forms:

- Winograd's minimal filtering, for a stride of 1 and enough channels: the fewest products, and those of a good shape.
- Patches times kernel otherwise (one input channel, strides, large kernels).

Where a max-pooling follows at once, `conv_general_dilated(..., max_pool_size=2)` does both: what pooling cuts off is
never computed, and the patches form gets the windows of the pooling as extra output channels of one product.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pair = tuple[int, int]

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


class _Window(NamedTuple):
    """How a convolution, and the max-pooling after it, walk over rows and columns."""

    strides: Pair
    pads: tuple[Pair, Pair]
    pool: int

    def output_size(self, axis: int, size: int, kernel_size: int) -> int:
        """Counts the outputs along one spatial axis that the pooling uses (pooling cuts the remainder)."""
        padded = size + sum(self.pads[axis])
        return max((padded - kernel_size) // self.strides[axis] + 1, 0) // self.pool * self.pool


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
    *,
    max_pool_size: int = 1,
    inference: bool = False,
) -> jax.Array:
    """Convolves as `lax.conv_general_dilated` does, then takes the maximum of each window of `max_pool_size` squared.

    f32[B,H,W,C], f32[h,w,C,D] -> f32[B,H',W',D] -> f32[B,H'//size,W'//size,D]

    It is what `flax.linen.Conv(conv_general_dilated=...)` takes; a bias, and a ReLU or another rising activation,
    commute with the maximum, so after the pooling they give the same result for a quarter of the work. What the fast
    forms do not cover (dilation, groups, other layouts, empty arrays) goes to `lax` on every platform.

    The CPU forms differentiate in reverse mode only, and twice only through the patches form. They pay in training;
    `inference` takes XLA's own on CPU too, which goes forward faster (10,000 images of the classic network: 0.22 s, not
    0.34 s or, in large batches, 1.0 s).
    """
    covered = (
        not inference
        and lhs.ndim == 4
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and set(lhs_dilation or ()) <= {1}
        and set(rhs_dilation or ()) <= {1}
        and feature_group_count == batch_group_count == 1
        and preferred_element_type in (None, lhs.dtype)
        and dimension_numbers is not None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == _NHWC
    )
    if covered:
        kernel_size = rhs.shape[:2]
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(lhs.shape[1:3], kernel_size, window_strides, padding)
        (top, bottom), (left, right) = padding
        strides = (int(window_strides[0]), int(window_strides[1]))
        window = _Window(strides, ((int(top), int(bottom)), (int(left), int(right))), max_pool_size)
        outputs = (window.output_size(axis, lhs.shape[1 + axis], kernel_size[axis]) for axis in (0, 1))
        if 0 not in (*lhs.shape, *rhs.shape, *outputs):
            return _conv(lhs, rhs, window, precision)
    y = lax.conv_general_dilated(
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
    return _xla_max_pool(y, max_pool_size)


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """Takes the maximum of each window, with a stride of its size: f32[B,H,W,C] -> f32[B,H//size,W//size,C].

    Rows and columns that fill no window are cut. Entries that tie for the maximum share the gradient equally on CPU, as
    in `jnp.max`; on other platforms the first one gets all of it, as in `lax.reduce_window`.
    """
    if 0 in (*x.shape, x.shape[1] // size, x.shape[2] // size):
        return _xla_max_pool(x, size)
    y: jax.Array = lax.platform_dependent(
        x,
        cpu=lambda x: _max_of(_split_windows(x, size), (2, 4)),
        default=lambda x: _xla_max_pool(x, size),
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


def _xla_max_pool(x: jax.Array, size: int) -> jax.Array:
    if size == 1:
        return x
    window = (1, size, size, 1)
    return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, window, window, "VALID")


def _conv(x: jax.Array, kernel: jax.Array, window: _Window, precision: Any) -> jax.Array:
    """Picks the form when the program is lowered for a platform, not when it is traced."""

    def cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Half precision is widened: XLA:CPU has no fast product for it, and Winograd's sums would lose its few bits.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        form = _winograd if _winograd_pays(kernel.shape, window) else _patches
        return form(x.astype(wide), kernel.astype(wide), window).astype(x.dtype)

    def default(x: jax.Array, kernel: jax.Array) -> jax.Array:
        strides, pads, pool = window
        y = lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_NHWC, precision=precision)
        return _xla_max_pool(y, pool)

    y: jax.Array = lax.platform_dependent(x, kernel, cpu=cpu, default=default)
    return y


# The maximum over window axes, with a mask for a gradient: that of reduce_window (select-and-scatter) is a serial loop.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return x.max(axes)


def _max_of_forward(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The gradient compares x with y. Were x computed anew for that, as XLA may choose, it could be rounded differently.
    x = lax.optimization_barrier(x)
    y = _max_of(x, axes)
    return y, (x, y)


def _max_of_backward(axes: tuple[int, ...], saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    x, y = saved
    # A blank background makes ties everywhere. Each gets an equal share, or the gradient would count several times.
    entries = [x]
    for axis in sorted(axes, reverse=True):
        entries = [lax.index_in_dim(e, i, axis, keepdims=False) for e in entries for i in range(e.shape[axis])]
    ties = functools.reduce(jnp.add, [(entry == y).astype(dy.dtype) for entry in entries])
    share, y = jnp.expand_dims(dy / ties, axes), jnp.expand_dims(y, axes)
    return (jnp.where(x == y, share, jnp.zeros((), dy.dtype)),)


_max_of.defvjp(_max_of_forward, _max_of_backward)


# Patches times kernel.


def _patches(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    """One matrix product of all patches: f32[B,H,W,C] -> f32[n,m,B,K] -> f32[n,m,B,size*size,D] -> f32[B,n,m,D].

    A window of the pooling sees one larger patch, of which each of its entries uses a part. So a product with the
    kernel in each of these places, padded with zeros, gives the entries side by side: with few channels that is faster
    than products a quarter as large followed by slicing (0.75 of the time of the first layer here).
    """
    strides, pads, pool = window
    # The order of axes that Winograd's form has: before one, so, the image is turned around and not its many maps.
    x = x.transpose(1, 2, 0, 3)
    h, w, _, channels = kernel.shape
    shifts = [(i * strides[0], j * strides[1]) for i in range(pool) for j in range(pool)]
    last_row, last_column = shifts[-1]
    placed = [jnp.pad(kernel, ((i, last_row - i), (j, last_column - j), (0, 0), (0, 0))) for i, j in shifts]
    matrix = jnp.stack(placed, 3).reshape(-1, pool * pool * channels)
    rows, columns = (window.output_size(axis, x.shape[axis], kernel.shape[axis]) // pool for axis in (0, 1))
    patch_size = (h + last_row, w + last_column)
    patches = _gather(x, (rows, columns), patch_size, (strides[0] * pool, strides[1] * pool), pads)
    y = _product(patches, matrix).reshape(*patches.shape[:3], pool * pool, channels)
    y = _max_of(y, (3,)) if pool > 1 else y[:, :, :, 0]
    return y.transpose(2, 0, 1, 3)


def _gather(x: jax.Array, outputs: Pair, patch_size: Pair, strides: Pair, pads: tuple[Pair, Pair]) -> jax.Array:
    """f32[H,W,B,C] -> f32[n,m,B,h*w*C]: one shifted slice beside the other."""
    x = lax.pad(x, jnp.zeros((), x.dtype), ((*pads[0], 0), (*pads[1], 0), (0, 0, 0), (0, 0, 0)))
    (rows, columns), (down, right) = outputs, strides
    slices = [
        x[i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        for i in range(patch_size[0])
        for j in range(patch_size[1])
    ]
    return jnp.concatenate(slices, 3)


@jax.custom_vjp
def _product(patches: jax.Array, matrix: jax.Array) -> jax.Array:
    """f32[n,m,B,K], f32[K,D] -> f32[n,m,B,D]."""
    return lax.dot_general(patches, matrix, (((3,), (0,)), ((), ())))


def _product_forward(patches: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(patches, matrix), (patches, matrix)


def _product_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    patches, matrix = saved
    # Written out, for JAX's own rule takes the second product in the order that is 1.9 times slower. Flat, for to
    # contract three axes XLA would turn the patches around in memory.
    dpatches = lax.dot_general(dy, matrix, (((3,), (1,)), ((), ())))
    flat_patches, flat_dy = patches.reshape(-1, patches.shape[3]), dy.reshape(-1, dy.shape[3])
    dmatrix = lax.dot_general(flat_patches, flat_dy, (((0,), (0,)), ((), ())))
    return dpatches, dmatrix


_product.defvjp(_product_forward, _product_backward)


# Winograd's minimal filtering (S. Winograd, Arithmetic complexity of computations, 1980; for networks: A. Lavin and
# S. Gray, Fast algorithms for convolutional neural networks, 2015): polynomials are multiplied by their values.


class _Axis(NamedTuple):
    """One spatial axis as three small matrices: y = outputs @ ((inputs @ x) * (kernel @ w))."""

    tiles: int
    inputs: np.ndarray  # [points * tiles, size]
    kernel: np.ndarray  # [points, kernel_size]
    outputs: np.ndarray  # [output_size, points * tiles]


# One more point lies at infinity. Eight in all keep the error of float32 at about 2e-6 of the result's scale
# (root mean square; a plain sum has 2e-7, bfloat16 4e-3); small reciprocal pairs keep it smallest.
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0, 2.0, -0.5)


@functools.cache
def _winograd_axis(size: int, kernel_size: int, output_size: int, pad: int) -> _Axis:
    """Chooses the outputs per tile that leave the fewest products, and builds the matrices."""
    choices = range(2, len(_POINTS) + 3 - kernel_size)
    tile = min(choices, key=lambda tile: -(-output_size // tile) * (tile + kernel_size - 1))
    points, tiles = tile + kernel_size - 1, -(-output_size // tile)

    def values(terms: int) -> np.ndarray:
        """Evaluates a polynomial with this many terms at the points; at infinity that is its last coefficient."""
        powers = np.array(_POINTS[: points - 1])[:, None] ** np.arange(terms)
        return np.vstack([powers, np.eye(terms)[-1]])

    filtering, weights, data = values(tile), values(kernel_size), np.linalg.inv(values(points)).T
    # Rows of similar size round best: the product of the three rows of a point is all that is fixed.
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


def _winograd_pays(kernel_shape: Sequence[int], window: _Window) -> bool:
    """Measured with kernels of 3 to 7: 0.3 to 0.8 of the patches' time for 4 to 64 channels, 3 times it for one."""
    h, w, c, d = kernel_shape
    return window.strides == (1, 1) and min(h, w) >= 2 and max(h, w) <= len(_POINTS) and min(c, d) >= 4


def _winograd_axes(x: jax.Array, kernel: jax.Array, window: _Window) -> tuple[_Axis, _Axis]:
    def axis(i: int) -> _Axis:
        size, kernel_size = x.shape[i], kernel.shape[i]
        return _winograd_axis(size, kernel_size, window.output_size(i, size, kernel_size), window.pads[i][0])

    return axis(0), axis(1)


def _transform(rows: np.ndarray, columns: np.ndarray, x: jax.Array) -> jax.Array:
    """f32[H,W,...] -> f32[p,q,...], by f32[p,H] and f32[q,W]; each is a matrix product on contiguous memory."""
    # Transposed, and hidden from XLA, which would transpose a constant back: so XLA:CPU takes Eigen's product for it,
    # which is twice as fast at these shapes as YNNPACK's.
    transposed = lax.optimization_barrier(jnp.asarray(rows.T, x.dtype))
    first = lax.dot_general(transposed, x, (((0,), (0,)), ((), ())))
    # A batched product, for an unbatched one would give [q,p,...] and a transposition of it all.
    repeated = jnp.broadcast_to(jnp.asarray(columns, x.dtype), (rows.shape[0], *columns.shape))
    return lax.dot_general(repeated, first, (((2,), (1,)), ((0,), (0,))))


def _winograd(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    """f32[B,H,W,C] -> f32[n,m,B,D] (rows and columns lead, so that a transform is one product) -> f32[B,n,m,D]."""
    y = _winograd_conv(x.transpose(1, 2, 0, 3), kernel, window)
    if (pool := window.pool) > 1:
        rows, columns, b, d = y.shape
        y = _max_of(y.reshape(rows // pool, pool, columns // pool, pool, b, d), (1, 3))
    return y.transpose(2, 0, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _winograd_conv(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    """f32[H,W,B,C], f32[h,w,C,D] -> f32[n,m,B,D]."""
    return _winograd_forward(x, kernel, window)[0]


def _winograd_forward(x: jax.Array, kernel: jax.Array, window: _Window) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rows, columns = _winograd_axes(x, kernel, window)
    batch, c, d = x.shape[2], *kernel.shape[2:]
    # At every point and in every tile a product over channels; the tiles of a row join the batch as its rows.
    data = _transform(rows.inputs, columns.inputs, x).reshape(-1, columns.tiles * batch, c)
    weights = _transform(rows.kernel, columns.kernel, kernel)
    p, q = weights.shape[:2]
    weights = jnp.broadcast_to(weights[:, None], (p, rows.tiles, q, c, d)).reshape(-1, c, d)
    products = lax.dot_general(data, weights, (((2,), (1,)), ((0,), (0,))))
    y = _transform(rows.outputs, columns.outputs, products.reshape(p * rows.tiles, q * columns.tiles, batch, d))
    return y, (x, kernel, data, weights)


def _winograd_backward(window: _Window, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, data, weights = saved  # of x and kernel only the shapes are used, so neither is kept
    rows, columns = _winograd_axes(x, kernel, window)
    batch, c, d = x.shape[2], *kernel.shape[2:]
    p, q = rows.kernel.shape[0], columns.kernel.shape[0]
    # The same products, transposed. Both share the transformed dy.
    dproducts = _transform(rows.outputs.T, columns.outputs.T, dy).reshape(*data.shape[:2], d)
    # Turned around in memory first, for products that contract their rows go to Eigen, which is slow for many small
    # ones: 0.8 ms with the copy and the sum, not 1.05, in the second layer of 64 images (jax 0.10). The barrier keeps
    # XLA from undoing that, and from joining the transform of dy with it.
    turned, dproducts = lax.optimization_barrier((data.transpose(0, 2, 1), dproducts))
    dweights = lax.dot_general(turned, dproducts, (((2,), (1,)), ((0,), (0,)))).reshape(p, rows.tiles, q, c, d).sum(1)
    ddata = lax.dot_general(dproducts, weights, (((2,), (2,)), ((0,), (0,))))
    dx = _transform(rows.inputs.T, columns.inputs.T, ddata.reshape(p * rows.tiles, q * columns.tiles, batch, c))
    return dx, _transform(rows.kernel.T, columns.kernel.T, dweights)


_winograd_conv.defvjp(_winograd_forward, _winograd_backward)
