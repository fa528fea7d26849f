"""Erases the lines of forms and grids, which may be as dark and thick as pen strokes, and may touch the digits.

A ruling is straight and spans the object that it belongs to: a grid line spans the grid, the side of a box spans the
box, and a line of ruled paper spans the picture. So each connected piece of ink is examined separately.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

_SMALLEST = 60  # pixels: below this height or width, lines cannot be distinguished from strokes
_SIDE = 400  # pixels: lines are detected in an image downsampled to at most this height and width
_SPAN = 0.62  # a ruling covers at least this share of the width or height of its piece of ink
_STRAIGHT = 0.88  # the minimum inked share of a line's length: higher in printed lines, lower in a curved 0
_SLOPES = np.tan(np.deg2rad(np.arange(-8, 8.01, 0.5)))


class Line(NamedTuple):
    """A straight line in a mask; if it is nearly vertical, x and y (and width and height) are exchanged."""

    level: bool  # whether it is nearly horizontal
    slope: float  # dy/dx, or dx/dy for a nearly vertical line
    first: float  # its first row of pixels is y = first + slope * (x - width / 2)
    last: float  # its last row is y = last + slope * (x - width / 2), so it is `last - first + 1` pixels thick
    share: float  # the inked share of its length


def without_grids(mask: np.ndarray, pen: float, *, boxes_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Erases printed lines from ink, `bool[H,W]`, without breaking the strokes that cross them.

    With `boxes_only`, only those of boxes and of grids that end inside the picture, unlike those of squared paper.

    Returns:
      The ink without rulings, and a mask of where rulings were, `bool[H,W]` each.
    """
    kept, ruled = mask, np.zeros_like(mask)
    if min(mask.shape) < _SMALLEST:
        return kept, ruled
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    places = ndimage.find_objects(labels)
    heights = np.array([rows.stop - rows.start for rows, _ in places])
    for number, place in enumerate(places, 1):
        sides = [part.stop - part.start for part in place]
        if max(sides) < max(30, 6 * pen, 0.12 * max(mask.shape)):
            continue
        piece = labels[place] == number
        others = np.delete(heights, number - 1)
        others = others[others > 0.15 * sides[0]]  # without specks
        stands_out = len(others) > 0 and sides[0] > 1.5 * np.median(others)
        lines = list(_rulings(piece, place, mask.shape, pen, stands_out, boxes_only))
        if not lines:
            continue
        if kept is mask:
            kept = mask.copy()
        strokes = kept[place] & ~_near(piece.shape, lines)
        for line in lines:
            _erase(kept[place], ruled[place], strokes, line)
    return without_residue(kept, mask), ruled


