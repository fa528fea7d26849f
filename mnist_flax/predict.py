"""Reads handwritten digits in pictures: one's own, of any size, colour and format.

    python -m mnist_flax.predict --workdir=runs/default PICTURE...

A PICTURE is a file (PNG, JPEG, GIF, BMP, WebP, TIFF), a folder (all pictures in it and below), a pattern such as
'scans/*.png', or - for standard input. A picture may hold several digits; they are read line by line, from left to
right. A digit with a question mark is a guess. The exit status is 1 if any picture could not be read.
"""

import glob
import io
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from mnist_flax import cli
from mnist_flax.config import Config, replace
from mnist_flax.errors import ConfigError, UserError

STDIN = "-"
CONFIDENT = (
    0.8  # below this probability a digit is a guess; scripts/bench_predict.py counts what that costs and catches
)

_TOP = 3
_BATCH_SIZE = 16  # one compiled program serves every picture; a larger batch would be mostly filling


class PicturesError(UserError):
    """Some pictures could not be read; the others were."""

    exit_status = 1


class Reading(NamedTuple):
    """What the network says about one digit of a picture.

    Attributes:
      digit: the likeliest class.
      probability: of it.
      top: the three likeliest classes with their probabilities, best first.
      box: left, top, right, bottom in pixels of the picture; the right and bottom edges are exclusive.
      doubtful: whether the probability is too low to call it a digit.
      image: `u8[28,28]`, what the network saw.
    """

    digit: int
    probability: float
    top: list[tuple[int, float]]
    box: tuple[int, int, int, int]
    doubtful: bool
    image: np.ndarray


