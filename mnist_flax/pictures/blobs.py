"""Groups connected pieces of ink into digits, and sorts them in reading order."""

import bisect
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image

from mnist_flax.pictures.decode import PictureError

MAX_PIECES = 10_000  # the maximum number of pieces of ink; a page of handwriting has fewer


class Blob(NamedTuple):
    """One or more pieces of ink: their numbers in the label image, and their bounding box (ends exclusive)."""

    labels: tuple[int, ...]
    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Its number of columns."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Its number of rows."""
        return self.bottom - self.top


def find_blobs(mask: np.ndarray, steps: np.ndarray, pen: float) -> tuple[np.ndarray, list[Blob]]:
    """Finds the digits in an ink mask, in no particular order.

    `steps` marks the edges of shadows; `pen` is the stroke width in pixels.

    Returns:
      The label image, `i32[H,W]`: the number of each pixel's piece, 0 where there is no ink; and the digits.

    Raises:
      PictureError: there are too many pieces.
    """
    reach = round(pen / 4)  # pixels; gaps of up to twice this size are bridged
    labels, _ = ndimage.label(ndimage.maximum_filter(mask, 2 * reach + 1), structure=np.ones((3, 3)))
    labels[~mask] = 0
    places = enumerate(ndimage.find_objects(labels), 1)
    pieces = _without_bars([_blob((number,), place) for number, place in places if place], pen)
    blobs = _without_specks(pieces, labels, steps, pen)
    if len(blobs) > MAX_PIECES:
        raise PictureError(f"has more than {MAX_PIECES:,} separate marks, too many for handwriting; crop it")
    count = int(labels.max())
    digits = []
    for blob in _join_broken(blobs, pen):
        parts = _cut_touching(blob, labels, pen, count + 1)
        count += len(parts) - 1
        digits += parts
    return labels, digits


def _blob(numbers: tuple[int, ...], place: tuple[slice, slice], left: int = 0, top: int = 0) -> Blob:
    """Returns the blob at `place`, its slices in a window whose top left corner is at (`left`, `top`)."""
    rows, columns = place
    return Blob(numbers, left + columns.start, top + rows.start, left + columns.stop, top + rows.stop)


def group_lines(blobs: list[Blob]) -> list[list[Blob]]:
    """Groups blobs into lines, from top to bottom; each is sorted from left to right.

    A blob belongs to a line if its middle is within the vertical extent of the horizontally nearest blob of the line,
    which also works for slanting lines. The tallest blobs are assigned first.
    """
    lines: list[list[Blob]] = []
    for blob in sorted(blobs, key=lambda blob: -blob.height):
        middle, place = (blob.top + blob.bottom) / 2, blob.left + blob.right
        for line in lines:
            right = bisect.bisect_left(line, place, key=lambda member: member.left + member.right)
            neighbours = line[max(0, right - 1) : right + 1]
            nearest = min(neighbours, key=lambda member: abs(member.left + member.right - place))
            if nearest.top <= middle <= nearest.bottom:
                line.insert(right, blob)
                break
        else:
            lines.append([blob])
    return sorted(lines, key=lambda line: np.mean([blob.top + blob.bottom for blob in line]))


def of_digit_size(line: list[Blob]) -> list[Blob]:
    """Removes blobs that are much shorter than the rest of their line: dashes, dots, commas."""
    height = _typical_height(np.array([blob.height for blob in line]))
    return [blob for blob in line if blob.height >= 0.4 * height]


def _typical_height(heights: np.ndarray) -> float:
    """Returns the median height of digits, `i64[N]`, ignoring dashes, dots and commas."""
    return float(np.median(heights[heights >= 0.4 * heights.max()]))


def _without_bars(blobs: list[Blob], pen: float) -> list[Blob]:
    """Removes narrow strokes that are much taller than the digits beside them, such as margins drawn by hand."""
    boxes = np.array([blob[1:] for blob in blobs])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    middles = (boxes[:, 1] + boxes[:, 3]) / 2
    is_digit = (widths >= 0.25 * heights) & (widths <= 1.5 * heights) & (heights >= 4 * pen)

    def is_bar(blob: Blob) -> bool:
        if blob.width >= 0.25 * blob.height or blob.height <= 10 * pen:  # 2.5 times as tall as the smallest digits
            return False
        beside = heights[is_digit & (blob.top <= middles) & (middles <= blob.bottom)]
        return len(beside) > 1 and blob.height > 2.5 * _typical_height(beside)

    return [blob for blob in blobs if not is_bar(blob)]


