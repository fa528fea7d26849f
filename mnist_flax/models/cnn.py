"""The network: a linen CNN built from `ModelConfig`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mnist_flax import rng
from mnist_flax.config import Config, ModelConfig
from mnist_flax.ops import conv as ops

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "tanh": nn.tanh,
    "gelu": nn.gelu,
    "silu": nn.silu,
}
NON_DECREASING = ("relu", "leaky_relu", "elu", "tanh")

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

INITIALIZERS: dict[str, nn.initializers.Initializer] = {
    "glorot_uniform": nn.initializers.glorot_uniform(),  # Glorot and Bengio, 2010
    "glorot_normal": nn.initializers.glorot_normal(),
    "he_uniform": nn.initializers.he_uniform(),  # He et al., 2015
    "he_normal": nn.initializers.he_normal(),
    "lecun_uniform": nn.initializers.lecun_uniform(),  # LeCun et al., 1998
    "lecun_normal": nn.initializers.lecun_normal(),
}


def cosine_patterns(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Returns a fixed first kernel, `f32[k,k,1,D]`: the patterns of the discrete cosine transform, and their negatives.

    They come smoothest first, each of length 1. Cosines are close to what decorrelates the pixels of small patches of
    images (Ahmed, Natarajan and Rao, 1974), so they stand in for kernels that whiten, as Jordan (2024, `94% on CIFAR-10
    in 3.29 seconds on a single GPU`) takes them from the data; ReLU lets both signs through.

    Args:
      key: not used; an initialiser has one.
      shape: `(k, k, 1, D)`, D at most 2 k^2.
      dtype: of the result.
    """
    del key
    size, width = shape[0], shape[3]
    waves = np.cos(np.pi * np.outer(np.arange(size), np.arange(size) + 0.5) / size)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    frequencies = sorted(np.ndindex(size, size), key=lambda f: f[0] ** 2 + f[1] ** 2)
    patterns = [sign * np.outer(waves[u], waves[v]) for u, v in frequencies for sign in (1, -1)]
    return jnp.asarray(np.stack(patterns[:width], -1)[:, :, None], dtype)


def scale_pixels(config: ModelConfig, images: Array) -> Array:
    """Turns grey values into the network's input, `u8[B,28,28,1] -> f32[B,28,28,1]`: the one place where it happens."""
    return (images.astype(jnp.float32) / 255.0 - config.pixel_mean) / config.pixel_std


def crop(config: ModelConfig, images: Array) -> Array:
    """Cuts off the pixels that no logit depends on, `u8[B,28,28,1] -> u8[B,S,S,1]`.

    Not computing what becomes of them saves a sixth of the arithmetic of the classic networks. It is done before the
    network, and not in it, so that its table and its activations can be of whole images.
    """
    size = config.seen_size()
    return images[:, :size, :size]


