"""Erases the lines of forms and grids, which may be as dark and thick as pen strokes, and may touch the digits.

A ruling is straight and spans the object that it belongs to: a grid line spans the grid, the side of a box spans the
box, and a line of ruled paper spans the picture. So each connected piece of ink is examined separately.
"""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from mnist_flax.pictures.lines import (
    Line,
    erase_line,
    find_lines,
    line_mask,
    median_slope,
    without_residue,
    without_strokes,
)

_SMALLEST = 60  # pixels: below this height or width, lines cannot be distinguished from strokes


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
        strokes = kept[place] & ~line_mask(piece.shape, lines)
        for line in lines:
            erase_line(kept[place], ruled[place], strokes, line)
    return without_residue(kept, mask), ruled


def _rulings(
    piece: np.ndarray,
    place: tuple[slice, slice],
    shape: tuple[int, ...],
    pen: float,
    stands_out: bool,
    boxes_only: bool,
) -> Iterator[Line]:
    """Yields the lines of a piece of ink that are rulings, not strokes; it may be much taller than the other pieces."""
    found = find_lines(piece)
    size = max(min(piece.shape), piece.shape[1] / 2)  # pixels; a box that the edge cuts off may be very low
    level, upright = (_alike(lines, 0.14 * size) for lines in found)
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
    for lines, axis in zip(found, (1, 0), strict=True):
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
    margin = 0.15 + abs(median_slope(lines)) * size[1] / size[0] / 2  # a tilted line is at the border with one end only
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
    lines = without_strokes(lines, thickest)
    if len(lines) < 3:
        return lines
    thickness = float(np.median([line.last - line.first for line in lines]))
    slope = median_slope(lines)
    return [line for line in lines if line.last - line.first <= 1.7 * thickness + 2 and abs(line.slope - slope) < 0.1]
