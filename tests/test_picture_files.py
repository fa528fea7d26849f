"""Files of pictures: found, read and saved, or refused with a reason."""

import os
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mnist_flax.pictures import files, parallel
from mnist_flax.pictures.decode import PictureError
from mnist_flax.pictures.segment import read_digits


def test_endless_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    with pytest.raises(PictureError, match="make it smaller"):
        files.read_file("/dev/zero")


def test_heic_files_in_a_folder_are_reported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    assert list(files.find_files([str(tmp_path)])) == [str(tmp_path / "photo.HEIC")]
    assert "HEIC; save it as JPEG" in str(parallel.read_one(str(tmp_path / "photo.HEIC"), read_digits))


def test_file_in_a_folder_that_cannot_be_examined_is_reported(tmp_path: pathlib.Path) -> None:
    (tmp_path / "1.png").symlink_to("a" * 300)  # too long a name
    (name,) = files.find_files([str(tmp_path)])
    with pytest.raises(PictureError, match="cannot be read"):
        files.read_file(name)


def test_folder_that_cannot_be_read_is_reported(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program run by root can read every folder, so the refusal is simulated."""
    locked, scandir = tmp_path / "locked", os.scandir
    locked.mkdir()
    (tmp_path / "1.png").touch()

    def refuse(folder: str) -> Any:
        if str(folder) == str(locked):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    assert list(files.find_files([str(tmp_path)])) == [str(tmp_path / "1.png"), str(locked)]
    with pytest.raises(PictureError, match=r"cannot be read .*Permission denied"):
        files.read_file(str(locked))


def test_saved_images_have_short_names(tmp_path: pathlib.Path) -> None:
    for number, stem in enumerate(["x" * 250, "\u4e09" * 80, "\udcff"], 1):
        files.save_images([np.zeros((28, 28), np.uint8)], tmp_path, number, f"{stem}.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_unreadable_file_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PictureError, match=r"cannot be read"):
        files.read_file(str(tmp_path / ("a" * 300)))
    with pytest.raises(PictureError, match=r"cannot be read"):
        files.read_file("a\0b")


def test_picture_that_needs_too_much_memory_is_not_called_damaged(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "1.png")
    monkeypatch.setattr("mnist_flax.pictures.decode._to_grey", fail)
    assert "needs more memory than there is" in str(parallel.read_one(str(tmp_path / "1.png"), read_digits))
