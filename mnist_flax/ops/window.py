"""The window of a convolution with the pooling after it, and the axis order of the CPU forms (see `conv.py`)."""

from typing import NamedTuple

import jax

Pair = tuple[int, int]


class Window(NamedTuple):
    """The strides and padding of a convolution, and the size of the max-pooling windows after it."""

    strides: Pair
    pads: tuple[Pair, Pair]
    pool: int

    def output_size(self, axis: int, size: int, kernel_size: int) -> int:
        """Returns the convolution's output size along one spatial axis, rounded down to a multiple of `pool`."""
        padded = size + sum(self.pads[axis])
        return max((padded - kernel_size) // self.strides[axis] + 1, 0) // self.pool * self.pool


def rows_first(x: jax.Array) -> jax.Array:
    """f32[B,H,W,C] -> f32[H,W,B,C]: in this order each of Winograd's transforms is a single matrix product.

    Every CPU form starts with this and ends with `batch_first`. Between consecutive forms XLA cancels the two
    transposes, so nothing is transposed in memory within a chain of convolution, normalisation and pooling.
    """
    return x.transpose(1, 2, 0, 3)


def batch_first(x: jax.Array) -> jax.Array:
    """f32[H,W,B,C] -> f32[B,H,W,C]."""
    return x.transpose(2, 0, 1, 3)


def split_windows(x: jax.Array, size: int) -> jax.Array:
    """Splits images into windows and drops the remainder: f32[H,W,B,C] -> f32[H//size,size,W//size,size,B,C]."""
    h, w, b, c = x.shape
    rows, columns = h // size, w // size
    return x[: rows * size, : columns * size].reshape(rows, size, columns, size, b, c)
