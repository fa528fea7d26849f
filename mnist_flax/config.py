"""The config of a run: frozen, typed, validated dataclasses, one for each section.

A preset (`configs/*.py`) starts from `default_config_dict()` or another preset and sets only what differs;
`Config.from_dict` turns the result into a frozen `Config`. Every mistake that can be found without the data raises
`ConfigError` with the field, its value and the remedy, before any data is loaded.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Self

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mnist_flax.checks import among, nearest, within
from mnist_flax.data.augment import AugmentConfig
from mnist_flax.data.registry import DATASETS, IMAGE_SIZE
from mnist_flax.errors import ConfigError, reason
from mnist_flax.logged import METRICS
from mnist_flax.losses import LOSSES
from mnist_flax.models import MODELS
from mnist_flax.models.base import ModelConfig
from mnist_flax.models.cnn import CNNConfig
from mnist_flax.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig, depends_on_length
from mnist_flax.sections import CheckpointConfig, DataConfig, EvalConfig, TrainConfig

_UNREGISTERED = "{} is not in MODELS; register it under a name"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The part of a config that compiled code depends on: hashable, and a static argument of jitted functions.

    Members of a population share compiled code, unless their folds differ in size. `code` holds the classes of the
    network and its config; the optimiser, schedule, loss and augmentations that the other fields name; and the logged
    metrics. If a notebook replaces any of these, its code is compiled again.
    """

    model: ModelConfig
    augment: AugmentConfig
    optimizer: OptimizerConfig
    loss: str
    label_smoothing: float
    augment_until: float
    teacher_weight: float
    batch_size: int
    steps_per_epoch: int
    num_steps: int
    num_classes: int
    code: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run: `seed`, and sections with fields of their own.

    Attributes:
      seed: seeds all random numbers of the run: the initial weights, the order of the rows, augmentation and dropout.
    """

    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=CNNConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if message := next(self._check(), None):
            raise ConfigError(message)

    def _check(self) -> Iterator[str]:
        """Yields messages; the caller stops at the first one, because later checks rely on earlier ones."""
        yield from within("seed", self.seed, 0, 2**32 - 1)
        yield from among("data.name", self.data.name, DATASETS, is_registry=True)
        dataset = DATASETS[self.data.name]
        yield from self.data.check(dataset.num_train, dataset.num_classes)
        yield from self._check_model()
        yield from self.augment.check(dataset.class_names)
        yield from self.train.check(self.num_train_rows)
        yield from self.optimizer.check(self.train.epochs, self.steps_per_epoch)
        yield from self.eval.check()
        yield from self.checkpoint.check()

    def _check_model(self) -> Iterator[str]:
        """Yields a message for each mistake in the model section, whose class may come from a user's script."""
        family, fields = type(self.model), {field.name for field in dataclasses.fields(self.model)}
        title = family.__name__
        if family not in MODELS.values():
            yield f"config.model: {_UNREGISTERED.format(title)}"
        yield from _missing_defaults(family)
        for name, kind in inspect.get_annotations(family).items():
            if name not in fields and "ClassVar" not in str(kind):
                yield f"config.model: {title}.{name} is not a field: decorate {title} with @dataclass(frozen=True)"
        try:
            hints: dict[str, Any] = typing.get_type_hints(family)
        except NameError as error:
            yield f"config.model: the annotations of {title} cannot be resolved ({error})"
            return
        for name in fields:
            if hints[name] is tuple or (typing.get_origin(hints[name]) or hints[name]) in (list, dict, set):
                yield f"config.model: {title}.{name} is a {hints[name]}: make it a tuple of one type: tuple[int, ...]"
        yield from self.model.check(IMAGE_SIZE) or ()
        try:
            self.model.module(self.num_classes)
        except Exception as error:
            yield f"config.model: {title}.module fails ({type(error).__name__}: {reason(error)})"

    @property
    def num_classes(self) -> int:
        """The number of classes of the dataset."""
        return DATASETS[self.data.name].num_classes

    @property
    def num_rows(self) -> int:
        """The number of rows of the training split in use, including held-out rows."""
        return self.data.num_train or DATASETS[self.data.name].num_train

    @property
    def num_holdout_rows(self) -> int:
        """The number of rows that are held out; if the rows do not divide evenly, the first folds have one more."""
        data = self.data
        return len(range(data.fold, self.num_rows, data.folds)) if data.folds else data.holdout

    @property
    def num_train_rows(self) -> int:
        """The number of rows that are trained on."""
        return self.num_rows - self.num_holdout_rows

    @property
    def steps_per_epoch(self) -> int:
        """The number of updates in an epoch; the last batch may be partly filled."""
        return -(-self.num_train_rows // self.train.batch_size)

    @property
    def num_steps(self) -> int:
        """The number of updates in the run."""
        return self.steps_per_epoch * self.train.epochs

    @property
    def length_matters(self) -> bool:
        """Whether a step depends on how many steps the run has, so that a finished run cannot be made longer."""
        augments_partly = bool(self.augment.strengths) and self.train.augment_until < 1
        return augments_partly or depends_on_length(self.optimizer, self.num_steps, self.steps_per_epoch)

    @property
    def program(self) -> Program:
        """The fields that compiled code depends on."""
        return Program(
            model=self.model,
            augment=self.augment,
            optimizer=self.optimizer,
            loss=self.train.loss,
            label_smoothing=self.train.label_smoothing,
            augment_until=self.train.augment_until,
            teacher_weight=self.train.teacher_weight,
            batch_size=self.train.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            num_steps=self.num_steps,
            num_classes=self.num_classes,
            code=(
                type(self.model),
                type(self.model.module(self.num_classes)),
                OPTIMIZERS[self.optimizer.name],
                SCHEDULES[self.optimizer.schedule],
                LOSSES[self.train.loss],
                *((entry.rewrite, entry.move, entry.change) for entry in self.augment.entries()),
                *METRICS.items(),
            ),
        )

    def unused(self) -> Iterator[str]:
        """Yields a message for changed fields that have no effect on this run."""
        if names := [f"config.optimizer.{name}" for name in self.optimizer.unused()]:
            name, schedule = self.optimizer.name, self.optimizer.schedule
            yield f"{', '.join(names)}: changed, but not used by {name} with the schedule {schedule}"
        if self.data.holdout_rows != DataConfig().holdout_rows and not self.data.holdout:
            yield f"config.data.holdout_rows = {self.data.holdout_rows!r}: has no effect with config.data.holdout = 0"
        if self.train.augment_until < 1 and not self.augment.strengths:
            yield f"config.train.augment_until = {self.train.augment_until}: has no effect without an augmentation"
        if self.train.teacher_weight < 1 and not self.train.teacher:
            yield f"config.train.teacher_weight = {self.train.teacher_weight}: has no effect without a teacher"
        if self.train.teacher and self.train.teacher_weight == 1:
            for name in ("loss", "label_smoothing"):
                if (value := getattr(self.train, name)) != getattr(TrainConfig(), name):
                    yield f"config.train.{name} = {value!r}: has no effect with config.train.teacher_weight = 1"

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Builds a config from nested mappings; fields that are left out keep their defaults.

        Raises:
          ConfigError: a field is unknown, or its value has the wrong type or is out of range.
        """
        return _build(cls, values, "config")

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts, for JSON and for comparing field by field."""
        return {
            field.name: _section_dict(value) if dataclasses.is_dataclass(value) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }

    def to_json(self) -> str:
        """Returns the config as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _section_dict(section: Any) -> dict[str, Any]:
    """Returns the fields of one section; the model section also has `name`, its family."""
    if isinstance(section, AugmentConfig):
        return section.to_dict()
    name = family_of(type(section))
    return {**({"name": name} if name else {}), **dataclasses.asdict(section)}


def family_of(cls: type) -> str | None:
    """Returns the name of a model family, or None if `MODELS` does not list it."""
    return next((name for name, family in MODELS.items() if family is cls), None)


def _family(name: str) -> type[ModelConfig]:
    for message in among("model.name", name, MODELS, is_registry=True):
        raise ConfigError(message)
    family = MODELS[name]
    if not (isinstance(family, type) and issubclass(family, ModelConfig)):
        raise ConfigError(f"MODELS[{name!r}]: must be a config, a subclass of ModelConfig, not {family!r:.60}")
    return family


def _missing_defaults(family: type[ModelConfig]) -> Iterator[str]:
    """Yields a message for each field without a default: reports show which fields differ from theirs."""
    for field in dataclasses.fields(family):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield f"config.model: {family.__name__}.{field.name} has no default; give it one"


def default_config_dict(model: str = "cnn") -> ConfigDict:
    """Returns all defaults of a model family as a ConfigDict, for a `get_config()` to start from.

    The ConfigDict accepts any field and value; `Config.from_dict` checks them all.

    Raises:
      ConfigError: there is no such family, or one of its fields has no default.
    """
    for message in _missing_defaults(_family(model)):
        raise ConfigError(message)
    return ConfigDict(Config(model=MODELS[model]()).to_dict(), type_safe=False)


def replace(config: Config, **fields: Any) -> Config:
    """Returns a config with some fields changed; `train__epochs=3` or `**{"train.epochs": 3}` sets `train.epochs`.

    With another family (`model__name`), all other model fields start from the defaults of that family.

    Raises:
      ConfigError: see `Config.from_dict`.
    """
    values, fields = config.to_dict(), {name.replace(".", "__"): value for name, value in fields.items()}
    if fields.get("model__name", values["model"].get("name")) != values["model"].get("name"):
        values["model"] = {}
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        if section and not isinstance(values.get(section), dict):
            values[section] = {}  # no such section, which `from_dict` reports
        (values[section] if section else values)[field] = value
    return Config.from_dict(values)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the old and new value, by dotted name, of each field that differs and can change this run's results."""
    there, now = result_fields(old), result_fields(new)
    changed = {name: (there.get(name), now.get(name)) for name in there | now if there.get(name) != now.get(name)}
    if "train.epochs" in changed and not (old.length_matters or new.length_matters):
        del changed["train.epochs"]
    return changed


def result_fields(config: Config) -> dict[str, Any]:
    """Returns the value of every field that can change a result, by its dotted name; a resumed run compares these."""
    hidden = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        if dataclasses.is_dataclass(values := getattr(config, section.name))
        for field in dataclasses.fields(values)
        if not field.metadata.get("compared", True)
    }
    return {name: value for name, value in dotted(config).items() if name not in hidden}


