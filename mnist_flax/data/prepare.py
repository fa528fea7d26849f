"""Prepares a dataset once: converts its official files to a TFDS folder.

Everything is written into our own subfolder of the TFDS folder, so no other copy is ever touched:

    <data_dir>/mnist_flax/mnist/3.0.1/       the prepared copy, a normal TFDS folder
    <data_dir>/mnist_flax/decoded/mnist.npz  the cache: the same data as arrays
    <data_dir>/mnist_flax/downloads/mnist/   downloaded official files
    <data_dir>/mnist_flax/lock               held while a process prepares a dataset
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mnist_flax.data.cache import FINGERPRINT_FILE, load_prepared
from mnist_flax.data.download import check_files, download_files
from mnist_flax.data.idx import read_files
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Splits, fingerprint
from mnist_flax.data.tfds_copy import copy_dir, write_copy
from mnist_flax.errors import DataError

logger = logging.getLogger(__name__)

_BYTES_PER_ROW = 1500  # 790 in the cache and up to 640 in the copy (Fashion-MNIST)


def prepare(name: str, data_dir: Path, raw_dir: Path | None) -> Splits:
    """Prepares a dataset in our folder, unless another process has just done so, and loads it.

    Args:
      name: a key of `DATASETS`.
      data_dir: the TFDS folder.
      raw_dir: a folder of official files, already checked; None downloads them.
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
            _check_space(own, sum(dataset.num_rows.values()) * _BYTES_PER_ROW)
            with tempfile.TemporaryDirectory(prefix="preparing-", dir=own) as staging:
                files = raw_dir or _downloaded(name, own, Path(staging))
                logger.info("preparing %s in %s, which happens only once", name, own)
                train, test = read_files(dataset, files)
                write_copy(name, train, test, Path(staging))
                copy = copy_dir(name, Path(staging))
                (copy / FINGERPRINT_FILE).write_text(fingerprint(train, test) + "\n")
                _move(copy, copy_dir(name, own))
            splits, flaws = load_prepared(name, data_dir)
    except OSError as error:
        raise DataError(
            f"{own}: cannot prepare {name} there ({error}); free some space, or choose a folder that can be written"
            " with --config.data.data_dir=DIR"
        ) from error
    if splits is None:
        raise DataError(f"{name} was prepared but cannot be loaded: {'; '.join(flaws)}")
    return splits._replace(source="raw" if raw_dir else "download")


def _check_space(folder: Path, num_bytes: int) -> None:
    """Raises OSError if less than `num_bytes` of disk space is free in a folder."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(f"it needs {num_bytes / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free")


def _downloaded(name: str, own: Path, staging: Path) -> Path:
    """Downloads the official files unless they are already there, and returns their folder."""
    dataset = DATASETS[name]
    target = own / "downloads" / name.partition("/")[0]
    with contextlib.suppress(DataError):
        check_files(dataset, target)
        return target
    _check_space(own, sum(file.size for file in dataset.files))
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

    If the body fails, new folders that are still empty are deleted again.
    """
    import filelock

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
