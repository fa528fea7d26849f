"""The builders, their files and the embedded digits."""

import gzip
import hashlib
import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from idx_files import Arrays, closed_url, idx, make_official, random_arrays, write_files

from mnist_flax.config import DATASETS
from mnist_flax.data import datasets
from mnist_flax.errors import DataError

NAMES = [name for name in DATASETS if name != "digits"]


def packed(*header: int, body: bytes = b"", dims: str = "") -> bytes:
    return gzip.compress(struct.pack(f">4B{dims}", *header) + body)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 28, 28), (2, 5)])
def test_read_idx_returns_what_was_written(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.testing.assert_array_equal(datasets.read_idx(io.BytesIO(idx(array)), "f", shape), array)


GOOD = idx(np.zeros((4, 3, 2)))


BAD = {
    "empty": (b"", "begins with 0x, which is no IDX"),
    "not gzip": (b"\0\0\x08\x03" + bytes(40), "not a whole gzip file"),
    "truncated": (GOOD[:-9], "not a whole gzip file"),
    "wrong CRC": (GOOD[:-8] + b"abcd" + GOOD[-4:], "not a whole gzip file"),
    "damaged inside": (GOOD[:12] + b"\xff\xff\xff" + GOOD[15:], "not a whole gzip file"),
    "wrong magic": (packed(1, 2, 8, 3, 4, 3, 2, dims="3I", body=bytes(24)), "no IDX file of bytes"),
    "floats": (packed(0, 0, 13, 3, 4, 3, 2, dims="3I", body=bytes(96)), "no IDX file of bytes"),
    "2^31 rows": (packed(0, 0, 8, 3, 2**31, 3, 2, dims="3I", body=bytes(24)), "2147483648 x 3 x 2"),
    "other count": (idx(np.zeros((5, 3, 2))), "5 x 3 x 2"),
    "labels": (idx(np.zeros(4)), "claims 1 dimensions, the first of them 4"),
    "too few": (packed(0, 0, 8, 3, 4, 3, 2, dims="3I", body=bytes(23)), "24 values, but holds 23"),
    "too many": (packed(0, 0, 8, 3, 4, 3, 2, dims="3I", body=bytes(25)), "24 values, but holds more"),
    "header only": (packed(0, 0, 8, 3), "0x00000803"),
}


@pytest.mark.parametrize("kind", BAD)
def test_read_idx_is_strict(kind: str) -> None:
    content, message = BAD[kind]
    with pytest.raises(DataError, match=f"the-file: .*{message}"):
        datasets.read_idx(io.BytesIO(content), "the-file", (4, 3, 2))


def test_gzip_bomb_is_not_unpacked() -> None:
    bomb = io.BytesIO(packed(0, 0, 8, 3, 4, 3, 2, dims="3I", body=bytes(1 << 26)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="holds more"):
            datasets.read_idx(bomb, "bomb", (4, 3, 2))
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["mnist", "emnist/letters"])
def test_read_split_rejects_what_does_not_fit_together(tmp_path: Path, name: str) -> None:
    emnist_config = name.partition("/")[2]

    def read(arrays: Arrays, num_classes: int) -> None:
        write_files(tmp_path, name, arrays)
        paths = {path.name: path for path in tmp_path.iterdir()}
        datasets.read_split("train", paths, emnist_config, 70, num_classes)

    arrays = random_arrays(name)
    images, labels = arrays["train"]
    read(arrays, 37)
    with pytest.raises(DataError, match=r"labels-idx1.*holds label 9, but there are 9 classes"):
        read({"train": (images, labels % 10)}, 9)
    with pytest.raises(DataError, match=r"labels-idx1.*the first of them 69"):
        read({"train": (images, labels[:69])}, 37)
    with pytest.raises(DataError, match=r"images-idx3.*69 x 28 x 28"):
        read({"train": (images[:69], labels)}, 37)


@pytest.mark.parametrize("kind", ["no zip", "truncated", "without the member"])
def test_read_split_rejects_a_wrong_zip(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "gzip.zip"
    write_files(tmp_path, "emnist/letters", random_arrays("emnist/letters"))
    if kind == "no zip":
        path.write_bytes(b"<html>sign in to this network</html>")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("gzip/readme.txt", "")
    with pytest.raises(DataError, match=r"gzip\.zip: not the zip file it should be"):
        datasets.read_split("train", {"gzip.zip": path}, "letters", 70, 37)


@pytest.mark.parametrize("name", NAMES)
def test_builders_are_those_of_tfds(tmp_path: Path, name: str) -> None:
    import tensorflow_datasets as tfds

    stock = tfds.builder(name, data_dir=tmp_path)
    ours = datasets._builder(name, tmp_path, {})
    assert ours.info.full_name == stock.info.full_name
    assert datasets.copy_dir(name, tmp_path) == Path(stock.data_dir)
    assert repr(ours.info.features) == repr(stock.info.features)
    assert ours.info.features["label"].names == stock.info.features["label"].names
    assert stock.info.features["label"].num_classes == DATASETS[name].num_classes
    if name.startswith("emnist/"):
        counts = stock.builder_config.train_examples, stock.builder_config.test_examples
        assert counts == (DATASETS[name].num_train, DATASETS[name].num_test)
    registered = tfds.core.download.checksums.get_all_url_infos()
    files = datasets.official_files(name)
    assert len(files) == (1 if name.startswith("emnist/") else 4)
    for file in files:
        assert (file.size, file.sha256) == (registered[file.url].size, registered[file.url].checksum)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_prepare_writes_a_normal_tfds_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import tensorflow_datasets as tfds

    arrays = random_arrays(name)
    write_files(tmp_path / "raw", name, arrays)
    make_official(monkeypatch, tmp_path / "raw", name, arrays, closed_url())
    rows = {split: len(labels) for split, (_, labels) in arrays.items()}
    datasets.prepare(name, raw_dir=tmp_path / "raw", data_dir=tmp_path / "tfds", num_examples=rows)

    for split, (images, labels) in datasets.read_copy(name, tmp_path / "tfds", rows).items():
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(images[..., 0], arrays[split][0])  # upright, and in the original order
        np.testing.assert_array_equal(labels, arrays[split][1])

    stock = tfds.builder(name, data_dir=tmp_path / "tfds")
    for split, source in stock.as_data_source().items():
        assert len(source) == rows[split]
        np.testing.assert_array_equal(source[3]["image"][..., 0], arrays[split][0][3])
        assert source[3]["label"] == arrays[split][1][3]


def test_prepare_is_quiet_and_restores_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorflow_datasets.core.utils import tqdm_utils

    arrays = random_arrays("mnist")
    write_files(tmp_path / "raw", "mnist", arrays)
    make_official(monkeypatch, tmp_path / "raw", "mnist", arrays, closed_url())
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        capfd.readouterr()
        rows = {"train": 70, "test": 50}
        datasets.prepare("mnist", raw_dir=tmp_path / "raw", data_dir=tmp_path / "tfds", num_examples=rows)
        datasets.read_copy("mnist", tmp_path / "tfds", rows)
        assert capfd.readouterr() == ("", "")
        assert logging.get_verbosity() == logging.INFO
        assert tqdm_utils._active
    finally:
        logging.set_verbosity(verbosity)


def test_check_file_says_what_is_wrong(tmp_path: Path) -> None:
    images, labels, *_ = datasets.official_files("mnist")
    path = tmp_path / labels.name
    with pytest.raises(DataError, match=rf"{labels.name}: no such file; fetch it from {labels.url}"):
        datasets.check_file(path, labels)
    with pytest.raises(DataError, match="no such file"):
        datasets.check_file(tmp_path, labels)
    path.write_bytes(bytes(100))
    with pytest.raises(DataError, match="100 bytes instead of 28881; fetch"):
        datasets.check_file(path, labels)
    path.write_bytes(bytes(images.size))
    with pytest.raises(
        DataError, match=r"9912422 bytes instead of 28881, the size of mnist's train-images-idx3-ubyte\.gz"
    ):
        datasets.check_file(path, labels)
    path.write_bytes(bytes(labels.size))
    with pytest.raises(
        DataError, match=f"SHA-256 is c16e7615.* instead of {labels.sha256}; fetch it from {labels.url}"
    ):
        datasets.check_file(path, labels)


def test_digits_are_split_the_same_everywhere() -> None:
    from sklearn.datasets import load_digits

    digits = datasets.embedded_digits()
    (train_images, train_labels), (test_images, test_labels) = digits["train"], digits["test"]
    assert train_images.shape == (1437, 28, 28, 1)
    assert test_images.shape == (360, 28, 28, 1)
    assert {array.dtype for array in (train_images, test_images)} == {np.dtype(np.uint8)}
    assert {array.dtype for array in (train_labels, test_labels)} == {np.dtype(np.int32)}
    share = np.bincount(test_labels) / np.bincount(load_digits().target)
    assert np.all(abs(share - 0.2) < 0.006)  # each class gives a fifth of its rows, to the nearest row
    np.testing.assert_array_equal(train_labels[:9], [0, 1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(test_labels[:9], [2, 4, 7, 0, 6, 8, 9, 5, 1])
    # Another value here means that everybody's test set has changed.
    assert hashlib.sha256(train_labels.tobytes() + test_labels.tobytes()).hexdigest()[:16] == "048b2a8a935f3934"
