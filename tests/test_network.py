"""Networks from outside the package: a mistake in one gets a message that names its line."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from jax import Array

from mnist_flax import train
from mnist_flax.config import Config, default_config_dict, replace
from mnist_flax.errors import ConfigError
from mnist_flax.models import MODELS
from mnist_flax.models.base import ModelConfig
from mnist_flax.models.layers import BatchNorm, Conv, Dense
from mnist_flax.step import state_shapes, try_step

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
            case "collection":
                self.variable("whitening", "mean", jnp.zeros, (1,))
            case "batch":
                return nn.Dense(10)(x.mean((0, 1, 2)))[None]
            case "empty":
                self.param("nothing", nn.initializers.zeros, (0,))
            case "tuple":
                return x, x
            case "integers":
                return nn.Dense(10)(x.mean((1, 2))).astype(jnp.int32)
            case "sizes":
                return jnp.dot(x.reshape(len(x), -1), jnp.zeros((3, 10)))
        return nn.Dense(10)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddConfig(ModelConfig):
    """The config of `Odd`."""

    mistake: str = ""

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        return Odd(self.mistake, train) if self.mistake != "module" else 1 / 0  # type: ignore[return-value]


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
    [
        ("batch", r"an array of shape \(1, 10\) for 3 images; it must return one"),
        ("tuple", "a tuple for one image"),
        ("integers", "logits of type int32; return floats"),
    ],
)
def test_a_network_that_returns_no_logits_is_refused(mistake: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"the network of OddConfig returns {message}"):
        state_shapes(Config(model=OddConfig(mistake=mistake)).program)


def test_a_network_with_other_variables_is_refused() -> None:
    with pytest.raises(ConfigError, match="the network of OddConfig keeps variables in 'whitening'; only"):
        state_shapes(Config(model=OddConfig(mistake="collection")).program)


def test_a_network_with_an_empty_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has an empty variable: \['params'\]\['nothing'\]"):
        state_shapes(Config(model=OddConfig(mistake="empty")).program)


def test_an_error_in_module_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"config.model: OddConfig.module fails \(ZeroDivisionError: "):
        Config(model=OddConfig(mistake="module"))


def test_mistakes_that_need_no_data_are_reported_first(tmp_path: pathlib.Path) -> None:
    nowhere = {"data__source": "raw", "data__raw_dir": str(tmp_path / "nowhere"), "data__on_missing": "error"}
    with pytest.raises(ConfigError, match="the network of OddConfig fails"):
        train.fit(replace(Config(model=OddConfig(mistake="training")), **nowhere), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"config.train.num_devices"):
        train.fit(replace(Config(), train__num_devices=99, **nowhere), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "default"), [(tuple, (1, 2)), (list[int], None), (dict, None)])
def test_a_field_that_cannot_be_saved_is_refused(kind: Any, default: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [("sizes", kind, dataclasses.field(default=default))]
    family = dataclasses.make_dataclass("Sized", fields, bases=(OddConfig,), frozen=True, kw_only=True)
    monkeypatch.setitem(MODELS, "sized", family)
    with pytest.raises(ConfigError, match=r"config.model: Sized.sizes is a .*tuple\[int, ...\]"):
        Config(model=family())


def test_an_annotation_that_cannot_be_resolved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = dataclasses.make_dataclass("Late", [("depth", "Unknown", 3)], bases=(OddConfig,), frozen=True)
    monkeypatch.setitem(MODELS, "late", family)
    with pytest.raises(
        ConfigError, match=r"the annotations of Late cannot be resolved \(name 'Unknown' is not defined"
    ):
        Config(model=family())


def test_a_field_without_a_default_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = dataclasses.make_dataclass("Needy", [("depth", int)], bases=(OddConfig,), frozen=True, kw_only=True)
    monkeypatch.setitem(MODELS, "needy", family)
    with pytest.raises(ConfigError, match=r"config.model: Needy.depth has no default; give it one"):
        default_config_dict("needy")
    with pytest.raises(ConfigError, match=r"config.model: Needy.depth has no default; give it one"):
        Config(model=family(depth=3))


def test_a_config_class_without_its_decorator_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config.model: Bare.width is not a field: decorate Bare with @dataclass"):
        Config(model=Bare())


@pytest.mark.parametrize("entry", [OddConfig(), nn.Dense, dict])
def test_a_family_that_is_not_a_config_is_refused(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "wrong", entry)
    with pytest.raises(ConfigError, match=r"MODELS\['wrong'\]: must be a config, a subclass of ModelConfig, not"):
        Config.from_dict({"model": {"name": "wrong"}})


@pytest.mark.parametrize("is_passed", [True, False])
def test_batch_norm_without_train_is_noticed(
    is_passed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Normed(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x: Array, mask: Array | None = None) -> Array:
            x = BatchNorm(train=self.train)(Conv(2, 3, train=self.train)(x), mask)
            return Dense(10)(BatchNorm(train=self.train and is_passed)(x, mask).mean((1, 2)))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NormedConfig(ModelConfig):
        def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
            return Normed(train)

    monkeypatch.setitem(MODELS, "normed", NormedConfig)
    try_step(Config(model=NormedConfig()).program)
    assert ("pass train=self.train to each BatchNorm" in caplog.text) != is_passed
