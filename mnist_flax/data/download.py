"""Checks and downloads the official files of the datasets."""

import hashlib
import logging
from pathlib import Path

from mnist_flax.data.registry import DATASETS, DataFile, Dataset
from mnist_flax.errors import DataError, reason

logger = logging.getLogger(__name__)

TIMEOUTS = (5, 20)  # seconds to connect, and between two chunks of a response


class UnavailableError(DataError):
    """A source has no usable copy of the dataset, so the next source may be tried."""


def check_files(dataset: Dataset, folder: Path) -> None:
    """Checks that a folder contains the files of a dataset, with the right sizes and checksums where they are known.

    Raises:
      DataError: a file is missing, cannot be read, or has the wrong size or SHA-256.
    """
    for file in dataset.files:
        _check_file(file.path_in(folder), file)


def _check_file(path: Path, file: DataFile) -> None:
    remedy = f"; fetch it from {file.url}" if file.url else ""
    try:
        if not path.is_file():
            is_unpacked = path.with_suffix("").is_file()
            hint = f" ({path.stem} is there, but only the checksum of the gzipped file is known)" if is_unpacked else ""
            raise DataError(f"{path}: no such file{hint}{remedy}")
        size = path.stat().st_size
        if file.size and size != file.size:
            raise DataError(f"{path}: {size} bytes{_owner(size)} instead of {file.size}{remedy}")
        with path.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest() if file.sha256 else ""
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}); make it readable{remedy}") from error
    if sha256 != file.sha256:
        raise DataError(f"{path}: damaged, its SHA-256 is {sha256} instead of {file.sha256}{remedy}")


def _owner(size: int) -> str:
    """Returns a hint if another known file has this size: many files have the same name and are easily confused."""
    for name, dataset in DATASETS.items():
        for file in dataset.files:
            if size and file.size == size:  # 0: not known
                return f" (the size of {name}'s {file.name})"
    return ""


def download_files(dataset: Dataset, folder: Path) -> None:
    """Downloads the files of a dataset into a folder.

    Raises:
      UnavailableError: a server cannot be reached.
      DataError: what a server sent is not the official file.
      OSError: the folder cannot be written.
    """
    for file in dataset.files:
        logger.info("downloading %s (%.1f MB)", file.url, file.size / 1e6)
        _download(file, folder / file.name)


def _download(file: DataFile, path: Path) -> None:
    """Downloads one file, but never more bytes than its known size."""
    import requests

    size = 0
    try:
        with requests.Session() as session, path.open("wb") as out:
            # Identity: if the server compressed or decompressed the file in transit, the checksum would not match.
            request = session.get(file.url, stream=True, timeout=TIMEOUTS, headers={"Accept-Encoding": "identity"})
            with request as response:
                response.raise_for_status()
                for block in response.iter_content(1 << 16):
                    size += len(block)
                    if size > file.size:
                        raise DataError(f"{file.url}: sends more than the expected {file.size} bytes; try again later")
                    out.write(block)
    except requests.RequestException as error:
        what = str(error)  # of a missing page, for example
        if isinstance(error, requests.Timeout):
            what = "the connection timed out"
        elif isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
            what = "there is no connection to its server, or it broke off"
        raise UnavailableError(f"{file.url} cannot be downloaded: {what}") from error
    try:
        _check_file(path, file)
    except DataError as error:
        raise DataError(f"{file.url} does not send the official file: {error}") from error
