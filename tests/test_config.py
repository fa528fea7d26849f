"""The config: what it accepts, what it rejects, and with which message."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import pytest

from mnist_flax import preset
from mnist_flax.config import Config, default_config_dict, differences, replace
from mnist_flax.data import load
from mnist_flax.data.augment import AUGMENTATIONS
from mnist_flax.data.registry import DATASETS
from mnist_flax.errors import ConfigError
from mnist_flax.losses import LOSSES, cross_entropy
from mnist_flax.models import MODELS
from mnist_flax.models.cnn import CNNConfig
from mnist_flax.models.resnet import ResNetConfig
from mnist_flax.optimizer import OPTIMIZERS
from mnist_flax.sections import SOURCES

pytestmark = pytest.mark.smoke


def test_defaults_survive_the_config_dict_and_json() -> None:
    config = Config()
    assert Config.from_dict(default_config_dict().to_dict()) == config
    assert Config.from_dict(json.loads(config.to_json())).to_dict() == config.to_dict()


def test_a_changed_field_survives_json() -> None:
    config = replace(Config(), seed=7, model__widths=(8,), model__pools=(2,), optimizer__learning_rate=1)
    assert Config.from_dict(json.loads(config.to_json())).to_dict() == config.to_dict()
    assert type(config.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optimizer__learning_rat": 1.0},
            r"config.optimizer.learning_rat: no such field; did you mean 'learning_rate'",
        ),
        ({"train__epochs": 1.5}, r"config.train.epochs = 1.5: must be of type int, not float"),
        ({"train__epochs": True}, r"config.train.epochs = True: must be of type int, not bool"),
        ({"train__epochs": 0}, r"config.train.epochs = 0: must be at least 1"),
        ({"train__tensorboard": 1}, r"config.train.tensorboard = 1: must be of type bool"),
        ({"train__augment_until": 0}, r"config.train.augment_until = 0.0: must be above 0 and at most 1"),
        ({"train__teacher_weight": 0}, r"config.train.teacher_weight = 0.0: must be above 0 and at most 1"),
        ({"train__teacher_weight": 1.1}, r"config.train.teacher_weight = 1.1: must be above 0 and at most 1"),
        ({"optimizer__learning_rate": float("nan")}, r"config.optimizer.learning_rate = nan: must be finite"),
        ({"optimizer__learning_rate": 10**400}, r"config.optimizer.learning_rate = inf: must be finite"),
        ({"optimizer__learning_rate": -0.1}, r"config.optimizer.learning_rate = -0.1: must be above 0"),
        ({"optimizer__name": "adma"}, r"config.optimizer.name = 'adma': did you mean 'adam'"),
        ({"optimizer__schedule": "sawtooth"}, r"config.optimizer.schedule = 'sawtooth': choose from: constant, cosine"),
        ({"optimizer__b1": 0.99999999999}, r"config.optimizer.b1 = 0.99999999999: must be at least 0 and below 1"),
        ({"optimizer__eps": 1e-60}, r"config.optimizer.eps = 1e-60: must be above 0"),
        ({"optimizer__b1": 1.0}, r"config.optimizer.b1 = 1.0: must be at least 0 and below 1"),
        ({"optimizer__nesterov": True, "optimizer__momentum": 0.0}, "momentum above 0"),
        ({"optimizer__warmup_epochs": 9.0}, r"config.optimizer.warmup_epochs = 9.0: must be at least 0 and at most 5"),
        (
            {"optimizer__schedule": "step", "optimizer__decay_epochs": 1e7},
            r"config.optimizer.decay_epochs = 10000000.0: must be above 0 and at most 2289428$",
        ),
        ({"optimizer__peak_at": 1.0}, r"config.optimizer.peak_at = 1.0: must be above 0 and below 1"),
        ({"data__name": "mnits"}, r"config.data.name = 'mnits': did you mean 'mnist'"),
        ({"data__num_train": 60_001}, r"config.data.num_train = 60001: must be at least 0 and at most 60000"),
        (
            {"data__holdout": 60_000},
            "config.data.holdout = 60000: must be at least 10 and below 60000, or 0 to hold out",
        ),
        ({"data__holdout": 9}, r"config.data.holdout = 9: must be at least 10"),
        ({"data__num_train": 100, "train__batch_size": 101}, r"config.train.batch_size = 101: more than the 100 rows"),
        ({"model__widths": 32}, r"config.model.widths = 32: must be a tuple"),
        ({"model__widths": (32, "a", 1)}, r"config.model.widths\[1\] = 'a': must be of type int"),
        ({"model__widths": (32, 0, 1)}, r"config.model.widths = .*every value must be at least 1"),
        ({"model__pools": (2, 2)}, r"config.model.pools = \(2, 2\): has 2 values for 3 convolutions"),
        ({"model__paddings": ("valid",)}, r"config.model.paddings = \('valid',\): each must be 'VALID' or 'SAME'"),
        ({"model__kernel_sizes": (3, 3, 7)}, r"7x7 kernel of convolution 3 is larger than its 5x5 feature map"),
        ({"model__pools": (2, 2, 4)}, r"4x4 pooling of convolution 3 is larger than its 3x3 feature map"),
        ({"model__dropout": 1.0}, r"config.model.dropout = 1.0: must be at least 0 and below 1"),
        ({"model__pixel_std": 1e-40}, r"config.model.pixel_std = 1e-40: must be above 0"),
        ({"model__pixel_std": 0.0}, r"config.model.pixel_std = 0.0: must be above 0"),
        (
            {"eval__batch_size": 1_000_000_000},
            r"config.eval.batch_size = 1000000000: must be at least 1 and at most 1000000$",
        ),
        ({"eval__views": 3}, r"config.eval.views = 3: must be 1 or 5"),
        ({"model__stem": "cosines"}, r"config.model.stem = 'cosines': did you mean 'cosine'"),
        ({"model__stem": "cosine"}, r"config.model.stem = 'cosine': a 3x3 kernel has only 18 patterns, not 32"),
        ({"model__stem": "cosine", "model__widths": (), "model__pools": (1,)}, r"stem = 'cosine': needs a convolution"),
        ({"augment__shift": 28}, r"config.augment.shift = 28: must be at least 0 and at most 27"),
        ({"seed": -1}, r"config.seed = -1: must be at least 0"),
        (
            {"data__num_train": 5, "data__holdout": 3},
            r"num_train = 5: 5 rows are too few to hold some .* least 11",
        ),
        ({"data__num_train": 15, "data__folds": 3}, r"num_train = 15: 15 rows are too few .* at least 20"),
        ({"checkpoint__keep_latest": 0}, r"config.checkpoint.keep_latest = 0: must be at least 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_field_and_a_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Config(), **fields)


def test_rubbish_is_refused() -> None:
    for rubbish in (None, 5, "text", [1]):
        with pytest.raises(ConfigError, match="must be a group of fields"):
            Config.from_dict(rubbish)
    with pytest.raises(ConfigError, match=r"config\.model = 3: must be a group of fields"):
        Config.from_dict({"model": 3})
    with pytest.raises(ConfigError, match=r"config\.model\.name = .*must be of type str, not PosixPath"):
        Config.from_dict({"model": {"name": pathlib.Path("cnn")}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trian__epochs": 3}, "config.trian: no such field; did you mean 'train'"),
        ({"seed__x": 1}, "config.seed = {'x': 1}: must be of type int"),
        ({"sed": 1}, "config.sed: no such field; did you mean 'seed'"),
        (
            {"model__name": "resnet", "model__batch_norm": True},
            "config.model.batch_norm: no such field; it belongs to another family; start from"
            " default_config_dict('resnet')",
        ),
    ],
)
def test_a_field_that_cannot_be_replaced_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(Config(), **fields)


def test_another_family_starts_from_its_own_defaults() -> None:
    config = replace(replace(Config(), model__dense=(8,)), model__name="resnet", model__blocks=2)
    assert config.model == ResNetConfig(blocks=2)
    assert replace(Config(), **{"model.name": "resnet", "model.blocks": 2}) == replace(config, model__name="resnet")
    assert replace(config, model__name="resnet", seed=1).model == config.model


@pytest.mark.parametrize(
    ("registry", "name", "other"),
    [(OPTIMIZERS, "adam", OPTIMIZERS["sgd"]), (AUGMENTATIONS, "erase", AUGMENTATIONS["stroke"])],
)
def test_a_replaced_entry_of_a_registry_makes_another_program(
    registry: dict[str, Any], name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(Config(), augment__erase=4)
    before = config.program
    monkeypatch.setitem(registry, name, other)
    assert config.program != before and hash(config.program)


def test_every_source_that_a_config_accepts_has_code() -> None:
    assert set(SOURCES) == {"auto", *load._LOADERS}


@pytest.mark.parametrize("model", MODELS)
def test_a_config_can_be_built_from_another(model: str) -> None:
    config = replace(Config(), model__name=model, augment__shift=2)
    assert Config.from_dict(config) == config


def test_configs_compare_every_field_but_may_share_a_program() -> None:
    config = replace(Config(), data__folds=3)
    for fields in (
        {"seed": 1},
        {"data__fold": 2},
        {"train__driver": "stream"},
        {"train__teacher": "runs/teacher"},
        {"data__raw_dir": "x"},
        {"checkpoint__every_steps": 5},
    ):
        other = replace(config, **fields)
        assert other != config
        assert other.program == config.program
        assert hash(other.program) == hash(config.program)
    assert differences(Config(seed=0), Config(seed=1)) == {"seed": (0, 1)}


def test_a_family_of_models_brings_its_own_fields() -> None:
    config = Config.from_dict(default_config_dict("resnet"))
    assert isinstance(config.model, ResNetConfig)
    assert Config.from_dict(json.loads(config.to_json())) == config
    assert replace(config, model__blocks=2).model == ResNetConfig(blocks=2)
    with pytest.raises(ConfigError, match=r"config.model.kernel_sizes: no such field"):
        replace(config, model__kernel_sizes=(3,))
    with pytest.raises(ConfigError, match=r"config.model.name = 'resnt': did you mean 'resnet'"):
        default_config_dict("resnt")
    changed = differences(Config(), config)
    assert changed["model.name"] == ("cnn", "resnet")
    assert changed["model.blocks"] == (None, 1)


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"optimizer__momentum": 0.5, "optimizer__decay_rate": 0.5},
            [
                "config.optimizer.decay_rate, config.optimizer.momentum: changed, but not used by adam with the"
                " schedule constant"
            ],
        ),
        ({"optimizer__name": "sgd", "optimizer__momentum": 0.5}, []),
        (
            {"train__augment_until": 0.5},
            ["config.train.augment_until = 0.5: has no effect without an augmentation"],
        ),
        ({"train__augment_until": 0.5, "augment__shift": 1}, []),
        (
            {"data__holdout_rows": "last"},
            ["config.data.holdout_rows = 'last': has no effect with config.data.holdout = 0"],
        ),
        ({"data__holdout_rows": "last", "data__holdout": 100}, []),
        ({"train__teacher_weight": 0.5}, ["config.train.teacher_weight = 0.5: has no effect without a teacher"]),
        ({"train__teacher_weight": 0.5, "train__teacher": "runs/teacher", "train__label_smoothing": 0.1}, []),
        (
            {"train__teacher": "runs/teacher", "train__label_smoothing": 0.1, "train__loss": "focal"},
            [
                "config.train.loss = 'focal': has no effect with config.train.teacher_weight = 1",
                "config.train.label_smoothing = 0.1: has no effect with config.train.teacher_weight = 1",
            ],
        ),
    ],
)
def test_fields_without_effect_are_found(
    fields: dict[str, Any], messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "focal", cross_entropy)
    assert list(replace(Config(), **fields).unused()) == messages


def test_a_family_that_is_not_registered_is_refused() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unregistered(CNNConfig):
        pass

    with pytest.raises(ConfigError, match=r"config.model: Unregistered is not in MODELS"):
        Config(model=Unregistered())
    with pytest.raises(ConfigError, match=r"config.model: Unregistered is not in MODELS"):
        Config.from_dict({"model": Unregistered()})


def test_differences_leave_out_what_changes_no_result() -> None:
    config = Config()
    assert differences(config, replace(config, checkpoint__every_steps=5, train__log_every_steps=1)) == {}
    assert differences(config, replace(config, train__driver="stream", data__raw_dir="elsewhere")) == {}
    assert differences(config, replace(config, model__dropout=0.5)) == {"model.dropout": (0.0, 0.5)}


def test_more_epochs_are_a_difference_only_to_a_schedule_that_depends_on_them() -> None:
    for schedule, expected in (("constant", {}), ("step", {}), ("cosine", {"train.epochs": (5, 6)})):
        config = replace(Config(), optimizer__schedule=schedule)
        assert differences(config, replace(config, train__epochs=6)) == expected
    config = replace(Config(), augment__shift=1, train__augment_until=0.8)  # the last, unaugmented steps move
    assert differences(config, replace(config, train__epochs=6)) == {"train.epochs": (5, 6)}


def test_steps_count_every_row() -> None:
    config = replace(Config(), data__num_train=1000, data__holdout=100, train__batch_size=64, train__epochs=2)
    assert (config.num_train_rows, config.steps_per_epoch, config.num_steps) == (900, 15, 30)


def test_classes_follow_the_dataset() -> None:
    assert {name: replace(Config(), data__name=name).num_classes for name in ("mnist", "emnist/byclass")} == {
        "mnist": 10,
        "emnist/byclass": 62,
    }
    assert all(info.num_train > info.num_test > 0 for info in DATASETS.values())


def test_single_values_spread_over_all_convolutions() -> None:
    blocks = CNNConfig(widths=(4, 8), kernel_sizes=(5,), pools=(2, 1)).blocks()
    assert [(block.width, block.kernel_size, block.pool) for block in blocks] == [(4, 5, 2), (8, 5, 1)]
    assert CNNConfig(widths=(), pools=(1,)).blocks() == ()


@pytest.mark.parametrize(
    ("padding", "stride", "size", "expected"), [("VALID", 1, 28, 26), ("VALID", 2, 28, 13), ("SAME", 2, 27, 14)]
)
def test_feature_map_sizes_are_those_of_a_convolution(padding: str, stride: int, size: int, expected: int) -> None:
    block = CNNConfig(widths=(1,), strides=(stride,), paddings=(padding,), pools=(1,)).blocks()[0]
    assert block.conv_size(size) == expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionalConfig(CNNConfig):
    """A family of a user, with a field that may be None."""

    groups: int | None = None
    slope: float | None = None
    norm: str | None = None
    sizes: tuple[int, ...] | None = None


def test_a_field_may_be_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setitem(MODELS, "optional", OptionalConfig)
    path = tmp_path / "own.py"
    path.write_text("def get_config():\n    return {'model': {'name': 'optional'}}\n")
    for override, expected in (([], (None, None)), (["model.groups=4", "model.slope=1"], (4, 1.0))):
        model = preset.load_config(path, override).model
        assert isinstance(model, OptionalConfig)
        assert (model.groups, model.slope) == expected
        assert type(model.slope) is type(expected[1])
    model = preset.load_config(path, ["model.norm=batch", "model.sizes=(1,2)"]).model
    assert isinstance(model, OptionalConfig)
    assert (model.norm, model.sizes) == ("batch", (1, 2))
    with pytest.raises(ConfigError, match=r"config.model.groups = 1.5: must be of type int \| None, not float"):
        preset.load_config(path, ["model.groups=1.5"])
    with pytest.raises(ConfigError, match=r"config.model.groups = 'four': must be of type int \| None, not str"):
        preset.load_config(path, ["model.groups=four"])
    with pytest.raises(ConfigError, match=r"config.model.dropout = None: must be of type float, not NoneType"):
        preset.load_config(path, ["model.dropout=None"])


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
