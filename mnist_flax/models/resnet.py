"""Small residual networks with batch norm and pre-activation (He et al., 2016, "Identity Mappings")."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from mnist_flax.checks import within
from mnist_flax.models.base import ModelConfig
from mnist_flax.models.layers import ACTIVATIONS, DTYPES, INITIALIZERS, BatchNorm, Conv, Dense, Dropout


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(ModelConfig):
    """A stem convolution, stages of residual blocks, global average pooling, one logit for each class.

    All convolutions have 3x3 kernels and SAME padding; shortcuts that change the shape have 1x1 kernels. Each stage
    begins with a max pooling that halves the side. A convolution of stride 2 would do this too, but it takes longer on
    a CPU.

    Attributes:
      stem_width: channels of the first convolution.
      widths: channels of each stage.
      blocks: residual blocks in each stage.
    """

    stem_width: int = 16
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    init: str = "he_normal"

    def check(self, size: int) -> Iterator[str]:
        """Yields a message for each invalid value."""
        yield from super().check(size)
        yield from within("model.stem_width", self.stem_width, 1)
        yield from within("model.blocks", self.blocks, 1)
        if not self.widths or any(width < 1 for width in self.widths):
            yield f"config.model.widths = {self.widths}: give at least one stage, each of at least one channel"
        if 2 ** len(self.widths) > size:
            yield f"config.model.widths = {self.widths}: has more stages than a {size}x{size} image can be halved"

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        """Builds the network."""
        return ResNet(self, num_classes, train)


class ResNet(nn.Module):
    """The network of a `ResNetConfig`."""

    config: ResNetConfig
    num_classes: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps scaled pixels to logits, `f32[B,H,W,1] -> f32[B,C]`."""
        config = self.config
        shared: dict[str, Any] = {"kernel_init": INITIALIZERS[config.init], "precision": config.matmul_precision}
        conv = partial(Conv, kernel_size=3, use_bias=False, train=self.train, dtype=DTYPES[config.dtype], **shared)
        norm = partial(BatchNorm, activation=ACTIVATIONS[config.activation], train=self.train)

        x = conv(features=config.stem_width)(x)
        for width in config.widths:
            for block in range(config.blocks):
                y = norm(pool=1 if block else 2)(x, mask)
                if not block:  # the shortcut must change shape
                    x = conv(features=width, kernel_size=1)(y)
                y = norm()(conv(features=width)(y), mask)
                x = x + conv(features=width)(y)
        x = norm()(x, mask).mean((1, 2))
        if config.dropout:
            x = Dropout(config.dropout, self.train)(x)
        return Dense(self.num_classes, dtype=jnp.float32, **shared)(x)
