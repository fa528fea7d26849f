"""Erases the lines of a table and the remains of boxes, and finds what the edge of the picture may have cut off."""

import numpy as np
from scipy import ndimage

from mnist_flax.pictures.lines import Line, find_lines, line_mask, without_residue, without_strokes

_SHORTEST = 30  # pixels: the minimum height or width of a piece that can be recognised as lines
_NEAR = 0.03  # of the picture's height or width: lines of a table end this near to the edge
_ROOM = 0.4  # digits are clear of an edge if the gap exceeds this share of their height


def without_joints(mask: np.ndarray) -> np.ndarray:
    """Erases the lines of a table that a sheet leaves in view, such as the joints of its tiles, `bool[H,W]`.

    They are pieces of ink that consist of straight lines, two or more in all, and reach an edge that the digits keep
    away from.
    """
    rows, columns = (slice(int(_NEAR * side) + 1, side - int(_NEAR * side) - 1) for side in mask.shape)
    if mask[rows, columns].sum() == mask.sum():  # saves time: no ink is near an edge
        return mask
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    places = ndimage.find_objects(labels)
    kept, num_lines = mask.copy(), 0
    for number in np.flatnonzero(at_edge_without_digits(_boxes(places), mask.shape, _NEAR)):
        piece = labels[places[number]] == number + 1
        if lines := _lines_of(piece, 0.9):
            kept[places[number]] &= ~(piece & line_mask(piece.shape, lines))
            num_lines += len(lines)
    return without_residue(kept, mask) if num_lines > 1 else mask


def without_frames(mask: np.ndarray) -> np.ndarray:
    """Erases the remains of boxes: pieces of ink that consist of straight lines around other ink, `bool[H,W]`."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    places = ndimage.find_objects(labels)
    boxes = _boxes(places)
    heights = boxes[:, 3] - boxes[:, 1]
    frames = []
    for number in np.flatnonzero(heights > 1.2 * np.median(heights)) if len(boxes) else []:
        within = (boxes[:, :2] > boxes[number, :2]).all(axis=1) & (boxes[:, 2:] < boxes[number, 2:]).all(axis=1)
        if (heights[within] >= _SHORTEST).any() and _lines_of(labels[places[number]] == number + 1, 0.7):
            frames.append(number)
    return mask & ~np.isin(labels, np.array(frames) + 1) if frames else mask


def at_edge_without_digits(boxes: np.ndarray, shape: tuple[int, ...], within: float = 0.0) -> np.ndarray:
    """Returns which boxes reach an edge of the picture that the others keep away from: `i64[N,4] -> bool[N]`.

    A box is left, top, right and bottom; the right and bottom edges are exclusive. It reaches an edge if the gap is at
    most the share `within` of the picture's width or height.
    """
    margins = np.hstack([boxes[:, :2], np.array(shape[::-1]) - boxes[:, 2:]])  # pixels
    heights = boxes[:, 3] - boxes[:, 1]
    reached = margins <= within * np.array(shape[::-1] * 2)
    inside = ~reached.any(axis=1)
    inside &= heights > 0.5 * heights.max(where=inside, initial=0)  # without specks
    if not inside.any():
        return np.zeros(len(boxes), bool)
    is_lonely = margins[inside].min(axis=0) > _ROOM * np.median(heights[inside])
    return np.asarray((reached & is_lonely).any(axis=1))


def _boxes(places: list[tuple[slice, slice]]) -> np.ndarray:
    """Returns slices of rows and columns as boxes: left, top, right and bottom, `i64[N,4]`."""
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in places]
    return np.array(boxes, np.int64).reshape(-1, 4)


def _lines_of(piece: np.ndarray, share: float) -> list[Line]:
    """Returns the lines of a piece of ink, `bool[H,W]`, or none if they make up less than this share of it."""
    if max(piece.shape) < _SHORTEST:
        return []
    level, upright = find_lines(piece)
    lines = without_strokes(level + upright, thickest=0.3 * max(piece.shape))
    covered = piece & line_mask(piece.shape, lines)
    return lines if covered.sum() >= share * piece.sum() else []
