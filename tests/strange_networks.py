"""Networks that no family of the package has."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class Strange(nn.Module):
    """Layers that no family of the package has."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(6, (3, 3), padding="SAME", kernel_dilation=2)(x)
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.Conv(6, (3, 3), strides=2, feature_group_count=6, padding=((1, 0), (0, 2)))(x)
        x = nn.max_pool(nn.softplus(x), (3, 3), (2, 2), padding="SAME")
        x = nn.avg_pool(x, (2, 2), (2, 2), padding="SAME", count_include_pad=False)
        tokens = jnp.concatenate([self.token(len(x)), x.reshape(len(x), -1, 6)], 1)
        x = nn.LayerNorm()(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(x)
        left, right = jnp.split(nn.Dense(8)(x[:, 0]), 2, axis=-1)
        return nn.Dense(10)(jnp.clip(left, -1, 1) * nn.sigmoid(right))

    def token(self, count: int) -> Array:
        token = self.param("token", nn.initializers.normal(1), (1, 1, 6))
        return jnp.broadcast_to(token, (count, 1, 6))


class Numbered(nn.Module):
    """Weights whose names end in numbers."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first = self.param("w_1", nn.initializers.normal(), (784, 16))
        second = self.param("w_2", nn.initializers.normal(), (16, 10))
        return x.reshape(x.shape[0], -1) @ first @ second


class Normalised(nn.Module):
    """A weight that is computed from another, by an operation that pixels go through as well."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(), (784, 10))
        return (x / 2).reshape(x.shape[0], -1) @ (kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True))
