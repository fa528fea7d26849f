"""Finds nearly horizontal and nearly vertical straight lines in ink, and erases them."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.measure import block_reduce

_STRAIGHT = 0.88  # the minimum inked share of a line's length: higher in printed lines, lower in a curved 0
_SIDE = 400  # pixels: lines are detected in an image downsampled to at most this height and width
_SPAN = 0.62  # a line covers at least this share of the width or height of its piece of ink
_SLOPES = np.tan(np.deg2rad(np.arange(-8, 8.01, 0.5)))


class Line(NamedTuple):
    """A straight line in a mask; if it is nearly vertical, x and y (and width and height) are exchanged."""

    level: bool  # whether it is nearly horizontal
    slope: float  # dy/dx, or dx/dy for a nearly vertical line
    first: float  # its first row of pixels is y = first + slope * (x - width / 2)
    last: float  # its last row is y = last + slope * (x - width / 2), so it is `last - first + 1` pixels thick
    share: float  # the inked share of its length


def find_lines(piece: np.ndarray) -> tuple[list[Line], list[Line]]:
    """Finds the lines that span a piece of ink, `bool[H,W]`: the nearly horizontal and the nearly vertical ones."""
    level = _lines(piece, True)
    upright = _lines(piece, False, abs(median_slope(level)))
    return level or _lines(piece, True, abs(median_slope(upright))), upright


def without_strokes(lines: list[Line], thickest: float) -> list[Line]:
    """Removes lines that are curved, or `thickest` pixels thick or more: they are strokes of a pen."""
    return [line for line in lines if line.share > _STRAIGHT and line.last - line.first < thickest]


def median_slope(lines: list[Line]) -> float:
    """Returns the median slope of lines of the same direction, 0 if there are none."""
    return float(np.median([line.slope for line in lines])) if lines else 0.0


def _lines(piece: np.ndarray, level: bool, tilt: float = 0.0) -> list[Line]:
    """Finds the lines of one direction.

    `tilt` is the slope of the perpendicular lines: the lines of a tilted grid are shorter than its bounding box.
    """
    factor = max(1, -(-max(piece.shape) // _SIDE))
    reduced = block_reduce(piece if level else piece.T, factor, np.any)  # a block with any ink counts as ink
    height, width = reduced.shape
    if width < 2:  # a point has no slope
        return []
    y, x = np.nonzero(ndimage.binary_dilation(reduced, np.ones((3, 1))))
    x = x - width / 2
    pad = int(width * _SLOPES[-1]) + 2
    rows = np.stack([
        np.bincount(np.round(y - slope * x).astype(int) + pad, minlength=height + 2 * pad) for slope in _SLOPES
    ])  # fmt: skip
    span = max(0.4 * width, width - tilt * height)
    share, offsets = rows / span, np.arange(rows.shape[1])[None, :] - pad
    found: list[Line] = []
    while len(found) < 200:
        turn, row = np.unravel_index(np.argmax(share), share.shape)
        best = float(share[turn, row])
        if best < _SPAN:
            break
        # A thick line has this share at several slopes; the middle one is its own.
        plateaus, _ = ndimage.label(share >= 0.99 * best)
        turn, row = np.round(ndimage.center_of_mass(plateaus == plateaus[turn, row])).astype(int)
        slope, middle = _fitted(reduced, float(_SLOPES[turn]), int(row) - pad)
        first, last = _edges(reduced, slope, middle)
        # Discard candidates that cross this line in the piece: rulings of the same direction do not cross.
        reach = np.abs(_SLOPES - slope)[:, None] * width / 2 + max(2, last - first + 2)
        share[np.abs(offsets - (first + last) / 2) <= reach] = 0
        found.append(Line(level, slope, first * factor, (last + 1) * factor - 1, best))
    # Lines that span much less than the first are strokes. If several lines fill half of the piece, it is not a grid.
    found = [line for line in found if line.share >= 0.75 * found[0].share]
    inked = sum(line.last - line.first + factor for line in found)
    return found if inked < 0.5 * height * factor or len(found) == 1 else []


def _fitted(piece: np.ndarray, slope: float, row: int) -> tuple[float, int]:
    """Refines the slope and the row of a line by a fit to the ink within a few rows of it."""
    height, width = piece.shape
    columns = np.arange(width)
    for reach in (4, 2):
        across = np.arange(-reach, reach + 1)[:, None]
        rows = np.round(row + slope * (columns - width / 2)).astype(int) + across
        ink = piece[np.clip(rows, 0, height - 1), columns] & (rows >= 0) & (rows < height)
        on_line = ink.any(axis=0) & ~ink.all(axis=0)  # excludes columns where a stroke crosses
        if on_line.sum() < max(2, 0.3 * width):
            return slope, row
        centres = ((rows * ink).sum(axis=0) / np.maximum(1, ink.sum(axis=0)))[on_line]
        slope, middle = np.polyfit(columns[on_line] - width / 2, centres, 1)
        row = round(middle)
    return float(slope), row


def _edges(piece: np.ndarray, slope: float, row: int) -> tuple[int, int]:
    """Returns the first and last row of the ink of the line at `row`, as medians over the columns."""
    height, width = piece.shape
    reach = max(height // 8, min(height, 40))  # a lone stroke is as thick as its piece is high
    columns = np.arange(width)
    middle = np.round(row + slope * (columns - width / 2)).astype(int)
    rows = middle + np.arange(-reach, reach + 1)[:, None]
    strip = piece[np.clip(rows, 0, height - 1), columns] & (rows >= 0) & (rows < height)
    near = strip[reach - 1 : reach + 2]
    inked = near.any(axis=0)
    if not inked.any():
        return row, row
    strip = strip[:, inked].copy()
    strip[reach] = True  # because of the dilation, the line may be one row away from its ink
    above = np.argmin(strip[reach::-1], axis=0)
    below = np.argmin(strip[reach:], axis=0)
    above, below = np.where(above == 0, reach, above) - 1, np.where(below == 0, reach, below) - 1
    return row - int(np.median(above)), row + int(np.median(below))


def line_mask(shape: tuple[int, ...], lines: list[Line]) -> np.ndarray:
    """Returns a mask of the pixels of lines, `bool[H,W]`, including strokes that cross them."""
    near = np.zeros(shape, bool)
    for line in lines:
        inside, rows, columns = _band(shape if line.level else shape[::-1], line, 0)
        places = rows[inside], np.broadcast_to(columns, rows.shape)[inside]
        near[places if line.level else places[::-1]] = True
    return near


def _band(shape: tuple[int, ...], line: Line, margin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a line and `margin` rows on each side: which pixels are in the image, their rows, and their columns."""
    height, width = shape
    columns = np.arange(width)
    top = np.round(line.first + line.slope * (columns - width / 2)).astype(int) - 1
    rows = top + np.arange(-margin, int(line.last - line.first) + 3 + margin)[:, None]
    return (rows >= 0) & (rows < height), np.clip(rows, 0, height - 1), columns


