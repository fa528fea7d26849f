"""The one schema of a run: frozen, typed, validated dataclasses.

A config file (`configs/*.py`) starts from `default_config_dict()` and sets only what differs; `Config.from_dict` turns
the result into the frozen `Config`, which is hashable and so can be a static argument of a jitted function. Every
mistake raises `ConfigError` with the field, its value and the remedy, before any data is loaded.
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

from ml_collections import ConfigDict

from mnist_flax.data.registry import DATASETS, IMAGE_SIZE
from mnist_flax.errors import ConfigError

ACTIVATIONS = ("relu", "leaky_relu", "elu", "tanh", "gelu", "silu")
INITIALIZERS = ("glorot_uniform", "glorot_normal", "he_uniform", "he_normal", "lecun_uniform", "lecun_normal")
OPTIMIZERS = ("adam", "adamw", "sgd")
DTYPES = ("float32", "bfloat16")
PRECISIONS = ("default", "high", "highest")
SCHEDULES = ("constant", "cosine", "one_cycle", "exponential", "step")


def cadence(default: Any) -> Any:
    """A field that says how a run is watched or saved: it may differ on resume, for no result depends on it.

    Nor does a compiled program, so like the seed it takes no part in equality and hash.
    """
    return dataclasses.field(default=default, compare=False, metadata={"changes_result": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and where they come from.

    Attributes:
      name: a key of `DATASETS`.
      source: `auto` tries the three others in this order: `tfds` (a copy prepared in `data_dir`), `raw` (the official
        files in `raw_dir`), `download` (from the addresses that TFDS has for them).
      data_dir: the TFDS folder; empty means `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      raw_dir: a folder with the official files; empty means `$MNIST_FLAX_RAW_DIR`.
      on_missing: `digits` trains on scikit-learn's embedded digits when nothing can be reached; `error` stops.
      num_train: train on this many rows, drawn stratified; 0 means all.
      holdout: rows of the training set kept for validation, drawn stratified; 0 means none.
      folds: divide the rows into this many stratified parts and hold out one of them, instead of `holdout`; 0 means no.
      fold: which of them, from 0. Like the seed, it takes no part in equality and hash: all folds share a program.
    """

    name: str = "mnist"
    source: str = cadence("auto")
    data_dir: str = cadence("")
    raw_dir: str = cadence("")
    on_missing: str = cadence("digits")
    num_train: int = 0
    holdout: int = 0
    folds: int = 0
    fold: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: convolution blocks, then dense layers, then one logit a class.

    The tuples over convolutions hold one value each, or a single one that serves all. A block is convolution, batch
    norm (if any), activation, pooling, dropout (if any).

    Attributes:
      widths: output channels of each convolution; empty for a multilayer perceptron.
      kernel_sizes: side of each square kernel, in pixels.
      strides: of each convolution, in pixels.
      paddings: `VALID` or `SAME`, of each convolution.
      pools: side and stride of the pooling window after each convolution; 1 means none.
      pooling: `max` or `avg`.
      dense: widths of the hidden dense layers.
      activation: one of `ACTIVATIONS`, after every layer but the last.
      init: one of `INITIALIZERS`, for all kernels; biases start at 0.
      stem: `learned`; or `cosine`: the kernels of the first convolution are cosine patterns that stay what they are,
        and it has no bias.
      batch_norm: normalise each convolution's and hidden dense layer's output over the batch, before the activation.
      conv_dropout: rate after each convolution block.
      dropout: rate on the input of the last layer.
      dtype: `float32` or `bfloat16`, of what convolutions and matrix products multiply. Weights, statistics, the last
        layer, the loss and every sum over a batch are in float32 in any case.
      matmul_precision: of the products of float32: `default` is what the device is fastest at (TF32 on NVIDIA's GPUs,
        bfloat16 on TPUs, float32 on CPUs), `highest` float32 everywhere, `high` something between.
      test_views: 1, or 5: outside training an image counts as the mean of itself and its shifts by a pixel.
      pixel_mean, pixel_std: pixels become (value / 255 - mean) / std; 0 and 1 leave them in [0, 1].
    """

    widths: tuple[int, ...] = (32, 64, 64)
    kernel_sizes: tuple[int, ...] = (3,)
    strides: tuple[int, ...] = (1,)
    paddings: tuple[str, ...] = ("VALID",)
    pools: tuple[int, ...] = (2, 2, 1)
    pooling: str = "max"
    dense: tuple[int, ...] = (64,)
    activation: str = "relu"
    init: str = "glorot_uniform"
    stem: str = "learned"
    batch_norm: bool = False
    conv_dropout: float = 0.0
    dropout: float = 0.0
    dtype: str = "float32"
    matmul_precision: str = "default"
    test_views: int = 1
    pixel_mean: float = 0.0
    pixel_std: float = 1.0

    def blocks(self) -> tuple["ConvBlock", ...]:
        """Returns the convolution blocks, with the single values spread over all of them."""
        per_block = (self.kernel_sizes, self.strides, self.paddings, self.pools)
        count = len(self.widths)
        columns = [column * count if len(column) == 1 else column for column in per_block]
        return tuple(ConvBlock(*row) for row in zip(self.widths, *columns, strict=True))

    def seen_size(self) -> int:
        """Returns the side of the part of an image, from its upper left corner, that the logits depend on.

        Strides and poolings leave out a remainder at the lower right: 2 of 28 pixels for two or three unpadded 3x3
        convolutions with poolings of 2. Padding needs to know where an image ends, and batch norm looks at all of it.
        """
        if self.batch_norm:
            return IMAGE_SIZE
        sizes = [IMAGE_SIZE]
        for block in self.blocks():
            sizes.append(block.output_size(sizes[-1]))
        seen = sizes.pop()
        for block, size in zip(reversed(self.blocks()), reversed(sizes), strict=True):
            seen = size if block.padding == "SAME" else (seen * block.pool - 1) * block.stride + block.kernel_size
        return seen


class ConvBlock(NamedTuple):
    """One convolution and its pooling, sizes in pixels."""

    width: int
    kernel_size: int
    stride: int
    padding: str
    pool: int

    def conv_size(self, size: int) -> int:
        """The side of the convolution's output for an input of side `size`; 0 or less if the kernel does not fit."""
        covered = 0 if self.padding == "SAME" else self.kernel_size - 1
        return -((covered - size) // self.stride)

    def output_size(self, size: int) -> int:
        """The side after the pooling, which leaves out what fills no window."""
        return self.conv_size(size) // self.pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random distortions of training images, each drawn uniformly between minus and plus its value; 0 means none.

    Attributes:
      shift: whole pixels, in x and in y.
      rotate: degrees.
      scale: fraction of the size (0.1: between 0.9 and 1.1 times).
      shear: degrees.
    """

    shift: int = 0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser, its learning rate over the run, and what is done to the gradient before and the weights after.

    Attributes:
      name: `adam`, `adamw` or `sgd`.
      learning_rate: the highest of the schedule.
      b1, b2, eps: of Adam and AdamW.
      momentum, nesterov: of SGD.
      weight_decay: of kernels, not of biases or norms. Decoupled with `adamw`, added to the gradient (L2) otherwise.
      clip_norm: the gradient's global norm is cut to this; 0 means not at all.
      schedule: `constant`; `cosine` (to `end_fraction` at the run's end); `one_cycle` (cosine from `start_fraction` up
        to the peak at `peak_at` of the run, then down to `end_fraction`); `exponential` (times `decay_rate` every
        `decay_epochs`, smoothly); `step` (the same, in steps).
      warmup_epochs: linear from 0, before any schedule but `one_cycle`, which has its own.
      ema_decay: evaluate an exponential moving average of the weights with this decay; 0 means the weights themselves.
    """

    name: str = "adam"
    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    start_fraction: float = 0.04
    end_fraction: float = 0.0
    peak_at: float = 0.25
    decay_rate: float = 0.95
    decay_epochs: float = 1.0
    ema_decay: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
      batch_size: rows of a step. An epoch's last batch may hold fewer; no row is dropped.
      epochs: passes over the training rows.
      label_smoothing: this share of each one-hot label is spread over all classes.
      driver: `scan` (many steps in one compiled call, the data on the device) or `stream` (a batch a call, from the
        host); a choice of speed and memory, never of result.
      epochs_per_dispatch: the device is given this many epochs in one call, so that a fast one does not wait for the
        host; evaluations on hold-out rows, checkpoints by epochs, signals and the console wait for its end. 0 means
        calls of about half a second, of an epoch at most. A choice of speed, never of result.
      eval_batch_size: rows of an evaluation's batch, for training's own evaluations and the final one.
      num_devices: the devices to train and evaluate on, of all processes together; the batch is split evenly over them.
        0 means all accelerators there are, and of a CPU, whose devices share its cores, one in each process.
      log_every_steps: a line of `metrics.jsonl` sums up this many steps, or what an epoch has left; 0 means an epoch.
      tensorboard: write TensorBoard events.
      report: write `report/index.html` at the end.
    """

    batch_size: int = 64
    epochs: int = 5
    label_smoothing: float = 0.0
    driver: str = cadence("scan")
    epochs_per_dispatch: int = cadence(0)
    eval_batch_size: int = cadence(2000)
    num_devices: int = cadence(0)
    log_every_steps: int = cadence(100)
    tensorboard: bool = cadence(True)
    report: bool = cadence(True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and how many are kept.

    Attributes:
      every_epochs: save after this many epochs; 0 means only at the end. The end of the run is always saved.
      every_steps: save also after this many steps, in the middle of an epoch too; 0 means not.
      every_seconds: save also when this many seconds have passed since the last; 0 means not.
      keep_latest: the newest kept.
      keep_best: the best on hold-out rows kept beside them (there must be hold-out rows to have a best).
    """

    every_epochs: int = cadence(1)
    every_steps: int = cadence(0)
    every_seconds: float = cadence(0.0)
    keep_latest: int = cadence(2)
    keep_best: int = cadence(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All that decides a run.

    The seed takes no part in equality and hash: it is an input of the compiled program and not a part of it, so a run
    with another seed reuses the program.
    """

    seed: int = dataclasses.field(default=0, compare=False)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        for message in _mistakes(self):
            raise ConfigError(message)

    @property
    def num_classes(self) -> int:
        """The number of classes, which follows the dataset."""
        return DATASETS[self.data.name].num_classes

    @property
    def num_rows(self) -> int:
        """The number of rows that are used: trained on or held out."""
        return self.data.num_train or DATASETS[self.data.name].num_train

    @property
    def num_holdout(self) -> int:
        """The number of rows that are held out; where rows cannot be divided evenly, the first folds have one more."""
        return -((self.data.fold - self.num_rows) // self.data.folds) if self.data.folds else self.data.holdout

    @property
    def num_train(self) -> int:
        """The number of rows that are trained on."""
        return self.num_rows - self.num_holdout

    @property
    def steps_per_epoch(self) -> int:
        """The number of updates in an epoch, the last on a batch that may be partly filled."""
        return -(-self.num_train // self.train.batch_size)

    @property
    def num_steps(self) -> int:
        """The number of updates in the run."""
        return self.steps_per_epoch * self.train.epochs

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Checks names and types and builds the config.

        Args:
          values: nested as this class is; what is left out keeps its default.

        Raises:
          ConfigError: a field is unknown, or its value has the wrong type or is out of range.
        """
        return _build(cls, values, "config")

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts, for JSON and for comparing field by field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
          ConfigError: the text is no JSON, or no config.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the saved config is not JSON: {error}") from error
        return cls.from_dict(values)

    def to_json(self) -> str:
        """Returns the config as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def default_config_dict() -> ConfigDict:
    """Returns all defaults as a locked ConfigDict: what a `get_config()` starts from."""
    return ConfigDict(Config().to_dict()).lock()


def replace(config: Config, **fields: Any) -> Config:
    """Returns a config with some fields changed, named with two underscores for a dot: `train__epochs=3`.

    Raises:
      ConfigError: as `Config.from_dict`.
    """
    values = config.to_dict()
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (values[section] if section else values)[field] = value
    return Config.from_dict(values)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the fields whose difference changes a run's result, dotted, with both values."""
    old_fields, new_fields = dict(_fields(old)), dict(_fields(new))
    changed = {
        name: (old_fields[name], new_fields[name]) for name in old_fields if old_fields[name] != new_fields[name]
    }
    if new.optimizer.schedule in ("constant", "exponential", "step"):  # these do not depend on where the run ends
        changed.pop("train.epochs", None)
    return changed


def _fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and value of every field that changes a result."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        elif field.metadata.get("changes_result", True):
            yield prefix + field.name, value


def _build(cls: type, values: Any, path: str) -> Any:
    """Builds a dataclass from a mapping, strictly."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} = {values!r}: must be a group of fields, not a {type(values).__name__}")
    known = typing.get_type_hints(cls)
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}.{name}: no such field; {nearest(str(name), known)}")
    fields = {}
    for name, value in values.items():
        kind = known[name]
        build = _build if dataclasses.is_dataclass(kind) else _convert
        fields[name] = build(kind, value, f"{path}.{name}")
    return cls(**fields)


def nearest(name: str, known: Any) -> str:
    """Returns a hint that names the known word most like `name`, or all of them."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {match[0]!r}?" if match else f"there are: {', '.join(sorted(known))}"


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Checks one value against its declared type; an int serves as a float, a list as a tuple, nothing else."""
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} = {value!r}: must be a tuple, such as ({value!r},)")
        return tuple(_convert(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path} = {value!r}: must be of type {kind.__name__}, not {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} = {value!r}: must be finite")
    return value


def _mistakes(config: Config) -> Iterator[str]:
    """Yields a message for each value that is out of range or fits no other."""

    def among(path: str, value: str, choices: Any) -> Iterator[str]:
        if value not in choices:
            yield f"config.{path} = {value!r}: {nearest(value, choices)}"

    def within(
        path: str, value: float, low: float, high: float = math.inf, *, open_high: bool = False
    ) -> Iterator[str]:
        if not (low <= value < high if open_high else low <= value <= high):
            bound = f"at least {low}" if high == math.inf else f"from {low} to {'below ' * open_high}{high}"
            yield f"config.{path} = {value!r}: must be {bound}"

    data, model, augment = config.data, config.model, config.augment
    optimizer, train, checkpoint = config.optimizer, config.train, config.checkpoint

    yield from within("seed", config.seed, 0, 2**32 - 1)
    yield from among("data.name", data.name, DATASETS)
    yield from among("data.source", data.source, ("auto", "tfds", "raw", "download"))
    yield from among("data.on_missing", data.on_missing, ("digits", "error"))

    yield from _mistakes_of_model(model)
    yield from among("model.pooling", model.pooling, ("max", "avg"))
    yield from among("model.activation", model.activation, ACTIVATIONS)
    yield from among("model.init", model.init, INITIALIZERS)
    yield from among("model.stem", model.stem, ("learned", "cosine"))
    if model.test_views not in (1, 5):
        yield f"config.model.test_views = {model.test_views}: must be 1 or 5"
    yield from among("model.dtype", model.dtype, DTYPES)
    yield from among("model.matmul_precision", model.matmul_precision, PRECISIONS)
    yield from within("model.conv_dropout", model.conv_dropout, 0, 1, open_high=True)
    yield from within("model.dropout", model.dropout, 0, 1, open_high=True)
    if model.pixel_std <= 0:
        yield f"config.model.pixel_std = {model.pixel_std!r}: must be above 0"

    yield from within("augment.shift", augment.shift, 0, IMAGE_SIZE - 1)
    yield from within("augment.rotate", augment.rotate, 0, 180)
    yield from within("augment.scale", augment.scale, 0, 1, open_high=True)
    yield from within("augment.shear", augment.shear, 0, 90, open_high=True)

    yield from among("optimizer.name", optimizer.name, OPTIMIZERS)
    yield from among("optimizer.schedule", optimizer.schedule, SCHEDULES)
    for name in ("learning_rate", "eps", "decay_rate", "decay_epochs"):
        if getattr(optimizer, name) <= 0:
            yield f"config.optimizer.{name} = {getattr(optimizer, name)!r}: must be above 0"
    for name in ("b1", "b2", "momentum", "ema_decay"):
        yield from within(f"optimizer.{name}", getattr(optimizer, name), 0, 1, open_high=True)
    for name in ("weight_decay", "clip_norm"):
        yield from within(f"optimizer.{name}", getattr(optimizer, name), 0)
    yield from within("optimizer.end_fraction", optimizer.end_fraction, 0, 1)
    for name in ("start_fraction", "peak_at"):
        if not 0 < getattr(optimizer, name) < 1:
            yield f"config.optimizer.{name} = {getattr(optimizer, name)!r}: must be between 0 and 1"
    if optimizer.nesterov and not optimizer.momentum:
        yield "config.optimizer.nesterov = True: needs config.optimizer.momentum above 0"

    for name in ("batch_size", "epochs", "eval_batch_size"):
        yield from within(f"train.{name}", getattr(train, name), 1)
    yield from within("train.label_smoothing", train.label_smoothing, 0, 1, open_high=True)
    yield from among("train.driver", train.driver, ("scan", "stream"))
    for name in ("epochs_per_dispatch", "num_devices", "log_every_steps"):
        yield from within(f"train.{name}", getattr(train, name), 0)
    for name in ("every_epochs", "every_steps", "every_seconds", "keep_best"):
        yield from within(f"checkpoint.{name}", getattr(checkpoint, name), 0)
    yield from within("checkpoint.keep_latest", checkpoint.keep_latest, 1)

    yield from _mistakes_of_rows(config)
    if optimizer.warmup_epochs:
        if optimizer.schedule == "one_cycle":
            yield f"config.optimizer.warmup_epochs = {optimizer.warmup_epochs}: one_cycle has its own; set peak_at"
        yield from within("optimizer.warmup_epochs", optimizer.warmup_epochs, 0, train.epochs)


def _mistakes_of_rows(config: Config) -> Iterator[str]:
    """Yields what is wrong with the numbers of rows."""
    info = DATASETS[config.data.name]
    data, batch_size = config.data, config.train.batch_size
    if not 0 <= config.data.num_train <= info.num_train:
        yield (
            f"config.data.num_train = {config.data.num_train}: {config.data.name} has {info.num_train} training rows;"
            " 0 means all"
        )
        return
    rows = config.num_rows
    if data.folds != 0 and not 2 <= data.folds <= rows // info.num_classes:
        yield f"config.data.folds = {data.folds}: must be from 2 to {rows // info.num_classes}, or 0 for none"
        return
    if not 0 <= data.fold < max(1, data.folds):
        yield f"config.data.fold = {data.fold}: must be below config.data.folds = {data.folds}"
    if data.folds and data.holdout:
        yield f"config.data.holdout = {data.holdout}: must be 0 with config.data.folds, for a fold is held out"
    if data.folds and (rows - -(-rows // data.folds)) % batch_size == 0 != rows % data.folds:
        # The smaller folds' runs would have a step more in an epoch: another schedule, and another program.
        yield (
            f"config.train.batch_size = {batch_size}: {data.folds} folds of {rows} rows would differ in their steps;"
            " use another, or another number of folds"
        )
    if not 0 <= config.data.holdout < rows:
        yield f"config.data.holdout = {config.data.holdout}: must leave some of the {rows} rows to train on"
    elif 0 < config.data.holdout < info.num_classes:
        yield f"config.data.holdout = {config.data.holdout}: needs a row for each of {info.num_classes} classes"
    if config.train.batch_size > config.num_train:
        yield f"config.train.batch_size = {config.train.batch_size}: more than the {config.num_train} rows to train on"


def _mistakes_of_model(model: ModelConfig) -> Iterator[str]:
    """Yields what is wrong with the sizes of the layers, walking through them as an image does."""
    for name in ("kernel_sizes", "strides", "paddings", "pools"):
        values = getattr(model, name)
        if len(values) not in (1, len(model.widths)):
            yield (
                f"config.model.{name} = {values}: has {len(values)} values for {len(model.widths)} convolutions;"
                " give one each, or one for all"
            )
            return
    for name in ("widths", "kernel_sizes", "strides", "pools", "dense"):
        if any(value < 1 for value in getattr(model, name)):
            yield f"config.model.{name} = {getattr(model, name)}: every value must be at least 1"
            return
    for padding in model.paddings:
        if padding not in ("VALID", "SAME"):
            yield f"config.model.paddings = {model.paddings}: each must be 'VALID' or 'SAME'"
            return
    if model.stem == "cosine" and not model.widths:
        yield "config.model.stem = 'cosine': needs a convolution; give config.model.widths a value"
    for block in model.blocks()[:1]:
        if model.stem == "cosine" and block.width > 2 * block.kernel_size**2:
            yield (
                f"config.model.stem = 'cosine': a {block.kernel_size}x{block.kernel_size} kernel has only"
                f" {2 * block.kernel_size**2} patterns, not {block.width}; use a larger kernel or a smaller width"
            )
    size = IMAGE_SIZE
    for i, block in enumerate(model.blocks()):
        conv_size = block.conv_size(size)
        if conv_size < 1:
            yield (
                f"config.model.kernel_sizes: the {block.kernel_size}x{block.kernel_size} kernel of convolution {i + 1}"
                f" is larger than its {size}x{size} feature map; use a smaller kernel, padding 'SAME', or less pooling"
            )
            return
        size = conv_size // block.pool
        if size < 1:
            yield (
                f"config.model.pools: the {block.pool}x{block.pool} pooling of convolution {i + 1} is larger than its"
                f" {conv_size}x{conv_size} feature map; use a smaller window, or 1 for none"
            )
            return
