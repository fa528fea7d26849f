"""The cache of decoded arrays, and read-only folders."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from idx_files import Published, tree

from mnist_flax.data import prepare
from mnist_flax.errors import DataError


def test_cache_of_another_copy_is_not_used(small: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    small.load_raw()
    other = Published(small.data_dir / "other", monkeypatch, seed=1)
    other.load_raw()
    shutil.rmtree(small.copy)
    shutil.move(other.copy, small.copy)
    other.check(small.load(source="tfds"), "tfds")


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("damage", ["pixel", "fingerprint", "truncated", "empty", "no archive", "pickle"])
def test_damaged_cache_is_rebuilt(small: Published, tmp_path: Path, data_messages: list[str], damage: str) -> None:
    small.load_raw()
    cache = small.cache
    if damage in ("pixel", "fingerprint"):  # valid zip archives, so zip's own checksums find nothing
        with np.load(cache) as arrays:
            content = dict(arrays)
        if damage == "pixel":
            content["test_image"][7, 3, 3, 0] ^= 1
        else:
            content["fingerprint"] = np.array("0" * 64)
        np.savez(cache, **content)
    elif damage == "pickle":  # loading it would run any code that its author wrote
        with np.load(cache) as arrays:
            np.savez(cache, **{**arrays, "train_label": np.array([Touch(tmp_path / "run")], object)})
    else:
        cache.write_bytes({"truncated": cache.read_bytes()[:-5000], "empty": b"", "no archive": b"x" * 5000}[damage])
    data_messages.clear()
    small.check(small.load(), "tfds")
    assert len(data_messages) == 1
    assert f"{cache} is damaged" in data_messages[0]
    assert not (tmp_path / "run").exists()
    small.check(small.load(), "tfds")
    assert len(data_messages) == 1


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Makes a folder read-only; root ignores permissions, so the process becomes an ordinary user meanwhile."""
    root = os.geteuid() == 0
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_read_only_folder_is_used_but_not_changed(small: Published, data_messages: list[str]) -> None:
    small.load_raw()
    cache = small.cache.relative_to(small.data_dir)
    with tempfile.TemporaryDirectory() as shared:  # unlike tmp_path, it can be made readable by other users
        os.chmod(shared, 0o755)
        small.data_dir = Path(shutil.copytree(small.data_dir, Path(shared, "tfds")))
        (small.data_dir / cache).unlink()
        raw_dir, closed = shutil.copytree(small.raw_dir, Path(shared, "raw")), Path(shared, "closed")
        raw_dir.chmod(0o755)
        closed.mkdir(mode=0)
        data_messages.clear()
        before = tree(small.data_dir)
        with read_only(small.data_dir):
            for _ in range(2):
                small.check(small.load(), "tfds")
            with pytest.raises(DataError, match=r"Permission denied.*--config\.data\.data_dir"):
                prepare.prepare("fashion_mnist", small.data_dir, Path("/"))
            with pytest.raises(DataError, match=r"Permission denied"):
                small.load(source="raw", raw_dir=str(raw_dir), data_dir=str(closed / "tfds"))
        assert tree(small.data_dir) == before
    assert len(data_messages) == 2
    assert all("cannot be kept ([Errno 13] Permission denied" in message for message in data_messages)
