"""What every model family has: its config's common fields, and the contract with the rest of the package."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn

from mnist_flax.checks import among, within
from mnist_flax.models.layers import ACTIVATIONS, DTYPES, INITIALIZERS, PRECISIONS


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields that all families share. A family is a subclass with fields of its own, listed in `MODELS`.

    Attributes:
      activation: a key of `ACTIVATIONS`.
      init: a key of `INITIALIZERS`, for all kernels; biases start at 0.
      dropout: rate on the input of the last layer.
      dtype: `float32` or `bfloat16`, of the operands of convolutions and matrix products. Weights, statistics, the last
        layer, the loss and every sum over a batch stay in float32.
      matmul_precision: of float32 products: `default` is the device's fastest (TF32 on NVIDIA GPUs, bfloat16 on TPUs,
        float32 on CPUs), `highest` is float32 everywhere, `high` lies between.
      pixel_mean, pixel_std: pixels become (value / 255 - mean) / std; 0 and 1 leave them in [0, 1].
    """

    activation: str = "relu"
    init: str = "glorot_uniform"
    dropout: float = 0.0
    dtype: str = "float32"
    matmul_precision: str = "default"
    pixel_mean: float = 0.0
    pixel_std: float = 1.0

    def check(self, size: int) -> Iterator[str]:
        """Yields a message for each wrong value, given the side of an image in pixels. A family adds its own checks."""
        yield from among("model.activation", self.activation, ACTIVATIONS)
        yield from among("model.init", self.init, INITIALIZERS)
        yield from among("model.dtype", self.dtype, DTYPES)
        yield from among("model.matmul_precision", self.matmul_precision, PRECISIONS)
        yield from within("model.dropout", self.dropout, 0, 1, open_high=True)
        yield from within("model.pixel_std", self.pixel_std, 0, open_low=True)

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        """Builds the network, whose `__call__(x, mask=None)` maps scaled pixels to logits: f32[B,H,W,1] -> f32[B,C].

        Args:
          num_classes: C.
          train: draw dropout masks (rng stream `dropout`), and use and update the batch's statistics. `mask` is then
            `bool[B]` and says which rows are examples.
        """
        raise NotImplementedError(f"{type(self).__name__} must define module()")

    def seen_size(self, size: int) -> int:
        """Returns the side of the square, from the upper left corner, that the logits depend on: here the whole image.

        A family that can prove a smaller one saves the work on the pixels outside it.
        """
        return size