def dotted(config: Config) -> dict[str, Any]:
    """Returns the value of every field by its dotted name, such as `data.name`."""
    return flatten_dict(config.to_dict(), sep=".")


def _build(cls: type, values: Any, path: str) -> Any:
    """Builds a dataclass from a mapping, and rejects unknown fields and values of the wrong type."""
    if dataclasses.is_dataclass(values) and isinstance(values, cls):
        if isinstance(values, ModelConfig) and type(values) not in MODELS.values():
            raise ConfigError(f"{path}: {_UNREGISTERED.format(type(values).__name__)}")
        values = values.to_dict() if isinstance(values, Config) else _section_dict(values)
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} = {values!r}: must be a group of fields, not of type {type(values).__name__}")
    values = dict(values)
    if cls is ModelConfig:
        cls = _family(_convert(str, values.pop("name", "cnn"), f"{path}.name"))
    known = AugmentConfig.field_types() if cls is AugmentConfig else typing.get_type_hints(cls)
    for name in values:
        if name not in known:
            hint = nearest(str(name), known)
            if issubclass(cls, ModelConfig) and any(name in typing.get_type_hints(other) for other in MODELS.values()):
                hint = f"it belongs to another family; start from default_config_dict({family_of(cls)!r})"
            raise ConfigError(f"{path}.{name}: no such field; {hint}")
    fields = {}
    for name, value in values.items():
        kind = known[name]
        build = _build if dataclasses.is_dataclass(kind) else _convert
        fields[name] = build(kind, value, f"{path}.{name}")
    return cls(**fields)


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Checks that a value has the declared type; only int to float and list to tuple are converted."""
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} = {value!r}: must be a tuple, such as ({value!r},)")
        return tuple(_convert(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # such as int | None
        for one in typing.get_args(kind):
            with contextlib.suppress(ConfigError):
                return _convert(one, value, path)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not kind:
        wanted = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{path} = {value!r}: must be of type {wanted}, not {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} = {value!r}: must be finite")
    return value