def operands(*args: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Gives what is multiplied its type, and leaves the bias in float32, for its gradient is a sum over the batch."""
    del inexact  # what linen's own function, whose place this takes, asks for
    inputs, kernel, bias = args
    return [inputs.astype(dtype), kernel.astype(dtype), bias]


class Dropout(nn.Module):
    """Zeroes a share `rate` of the features and scales up the rest, for training (Srivastava et al., 2014).

    Unlike `nn.Dropout` it draws each example's mask from a key of its own, so that the masks do not depend on how a
    batch is split over devices. The rng stream `dropout` holds a key for each example, `key[B]`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns `x` thinned out, `f32[B,...] -> f32[B,...]`."""
        # 16 random bits decide well enough (the rate is off by less than 1e-5) and cost half of 32.
        dropped = round(self.rate * 2**16)
        keys = rng.per_example(self.make_rng("dropout"), len(x))
        bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))(keys)
        return jnp.where(bits >= dropped, x / (1.0 - self.rate), 0.0)


class Bias(nn.Module):
    """Adds a learned number to each channel."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Adds the bias, `f32[...,C] -> f32[...,C]`."""
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (x + jnp.expand_dims(bias, range(x.ndim - 1))).astype(x.dtype)  # added, and its gradient summed, in f32


class CNN(nn.Module):
    """Convolution blocks, hidden dense layers, and one logit a class.

    Attributes:
      config: the layers.
      num_classes: C.
      train: draw dropout masks (rng stream `dropout`), and use and update the batch's statistics.
    """

    config: ModelConfig
    num_classes: int
    train: bool = False

    @nn.compact
    def __call__(self, images: Array, mask: Array | None = None) -> Array:
        """Computes the logits, `u8[B,28,28,1] -> f32[B,C]`.

        Args:
          images: grey values from 0 (paper) to 255 (ink).
          mask: `bool[B]`, which rows are examples; all, if not given. Only batch norm in training looks at it.
        """
        config = self.config
        kernel_init = INITIALIZERS[config.init]
        activation = ACTIVATIONS[config.activation]
        pool = {"max": ops.max_pool, "avg": ops.avg_pool}[config.pooling]
        # A maximum commutes with adding a bias and with a non-decreasing activation: pooled first, they touch a quarter
        # of the values and give the same result. Batch norm keeps a place between convolution and pooling.
        pool_first = config.pooling == "max" and config.activation in NON_DECREASING
        pool_at_once = pool_first and not config.batch_norm

        dtype = DTYPES[config.dtype]
        dense = partial(nn.Dense, kernel_init=kernel_init, precision=config.matmul_precision, promote_dtype=operands)

        x = scale_pixels(config, images)
        for i, block in enumerate(config.blocks()):
            is_fixed = i == 0 and config.stem == "cosine"
            convolve = partial(
                ops.conv_general_dilated,
                max_pool_size=block.pool if pool_at_once else 1,
                inference=not self.train,
            )
            x = nn.Conv(
                block.width,
                (block.kernel_size, block.kernel_size),
                strides=block.stride,
                padding=block.padding,
                use_bias=False,
                dtype=dtype,
                precision=config.matmul_precision,
                kernel_init=cosine_patterns if is_fixed else kernel_init,
                # A kernel that never changes needs no gradient: where all pixels are, that is a third of the work.
                conv_general_dilated=_with_fixed_kernel(convolve) if is_fixed else convolve,
            )(x)
            if config.batch_norm:
                x = self._normalize(x, mask)
                if pool_first:
                    x = pool(x, block.pool)
            elif not is_fixed:  # a bias would need the gradient by all that the fixed layer makes
                x = Bias()(x)
            x = activation(x)
            if not pool_first:
                x = pool(x, block.pool)
            x = self._drop(x, config.conv_dropout)
        x = x.reshape(len(x), -1)
        for width in config.dense:
            x = dense(width, use_bias=not config.batch_norm, dtype=dtype)(x).astype(dtype)
            if config.batch_norm:
                x = self._normalize(x, mask)
            x = activation(x)
        x = self._drop(x, config.dropout)
        return dense(self.num_classes, dtype=jnp.float32)(x)

    def _normalize(self, x: Array, mask: Array | None) -> Array:
        """Normalises over the batch's examples (Ioffe and Szegedy, 2015), with running statistics at test time."""
        if mask is not None:
            mask = mask.reshape(-1, *[1] * (x.ndim - 1))
        return nn.BatchNorm(use_running_average=not self.train, dtype=x.dtype)(x, mask=mask)

    def _drop(self, x: Array, rate: float) -> Array:
        return Dropout(rate)(x) if self.train and rate else x


def _with_fixed_kernel(convolve: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, kernel, *args, **kwargs: convolve(x, jax.lax.stop_gradient(kernel), *args, **kwargs)


def build(config: Config, *, train: bool = False) -> CNN:
    """Returns the network of a config, with as many logits as its dataset has classes."""
    return CNN(config.model, config.num_classes, train)
