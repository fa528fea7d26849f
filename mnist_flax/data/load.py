"""Loads a dataset by name, from the first source that has it."""

import logging
import os
from pathlib import Path

import numpy as np

from mnist_flax.config import Config, replace
from mnist_flax.data.download import UnavailableError, check_files
from mnist_flax.data.embedded import embedded_digits
from mnist_flax.data.idx import read_files
from mnist_flax.data.prepare import load_prepared, prepare
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Splits, check_fingerprint, make_splits
from mnist_flax.errors import DataError
from mnist_flax.sections import DataConfig

logger = logging.getLogger(__name__)


def load_splits(data: DataConfig) -> Splits:
    """Loads the dataset that `data` names, or the fallback that it allows (see `DataConfig`).

    Raises:
      DataError: no source has it and no fallback is allowed, or its files are damaged; the message says what to do.
    """
    if not DATASETS[data.name].files:
        return make_splits(data.name, *embedded_digits(), "embedded")
    tried = []
    for source in _LOADERS if data.source == "auto" else [data.source]:
        try:
            return _LOADERS[source](data)
        except UnavailableError as error:
            tried.append(str(error))
    what = f"{data.name} cannot be loaded (config.data.source = {data.source!r}):\n  " + "\n  ".join(tried)
    remedy = "Connect to the internet, or put the official files into a folder and set MNIST_FLAX_RAW_DIR to it."
    if not DATASETS[data.name].tfds_version:
        remedy = "Put its files into a folder and set --config.data.raw_dir to it."
    if data.source != "auto":
        remedy += " Then set --config.data.source=auto, which tries every source."
    if data.source != "auto" or data.on_missing == "error":
        raise DataError(f"{what}\n{remedy}")
    logger.warning(
        "\n%s\n%s\n%s\nTHIS RUN USES ANOTHER, MUCH SMALLER DATASET: the digits embedded in scikit-learn, NOT %s.\n"
        "Its results are those of `digits`. To stop here instead: --config.data.on_missing=error\n%s",
        "=" * 100,
        what,
        remedy,
        data.name,
        "=" * 100,
    )
    return make_splits("digits", *embedded_digits(), "embedded")


def _from_tfds(data: DataConfig) -> Splits:
    if not DATASETS[data.name].tfds_version:
        raise UnavailableError("no prepared copy: TFDS does not have this dataset")
    splits, flaws = load_prepared(data.name, _data_dir(data))
    if splits is None:
        raise UnavailableError("\n    ".join([f"no prepared copy in {_data_dir(data)} that can be used", *flaws]))
    return splits


def _from_raw(data: DataConfig) -> Splits:
    """Loads files from the user's folder.

    Official files are prepared only if there is no usable prepared copy. Checksums guarantee that such a copy holds the
    same data.
    """
    parent = raw_folder(data)
    if parent is None:
        raise UnavailableError(
            "no folder of official files: neither config.data.raw_dir nor $MNIST_FLAX_RAW_DIR is set"
        )
    dataset = DATASETS[data.name]
    # Most datasets use MNIST's file names, so a folder that holds several needs a subfolder for each.
    subfolders = [parent / data.name, parent / data.name.partition("/")[0]]
    folder = next((folder for folder in subfolders if os.path.isdir(folder)), parent)
    try:
        check_files(dataset, folder)
        splits = None if dataset.tfds_version else make_splits(data.name, *read_files(dataset, folder), "raw")
    except DataError as error:
        field = "config.data.raw_dir" if data.raw_dir else "$MNIST_FLAX_RAW_DIR"
        place = f"it or its subfolder {data.name!r}" if folder == parent else str(folder)
        remedy = f"correct the files in {place}, or its entry in DATASETS"
        if dataset.tfds_version:
            remedy = f"put the files into {place}, or set --config.data.source=download"
        raise DataError(f"{field} = {str(parent)!r} does not hold {data.name}: {error}; {remedy}") from error
    if splits is None:
        return load_prepared(data.name, _data_dir(data))[0] or prepare(data.name, _data_dir(data), folder)
    check_fingerprint(splits, dataset.fingerprint, folder, "replace the files, or correct its entry in DATASETS")
    for name, other in DATASETS.items():
        if name != splits.name and other.fingerprint == splits.fingerprint:
            logger.warning("%s holds the files of %s, not of %s", folder, name, splits.name)
    return splits


def raw_folder(data: DataConfig) -> Path | None:
    """Returns the user's folder of official files: `data.raw_dir`, or `$MNIST_FLAX_RAW_DIR`; None if neither is set."""
    folder = data.raw_dir or os.environ.get("MNIST_FLAX_RAW_DIR")
    return Path(os.path.expanduser(folder)) if folder else None


def _from_download(data: DataConfig) -> Splits:
    if not DATASETS[data.name].tfds_version:
        raise UnavailableError("no download: this dataset is only read from a folder")
    return load_prepared(data.name, _data_dir(data))[0] or prepare(data.name, _data_dir(data), None)


# In the order in which `auto` tries them.
_LOADERS = {"tfds": _from_tfds, "raw": _from_raw, "download": _from_download}


def _data_dir(data: DataConfig) -> Path:
    """Returns the TFDS folder."""
    folder = os.path.expanduser(data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if folder.startswith("~"):
        raise DataError(f"{folder}: there is no such home folder; name another folder with --config.data.data_dir=DIR")
    return Path(os.path.abspath(folder))


def adapt_to_dataset(config: Config, splits: Splits) -> Config:
    """Returns the config adapted to the dataset that was loaded.

    A substitute dataset is smaller: `num_train` is at most its size, and `holdout` shrinks in proportion to the rows in
    use. At least one training row remains and, if the config holds out rows, one hold-out row per class; with folds, a
    row per class and fold. The batch is no larger than the training set, or the smallest training set of all folds.
    """
    data = config.data
    if splits.name == data.name:
        return config
    new, old = DATASETS[splits.name], DATASETS[data.name]
    fewest = new.num_classes + 1 if data.holdout else 1
    if data.folds:  # every class, even the rarest, has a row in each fold
        fewest = -(-data.folds * new.num_train // int(np.bincount(splits.train.label).min()))
    num_train = min(max(fewest, data.num_train), new.num_train) if data.num_train else 0
    rows = num_train or new.num_train
    fraction = min(1.0, rows / (data.num_train or old.num_train))
    holdout = min(max(new.num_classes, round(data.holdout * fraction)), rows - 1) if data.holdout else 0
    held_out = -(-rows // data.folds) if data.folds else holdout  # the first fold is the largest
    batch_size = min(config.train.batch_size, rows - held_out)
    return replace(
        config, data__name=splits.name, data__num_train=num_train, data__holdout=holdout, train__batch_size=batch_size
    )
