"""Converts a dataset's official files to a TFDS folder once, and loads that folder through a cache of arrays.

Everything is written into our own subfolder of `data_dir`, so no other copy is ever touched:

    <data_dir>/mnist_flax/mnist/3.0.1/       the prepared copy, a normal TFDS folder
    <data_dir>/mnist_flax/decoded/mnist.npz  the cache: the same data as arrays
    <data_dir>/mnist_flax/downloads/mnist/   downloaded official files
    <data_dir>/mnist_flax/lock               held while a process prepares a dataset
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np

from mnist_flax.data import tfds_copy
from mnist_flax.data.download import check_files, download_files
from mnist_flax.data.idx import read_files
from mnist_flax.data.registry import DATASETS, IMAGE_SIZE, Dataset
from mnist_flax.data.splits import Examples, Splits, check_fingerprint, fingerprint, make_splits
from mnist_flax.errors import DataError

logger = logging.getLogger(__name__)

FINGERPRINT_FILE = "fingerprint.txt"  # written into each copy that we prepare
_BYTES_PER_ROW = 1500  # 790 in the cache and up to 640 in the copy (Fashion-MNIST)


def prepare(name: str, data_dir: Path, raw_dir: Path | None) -> Splits:
    """Prepares a dataset in our folder, unless another process has just done so, and loads it.

    `raw_dir` holds its official files, already checked; None downloads them.

    Raises:
      UnavailableError: the files cannot be downloaded.
      DataError: the folder cannot be written or is full, or a file is damaged. No partial copy is left behind.
    """
    own = data_dir / "mnist_flax"
    dataset = DATASETS[name]
    try:
        with _locked(own):
            splits, flaws = load_prepared(name, data_dir)
            if splits:
                return splits
            for flaw in flaws:
                logger.info("not used: %s", flaw)
            for leftover in own.glob("preparing-*"):  # left by a process that died
                shutil.rmtree(leftover, ignore_errors=True)
            downloads = own / "downloads" / name.partition("/")[0]
            files = raw_dir or (downloads if _holds(downloads, dataset) else None)
            needed = sum(dataset.split_sizes.values()) * _BYTES_PER_ROW
            needed += 0 if files else sum(file.size for file in dataset.files)
            if (free := shutil.disk_usage(own).free) < needed:
                raise OSError(f"it needs {needed / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free")
            with tempfile.TemporaryDirectory(prefix="preparing-", dir=own) as staging:
                files = files or _downloaded(dataset, downloads, Path(staging))
                logger.info("preparing %s in %s, which happens only once", name, own)
                train, test = read_files(dataset, files)
                tfds_copy.write_copy(name, train, test, Path(staging))
                copy = tfds_copy.copy_dir(name, Path(staging))
                (copy / FINGERPRINT_FILE).write_text(fingerprint(train, test) + "\n")
                _move(copy, tfds_copy.copy_dir(name, own))
            splits, flaws = load_prepared(name, data_dir)
    except OSError as error:
        raise DataError(
            f"{own}: cannot prepare {name} there ({error}); free some space, or choose a folder that can be written"
            " with --config.data.data_dir=DIR"
        ) from error
    if splits is None:
        raise DataError(f"{name} was prepared but cannot be loaded: {'; '.join(flaws)}")
    return splits._replace(source="raw" if raw_dir else "download")


def _holds(folder: Path, dataset: Dataset) -> bool:
    """Returns whether a folder holds the official files of a dataset."""
    try:
        check_files(dataset, folder)
    except DataError:
        return False
    return True


def _downloaded(dataset: Dataset, target: Path, staging: Path) -> Path:
    """Downloads the official files of a dataset into a folder, and returns it."""
    folder = staging / "downloaded"
    folder.mkdir()
    download_files(dataset, folder)
    _move(folder, target)
    return target


def _move(source: Path, target: Path) -> None:
    """Moves a folder, replacing the target if it exists."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


@contextlib.contextmanager
def _locked(own: Path) -> Iterator[None]:
    """Creates our folder and holds its lock, which the system releases if the process dies.

    If the body fails, new folders are deleted again if they are empty.
    """
    lock = filelock.FileLock(own / "lock")
    new: list[Path] = []
    timeout = 0
    try:
        new = [folder for folder in (own, *own.parents) if not folder.exists()]
        while not lock.is_locked:
            own.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=timeout)
            except filelock.Timeout:
                logger.info("waiting for another process that is preparing a dataset in %s", own)
                timeout = -1  # no limit
            except FileNotFoundError:  # the other process failed, and removed the folder
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


