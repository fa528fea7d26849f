"""Removes the printed lines of ruled and squared paper: from edge to edge, thinner and often paler than the pen."""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage
from skimage.transform import hough_line, hough_line_peaks

from mnist_flax.pictures.ink import pen_width
from mnist_flax.pictures.lines import without_residue

_MARGIN = 64  # pixels kept on each side of a line: room for the thickest line and the longest bridge


def without_rulings(mask: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Erases printed lines and grids from the ink without breaking the strokes that cross them.

    A ruling is straight, nearly horizontal or vertical, runs from edge to edge, and is thinner than the pen. All arrays
    are `bool[H,W]`; `marks` is anything that differs from the paper, however pale.
    """
    specks, _ = ndimage.label(marks, np.ones((3, 3)))
    marks = marks & (np.bincount(specks.ravel()) > 16)[specks]
    kept = mask.copy()
    thinnest = np.inf
    eighths = [np.arange(side) * 8 // side for side in mask.shape]
    for window, across, level in _straight_lines(marks):
        inside = np.abs(across) < 12
        counts = np.bincount(np.round(across[inside & marks[window]]).astype(int) + 12, minlength=25)
        share = counts / np.maximum(1, np.bincount(np.round(across[inside]).astype(int) + 12, minlength=25))
        wide = np.flatnonzero(share > 0.5)
        if not len(wide):
            continue
        runs = np.split(wide, np.flatnonzero(np.diff(wide) > 1) + 1)
        wide = min(runs, key=lambda run: np.abs(run - 12).min())  # without columns or rows of digits beside the line
        thickness = wide[-1] - wide[0] + 1
        band = (across >= wide[0] - 12.5) & (across < wide[-1] - 11.5)
        part = np.broadcast_to(eighths[1] if level else eighths[0][:, None], mask.shape)[window]
        sizes = np.bincount(part[band], minlength=8)
        share = np.bincount(part[band & marks[window]], minlength=8) / np.maximum(1, sizes)
        if share.min(where=sizes > 8, initial=1.0) < 0.3:
            continue  # does not run from edge to edge
        thinnest = min(thinnest, thickness)
        band = (across >= wide[0] - 13) & (across <= wide[-1] - 11)
        erased = kept[window] & ~band
        # A stroke that continues on both sides of the band crosses it, and is kept.
        length = int(thickness) + 5
        bridge = ndimage.binary_closing(np.pad(erased, length), np.ones((length, 3) if level else (3, length)))
        kept[window] = erased | (kept[window] & band & bridge[length:-length, length:-length])
    if thinnest == np.inf:
        return mask
    kept = without_residue(kept, mask)
    # The bar of a 7 that fills its picture, or a lone 1, is not a ruling: it is as thick as the rest, or the only ink.
    return kept if kept.any() and thinnest < 0.8 * pen_width(kept) else mask


def _straight_lines(marks: np.ndarray) -> Iterator[tuple[tuple[slice, slice], np.ndarray, bool]]:
    """Finds straight lines from edge to edge by a Hough transform.

    Yields:
      For each line, a window that contains it, every pixel's signed distance from the line, `f64[h,w]`, and whether it
      is nearly horizontal.
    """
    height, width = marks.shape
    if min(height, width) < 80:  # too small to distinguish a line from a stroke
        return
    half = marks[: height // 2 * 2, : width // 2 * 2].reshape(height // 2, 2, width // 2, 2).any((1, 3))
    half = ndimage.binary_dilation(half)
    turns = np.deg2rad(np.arange(-10, 10.01, 0.25))
    for upright in (0.0, np.pi / 2):
        votes, angles, distances = hough_line(half, upright + turns)
        reach, _, _ = hough_line(np.ones_like(half), upright + turns)  # the number of pixels of each line
        share = np.where(reach > 0.5 * half.shape[1 if upright else 0], votes / np.maximum(reach, 1), 0)
        share = ndimage.gaussian_filter(share, (1, 2))  # moves the peak to the middle of a plateau
        apart = max(3, min(half.shape) // 40)
        for _, angle, distance in zip(
            *hough_line_peaks(share, angles, distances, min_distance=apart, min_angle=len(turns), threshold=0.6),
            strict=True,
        ):
            yield *_distances(marks.shape, angle, 2 * distance + 0.3), bool(upright)


def _distances(shape: tuple[int, ...], angle: float, distance: float) -> tuple[tuple[slice, slice], np.ndarray]:
    """Returns a window around the line x cos(angle) + y sin(angle) = distance, and its pixels' distances from it."""
    cos, sin, axis = np.cos(angle), np.sin(angle), 0 if abs(np.sin(angle)) > abs(np.cos(angle)) else 1
    steep, flat = (sin, cos) if axis == 0 else (cos, sin)
    ends = [(distance - flat * end) / steep for end in (0, shape[1 - axis])]
    part = slice(max(0, int(min(ends)) - _MARGIN), max(0, int(max(ends)) + _MARGIN))
    window = (part, slice(0, shape[1])) if axis == 0 else (slice(0, shape[0]), part)
    y, x = (np.arange(side, dtype=np.float32)[range_] for side, range_ in zip(shape, window, strict=True))
    return window, x * cos + y[:, None] * sin - distance
