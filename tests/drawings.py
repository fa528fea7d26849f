"""Draws digits with lines, encodes them in any file format, and measures how much two framed digits differ."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mnist_flax.pictures import segment as pictures
from mnist_flax.pictures.segment import read_digits

Array = np.ndarray

# The strokes of each digit in a box of 100x100: lists of points (x, y).
STROKES: dict[str, list[list[tuple[int, int]]]] = {
    "1": [[(50, 0), (50, 100)]],
    "4": [[(30, 0), (20, 55), (80, 55)], [(65, 20), (65, 100)]],
    "7": [[(20, 5), (80, 5), (40, 100)]],
    "L": [[(25, 0), (25, 100), (75, 100)]],  # not a digit, but it has no symmetry
    "5": [[(45, 22), (30, 45), (70, 60), (60, 95), (25, 95)], [(45, 2), (80, 2)]],
}


def draw(name: str, size: int = 100, width: int = 10) -> Array:
    """Draws black on white, with a margin of half the size: u8[2*size,2*size]."""
    image = Image.new("L", (2 * size, 2 * size), 255)
    for line in STROKES[name]:
        points = [(size / 2 + x * size / 100, size / 2 + y * size / 100) for x, y in line]
        ImageDraw.Draw(image).line(points, fill=0, width=width, joint="curve")
    return np.asarray(image)


def draw_form(rows: int, cell: int, line: int) -> tuple[Array, list[tuple[float, float]]]:
    """Draws a square grid with a digit in each cell; returns it with the middles of the cells (x, y), line by line.

    A cell is `cell` pixels wide, and a digit half as tall. The lines are `line` pixels wide, and as dark as the digits.
    """
    margin = cell // 2
    side = rows * cell + 2 * margin
    image = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(image)
    middles = [(margin + (x + 0.5) * cell, margin + (y + 0.5) * cell) for y in range(rows) for x in range(rows)]
    for i, middle in enumerate(middles):
        pen.text(middle, str(i % 10), font=ImageFont.load_default(0.7 * cell), fill=0, anchor="mm")
    for place in range(margin, side, cell):
        for ends in ((place, margin, place, side - margin), (margin, place, side - margin, place)):
            pen.line(ends, fill=0, width=line)
    return np.asarray(image), middles


def encode(image: Image.Image | Array, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def only(content: bytes) -> pictures.Digit:
    (digit,) = read_digits(content)
    return digit


def difference(one: Array, other: Array) -> float:
    """The mean absolute difference of grey values; two different digits differ by 30 or more."""
    return float(np.abs(one.astype(float) - other).mean())
