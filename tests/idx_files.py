"""Small datasets in the format of the official files, used in place of the real ones."""

import dataclasses
import gzip
import hashlib
import io
import os
import socket
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_flax import config
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS, IDX_FILES, DataFile
from mnist_flax.data.splits import Splits

NAMES = [name for name in DATASETS if name != "digits"]
RAW_DIR = os.environ.get("MNIST_FLAX_RAW_DIR", "")
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def real_folder(name: str) -> Path:
    """Returns the folder with a dataset's official files; skips the test if there is none."""
    folder = next((path for path in (Path(RAW_DIR, name), Path(RAW_DIR)) if path.is_dir()), Path())
    if not RAW_DIR or (folder.name != name and name != "mnist"):
        pytest.skip(f"needs the real files of {name} in $MNIST_FLAX_RAW_DIR")
    return folder


def idx(array: np.ndarray) -> bytes:
    """Returns an array of bytes as a gzipped IDX file."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def random_arrays(name: str, num_train: int = 70, num_test: int = 50, seed: int = 0) -> Arrays:
    """Returns random images u8[N,28,28], and labels u8[N] that cycle through the classes, by split."""
    rng = np.random.default_rng(seed)
    num_classes = DATASETS[name].num_classes
    return {
        split: (rng.integers(0, 256, (rows, 28, 28), np.uint8), (np.arange(rows) * 7 % num_classes).astype(np.uint8))
        for split, rows in (("train", num_train), ("test", num_test))
    }


def write_files(folder: Path, name: str, arrays: Arrays) -> None:
    """Writes a dataset as its publisher does: four gzipped IDX files, or EMNIST's zip with transposed images."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = DATASETS[name]
    files = [
        idx(array.transpose(0, 2, 1) if dataset.transposed and array.ndim == 3 else array)
        for pair in arrays.values()
        for array in pair
    ]
    if not dataset.archive_members:
        for file, content in zip(dataset.files, files, strict=True):
            (folder / file.name).write_bytes(content)
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in zip(dataset.archive_members, files, strict=True):
            archive.writestr(member, content)
    (folder / dataset.files[0].name).write_bytes(buffer.getvalue())


def make_official(patch: pytest.MonkeyPatch, folder: Path, name: str, arrays: Arrays, url: str) -> None:
    """Registers the files in a folder as a dataset's official ones: numbers of rows, addresses, sizes and checksums."""
    files = []
    for file in DATASETS[name].files:
        content = (folder / file.name).read_bytes()
        files.append(DataFile(file.name, url + file.name, len(content), hashlib.sha256(content).hexdigest()))
    num_train, num_test = (len(arrays[split][1]) for split in ("train", "test"))
    entry = dataclasses.replace(
        DATASETS[name],
        num_train=num_train,
        num_test=num_test,
        files=tuple(files),
        fingerprint="",
        doubtful_test_rows=(),
    )
    patch.setitem(DATASETS, name, entry)


def closed_url() -> str:
    """Returns an address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


class Published:
    """A small dataset whose official files are in a folder, under an address where nothing listens."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "mnist", seed: int = 0):
        for variable in ("MNIST_FLAX_RAW_DIR", "TFDS_DATA_DIR", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(variable, raising=False)
            monkeypatch.delenv(variable.upper(), raising=False)
        self.name, self.raw_dir, self.data_dir, self._patch = name, folder / "raw", folder / "tfds", monkeypatch
        self.own = self.data_dir / "mnist_flax"
        self.copy = self.own / name / DATASETS[name].tfds_version
        self.cache = self.own / "decoded" / f"{name.replace('/', '-')}.npz"
        self.arrays = random_arrays(name, seed=seed)
        self.publish()

    def publish(self) -> None:
        """Writes the files and makes them the official ones."""
        write_files(self.raw_dir, self.name, self.arrays)
        self.at(closed_url())

    def at(self, url: str) -> None:
        make_official(self._patch, self.raw_dir, self.name, self.arrays, url)

    def config(self, **fields: Any) -> config.Config:
        fields = {"name": self.name, "data_dir": str(self.data_dir), **fields}
        return config.replace(
            config.Config(), train__batch_size=1, **{f"data__{field}": value for field, value in fields.items()}
        )

    def load(self, **fields: Any) -> Splits:
        return load_splits(self.config(**fields).data)

    def load_raw(self) -> Splits:
        return self.load(source="raw", raw_dir=str(self.raw_dir))

    def check(self, splits: Splits, source: str) -> None:
        assert (splits.name, splits.source) == (self.name, source)
        check_arrays(splits, self.arrays)


def check_arrays(splits: Splits, arrays: Arrays) -> None:
    """Checks that splits contain these arrays."""
    for split, (images, labels) in arrays.items():
        got = getattr(splits, split)
        assert got.image.dtype == np.uint8
        assert got.label.dtype == np.int32
        np.testing.assert_array_equal(got.image[..., 0], images)
        np.testing.assert_array_equal(got.label, labels)


def tree(folder: Path) -> list[str]:
    """Returns everything in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


FILE_NAMES = [file.name for file in IDX_FILES]
