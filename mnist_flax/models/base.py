"""The base class of all model families: common config fields, and the interface to the rest of the package."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn

from mnist_flax.checks import among, within
from mnist_flax.models.layers import ACTIVATIONS, DTYPES, INITIALIZERS, PRECISIONS


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields that all families share. A family is a subclass that may add fields; `MODELS` lists the families.

    Attributes:
      activation: a key of `ACTIVATIONS`.
      init: a key of `INITIALIZERS`, for all kernels; biases start at 0.
      dropout: dropout rate on the input of the last layer.
      dtype: compute dtype of convolutions and matrix products, `float32` or `bfloat16`. Weights, statistics, the last
        layer, the loss and every sum over a batch stay in float32.
      matmul_precision: precision of float32 products: `default` is the device's fastest (TF32 on NVIDIA GPUs, bfloat16
        on TPUs, float32 on CPUs), `highest` is float32 everywhere, `high` is between the two.
      pixel_mean, pixel_std: inputs are (pixel / 255 - mean) / std; mean 0 and std 1 give inputs in [0, 1].
    """

    activation: str = "relu"
    init: str = "glorot_uniform"
    dropout: float = 0.0
    dtype: str = "float32"
    matmul_precision: str = "default"
    pixel_mean: float = 0.0
    pixel_std: float = 1.0

    def check(self, size: int) -> Iterator[str]:
        """Yields a message for each invalid value; `size` is the side of an image in pixels. Families add checks."""
        yield from among("model.activation", self.activation, ACTIVATIONS)
        yield from among("model.init", self.init, INITIALIZERS)
        yield from among("model.dtype", self.dtype, DTYPES)
        yield from among("model.matmul_precision", self.matmul_precision, PRECISIONS)
        yield from within("model.dropout", self.dropout, 0, 1, open_high=True)
        yield from within("model.pixel_std", self.pixel_std, 0, open_low=True)

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        """Builds the network, whose `__call__(x, mask=None)` maps scaled pixels to logits: f32[B,H,W,1] -> f32[B,C].

        In training it draws dropout masks (rng stream `dropout`), normalises with batch statistics and updates the
        running statistics; `mask`, bool[B], then marks the rows that are examples rather than padding.
        """
        raise NotImplementedError(f"{type(self).__name__} must define module()")

    def seen_size(self, size: int) -> int:
        """Returns the side of the top-left square of pixels that the logits depend on; by default the whole image.

        A family whose logits depend on a smaller square can return that side: `step.crop` then drops the other pixels.
        """
        return size
