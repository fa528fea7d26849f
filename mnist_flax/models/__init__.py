"""Model families: one file each, with its config, its checks and its linen module.

A new family is one file with a subclass of `ModelConfig`, and one entry here.
"""

from mnist_flax.models.base import ModelConfig
from mnist_flax.models.cleaned import CleanedCNNConfig
from mnist_flax.models.cnn import CNNConfig
from mnist_flax.models.resnet import ResNetConfig

MODELS: dict[str, type[ModelConfig]] = {
    "cnn": CNNConfig,
    "cleaned_cnn": CleanedCNNConfig,
    "resnet": ResNetConfig,
}
