"""Finds and reads picture files, and saves framed digits."""

import glob
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

from mnist_flax.errors import ConfigError, reason
from mnist_flax.pictures.decode import FOREIGN_SUFFIXES, SUFFIXES, PictureError

STDIN = "-"
MOST_BYTES = 256 * 2**20

_LONGEST_STEM = 100  # bytes; longer picture names are cut to this in the names of saved digits


def find_files(names: Sequence[str]) -> Iterator[str]:
    """Yields the files that the names stand for, with folders and glob patterns expanded in sorted order.

    A name that matches no file, or a folder without pictures, is yielded unchanged, so that opening it reports the
    error. A file that a pattern matches more than once is yielded once.
    """
    for name in names:
        is_pattern = glob.has_magic(name) and not os.path.exists(name)
        matches = sorted(glob.glob(name, recursive=True)) if is_pattern else []
        found: dict[str, str] = {}  # by normalised path
        for match in matches or [name]:
            pictures = _in_folder(pathlib.Path(match)) if match != STDIN and os.path.isdir(match) else []
            for file in pictures or [match]:
                found.setdefault(os.path.normpath(file), file)
        yield from found.values()


def _in_folder(folder: pathlib.Path) -> list[str]:
    """Returns the paths of the pictures in a folder and its subfolders, sorted, without hidden ones.

    Pictures in unsupported formats are included, and folders and files that cannot be read, because skipping them
    silently would look like success. Links to folders are not followed.
    """
    unreadable: list[OSError] = []
    found = []
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = [name for name in files if name.lower().endswith(SUFFIXES + FOREIGN_SUFFIXES)]
        paths = [os.path.join(parent, name) for name in pictures if not name.startswith(".")]
        found += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]
    return sorted([*found, *(str(error.filename) for error in unreadable)])


def read_file(name: str) -> bytes:
    """Returns the bytes of a file, or of standard input.

    Raises:
      PictureError: the file cannot be read, or is larger than `MOST_BYTES`.
    """
    if name == STDIN:
        return _bounded(sys.stdin.buffer)
    try:
        if os.path.isdir(name):
            os.listdir(name)  # says why a folder cannot be read
            raise PictureError(f"is a folder without pictures ({', '.join(SUFFIXES)})")
        with open(name, "rb") as file:
            return _bounded(file)
    except FileNotFoundError as error:
        pattern = glob.has_magic(name)
        raise PictureError("matches no file" if pattern else "does not exist; check the name") from error
    except (OSError, ValueError) as error:
        raise PictureError(f"cannot be read ({reason(error)})") from error


def _bounded(file: BinaryIO) -> bytes:
    """Reads at most `MOST_BYTES`, because a file may be endless, such as /dev/zero."""
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise PictureError(f"has more than {MOST_BYTES // 2**20} MiB; make it smaller")
    return content


def save_images(images: Sequence[np.ndarray], folder: pathlib.Path, number: int, name: str) -> None:
    """Writes the framed digits of a picture as PNG files; long names are shortened.

    Each is called `<number>-<stem>-<place>.png`: the number of the picture, its file name without the suffix, and the
    place of the digit in it, from 1.

    Raises:
      ConfigError: the folder cannot be written.
    """
    stem = os.fsencode("stdin" if name == STDIN else pathlib.Path(name).stem)
    short = stem if len(stem) <= _LONGEST_STEM else stem[:_LONGEST_STEM].decode(errors="ignore").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place, image in enumerate(images, 1):
            with open(folder / f"{number:04d}-{os.fsdecode(short)}-{place}.png", "wb") as file:
                Image.fromarray(image).save(file, "PNG")
    except (OSError, ValueError) as error:
        what = f"--save_preprocessed={folder}: cannot be written ({reason(error)})"
        raise ConfigError(f"{what}; name another folder") from error