def load_prepared(name: str, data_dir: Path) -> tuple[Splits | None, list[str]]:
    """Loads the first usable prepared copy, if any, and lists why the copies before it are unusable.

    Raises:
      DataError: a copy can be read, but it is not this dataset.
    """
    flaws: list[str] = []
    for parent in (data_dir, data_dir / "mnist_flax"):
        copy = tfds_copy.copy_dir(name, parent)
        flaw = tfds_copy.find_flaw(name, parent)
        if not flaw:
            try:
                splits = _load_copy(name, data_dir, parent)
            except Exception as error:  # a damaged record can raise almost any error in the decoding libraries
                flaw = f"its records cannot be read ({type(error).__name__}: {error})"
            else:
                remedy = "delete this folder to prepare it again, or choose another with --config.data.data_dir=DIR"
                check_fingerprint(splits, _expected_fingerprint(name, copy), copy, remedy)
                return splits, flaws
        if os.path.exists(copy):  # unlike Path.exists, os.path.exists never raises
            flaws.append(f"{copy}: {flaw}")
    return None, flaws


def _load_copy(name: str, data_dir: Path, parent: Path) -> Splits:
    """Loads the copy below `parent` through the cache."""
    cache = data_dir / "mnist_flax" / "decoded" / f"{name.replace('/', '-')}.npz"
    key = _copy_key(tfds_copy.copy_dir(name, parent))
    splits = _read_cache(cache, name, key)
    if splits is None:
        splits = make_splits(name, *tfds_copy.read_copy(name, parent), "tfds")
        _write_cache(cache, key, splits)
    _check_arrays(splits)
    return splits


def _check_arrays(splits: Splits) -> None:
    """Raises ValueError if shapes or labels do not match the dataset's entry in `DATASETS`."""
    num_classes = DATASETS[splits.name].num_classes
    for split, rows in DATASETS[splits.name].split_sizes.items():
        image, label = getattr(splits, split)
        if image.shape != (rows, IMAGE_SIZE, IMAGE_SIZE, 1) or label.shape != (rows,):
            raise ValueError(f"{split} has images {image.shape} and labels {label.shape} for {rows} rows")
        if label.min() < 0 or label.max() >= num_classes:
            raise ValueError(f"{split} has labels from {label.min()} to {label.max()} for {num_classes} classes")


def _expected_fingerprint(name: str, copy: Path) -> str:
    """Returns the fingerprint that a copy should have, or an empty string if it is unknown."""
    if not DATASETS[name].fingerprint:
        with contextlib.suppress(OSError):
            return (copy / FINGERPRINT_FILE).read_bytes().decode(errors="replace").strip()
    return DATASETS[name].fingerprint


def _copy_key(copy: Path) -> str:
    """Returns the cache key of a prepared copy, which changes whenever one of its files is rewritten."""
    digest = hashlib.sha256((copy / "dataset_info.json").read_bytes())
    for path in sorted(copy.iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, name: str, key: str) -> Splits | None:
    """Loads the cached arrays; returns None if they are missing, damaged or from another copy."""
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            train, test = (Examples(arrays[f"{split}_image"], arrays[f"{split}_label"]) for split in ("train", "test"))
            splits = Splits(name, train, test, str(arrays["fingerprint"]), "tfds")
        if fingerprint(train, test) != splits.fingerprint:
            raise ValueError("its fingerprint differs")
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong, the cache can be rebuilt
        logger.info("%s is damaged (%s): decoding %s again", cache, error, name)
        return None
    return splits


def _write_cache(cache: Path, key: str, splits: Splits) -> None:
    """Caches the decoded arrays; the file is replaced atomically."""
    names = ("train_image", "train_label", "test_image", "test_label")
    arrays = dict(zip(names, (*splits.train, *splits.test), strict=True))
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        for leftover in cache.parent.glob(f"{cache.name}.*.tmp"):
            if time.time() - leftover.stat().st_mtime > 600:  # left by a process that died
                leftover.unlink()
        with temporary.open("wb") as file:
            np.savez(file, key=key, fingerprint=splits.fingerprint, **arrays)
        os.replace(temporary, cache)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        logger.info("the decoded images cannot be kept (%s): they will be decoded again at the next start", error)