def erase_line(kept: np.ndarray, ruled: np.ndarray, strokes: np.ndarray, line: Line) -> None:
    """Erases a line from `kept` where no stroke crosses it, and marks it in `ruled`; both are changed in place.

    `strokes` is the ink outside all lines, so that another line that crosses this one does not count as a stroke.
    """
    if not line.level:
        kept, ruled, strokes = kept.T, ruled.T, strokes.T
    thickness = int(line.last - line.first) + 2
    margin = 2 + thickness // 4
    inside, rows, columns = _band(kept.shape, line, margin)
    strip = strokes[rows, columns] & inside
    # A stroke that continues on both sides of the line crosses it, even if it slants.
    reach = thickness + 1
    above = ndimage.maximum_filter1d(strip[: margin - 1].all(axis=0), reach)
    below = ndimage.maximum_filter1d(strip[-margin + 1 :].all(axis=0), reach)
    band = inside[margin:-margin] & ~(above & below)
    band_rows = rows[margin:-margin]
    places = band_rows[band], np.broadcast_to(columns, band.shape)[band]
    kept[places] = False
    ruled[places] = True


def without_residue(kept: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Removes what is left of erased lines along their edges: ink thinner than two pixels beside what was erased."""
    erased = mask & ~kept
    if not erased.any():
        return kept
    near = ndimage.binary_dilation(erased, np.ones((3, 3)))
    return kept & (ndimage.binary_opening(kept, np.ones((2, 2))) | ~near)
