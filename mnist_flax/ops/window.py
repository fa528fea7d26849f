"""How a convolution and the pooling after it walk over an image, and the order of axes that the CPU forms share."""

from typing import NamedTuple

import jax

Pair = tuple[int, int]


class Window(NamedTuple):
    """How a convolution, and the max-pooling after it, walk over rows and columns."""

    strides: Pair
    pads: tuple[Pair, Pair]
    pool: int

    def output_size(self, axis: int, size: int, kernel_size: int) -> int:
        """Counts the outputs along one spatial axis that the pooling uses (pooling cuts the remainder)."""
        padded = size + sum(self.pads[axis])
        return max((padded - kernel_size) // self.strides[axis] + 1, 0) // self.pool * self.pool


def rows_first(x: jax.Array) -> jax.Array:
    """f32[B,H,W,C] -> f32[H,W,B,C], where Winograd's transforms are single matrix products.

    Every CPU form starts with this and ends with `batch_first`. Between two of them XLA cancels the pair, so a chain of
    convolution, normalisation and pooling transposes nothing in memory.
    """
    return x.transpose(1, 2, 0, 3)


def batch_first(x: jax.Array) -> jax.Array:
    """f32[H,W,B,C] -> f32[B,H,W,C]."""
    return x.transpose(2, 0, 1, 3)


def split_windows(x: jax.Array, size: int) -> jax.Array:
    """Cuts rows and columns that fill no window: f32[H,W,B,C] -> f32[H//size,size,W//size,size,B,C]."""
    h, w, b, c = x.shape
    rows, columns = h // size, w // size
    return x[: rows * size, : columns * size].reshape(rows, size, columns, size, b, c)