def read_picture(config: Config, variables: dict[str, Any], content: bytes) -> list[Reading]:
    """Reads the digits in a picture's file, in reading order.

    Args:
      config: of the run.
      variables: its weights.
      content: the bytes of the file.

    Raises:
      PictureError: it is no picture, or a damaged, huge or blank one.
    """
    from mnist_flax.analysis.evaluation import make_predictor, predict_logits
    from mnist_flax.pictures.segment import read_digits

    digits = read_digits(content)
    images = np.stack([digit.image for digit in digits])[..., None]
    predictor = make_predictor(replace(config, eval__batch_size=_BATCH_SIZE), variables)
    probs = softmax(predict_logits(predictor, images))
    readings = []
    for digit, row in zip(digits, probs, strict=True):
        top = [(int(label), float(row[label])) for label in np.argsort(-row, kind="stable")[:_TOP]]
        label, probability = top[0]
        readings.append(Reading(label, probability, top, digit.box, probability < CONFIDENT, digit.image))
    return readings


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turns logits into probabilities, `f32[N,C] -> f64[N,C]`."""
    from scipy.special import softmax as scipy_softmax

    return np.asarray(scipy_softmax(logits.astype(np.float64), axis=-1))


# Files ----------------------------------------------------------------------------------------------------------------


def find_files(names: Sequence[str]) -> Iterator[str]:
    """Yields the file for each name, and those that folders and patterns stand for, sorted.

    A name that stands for no file is yielded as it is: opening it tells what is wrong.
    """
    for name in names:
        if name == STDIN:
            yield name
        elif os.path.isdir(name):
            yield from _in_folder(pathlib.Path(name)) or [name]
        elif glob.has_magic(name) and not os.path.exists(name):
            for match in sorted(glob.glob(name, recursive=True)) or [name]:
                yield from _in_folder(pathlib.Path(match)) if os.path.isdir(match) else [match]
        else:
            yield name


def _in_folder(folder: pathlib.Path) -> list[str]:
    """Returns the pictures in a folder and below, by their names; hidden ones are left out."""
    from mnist_flax.pictures.decode import SUFFIXES

    return sorted(
        str(path)
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def read_file(name: str) -> bytes:
    """Returns the bytes of a file, or of standard input.

    Raises:
      PictureError: there are none to be had.
    """
    from mnist_flax.pictures.decode import PictureError

    if name == STDIN:
        return sys.stdin.buffer.read()
    if os.path.isdir(name):
        raise PictureError("is a folder without pictures")
    try:
        return pathlib.Path(name).read_bytes()
    except FileNotFoundError as error:
        pattern = glob.has_magic(name)
        raise PictureError("matches no file" if pattern else "does not exist; check the name") from error
    except (OSError, ValueError) as error:
        raise PictureError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def save_images(readings: Sequence[Reading], folder: pathlib.Path, number: int, name: str) -> None:
    """Writes what the network saw as `<number>-<file's name>-<place>.png`, counted from 1.

    Raises:
      ConfigError: the folder cannot be written.
    """
    from PIL import Image

    stem = "stdin" if name == STDIN else pathlib.Path(name).stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place, reading in enumerate(readings, 1):
            buffer = io.BytesIO()
            Image.fromarray(reading.image).save(buffer, "PNG")
            (folder / f"{number:04d}-{stem}-{place}.png").write_bytes(buffer.getvalue())
    except OSError as error:
        raise ConfigError(
            f"--save_preprocessed={folder}: cannot be written ({error.strerror}); name another folder"
        ) from error


# Output ---------------------------------------------------------------------------------------------------------------


def as_json(name: str, readings: Sequence[Reading]) -> str:
    """Returns one line of JSON for a picture."""
    digits = [
        {
            "digit": reading.digit,
            "probability": round(reading.probability, 6),
            "top": [[label, round(probability, 6)] for label, probability in reading.top],
            "box": list(reading.box),
            "doubtful": reading.doubtful,
        }
        for reading in readings
    ]
    return json.dumps({"file": name, "digits": digits, "doubtful": is_doubtful(readings)})


def is_doubtful(readings: Sequence[Reading]) -> bool:
    """Tells whether a picture holds no digit with any confidence."""
    return all(reading.doubtful for reading in readings)


def as_table(name: str, readings: Sequence[Reading], width: int) -> str:
    """Returns the lines of the table for a picture, its name in a column of `width` characters."""
    lines = []
    for reading in readings:
        top = "  ".join(f"{label} {probability:6.1%}" for label, probability in reading.top)
        mark = "?" if reading.doubtful else " "
        lines.append(f"{name:<{width}}  {reading.digit:>5}{mark} {reading.probability:11.1%}  {top}")
        name = ""
    if is_doubtful(readings):
        lines[-1] += "  doubtful: perhaps no digit"
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Reads the pictures that the command line names."""
    values = flags.FLAGS
    names = argv[1:]
    if not names:
        raise ConfigError("no picture is named: name files, folders or patterns, or - for standard input")
    if not values.workdir:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    from mnist_flax.pictures.decode import PictureError
    from mnist_flax.run.checkpoint import load_run
    from mnist_flax.step import eval_variables

    run = load_run(pathlib.Path(values.workdir), values.checkpoint)
    variables = eval_variables(run.state)
    files = list(find_files(names))
    width = max(4, *map(len, files))
    if not values.json:
        print(f"{'file':<{width}}  {'digit':>5}  probability  top {_TOP}", flush=True)
    failed = 0
    for number, name in enumerate(files, 1):
        try:
            readings = read_picture(run.config, variables, read_file(name))
        except PictureError as error:
            failed += 1
            if values.json:
                print(json.dumps({"file": name, "error": str(error)}), flush=True)
            else:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        print(as_json(name, readings) if values.json else as_table(name, readings, width), flush=True)
        if values.save_preprocessed:
            save_images(readings, pathlib.Path(values.save_preprocessed), number, name)
    if failed:
        raise PicturesError(f"{failed} of {len(files)} pictures could not be read")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the folder of a run")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on hold-out rows) or a step")
    flags.DEFINE_boolean("json", False, "print one JSON object a picture instead of a table")
    flags.DEFINE_string("save_preprocessed", None, "a folder to write what the network saw to, 28x28 PNG files")
    cli.run(main)
