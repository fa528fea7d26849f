"""Classifies the digits of pictures in batches across pictures, and formats the results as JSON or a table."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_flax.pictures.decode import PictureError
from mnist_flax.pictures.segment import Digit

TOP = 3

_FLUSH_SECONDS = 0.3  # so many seconds after the last batch, the next picture triggers one, even if it is not full


class Reading(NamedTuple):
    """The network's prediction for one digit of a picture."""

    digit: int  # the most probable class
    probability: float  # the probability of this class
    top: list[tuple[int, float]]  # the three most probable classes with their probabilities, best first
    # left, top, right, bottom in pixels of the picture; the right and bottom edges are exclusive
    box: tuple[int, int, int, int]
    doubtful: bool  # whether the prediction is uncertain, or this may not be a digit at all
    image: np.ndarray  # `u8[28,28]`, the input of the network


# u8[N,28,28,1] -> log probabilities f64[N,C], and which answers are doubtful, bool[N]
Answer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def classify(digits: Sequence[Digit], answer: Answer) -> list[Reading]:
    """Classifies the digits of one picture or of several."""
    if not digits:
        return []
    log_probs, doubtful = answer(np.stack([digit.image for digit in digits])[..., None])
    readings = []
    for digit, row, is_doubtful in zip(digits, np.exp(log_probs), doubtful, strict=True):
        top = [(int(label), float(row[label])) for label in np.argsort(-row, kind="stable")[:TOP]]
        readings.append(Reading(*top[0], top, digit.box, bool(is_doubtful) or digit.suspect, digit.image))
    return readings


def classify_all(
    pictures: Iterable[tuple[str, list[Digit] | PictureError]],
    answer: Answer,
    batch_size: int,
) -> Iterator[tuple[str, list[Reading] | PictureError]]:
    """Classifies the digits of many pictures, in batches across pictures; yields the pictures in order."""
    waiting: list[tuple[str, list[Digit] | PictureError]] = []
    started = time.monotonic()

    def flush() -> Iterator[tuple[str, list[Reading] | PictureError]]:
        found = [digit for _, digits in waiting if isinstance(digits, list) for digit in digits]
        readings = iter(classify(found, answer))
        for name, digits in waiting:
            yield name, [next(readings) for _ in digits] if isinstance(digits, list) else digits
        waiting.clear()

    for name, digits in pictures:
        waiting.append((name, digits))
        count = sum(len(digits) for _, digits in waiting if isinstance(digits, list))
        if count >= batch_size or time.monotonic() - started > _FLUSH_SECONDS:
            yield from flush()
            started = time.monotonic()
    yield from flush()


def is_doubtful(readings: Sequence[Reading]) -> bool:
    """Returns whether all digits of a picture are doubtful."""
    return all(reading.doubtful for reading in readings)


def as_json(name: str, readings: Sequence[Reading], class_names: Sequence[str]) -> str:
    """Returns one line of JSON for a picture; `label` is added for a class that is not a digit, such as a letter."""
    digits: list[dict[str, Any]] = []
    for reading in readings:
        label = class_names[reading.digit]
        top = [[label, round(probability, 6)] for label, probability in reading.top]
        named = {"digit": reading.digit} | ({"label": label} if label != str(reading.digit) else {})
        probability = round(reading.probability, 6)
        digits.append(
            named | {"probability": probability, "top": top, "box": list(reading.box), "doubtful": reading.doubtful}
        )
    return json.dumps({"file": name, "digits": digits, "doubtful": is_doubtful(readings)})


def table_header(width: int, class_names: Sequence[str]) -> str:
    """Returns the header of the table, for names in a column of `width` characters."""
    return f"{'file':<{width}}  {'digit':>{max(5, *map(len, class_names))}}  probability  top {TOP}"


def as_table(name: str, readings: Sequence[Reading], width: int, class_names: Sequence[str]) -> str:
    """Returns the table rows of a picture, with its name in a column of `width` characters."""
    lines = []
    column = max(5, *map(len, class_names))
    for reading in readings:
        top = "  ".join(f"{class_names[label]} {probability:6.1%}" for label, probability in reading.top)
        mark = "?" if reading.doubtful else " "
        label = class_names[reading.digit]
        lines.append(f"{name:<{width}}  {label:>{column}}{mark} {reading.probability:11.1%}  {top}")
        name = ""
    if is_doubtful(readings):
        lines[-1] += "  doubtful: may not be a digit"
    return "\n".join(lines)
