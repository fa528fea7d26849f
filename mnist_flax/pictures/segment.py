"""Finds the digits of a picture, and converts each to the format of MNIST.

This module uses no flags, network or files: it takes bytes and returns arrays.

    bytes -> grey u8[H,W] -> sheet -> ink f32[H,W], 0 where there is paper -> without rulings -> blobs, in reading order
          -> u8[28,28] each
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from mnist_flax.data.framing import BOX_SIZE, CENTRE, frame
from mnist_flax.data.registry import IMAGE_SIZE
from mnist_flax.pictures.background import at_edge_without_digits, without_frames, without_joints
from mnist_flax.pictures.blobs import Blob, find_blobs, group_lines, of_digit_size
from mnist_flax.pictures.decode import PictureError, decode
from mnist_flax.pictures.grids import without_grids
from mnist_flax.pictures.ink import Ink, find_ink, is_dark_on_light, pen_width, thick_pen
from mnist_flax.pictures.rulings import without_rulings
from mnist_flax.pictures.sheet import find_sheet

_LEAST_TURN = 3.0  # degrees: a picture rotated by less is not levelled


class Digit(NamedTuple):
    """A possible digit."""

    image: np.ndarray  # `u8[28,28]`, white on black, as in MNIST
    # left, top, right, bottom in pixels of the picture after applying its EXIF orientation; the right and bottom
    # edges are exclusive
    box: tuple[int, int, int, int]
    # whether it may be only part of a digit, however confident the network is: it overlaps erased lines or is cut off
    suspect: bool = False


def read_digits(content: bytes) -> list[Digit]:
    """Finds the digits in an image file, in reading order: lines from top to bottom, each from left to right.

    Raises:
      PictureError: the file is not a picture, or is damaged, too large or blank, or holds too many marks.
    """
    picture = decode(content)
    digits = find_digits(picture.grey)
    if not digits:
        raise PictureError("is blank: nothing in it stands out like ink on paper")
    boxes = np.rint(np.array([digit.box for digit in digits]) * picture.scale).astype(int)
    boxes = np.minimum(boxes, picture.size * 2)
    return [digit._replace(box=tuple(box)) for digit, box in zip(digits, boxes.tolist(), strict=True)]


def read_as_is(content: bytes) -> list[Digit]:
    """Reads an image file of 28x28 pixels as the network's input, without looking for digits in it.

    Raises:
      PictureError: the file is not a picture, is damaged, or has another size.
    """
    grey = decode(content).grey
    if grey.shape != (IMAGE_SIZE, IMAGE_SIZE):
        height, width = grey.shape
        raise PictureError(f"has {width}x{height} pixels; --as_is needs {IMAGE_SIZE}x{IMAGE_SIZE}")
    return [Digit(grey, (0, 0, IMAGE_SIZE, IMAGE_SIZE))]


def find_digits(grey: np.ndarray) -> list[Digit]:
    """Finds possible digits in a greyscale picture, `u8[H,W]`, in reading order; a blank picture has none."""
    if (ready := _as_in_mnist(grey)) is not None:
        return [Digit(ready, (0, 0, IMAGE_SIZE, IMAGE_SIZE))]
    sheet = find_sheet(grey)
    ink = find_ink(grey, sheet.inside if sheet else None)
    if ink is None:
        return []
    if not sheet:  # before it is levelled, because the lines of a table are level already
        ink = ink._replace(mask=without_joints(ink.mask))
    turn = sheet.turn if sheet else 0.0
    levelled = _levelled(ink, turn)
    digits, slope = _segment(levelled)
    if not sheet and abs(slope) > 8:
        turn = slope
        levelled = _levelled(ink, turn)
        digits, _ = _segment(levelled)
    boxes = [_turned_back(digit.box, levelled.mask.shape, grey.shape, turn) for digit in digits]
    is_cut_off = at_edge_without_digits(np.array(boxes).reshape(-1, 4), grey.shape)
    return [
        Digit(digit.image, box, digit.suspect or bool(cut))
        for digit, box, cut in zip(digits, boxes, is_cut_off, strict=True)
    ]


def _as_in_mnist(grey: np.ndarray) -> np.ndarray | None:
    """Returns a picture that is already in MNIST's format as white on black, with no other change; else None."""
    if grey.shape != (IMAGE_SIZE, IMAGE_SIZE):
        return None
    image = 255 - grey if is_dark_on_light(grey.astype(np.float32)) else grey
    sides = [np.ptp(np.flatnonzero(image.any(axis=axis))) + 1 for axis in (0, 1) if image.any()]
    if not sides or max(sides) != BOX_SIZE or np.hypot(*np.subtract(ndimage.center_of_mass(image), CENTRE)) > 1:
        return None
    return image


def _levelled(ink: Ink, turn: float) -> Ink:
    """Levels ink that is rotated clockwise by `turn` degrees."""
    if abs(turn) < _LEAST_TURN:
        return ink

    def rotated(values: np.ndarray) -> np.ndarray:
        image = Image.fromarray(values.astype(np.float32))
        return np.asarray(image.rotate(turn, Image.Resampling.BILINEAR, expand=True))

    return Ink(rotated(ink.strength), *(rotated(part) > 0.5 for part in (ink.mask, ink.marks, ink.steps)))


def _turned_back(
    box: tuple[int, int, int, int], levelled: tuple[int, ...], shape: tuple[int, ...], turn: float
) -> tuple[int, int, int, int]:
    """Maps a box in the levelled ink back to the picture: the bounding box of the rotated box."""
    if abs(turn) < _LEAST_TURN:
        return box
    angle = np.deg2rad(turn)
    x = np.array([box[0], box[2], box[2], box[0]]) - levelled[1] / 2
    y = np.array([box[1], box[1], box[3], box[3]]) - levelled[0] / 2
    x, y = x * np.cos(angle) - y * np.sin(angle) + shape[1] / 2, x * np.sin(angle) + y * np.cos(angle) + shape[0] / 2
    left, right = np.clip([x.min(), x.max()], 0, shape[1])
    top, bottom = np.clip([y.min(), y.max()], 0, shape[0])
    return int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom))


