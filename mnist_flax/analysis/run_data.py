"""The data that a trained network is evaluated on: its own dataset, or another compatible one."""

import types
from collections.abc import Mapping
from typing import Any

from mnist_flax.config import Config, replace
from mnist_flax.data import batches
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATA_FIELDS, DATASETS, IMAGE_SIZE
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.errors import ConfigError, DataError
from mnist_flax.run import console
from mnist_flax.sections import DataConfig, TrainConfig

DEFAULT_DATA: Mapping[str, Any] = types.MappingProxyType({})  # no overrides: the data that the run's config names


def load_data(
    config: Config, fingerprint: str, overrides: Mapping[str, Any] = DEFAULT_DATA
) -> tuple[DataConfig, Splits]:
    """Loads the dataset of a run, or another one to evaluate it on.

    The paths recorded in the run are ignored, because the run may come from someone else or another machine.

    `config` and `fingerprint` are those of the run. `overrides` holds values for some of the fields in `DATA_FIELDS`;
    source and folders default to those of a new config.

    Returns:
      The data config in use, and the data.

    Raises:
      ConfigError: a field is not one of `DATA_FIELDS`, or the other dataset is not compatible with the network.
      DataError: the data cannot be found, or are not the ones that the run was trained on.
    """
    check_overrides(overrides)
    # Falling back to a dataset other than the one asked for would give meaningless results.
    changed: dict[str, Any] = {"data__source": "auto", "data__data_dir": "", "data__raw_dir": ""}
    changed |= {name.replace(".", "__"): value for name, value in overrides.items()} | {"data__on_missing": "error"}
    name = changed.get("data__name", config.data.name)
    if name != config.data.name:  # the run neither trained on nor held out any of its rows
        changed |= dict.fromkeys(("data__num_train", "data__holdout", "data__folds", "data__fold"), 0)
    # Without the other sections, because augmentation and batch size need not fit another dataset.
    used = replace(Config(data=config.data, train=TrainConfig(batch_size=1)), **changed)
    check_classes(config, name)
    splits = load_splits(used.data)
    for split in (splits.train, splits.test):
        if split.image.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 1):
            raise DataError(f"{name}: has images of shape {split.image.shape[1:]}; the network needs 28x28 grey ones")
    if name == config.data.name and splits.fingerprint != fingerprint:
        raise DataError(
            f"{name}: its fingerprint is {splits.fingerprint}, but the run was trained on {fingerprint}; name the"
            " folder of the same data with --config.data.data_dir=DIR or --config.data.raw_dir=DIR"
        )
    return used.data, splits


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises a ConfigError if a field is not one of `DATA_FIELDS`."""
    for name, value in overrides.items():
        if name not in DATA_FIELDS:
            raise ConfigError(
                f"config.{name} = {value!r}: cannot be changed after training; only these can:"
                f" {', '.join('config.' + field for field in DATA_FIELDS)}"
            )


def load_own_data(config: Config, fingerprint: str, overrides: Mapping[str, Any] = DEFAULT_DATA) -> Splits:
    """Loads the dataset of a run, for a command that is about this run; see `load_data`.

    Raises:
      ConfigError, DataError: as for `load_data`; or the overrides name another dataset.
    """
    check_own_dataset(config.data.name, overrides)
    return load_data(config, fingerprint, overrides)[1]


def check_own_dataset(trained_on: str, overrides: Mapping[str, Any]) -> None:
    """Raises a ConfigError if the overrides name a dataset other than the one that a network was trained on."""
    name = overrides.get("data.name", trained_on)
    if name != trained_on:
        raise ConfigError(
            f"config.data.name = {name!r}: this network was trained on {trained_on}; leave this field"
            f" out, or use {console.command('evaluate')} to evaluate the network on another dataset"
        )


def check_classes(config: Config, name: str) -> None:
    """Raises a ConfigError if a network cannot be evaluated on a dataset."""
    num_classes = DATASETS[name].num_classes
    if num_classes != config.num_classes:
        fitting = [other for other, info in DATASETS.items() if info.num_classes == config.num_classes]
        raise ConfigError(
            f"config.data.name = {name!r}: has {num_classes} classes, but this network was trained on the"
            f" {config.num_classes} of {config.data.name}; these datasets fit: {', '.join(fitting)}"
        )


def select_examples(data: DataConfig, splits: Splits, split: str) -> Examples:
    """Returns the examples of the split `train`, `holdout` or `test`, given what `load_data` returns.

    On the run's own dataset, `train` means the rows that it was trained on.

    Raises:
      ConfigError: no rows were held out.
    """
    if split == "test":
        return splits.test
    train, held_out = batches.rows_of(splits.train.label, data)
    rows = {"train": train, "holdout": held_out}[split]
    if not len(rows):
        raise ConfigError(f"--split={split}: the run held out no rows of {splits.name}; choose another split")
    return splits.train.select(rows)
