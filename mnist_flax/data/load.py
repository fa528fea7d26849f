"""From a dataset's name to its images: prepared once by TFDS, decoded once, then loaded from a cache.

Whatever is written goes into one folder of our own inside the TFDS folder, so no copy of anybody else is ever touched:

    <data_dir>/mnist_flax/mnist/3.0.1/       the prepared copy, a normal TFDS folder
    <data_dir>/mnist_flax/decoded/mnist.npz  the cache: the same as arrays
    <data_dir>/mnist_flax/downloads/mnist/   official files that were downloaded
    <data_dir>/mnist_flax/lock               held while one process prepares
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_flax import config as config_lib
from mnist_flax.config import Config, DataConfig
from mnist_flax.data import datasets
from mnist_flax.data.datasets import Examples
from mnist_flax.errors import DataError

logger = logging.getLogger(__name__)

_TIMEOUTS = (5, 20)  # seconds to connect, and between two pieces of an answer


class Splits(NamedTuple):
    """A dataset in memory, in the order of the original files.

    Attributes:
      name: a key of `config.DATASETS`: the dataset that this is, which need not be the one asked for.
      fingerprint: SHA-256 of all shapes, images and labels, in hexadecimal.
      source: where it came from this time: `tfds` (a copy that was already prepared), `raw` (official files),
        `download`, or `embedded`.
    """

    name: str
    train: Examples
    test: Examples
    fingerprint: str
    source: str


class _UnreachableError(DataError):
    """A download that did not happen, through no fault in the data."""


def load_splits(config: Config) -> Splits:
    """Loads the dataset that `config.data` names, from where it says; `DataConfig` explains the sources.

    Official files are prepared only if no prepared copy can be used: checksums make all sources the same.

    Raises:
      DataError: it cannot be had from there, or is damaged; the message names the place and the remedy.
    """
    data = config.data
    if data.name == "digits":
        return _splits("digits", datasets.embedded_digits(), "embedded")
    data_dir = _data_dir(data)
    raw_dir = data.raw_dir or os.environ.get("MNIST_FLAX_RAW_DIR", "")
    splits, flaws = _load_prepared(data.name, data_dir)
    tried = []
    if data.source in ("auto", "tfds"):
        if splits:
            return splits
        tried.append("\n    ".join([f"no prepared copy in {data_dir} that can be used", *flaws]))
    if data.source in ("auto", "raw"):
        if raw_dir:
            folder = Path(os.path.expanduser(raw_dir))
            try:
                _check_raw(data.name, folder)
            except DataError as error:
                field = "config.data.raw_dir" if data.raw_dir else "$MNIST_FLAX_RAW_DIR"
                raise DataError(
                    f"{field} = {raw_dir!r} does not hold {data.name}: {error}, or set --config.data.source=download"
                ) from error
            return splits or _prepare(data.name, data_dir, folder)
        tried.append("no folder of official files: neither config.data.raw_dir nor $MNIST_FLAX_RAW_DIR is set")
    if data.source in ("auto", "download"):
        try:
            return splits or _prepare(data.name, data_dir, None)
        except _UnreachableError as error:
            tried.append(str(error))
    what = f"{data.name} cannot be loaded (config.data.source = {data.source!r}):\n  " + "\n  ".join(tried)
    remedy = "Connect to the network, or put the official files into a folder and set MNIST_FLAX_RAW_DIR to it."
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
    return _splits("digits", datasets.embedded_digits(), "embedded")


def adapt_to_dataset(config: Config, splits: Splits) -> Config:
    """Returns the config of the dataset in hand.

    When another was asked for, the numbers of rows are scaled down in proportion: at least one held-out row a class
    (if any), at least one row to train on, and a batch no larger than the rows.
    """
    data = config.data
    if splits.name == data.name:
        return config
    new, old = config_lib.DATASETS[splits.name], config_lib.DATASETS[data.name]
    fraction = min(1.0, new.num_train / old.num_train)
    fewest = new.num_classes + 1 if data.holdout else 1
    num_train = max(fewest, round(data.num_train * fraction)) if data.num_train else 0
    rows = num_train or new.num_train
    holdout = min(max(new.num_classes, round(data.holdout * fraction)), rows - 1) if data.holdout else 0
    batch_size = min(config.train.batch_size, rows - holdout)
    return config_lib.replace(
        config, data__name=splits.name, data__num_train=num_train, data__holdout=holdout, train__batch_size=batch_size
    )


def fingerprint(train: Examples, test: Examples) -> str:
    """Returns the SHA-256 of all shapes, images and labels, in hexadecimal."""
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _splits(name: str, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], source: str) -> Splits:
    """Wraps decoded arrays."""
    train, test = (Examples(*arrays[split]) for split in datasets.SPLITS)
    return Splits(name, train, test, fingerprint(train, test), source)


def _data_dir(data: DataConfig) -> Path:
    """Returns the TFDS folder."""
    folder = data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(os.path.abspath(os.path.expanduser(folder)))


def _num_examples(name: str) -> dict[str, int]:
    """Returns how many rows each split has."""
    info = config_lib.DATASETS[name]
    return {"train": info.num_train, "test": info.num_test}


# Prepared copies ------------------------------------------------------------------------------------------------------


def _load_prepared(name: str, data_dir: Path) -> tuple[Splits | None, list[str]]:
    """Loads the first prepared copy that can be used; returns also why others cannot."""
    flaws: list[str] = []
    for parent in (data_dir, data_dir / "mnist_flax"):
        copy = datasets.copy_dir(name, parent)
        flaw = _flaw(name, copy)
        if not flaw:
            try:
                return _load_copy(name, data_dir, parent), flaws
            except DataError as error:
                flaw = str(error)
        if os.path.exists(copy):  # unlike Path.exists, it never raises
            flaws.append(f"{copy}: {flaw}")
    return None, flaws


def _flaw(name: str, copy: Path) -> str:
    """Says why a prepared copy cannot be used; empty if it can."""
    try:
        info = json.loads((copy / "dataset_info.json").read_bytes())
        rows = {split["name"]: sum(map(int, split["shardLengths"])) for split in info["splits"]}
        if info["fileFormat"] != "array_record":
            return f"its format is {info['fileFormat']}, which only TensorFlow reads"
        if not info.get("disableShuffling"):
            return "its records were shuffled when they were written"
        if name.startswith("emnist/") and datasets.UPRIGHT not in info["description"]:
            return "its images are transposed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "it is incomplete: dataset_info.json is missing or cannot be read"
    expected = _num_examples(name)
    return "" if rows == expected else f"its numbers of rows are {rows}, not {expected}"


def _load_copy(name: str, data_dir: Path, parent: Path) -> Splits:
    """Loads a prepared copy through the cache.

    Raises:
      DataError: its records are damaged.
    """
    cache = data_dir / "mnist_flax" / "decoded" / f"{name.replace('/', '-')}.npz"
    try:
        key = _copy_key(datasets.copy_dir(name, parent))
        splits = _read_cache(cache, name, key)
        if splits is None:
            splits = _splits(name, datasets.read_copy(name, parent, _num_examples(name)), "tfds")
            _write_cache(cache, key, splits)
        _check(splits)
    except Exception as error:  # a damaged record can surface as almost any error of the libraries that decode it
        raise DataError(f"its records cannot be read ({type(error).__name__}: {error})") from error
    return splits


def _check(splits: Splits) -> None:
    """Checks that arrays are what the dataset's name promises.

    Raises:
      ValueError: they are not.
    """
    num_classes = config_lib.DATASETS[splits.name].num_classes
    for split, rows in _num_examples(splits.name).items():
        image, label = getattr(splits, split)
        if image.shape != (rows, 28, 28, 1) or label.shape != (rows,):
            raise ValueError(f"{split} has images {image.shape} and labels {label.shape} for {rows} rows")
        if label.min() < 0 or label.max() >= num_classes:
            raise ValueError(f"{split} has labels from {label.min()} to {label.max()} for {num_classes} classes")


# The cache ------------------------------------------------------------------------------------------------------------


def _copy_key(copy: Path) -> str:
    """Returns a key of a prepared copy, which changes whenever one of its files is written anew."""
    digest = hashlib.sha256((copy / "dataset_info.json").read_bytes())
    for path in sorted(copy.iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, name: str, key: str) -> Splits | None:
    """Loads the decoded arrays, unless there are none, or of another copy, or damaged."""
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            train, test = (Examples(arrays[f"{split}_image"], arrays[f"{split}_label"]) for split in datasets.SPLITS)
            splits = Splits(name, train, test, str(arrays["fingerprint"]), "tfds")
        if fingerprint(train, test) != splits.fingerprint:
            raise ValueError("its fingerprint differs")
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, it can be made again
        logger.info("%s is damaged (%s): decoding %s again", cache, error, name)
        return None
    return splits


def _write_cache(cache: Path, key: str, splits: Splits) -> None:
    """Keeps decoded arrays for the next time; the file appears whole or not at all."""
    arrays = {
        f"{split}_{field}": array
        for split in datasets.SPLITS
        for field, array in getattr(splits, split)._asdict().items()
    }
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        for leftover in cache.parent.glob(f"{cache.name}.*.tmp"):  # of a process that died
            leftover.unlink()
        with temporary.open("wb") as file:
            np.savez(file, key=key, fingerprint=splits.fingerprint, **arrays)
        os.replace(temporary, cache)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        logger.info("the decoded images cannot be kept (%s): they will be decoded again at the next start", error)


# Preparing ------------------------------------------------------------------------------------------------------------


def _prepare(name: str, data_dir: Path, raw_dir: Path | None) -> Splits:
    """Prepares a dataset in our folder, unless another process just has, and loads it.

    Args:
      name: a key of `config.DATASETS`.
      data_dir: the TFDS folder.
      raw_dir: a folder of checked official files; None means to download them.

    Raises:
      DataError: the folder cannot be written, the download failed, or a file is damaged. Nothing new is left behind.
    """
    own = data_dir / "mnist_flax"
    try:
        with _locked(own):
            splits, flaws = _load_prepared(name, data_dir)
            if splits:
                return splits
            for flaw in flaws:
                logger.info("not used: %s", flaw)
            for leftover in own.glob("preparing-*"):  # of a process that died
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="preparing-", dir=own) as staging:
                files = raw_dir or _download(name, own, Path(staging))
                logger.info("preparing %s in %s, which happens only once", name, own)
                datasets.prepare(name, raw_dir=files, data_dir=Path(staging), num_examples=_num_examples(name))
                _move(datasets.copy_dir(name, Path(staging)), datasets.copy_dir(name, own))
            splits, flaws = _load_prepared(name, data_dir)
    except OSError as error:
        raise DataError(
            f"{own}: cannot prepare {name} there ({error}); free some space, or choose a folder that can be written"
            " with --config.data.data_dir=DIR"
        ) from error
    if splits is None:
        raise DataError(f"{name} was prepared but cannot be loaded: {'; '.join(flaws)}")
    return splits._replace(source="raw" if raw_dir else "download")


def _move(source: Path, target: Path) -> None:
    """Moves a folder in place of another one."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


