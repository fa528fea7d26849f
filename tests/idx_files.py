"""Small datasets in the format of the official files, which stand in for the real ones."""

import gzip
import hashlib
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mnist_flax import config
from mnist_flax.data import datasets

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def idx(array: np.ndarray) -> bytes:
    """Returns an array of bytes as a gzipped IDX file."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def random_arrays(name: str, num_train: int = 70, num_test: int = 50, seed: int = 0) -> Arrays:
    """Returns random images u8[N,28,28] and labels u8[N] of every class that fits, by split."""
    rng = np.random.default_rng(seed)
    num_classes = config.DATASETS[name].num_classes
    return {
        split: (rng.integers(0, 256, (rows, 28, 28), np.uint8), (np.arange(rows) * 7 % num_classes).astype(np.uint8))
        for split, rows in (("train", num_train), ("test", num_test))
    }


def write_files(folder: Path, name: str, arrays: Arrays) -> None:
    """Writes a dataset as its publisher does: four gzipped IDX files, or EMNIST's zip with transposed images."""
    folder.mkdir(parents=True, exist_ok=True)
    family, _, emnist_config = name.partition("/")
    if family != "emnist":
        for split, pair in arrays.items():
            for file, array in zip(FILES[split], pair, strict=True):
                (folder / file).write_bytes(idx(array))
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for split, (images, labels) in arrays.items():
            prefix = f"gzip/emnist-{emnist_config}-{split}"
            archive.writestr(f"{prefix}-images-idx3-ubyte.gz", idx(images.transpose(0, 2, 1)))
            archive.writestr(f"{prefix}-labels-idx1-ubyte.gz", idx(labels))
    (folder / "gzip.zip").write_bytes(buffer.getvalue())


def make_official(patch: pytest.MonkeyPatch, folder: Path, name: str, arrays: Arrays, url: str) -> None:
    """Makes the files in a folder the official ones of a dataset: numbers of rows, address, sizes and checksums."""
    from tensorflow_datasets.core.download import checksums

    family = name.partition("/")[0]
    url = url.rstrip("/") + "/" + ("gzip.zip" if family == "emnist" else "")
    infos = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        address = url if family == "emnist" else url + path.name
        infos[address] = checksums.UrlInfo(len(content), hashlib.sha256(content).hexdigest(), path.name)
    patch.setattr(datasets.builder_class(family), "URL", url)
    patch.setattr(datasets.builder_class(family), "url_infos", infos)
    rows = (len(arrays[split][1]) for split in ("train", "test"))
    patch.setitem(config.DATASETS, name, config.DatasetInfo(config.DATASETS[name].num_classes, *rows))


def closed_url() -> str:
    """Returns an address at which nothing listens."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"