def _segment(ink: Ink) -> tuple[list[Digit], float]:
    """Finds the digits in level ink, in reading order, and the clockwise slope of their lines in degrees."""
    mask, ruled = _without_lines(ink)
    if not mask.any():
        return [], 0.0
    pen = pen_width(mask)
    labels, blobs = find_blobs(mask, ink.steps, pen)
    lines = [of_digit_size(line) for line in group_lines(blobs)]
    erased = ink.mask & ~mask
    digits = [
        Digit(_draw(ink.strength, labels, blob, pen), blob[1:], _touches(ruled, blob) or _ends_in(erased, blob))
        for line in lines
        for blob in line
    ]
    return digits, _slope(lines)


def _without_lines(ink: Ink) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ink without printed lines, and a mask of where lines of boxes and grids were, `bool[H,W]` each."""
    # Boxes come first, while their sides are connected; then lines from edge to edge; then what these connected.
    thick = thick_pen(ink.mask)
    mask, boxes = without_grids(ink.mask, thick, boxes_only=True)
    mask = without_rulings(mask, ink.marks & ~boxes)
    mask, ruled = without_grids(mask, thick if mask is ink.mask else thick_pen(mask))
    return without_frames(without_joints(mask)), ruled | boxes


def _touches(ruled: np.ndarray, blob: Blob) -> bool:
    """Returns whether lines were erased at a digit, so that it may be the remains of a line."""
    window = ruled[max(0, blob.top - 2) : blob.bottom + 2, max(0, blob.left - 2) : blob.right + 2]
    return bool(window.mean() > 0.12)


def _ends_in(erased: np.ndarray, blob: Blob) -> bool:
    """Returns whether a narrow blob, perhaps a 1, ends in erased lines, so that it may be the side of a box."""
    if blob.width > 0.35 * blob.height:
        return False
    ends = slice(max(0, blob.top - 4), blob.top + 2), slice(max(0, blob.bottom - 2), blob.bottom + 4)
    return any(bool(erased[end, blob.left : blob.right].any(axis=0).mean() > 0.2) for end in ends)


def _slope(lines: list[list[Blob]]) -> float:
    """Returns the slope of the digits in degrees; 0 if they are too few or not in a straight line.

    In a steep line, each digit seems to begin another line, so all digits are first fitted as one line.
    """
    together = [blob for line in lines for blob in line] if len(lines) > 1 else []
    slope = _fitted_slope(together, 2)
    if abs(slope) > 35:
        slope = 0.0
    return slope or _fitted_slope(max(lines, key=len, default=[]), 3)


def _fitted_slope(line: list[Blob], fewest: int) -> float:
    """Returns the slope of a straight line of digits in degrees; 0 if they are too few or not in a straight line."""
    if len(line) < fewest:
        return 0.0
    x = np.array([blob.left + blob.right for blob in line]) / 2
    y = np.array([blob.top + blob.bottom for blob in line]) / 2
    height = float(np.median([blob.height for blob in line]))
    nearest, farthest = (1.5, np.inf) if len(line) > 2 else (1.0, 3.0)  # any two digits are in a straight line
    if not nearest * height <= np.ptp(x) <= farthest * height:
        return 0.0
    fit = np.polyfit(x, y, 1)
    is_straight = np.abs(y - np.polyval(fit, x)).max() < 0.25 * height
    return float(np.degrees(np.arctan(fit[0]))) if is_straight else 0.0


def _draw(strength: np.ndarray, labels: np.ndarray, blob: Blob, pen: float) -> np.ndarray:
    """Draws a blob in the format of MNIST, `u8[28,28]`."""
    margin = max(1, round(pen / 2))
    top, left = max(0, blob.top - margin), max(0, blob.left - margin)
    window = np.s_[top : blob.bottom + margin, left : blob.right + margin]
    own = np.isin(labels[window], blob.labels)
    near = ndimage.binary_dilation(own, iterations=margin) & ((labels[window] == 0) | own)
    image = np.round(np.where(near, strength[window], 0) * 255).astype(np.uint8)
    # A thin stroke would fade in the small image. MNIST's strokes are about 2 pixels wide in a box of 20.
    wanted = 0.1 * max(blob.height, blob.width)
    if pen < wanted:
        image = _thickened(image, max((wanted - pen) / 2, 0.5))
    return frame(image)


def _thickened(image: np.ndarray, radius: float) -> np.ndarray:
    """Dilates an image by a disc, `u8[H,W] -> u8[H+2R,W+2R]`, where R is `radius` in whole pixels, rounded up.

    The disc is a stack of rows. Maxima over ever wider rows are computed once, so the time grows with the radius,
    not with its square.
    """
    size = int(np.ceil(radius))
    height, width = image.shape
    padded = np.pad(image, ((0, 0), (2 * size, 2 * size)))
    result = np.zeros((height + 2 * size, width + 2 * size), np.uint8)
    widest = np.zeros((height, width + 2 * size), np.uint8)  # the maximum over each pixel's row of the disc
    reach = 0
    for down in range(size, -1, -1):
        while reach <= size and np.hypot(down, reach) <= radius:
            for left in (size - reach, size + reach):
                np.maximum(widest, padded[:, left : left + widest.shape[1]], out=widest)
            reach += 1
        for top in (size - down, size + down):
            np.maximum(result[top : top + height], widest, out=result[top : top + height])
    return result