def without_residue(kept: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Removes what is left of erased lines along their edges: ink thinner than two pixels beside what was erased."""
    erased = mask & ~kept
    if not erased.any():
        return kept
    near = ndimage.binary_dilation(erased, np.ones((3, 3)))
    return kept & (ndimage.binary_opening(kept, np.ones((2, 2))) | ~near)


def _rulings(
    piece: np.ndarray,
    place: tuple[slice, slice],
    shape: tuple[int, ...],
    pen: float,
    stands_out: bool,
    boxes_only: bool,
) -> Iterator[Line]:
    """Yields the lines of a piece of ink that are rulings, not strokes; it may be much taller than the other pieces."""
    found = {True: _lines(piece, True)}
    found[False] = _lines(piece, False, abs(_slope(found[True])))
    if not found[True]:
        found[True] = _lines(piece, True, abs(_slope(found[False])))
    size = max(min(piece.shape), piece.shape[1] / 2)  # pixels; a box that the edge cuts off may be very low
    level, upright = (_alike(lines, 0.14 * size) for lines in found.values())
    if boxes_only:
        from_edge_to_edge = any(part.start == 0 and part.stop == side for part, side in zip(place, shape, strict=True))
        is_closed = _is_closed(level, piece.shape) and _is_closed(upright, piece.shape[::-1])
        if not from_edge_to_edge and (is_closed or _is_grid(level, upright)):
            yield from level + upright
        return
    # Two lines in each direction form a box or a grid. A digit of this size would have thicker strokes.
    if min(len(level), len(upright)) >= 2 or _is_open_box(level, upright, piece.shape):
        yield from level + upright
        return
    for lines, axis in ((found[True], 1), (found[False], 0)):
        part, side = place[axis], shape[axis]
        length = part.stop - part.start
        ends = (part.start <= 0.03 * side) + (part.stop >= 0.97 * side)
        for line in lines:
            thickness = line.last - line.first + 1
            thin = thickness < 0.75 * pen
            alone = piece.shape[1 - axis] < 1.5 * thickness + 4 + abs(line.slope) * length
            if alone and not (line.level or thin or stands_out):
                continue  # a 1, which may fill the height of its picture
            crossed = line in level + upright and len(level) + len(upright) >= 2
            if (
                (ends == 2 and (alone or crossed))
                or (thin and (ends == 2 or (ends == 1 and length > 0.55 * side)))
                or (thickness < 0.5 * pen and length > 0.6 * side and line.share > 0.9)
                or (line.level and alone and length > 8 * thickness)  # a lone horizontal bar is not a digit
            ):
                yield line


def _is_closed(lines: list[Line], size: tuple[int, ...]) -> bool:
    """Returns whether there are lines along both sides of a piece, of the given size across and along them."""
    if len(lines) < 2:
        return False
    middles = [(line.first + line.last) / 2 / size[0] for line in lines]
    margin = 0.15 + abs(_slope(lines)) * size[1] / size[0] / 2  # a tilted line is at the border with one end only
    return min(middles) < margin and max(middles) > 1 - margin


def _is_grid(level: list[Line], upright: list[Line]) -> bool:
    """Returns whether lines are so many and so alike that they form a grid, not two rulings with a 1 and a 4."""
    thickness = [line.last - line.first for line in level + upright]
    few = min(len(level), len(upright)) < 2 or len(thickness) < 5
    return not few and max(thickness) <= 1.7 * float(np.median(thickness)) + 2


def _is_open_box(level: list[Line], upright: list[Line], size: tuple[int, ...]) -> bool:
    """Returns whether three or more lines are a box, or a row of boxes, with one side missing.

    The missing side was already erased as a ruling from edge to edge, or lies outside the picture. No digit consists
    of a straight line and two full-length lines perpendicular to it.
    """
    if len(level) == 1 and len(upright) >= 2:
        (side,), across, axis = level, upright, 0
    elif len(upright) == 1 and len(level) >= 4:  # fewer may be a 3, 5 or 2 drawn with straight strokes
        (side,), across, axis = upright, level, 1
    else:
        return False
    slopes = [side.slope] + [-line.slope for line in across]
    # If only two lines are perpendicular to the side, all three must lie at the border.
    first, last = (
        min(line.first for line in across) / size[1 - axis],
        max(line.last for line in across) / size[1 - axis],
    )
    at_border = (side.first < 0.15 * size[axis] or side.last > 0.85 * size[axis]) and first < 0.15 and last > 0.85
    return bool((len(across) > 2 or at_border) and np.ptp(slopes) < 0.16)


def _alike(lines: list[Line], thickest: float) -> list[Line]:
    """Removes strokes: lines that are curved, too thick, or of a different slope than the others."""
    lines = [line for line in lines if line.share > _STRAIGHT and line.last - line.first < thickest]
    if len(lines) < 3:
        return lines
    thickness = float(np.median([line.last - line.first for line in lines]))
    slope = float(np.median([line.slope for line in lines]))
    return [line for line in lines if line.last - line.first <= 1.7 * thickness + 2 and abs(line.slope - slope) < 0.1]


def _slope(lines: list[Line]) -> float:
    """Returns the median slope of lines of the same direction, 0 if there are none."""
    return float(np.median([line.slope for line in lines])) if lines else 0.0


def _lines(piece: np.ndarray, level: bool, tilt: float = 0.0) -> list[Line]:
    """Finds the nearly horizontal (`level`) or nearly vertical straight lines that span a piece.

    `tilt` is the slope of the perpendicular lines: the lines of a tilted grid are shorter than its bounding box.
    """
    from skimage.measure import block_reduce

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
        if on_line.sum() < 0.3 * width:
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


def _near(shape: tuple[int, ...], lines: list[Line]) -> np.ndarray:
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


def _erase(kept: np.ndarray, ruled: np.ndarray, strokes: np.ndarray, line: Line) -> None:
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
