"""Networks from outside the package: a mistake in one gets a message that names its line."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from jax import Array

from mnist_flax.config import Config
from mnist_flax.errors import ConfigError
from mnist_flax.models import MODELS
from mnist_flax.models.base import ModelConfig
from mnist_flax.step import state_shapes

pytestmark = pytest.mark.smoke


class Odd(nn.Module):
    """A network with one of several mistakes."""

    mistake: str
    train: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Any:
        channels = nn.Dense(4)(x.mean((1, 2)))
        x = nn.Conv(4, (3, 3))(x)
        match self.mistake:
            case "axis":  # works for a single image
                x = x * channels[:, None, :]
            case "training":
                x = x / len(x) if not self.train else self.undefined(x)
            case "batch":
                return nn.Dense(10)(x.mean((0, 1, 2)))[None]
            case "tuple":
                return x, x
            case "sizes":
                return jnp.dot(x.reshape(len(x), -1), jnp.zeros((3, 10)))
        return nn.Dense(10)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddConfig(ModelConfig):
    """The config of `Odd`."""

    mistake: str = ""

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        return Odd(self.mistake, train)


class Bare(ModelConfig):
    """A config whose decorator was forgotten."""

    width: int = 3


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "odd", OddConfig)
    monkeypatch.setitem(MODELS, "bare", Bare)


def line_of(text: str) -> int:
    """The number of the first line of this file that contains a text."""
    return next(i for i, line in enumerate(pathlib.Path(__file__).read_text().splitlines(), 1) if text in line)


def test_a_network_without_mistakes_is_accepted() -> None:
    assert state_shapes(Config(model=OddConfig()).program).params["Conv_0"]["kernel"].shape == (3, 3, 1, 4)


@pytest.mark.parametrize(
    ("mistake", "line", "message"),
    [
        ("axis", "channels[:, None, :]", "ValueError: "),
        ("training", "self.undefined(x)", "AttributeError: "),
        ("sizes", "jnp.zeros((3, 10))", "TypeError: "),
    ],
)
def test_an_error_in_a_network_names_its_line(mistake: str, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        state_shapes(Config(model=OddConfig(mistake=mistake)).program)
    start = f"config.model: the network of OddConfig fails (test_network.py, line {line_of(line)}: {message}"
    assert str(raised.value).startswith(start)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [("batch", r"an array of shape \(1, 10\) for 3 images; it must return one"), ("tuple", "a tuple for one image")],
)
def test_a_network_that_returns_no_logits_is_refused(mistake: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"the network of OddConfig returns {message}"):
        state_shapes(Config(model=OddConfig(mistake=mistake)).program)


def test_a_config_class_without_its_decorator_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config.model: Bare.width is not a field: decorate Bare with @dataclass"):
        Config(model=Bare())
