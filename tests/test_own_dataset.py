"""A user's own datasets: IDX files and a registry entry."""

import dataclasses
import gzip
import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from idx_files import (
    FILE_NAMES,
    Arrays,
    check_arrays,
    idx,
    random_arrays,
    write_files,
)

from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS, DataFile, Dataset
from mnist_flax.data.splits import Splits, fingerprint
from mnist_flax.errors import DataError
from mnist_flax.sections import DataConfig


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Registers a dataset of the user's own, and returns what its files will contain."""
    monkeypatch.setitem(DATASETS, "letters", Dataset(num_classes=26, num_train=70, num_test=50))
    return random_arrays("letters")


def load_letters(raw_dir: Path, **fields: Any) -> Splits:
    return load_splits(DataConfig(name="letters", raw_dir=str(raw_dir), **fields))


def test_own_dataset_needs_only_files_and_an_entry(tmp_path: Path, letters: Arrays, data_messages: list[str]) -> None:
    write_files(tmp_path / "letters", "letters", letters)
    for raw_dir in (tmp_path, tmp_path / "letters"):
        splits = load_letters(raw_dir, data_dir="/dev/null")
        assert (splits.name, splits.source) == ("letters", "raw")
        check_arrays(splits, letters)
        assert splits.fingerprint == fingerprint(splits.train, splits.test)
    assert not data_messages


def test_files_of_an_own_dataset_may_be_unpacked(tmp_path: Path, letters: Arrays) -> None:
    write_files(tmp_path, "letters", letters)
    packed = sorted(tmp_path.glob("*.gz"))
    for path in packed[1:]:  # the others stay as they are
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    check_arrays(load_letters(tmp_path), letters)
    packed[0].unlink()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: no such file"):
        load_letters(tmp_path)


def test_a_checksum_is_that_of_the_gzipped_file(
    tmp_path: Path, letters: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, "letters", letters)
    known = tuple(
        file._replace(sha256=hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest())
        for file in DATASETS["letters"].files
    )
    monkeypatch.setitem(DATASETS, "letters", dataclasses.replace(DATASETS["letters"], files=known))
    packed = tmp_path / known[0].name
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    with pytest.raises(DataError, match="is there, but only the checksum of the gzipped file is known"):
        load_letters(tmp_path)


def test_own_dataset_may_have_other_file_names_and_checksums(
    tmp_path: Path, letters: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {f"part{i}.idx": idx(array) for i, array in enumerate(itertools.chain(*letters.values()))}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = tuple(
        DataFile(name, sha256=hashlib.sha256(content).hexdigest().upper()) for name, content in contents.items()
    )
    monkeypatch.setitem(DATASETS, "letters", dataclasses.replace(DATASETS["letters"], files=files))
    check_arrays(load_letters(tmp_path), letters)
    (tmp_path / "part2.idx").write_bytes(idx(letters["test"][0] ^ 1))
    with pytest.raises(DataError, match=r"part2\.idx: damaged, its SHA-256 is"):
        load_letters(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": lambda images, labels: (images[:69], labels)}, r"idx3.*shape \(70, 28, 28\).* says 69 x 28 x 28"),
        ({"train": lambda images, labels: (images[:, :20], labels)}, r"idx3.*says 70 x 20 x 28"),
        ({"test": lambda images, labels: (images, labels[:9])}, r"t10k-labels.*shape \(50,\).*says 9"),
        ({"test": lambda images, labels: (images, labels + 1)}, r"t10k-labels.*contains label 26, .* 26 classes"),
        ({"test": lambda images, labels: (labels, images)}, r"t10k-images.*says 50;"),
    ],
)
def test_own_dataset_that_differs_from_its_entry_is_an_error(
    tmp_path: Path, letters: Arrays, change: dict[str, Any], message: str
) -> None:
    changed = {split: change[split](*pair) if split in change else pair for split, pair in letters.items()}
    write_files(tmp_path, "letters", changed)
    with pytest.raises(DataError, match=rf"does not hold letters: {tmp_path}/.*{message}") as raised:
        load_letters(tmp_path)
    assert "or its entry in DATASETS" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_own_dataset_with_a_missing_file_is_an_error(tmp_path: Path, letters: Arrays) -> None:
    write_files(tmp_path / "letters", "letters", letters)
    (tmp_path / "letters" / FILE_NAMES[3]).unlink()
    with pytest.raises(DataError, match=f"does not hold letters: {tmp_path}/letters/{FILE_NAMES[3]}: no such file"):
        load_letters(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"), [("tfds", "TFDS does not have this dataset"), ("download", "only read from a folder")]
)
def test_own_dataset_has_no_other_source(tmp_path: Path, letters: Arrays, source: str, message: str) -> None:
    write_files(tmp_path, "letters", letters)
    with pytest.raises(DataError, match=rf"(?s){message}.*Put its files into a folder .*--config\.data\.raw_dir"):
        load_letters(tmp_path, source=source)


def test_own_dataset_with_a_fingerprint_is_checked(
    tmp_path: Path, letters: Arrays, monkeypatch: pytest.MonkeyPatch, data_messages: list[str]
) -> None:
    write_files(tmp_path, "letters", letters)
    entry, known = DATASETS["letters"], load_letters(tmp_path).fingerprint
    monkeypatch.setitem(DATASETS, "letters", dataclasses.replace(entry, fingerprint=known.upper()))
    load_letters(tmp_path)
    monkeypatch.setitem(DATASETS, "letters", dataclasses.replace(entry, fingerprint="0" * 64))
    with pytest.raises(DataError, match=f"{tmp_path}: its images and labels are not those of letters"):
        load_letters(tmp_path)
    assert not data_messages


def test_own_dataset_with_the_files_of_another_is_announced(
    tmp_path: Path, letters: Arrays, monkeypatch: pytest.MonkeyPatch, data_messages: list[str]
) -> None:
    write_files(tmp_path, "letters", letters)
    known = dataclasses.replace(DATASETS["kmnist"], fingerprint=load_letters(tmp_path).fingerprint)
    monkeypatch.setitem(DATASETS, "kmnist", known)
    load_letters(tmp_path)
    assert data_messages == [f"WARNING: {tmp_path} holds the files of kmnist, not of letters"]
