"""The peers of bench_peers.py, and the configs that each of them supports."""

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from mnist_flax.config import Config, differences, replace
from mnist_flax.errors import ConfigError


class Peer(NamedTuple):
    """A program in scripts/peers/, one of its variants, and what it needs.

    Attributes:
      module: its module in scripts/peers/.
      variant: its `--variant`.
      packages: the packages of its environment.
      any_network: whether it supports any `cnn` and `resnet`, or only the network of `three_conv_adam`.
      distorts: whether it supports rotating, scaling and shearing.
    """

    module: str
    variant: str = ""
    packages: tuple[str, ...] = ()
    any_network: bool = True
    distorts: bool = False


PYTORCH = ("torch==2.13.0", "numpy")
PEERS = {
    "pytorch_eager": Peer("pytorch", "eager", PYTORCH, distorts=True),
    "pytorch_channels_last": Peer("pytorch", "channels_last", PYTORCH, distorts=True),
    "pytorch_compiled": Peer("pytorch", "compiled", PYTORCH, distorts=True),
    "keras": Peer("keras", packages=("tensorflow==2.21.0", "keras==3.15.0")),
    "flax": Peer(
        "flax",
        packages=tuple(f"{name}=={version(name)}" for name in ("jax", "jaxlib", "flax", "optax")),
        any_network=False,
    ),
}

# The peers support only these values of these fields of `config.model`, and any value of its other fields.
NETWORK = {
    "activation": "relu",
    "pooling": "max",
    "stem": "learned",
    "dtype": "float32",
    "matmul_precision": "default",
    "pixel_mean": 0.0,
    "pixel_std": 1.0,
}
DISTORTIONS = ("augment.rotate", "augment.scale", "augment.shear")

# The other fields that the peers support, with the supported values (empty: all). All remaining fields must have their
# defaults.
FOLLOWED: dict[str, tuple[str, ...]] = {
    "data.name": (),
    "data.num_train": (),
    "data.holdout": (),
    "model.init": ("glorot_uniform", "he_normal"),
    "augment.shift": (),
    "optimizer.name": ("adam", "adamw"),
    "optimizer.learning_rate": (),
    "optimizer.weight_decay": (),
    "optimizer.schedule": ("constant", "one_cycle"),
    "optimizer.peak_at": (),
    "optimizer.start_fraction": (),
    "train.batch_size": (),
    "train.epochs": (),
    "train.label_smoothing": (),
}


def check(config: Config, names: Sequence[str] = tuple(PEERS)) -> None:
    """Checks that these peers support a config.

    Raises:
      ConfigError: a field has a value that a peer does not support.
    """
    for name, known in FOLLOWED.items():
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if known and value not in known:
            raise ConfigError(f"config.{name} = {value!r}: the peers know only {' and '.join(known)}")
    if config.num_classes != 10:
        raise ConfigError(f"config.data.name = {config.data.name!r}: the peers know only datasets of 10 classes")
    if config.optimizer.name == "adam" and config.optimizer.weight_decay:
        raise ConfigError(
            f"config.optimizer.weight_decay = {config.optimizer.weight_decay}: the peers need adamw for it"
        )
    sizes, paddings = getattr(config.model, "kernel_sizes", ()), getattr(config.model, "paddings", ())
    if "SAME" in paddings and any(size % 2 == 0 for size in sizes):
        raise ConfigError(f"config.model.kernel_sizes = {sizes}: the peers need odd sizes for padding SAME")
    for peer in names:
        for field, (known_value, value) in differences(_as_followed(config, PEERS[peer]), config).items():
            raise ConfigError(f"config.{field} = {value!r}: {peer} knows only {known_value!r}")


def _as_followed(config: Config, peer: Peer) -> Config:
    """Returns the config with the fields that a peer does not support set to their defaults."""
    names = (*FOLLOWED, *(DISTORTIONS if peer.distorts else ()))
    fields = {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in names}
    followed = replace(Config(seed=config.seed), **{name.replace(".", "__"): value for name, value in fields.items()})
    if not peer.any_network:
        return followed
    own = {field.name for field in dataclasses.fields(config.model)}
    known: dict[str, Any] = {name: value for name, value in NETWORK.items() if name in own}
    return dataclasses.replace(followed, model=dataclasses.replace(config.model, **known))
