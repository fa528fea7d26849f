"""Networks that the demo page runs in tests: one for each kind of layer, and one from outside the package."""

import dataclasses

import flax.linen as nn
import jax
import pytest

from mnist_flax.config import Config, replace
from mnist_flax.models import MODELS
from mnist_flax.models.base import ModelConfig
from mnist_flax.models.cleaned import CleanedCNNConfig
from mnist_flax.models.resnet import ResNetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(ModelConfig):
    """A family from outside the package."""

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        return OwnNet(num_classes)


class OwnNet(nn.Module):
    """Operations that no family of the package has: a slice with strides, and a dense layer applied to each pixel."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Dense(6)(x[:, ::2, 1::2]))
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


with pytest.MonkeyPatch.context() as patch:
    patch.setitem(MODELS, "own", OwnConfig)
    OWN = Config(model=OwnConfig())

CONFIGS = {
    "default": Config(),
    "own": OWN,
    "mlp": replace(Config(), model__widths=(), model__pools=(1,), model__dense=(16, 12), model__activation="elu"),
    "batch_norm": replace(
        Config(),
        model__widths=(6, 8),
        model__paddings=("SAME",),
        model__strides=(2, 1),
        model__pooling="avg",
        model__pools=(1, 2),
        model__activation="gelu",
        model__batch_norm=True,
    ),
    "cosine": replace(
        Config(), model__widths=(8, 8), model__pools=(2, 1), model__stem="cosine", model__activation="leaky_relu"
    ),
    "silu": replace(
        Config(), model__widths=(8,), model__pools=(3,), model__kernel_sizes=(5,), model__activation="silu"
    ),
    "resnet": replace(Config(), model=ResNetConfig(widths=(6, 10), blocks=2)),
    "cleaned": replace(Config(), model=CleanedCNNConfig(widths=(6, 8), pools=(2,), dense=(12,), batch_norm=True)),
}
