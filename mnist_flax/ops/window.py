"""How a convolution and the pooling after it walk over an image."""

from typing import NamedTuple

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
