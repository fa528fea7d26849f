"""Finds the sheet of paper in a photograph: its position and rotation."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from mnist_flax.pictures.ink import shrunk

_SIDE = 160  # pixels: sheets are detected in a downsampled picture
_RATIO = 1.2  # the minimum ratio of a sheet's brightness to that of the background


class Sheet(NamedTuple):
    """A sheet of paper."""

    inside: np.ndarray  # `bool[H,W]`, True on the sheet, except for a margin
    turn: float  # its rotation in degrees, from -45 to 44, positive if clockwise


def find_sheet(grey: np.ndarray) -> Sheet | None:
    """Finds a light, rectangular sheet with at least two sides in view, `u8[H,W] -> Sheet`; None if there is none."""
    if min(grey.shape) < 60:
        return None
    small = shrunk(grey.astype(np.float32), _SIDE)
    paper = ndimage.grey_closing(np.pad(small, 9, mode="edge"), (9, 9))[9:-9, 9:-9]  # removes ink
    paper = np.log(np.maximum(ndimage.median_filter(paper, 3), 4.0))
    light = paper > threshold_otsu(paper)
    if light.all() or not light.any() or paper[light].mean() - paper[~light].mean() < np.log(_RATIO):
        return None
    labels, count = ndimage.label(light)
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel(), minlength=count + 1)[1:])
    largest = ndimage.binary_fill_holes(largest)
    if not 0.08 < largest.mean() < 0.97:
        return None
    return _rectangle(largest, grey.shape)


def _rectangle(region: np.ndarray, shape: tuple[int, ...]) -> Sheet | None:
    """Fits a rectangle around a region; None if the region is not a rectangle, or shows fewer than two of its sides."""
    y, x = np.nonzero(region & ~ndimage.binary_erosion(region))
    turns = np.arange(-45, 45)
    along, across = _turned(x, y, turns[:, None])
    best = np.argmin(np.ptp(along, axis=1) * np.ptp(across, axis=1))
    turn, (low, high), (left, right) = turns[best], *((part[best].min(), part[best].max()) for part in (along, across))
    height, width = region.shape
    rows, columns = np.mgrid[0:height, 0:width]
    along, across = _turned(columns, rows, turn)
    box = (along >= low) & (along <= high) & (across >= left) & (across <= right)
    if region.sum() < 0.85 * box.sum():
        return None
    inner = np.pad(np.ones_like(region)[2:-2, 2:-2], 2)
    sides = [
        box & (np.abs(place - end) < 1) for place, end in ((along, low), (along, high), (across, left), (across, right))
    ]
    if sum((side & inner).sum() > 0.3 * max(1, side.sum()) for side in sides) < 2:
        return None
    # A sheet seen at an angle does not fill the corners of the rectangle, so the region is returned instead.
    solid = ndimage.binary_closing(np.pad(region, 12), iterations=10)[12:-12, 12:-12] | region
    solid = ndimage.binary_erosion(ndimage.binary_fill_holes(solid), iterations=2, border_value=1)
    index = [np.arange(full) * side // full for full, side in zip(shape, solid.shape, strict=True)]
    return Sheet(solid[np.ix_(*index)], float(turn))


def _turned(x: np.ndarray, y: np.ndarray, degrees: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coordinates along and perpendicular to a direction rotated clockwise by `degrees`."""
    angle = np.deg2rad(degrees)
    return x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