@contextlib.contextmanager
def _locked(own: Path) -> Iterator[None]:
    """Makes our folder and holds its lock, which the system frees when a process dies.

    If the body fails, folders that are new and still empty are removed again.
    """
    import filelock

    lock = filelock.FileLock(own / "lock")
    new: list[Path] = []
    seconds = 0
    try:
        while not lock.is_locked:
            new = [folder for folder in (own, *own.parents) if not folder.exists()] or new
            own.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=seconds)
            except filelock.Timeout:
                if not seconds:
                    logger.info("waiting for another process that prepares a dataset in %s", own)
                seconds = 10
            except FileNotFoundError:  # it failed, and removed the folder
                pass
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if own in new:
                (own / "lock").unlink()
            for folder in new:
                folder.rmdir()
        raise
    finally:
        lock.release()


def _check_raw(name: str, raw_dir: Path) -> None:
    """Checks a user's folder of official files.

    Raises:
      DataError: a file is missing or is not the official one.
    """
    for file in datasets.official_files(name):
        datasets.check_file(raw_dir / file.name, file)


def _download(name: str, own: Path, staging: Path) -> Path:
    """Downloads the official files of a dataset, if that is not yet done, and returns their folder.

    Raises:
      DataError: what came is not the official file.
    """
    target = own / "downloads" / datasets.family(name)
    with contextlib.suppress(DataError):
        _check_raw(name, target)
        return target
    folder = staging / "downloaded"
    folder.mkdir()
    for file in datasets.official_files(name):
        logger.info("downloading %s (%.1f MB)", file.url, file.size / 1e6)
        _fetch(file, folder / file.name)
    _move(folder, target)
    return target


def _fetch(file: datasets.OfficialFile, path: Path) -> None:
    """Downloads one file, and never more than its size.

    Raises:
      DataError: what came is not the official file.
    """
    import requests

    size = 0
    try:
        with requests.Session() as session, path.open("wb") as out:
            # As it is: a server may offer to unpack it on the way, and then no checksum would fit.
            request = session.get(file.url, stream=True, timeout=_TIMEOUTS, headers={"Accept-Encoding": "identity"})
            with request as response:
                response.raise_for_status()
                for block in response.iter_content(1 << 16):
                    size += len(block)
                    if size > file.size:
                        raise DataError(f"{file.url}: sends more than the {file.size} bytes it should; try again later")
                    out.write(block)
    except requests.RequestException as error:
        raise _UnreachableError(f"{file.url} cannot be downloaded: {error}") from error
    try:
        datasets.check_file(path, file)
    except DataError as error:
        raise DataError(f"{file.url} does not send the official file: {error}") from error