def _without_specks(blobs: list[Blob], labels: np.ndarray, steps: np.ndarray, pen: float) -> list[Blob]:
    """Removes specks and remains of rulings; if nothing else is there, keeps the largest, which may be a digit."""
    areas = np.bincount(labels.ravel())
    tallest, largest = max(blob.height for blob in blobs), max(areas[blob.labels[0]] for blob in blobs)
    height, width = labels.shape

    def is_speck(blob: Blob) -> bool:
        area = areas[blob.labels[0]]
        side = max(blob.height, blob.width)
        at_edge = blob.left == 0 or blob.top == 0 or blob.right == width or blob.bottom == height
        if (
            area < 0.03 * largest
            or side < max(0.15 * tallest, 1.2 * pen)
            or (side > 3 * pen and area < 0.4 * pen * side)  # a line much thinner than the pen
            or (at_edge and blob.width > 3 * blob.height)
            or blob.width > 6 * blob.height  # a dash, or a piece of a ruling
        ):
            return True
        window = np.s_[blob.top : blob.bottom, blob.left : blob.right]
        own, shadow = labels[window] == blob.labels[0], steps[window]
        # A small piece mostly at the edge of a shadow may be a corner of the shadow.
        return _is_blot(own, shadow) or bool(side < 0.5 * tallest and shadow[own].mean() > 0.45)

    return [blob for blob in blobs if not is_speck(blob)] or [max(blobs, key=lambda blob: areas[blob.labels[0]])]


def _is_blot(own: np.ndarray, shadow: np.ndarray) -> bool:
    """Returns whether a piece is about as thick as it is long: a dot or the corner of a shadow, not a stroke.

    `own` and `shadow`, `bool[h,w]`, mark the piece and the edges of shadows within its box.
    """
    factor = max(1, min(own.shape) // 30)
    small = np.pad(own[::factor, ::factor], 1)
    thickness = 2 * ndimage.distance_transform_edt(small).max()
    if small.sum() >= (2.0 if shadow.any() else 1.3) * thickness**2:
        return False
    return bool(small.sum() > 0.85 * convex_hull_image(small).sum())  # unlike a 6 whose loop is filled


def _join_broken(blobs: list[Blob], pen: float) -> list[Blob]:
    """Joins the pieces of broken digits: each piece joins a clearly taller one that is above, below or close to it."""
    boxes = np.array([blob[1:] for blob in blobs])
    parts = [blob.labels for blob in blobs]
    whole = np.ones(len(blobs), bool)
    first_height = boxes[:, 3] - boxes[:, 1]
    for piece in np.argsort(first_height, kind="stable"):
        left, top, right, bottom = boxes[piece]
        if not whole[piece] or bottom - top != first_height[piece]:  # already joined, or has grown
            continue
        taller = np.flatnonzero(whole & (bottom - top <= 0.7 * (boxes[:, 3] - boxes[:, 1])))  # few on a dense page
        if not len(taller):
            continue
        hosts = boxes[taller]
        widths, heights = hosts[:, 2] - hosts[:, 0], hosts[:, 3] - hosts[:, 1]
        overlap = np.minimum(hosts[:, 2], right) - np.maximum(hosts[:, 0], left)  # columns; negative if there is a gap
        apart = np.maximum(0, np.maximum(hosts[:, 1], top) - np.minimum(hosts[:, 3], bottom))
        gap = np.hypot(np.maximum(0, -overlap), apart)
        over = overlap >= 0.25 * np.minimum(widths, right - left)
        together = np.maximum(hosts[:, 2:], (right, bottom)) - np.minimum(hosts[:, :2], (left, top))
        is_host = (gap <= np.where(over, 0.35 * heights, max(2.0, 1.5 * pen))) & (
            together[:, 0] <= 1.5 * together[:, 1]
        )
        if is_host.any():
            best = np.lexsort((-overlap, gap, ~is_host))[0]
            host = taller[best]
            boxes[host, :2] = np.minimum(boxes[host, :2], (left, top))
            boxes[host, 2:] = np.maximum(boxes[host, 2:], (right, bottom))
            parts[host] += parts[piece]
            whole[piece] = False
    return [Blob(parts[i], *map(int, boxes[i])) for i in np.flatnonzero(whole)]


def _cut_touching(blob: Blob, labels: np.ndarray, pen: float, number: int) -> list[Blob]:
    """Splits a wide blob into two touching digits if only one stroke crosses some column near its middle.

    In `labels`, the right digit gets the new label `number`, in place.
    """
    if blob.width < max(3, 1.5 * blob.height):
        return [blob]
    window = labels[blob.top : blob.bottom, blob.left : blob.right]
    own = np.isin(window, blob.labels)
    third = blob.width // 3
    cut = third + int(np.argmin(own.sum(axis=0)[third:-third]))
    halves = own * np.where(np.arange(blob.width) < cut, 1, 2)
    places = [place for place in ndimage.find_objects(halves, 2) if place]
    heights = [rows.stop - rows.start for rows, _ in places]
    if own[:, cut].sum() > 1.3 * pen or len(places) < 2 or min(heights) < 0.75 * blob.height:
        return [blob]
    window[halves == 2] = number
    parts = zip((blob.labels, (number,)), places, strict=True)
    return [_blob(numbers, place, blob.left, blob.top) for numbers, place in parts]
