"""Plain convolutional networks: convolution blocks, hidden dense layers, one logit for each class."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from mnist_flax.checks import among, within
from mnist_flax.models import layers
from mnist_flax.models.base import ModelConfig
from mnist_flax.models.layers import BatchNorm, Conv, Dense, Dropout
from mnist_flax.ops.pool import POOLINGS


@dataclass(frozen=True, kw_only=True)
class CNNConfig(ModelConfig):
    """Each block is a convolution, optional batch norm, an activation, pooling and optional dropout.

    Each of `kernel_sizes`, `strides`, `paddings` and `pools` holds one value per convolution, or one value for all.
    Without batch norm, the network is given only the rows and columns that some logit depends on: 26x26 of the 28x28
    pixels for two 3x3 convolutions without padding, each with a 2x2 pooling, because the second pooling drops a row and
    a column.

    Attributes:
      widths: output channels of each convolution; empty for a multilayer perceptron.
      kernel_sizes: side of each square kernel, in pixels.
      strides: stride of each convolution, in pixels.
      paddings: `VALID` or `SAME`, for each convolution.
      pools: side and stride of the pooling window after each convolution; 1 means none.
      pooling: `max` or `avg`.
      dense: widths of the hidden dense layers.
      stem: `learned`, or `cosine` for a fixed first convolution with cosine patterns and no bias.
      batch_norm: normalise the output of each convolution and hidden dense layer before the activation.
      conv_dropout: dropout rate at the end of each convolution block.
    """

    widths: tuple[int, ...] = (32, 64, 64)
    kernel_sizes: tuple[int, ...] = (3,)
    strides: tuple[int, ...] = (1,)
    paddings: tuple[str, ...] = ("VALID",)
    pools: tuple[int, ...] = (2, 2, 1)
    pooling: str = "max"
    dense: tuple[int, ...] = (64,)
    stem: str = "learned"
    batch_norm: bool = False
    conv_dropout: float = 0.0

    def blocks(self) -> tuple["ConvBlock", ...]:
        """Returns the convolution blocks, with single values repeated for all of them."""
        per_block = (self.kernel_sizes, self.strides, self.paddings, self.pools)
        count = len(self.widths)
        columns = [column * count if len(column) == 1 else column for column in per_block]
        return tuple(ConvBlock(*row) for row in zip(self.widths, *columns, strict=True))

    def seen_size(self, size: int) -> int:
        """Returns the side of the top-left square of pixels that the logits depend on.

        Strides and pooling drop a remainder at the lower right: 2 of 28 pixels for two or three unpadded 3x3
        convolutions with pooling by 2. A SAME convolution depends on its whole input, batch norm on the whole image.
        """
        if self.batch_norm:
            return size
        sizes = [size]
        for block in self.blocks():
            sizes.append(block.output_size(sizes[-1]))
        seen = sizes.pop()
        for block, before in zip(reversed(self.blocks()), reversed(sizes), strict=True):
            seen = before if block.padding == "SAME" else (seen * block.pool - 1) * block.stride + block.kernel_size
        return seen

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        """Builds the network."""
        return CNN(self, num_classes, train)

    def check(self, size: int) -> Iterator[str]:
        """Yields a message for each invalid value."""
        yield from super().check(size)
        yield from among("model.pooling", self.pooling, POOLINGS)
        yield from among("model.stem", self.stem, ("learned", "cosine"))
        yield from within("model.conv_dropout", self.conv_dropout, 0, 1, open_high=True)
        wrong = list(self._check_tuples())
        yield from wrong or self._check_sizes(size)

    def _check_tuples(self) -> Iterator[str]:
        for name in ("kernel_sizes", "strides", "paddings", "pools"):
            values = getattr(self, name)
            if len(values) not in (1, len(self.widths)):
                yield (
                    f"config.model.{name} = {values}: has {len(values)} values for {len(self.widths)} convolutions;"
                    " give one for each, or one for all"
                )
        for name in ("widths", "kernel_sizes", "strides", "pools", "dense"):
            if any(value < 1 for value in getattr(self, name)):
                yield f"config.model.{name} = {getattr(self, name)}: every value must be at least 1"
        if not set(self.paddings) <= {"VALID", "SAME"}:
            yield f"config.model.paddings = {self.paddings}: each must be 'VALID' or 'SAME'"

    def _check_sizes(self, size: int) -> Iterator[str]:
        """Yields messages about sizes that do not fit, following an image through the layers."""
        if self.stem == "cosine" and not self.widths:
            yield "config.model.stem = 'cosine': needs a convolution; give config.model.widths a value"
        for i, block in enumerate(self.blocks()):
            if i == 0 and self.stem == "cosine" and block.width > 2 * block.kernel_size**2:
                yield (
                    f"config.model.stem = 'cosine': a {block.kernel_size}x{block.kernel_size} kernel has only"
                    f" {2 * block.kernel_size**2} patterns, not {block.width}; use a larger kernel or a smaller width"
                )
            conv_size = block.conv_size(size)
            if conv_size < 1:
                yield (
                    f"config.model.kernel_sizes: the {block.kernel_size}x{block.kernel_size} kernel of convolution"
                    f" {i + 1} is larger than its {size}x{size} feature map; use a smaller kernel, padding 'SAME', or"
                    " less pooling"
                )
                return
            size = conv_size // block.pool
            if size < 1:
                yield (
                    f"config.model.pools: the {block.pool}x{block.pool} pooling of convolution {i + 1} is larger than"
                    f" its {conv_size}x{conv_size} feature map; use a smaller window, or 1 for none"
                )
                return


class ConvBlock(NamedTuple):
    """One convolution and its pooling, sizes in pixels."""

    width: int
    kernel_size: int
    stride: int
    padding: str
    pool: int

    def conv_size(self, size: int) -> int:
        """Returns the side of the convolution's output for an input of side `size`; below 1 if the kernel is larger."""
        covered = 0 if self.padding == "SAME" else self.kernel_size - 1
        return -((covered - size) // self.stride)

    def output_size(self, size: int) -> int:
        """Returns the side after pooling, which drops incomplete windows."""
        return self.conv_size(size) // self.pool


class CNN(nn.Module):
    """The network of a `CNNConfig`."""

    config: CNNConfig
    num_classes: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps scaled pixels to logits, `f32[B,H,W,1] -> f32[B,C]`."""
        config, train = self.config, self.train
        activation, dtype = layers.ACTIVATIONS[config.activation], layers.DTYPES[config.dtype]
        init = layers.INITIALIZERS[config.init]
        shared: dict[str, Any] = {"kernel_init": init, "precision": config.matmul_precision}

        for i, block in enumerate(config.blocks()):
            is_fixed = i == 0 and config.stem == "cosine"
            patterns = layers.cosine_patterns(block.kernel_size, block.width) if is_fixed else None
            conv = partial(
                Conv, block.width, block.kernel_size, block.stride, block.padding,
                fixed_kernel=patterns, train=train, dtype=dtype, **shared,
            )  # fmt: skip
            ending: dict[str, Any] = {"activation": activation, "pool": block.pool, "pooling": config.pooling}
            if config.batch_norm:
                x = BatchNorm(train=train, **ending)(conv(use_bias=False)(x), mask)
            else:
                x = conv(use_bias=not is_fixed, **ending)(x)
            if config.conv_dropout:
                x = Dropout(config.conv_dropout, train)(x)

        x = layers.flatten(x)
        for width in config.dense:
            x = Dense(width, use_bias=not config.batch_norm, dtype=dtype, **shared)(x)
            x = BatchNorm(activation=activation, train=train)(x, mask) if config.batch_norm else activation(x)
        if config.dropout:
            x = Dropout(config.dropout, train)(x)
        return Dense(self.num_classes, dtype=jnp.float32, **shared)(x)
