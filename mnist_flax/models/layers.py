"""The layers that model families are built from: linen modules that call `ops`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mnist_flax import rng
from mnist_flax.ops.conv import conv_block
from mnist_flax.ops.norm import norm_activate_pool, normalize
from mnist_flax.ops.pool import activate_pool

NORM_MOMENTUM = 0.99  # the fraction of batch norm's running averages that each step keeps

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "tanh": nn.tanh,
    "gelu": nn.gelu,
    "silu": nn.silu,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

PRECISIONS = ("default", "high", "highest")

INITIALIZERS: dict[str, nn.initializers.Initializer] = {
    "glorot_uniform": nn.initializers.glorot_uniform(),  # Glorot and Bengio (2010)
    "glorot_normal": nn.initializers.glorot_normal(),
    "he_uniform": nn.initializers.he_uniform(),  # He et al. (2015)
    "he_normal": nn.initializers.he_normal(),
    "lecun_uniform": nn.initializers.lecun_uniform(),  # LeCun et al. (1998)
    "lecun_normal": nn.initializers.lecun_normal(),
}


class Conv(nn.Module):
    """A convolution, then an activation, then pooling; `ops.conv.conv_block` chooses the fastest order.

    Attributes:
      kernel_size: side of the square kernel, in pixels.
      padding: `VALID` or `SAME`.
      activation: applied after the bias, before pooling.
      pool: side and stride of the pooling window; 1 means no pooling.
      pooling: `max` or `avg`.
      fixed_kernel: a kernel to use instead of a learned one. Its gradient is not computed, which saves a third of the
        work of a first layer.
      train: use the form that is fastest in training, not the one with the fastest forward pass for few images.
      dtype: dtype of the operands.
      precision: precision of their product.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: str = "SAME"
    use_bias: bool = True
    activation: Callable[[Array], Array] | None = None
    pool: int = 1
    pooling: str = "max"
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    fixed_kernel: np.ndarray | None = None
    train: bool = False
    dtype: Any = jnp.float32
    precision: str = "default"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `f32[B,H,W,C] -> f32[B,H',W',features]`."""
        if self.fixed_kernel is None:
            shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
            kernel = self.param("kernel", self.kernel_init, shape)
        else:
            kernel = jnp.asarray(self.fixed_kernel)
            self.sow("intermediates", "kernel", kernel)  # lets callers inspect it; it is not a parameter
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return conv_block(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            bias,
            strides=(self.stride, self.stride),
            padding=self.padding,
            activation=self.activation,
            pool=self.pool,
            pooling=self.pooling,
            precision=self.precision,
            inference=not self.train,
        )


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy, 2015), then an activation, then pooling.

    Training normalises with the mean and variance of the batch's examples and moves the running averages towards them;
    evaluation normalises with the running averages.

    Activation and pooling are as in `Conv`.
    """

    activation: Callable[[Array], Array] | None = None
    pool: int = 1
    pooling: str = "max"
    train: bool = False
    momentum: float = NORM_MOMENTUM
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps `f32[B,...,C] -> f32[B,...,C]`, pooled; `mask`, `bool[B]`, marks the rows that are examples."""
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        if not self.train:
            y = normalize(x, scale, bias, mean.value, var.value, eps=self.eps)
            return activate_pool(y, self.activation, self.pool, self.pooling)
        after: dict[str, Any] = {"activation": self.activation, "pool": self.pool, "pooling": self.pooling}
        y, batch_mean, batch_var = norm_activate_pool(x, scale, bias, mask, eps=self.eps, **after)
        mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
        var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return y


class Dense(nn.Module):
    """A dense layer, `f32[B,D] -> f32[B,features]`; the bias is added in float32, because its gradient sums a batch."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    dtype: Any = jnp.float32
    precision: str = "default"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Multiplies by the kernel and adds the bias."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype), precision=self.precision)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))[None]
        return y.astype(self.dtype)


class Dropout(nn.Module):
    """Zeroes each feature with probability `rate` and scales up the rest, in training only (Srivastava et al., 2014).

    Unlike in `nn.Dropout`, each example has its own key, so the masks do not depend on how a batch is split over
    devices.
    """

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `f32[B,...] -> f32[B,...]`."""
        if not self.train:
            return x
        # 16 random bits are enough (the rate is off by less than 1e-5). JAX would draw 32 for each and throw half away.
        dropped = min(round(self.rate * 2**16), 2**16 - 1)
        keys = rng.per_example(self.make_rng("dropout"), x.shape[0])
        features = math.prod(x.shape[1:])
        words = jax.vmap(lambda key: jax.random.bits(key, (-(-features // 2),)))(keys)
        bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(x.shape[0], -1)[:, :features].reshape(x.shape)
        return jnp.where(bits >= dropped, x / (1.0 - self.rate), 0.0)


def flatten(x: Array) -> Array:
    """Joins all axes but the first, `f32[B,...] -> f32[B,D]`; B may be 0."""
    return x.reshape(x.shape[0], int(np.prod(x.shape[1:])))


def cosine_patterns(size: int, count: int) -> np.ndarray:
    """Returns kernels for a fixed first layer, `f32[size,size,1,count]`: cosine patterns and their negatives.

    These are the `size**2` patterns of the discrete cosine transform, lowest frequency first, each with norm 1. A ReLU
    needs both signs. Cosines nearly decorrelate the pixels of small image patches (Ahmed, Natarajan and Rao, 1974), so
    they can replace the whitening kernels that Jordan (2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU")
    computes from the data.
    """
    waves = np.cos(np.pi * np.outer(np.arange(size), np.arange(size) + 0.5) / size)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    frequencies = sorted(np.ndindex(size, size), key=lambda f: f[0] ** 2 + f[1] ** 2)[: -(-count // 2)]
    patterns: Sequence[np.ndarray] = [sign * np.outer(waves[u], waves[v]) for u, v in frequencies for sign in (1, -1)]
    return np.stack(patterns[:count], -1)[:, :, None].astype(np.float32)
