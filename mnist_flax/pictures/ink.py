"""Separates ink from paper under any light, dark on light or light on dark."""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold, threshold_otsu
from skimage.filters.rank import median

_FAINTEST = 10.0  # grey levels of 255: ink differs from the paper by at least this much
_TURNS = (22.5, 45.0, 67.5)  # degrees


class Ink(NamedTuple):
    """The ink of a picture."""

    strength: np.ndarray  # `f32[H,W]`, from 0 (paper) to 1 (the pen's full colour)
    mask: np.ndarray  # `bool[H,W]`, True for ink
    marks: np.ndarray  # `bool[H,W]`, True for anything that differs from the paper, however pale
    # `bool[H,W]`, True where the brightness of the paper changes abruptly: edges of shadows and of sheets
    steps: np.ndarray


def find_ink(grey: np.ndarray, sheet: np.ndarray | None = None) -> Ink | None:
    """Separates ink from paper, `u8[H,W] -> Ink`; returns None if nothing stands out like ink.

    `sheet`, `bool[H,W]`, is True on a light sheet of paper; without it, the whole picture is paper.
    """
    dark = sheet is not None or is_dark_on_light(grey.astype(np.float32))
    ink = _find_ink(grey, sheet, dark)
    if sheet is not None or ink is None or not ink.steps.any():
        return ink
    # A sheet half in shadow on a dark table looks light on dark; its bright half would be a very thick stroke.
    pen = thick_pen(ink.mask)
    if pen <= 0.1 * min(grey.shape):
        return ink
    other = _find_ink(grey, None, not dark)
    return other if other is not None and thick_pen(other.mask) < 0.4 * pen else ink


def _find_ink(grey: np.ndarray, sheet: np.ndarray | None, dark: bool) -> Ink | None:
    """Separates dark ink from light paper, or, if not `dark`, light ink from dark paper."""
    values = grey.astype(np.float32)
    values, noise = _denoised(255 - values if dark else values)
    window = _paper_window(values)
    paper, contrast = _contrast(values, window, dark, sheet)
    for _ in range(2):
        marks = contrast > max(_FAINTEST, 5 * noise)
        if marks.sum() < 4:
            return None
        inked = np.round(contrast[marks])  # rounded, because the histogram fails on nearly equal values
        strong = float(np.median(inked[inked >= threshold_otsu(inked)]))
        mask = apply_hysteresis_threshold(contrast, max(0.4 * strong, _FAINTEST), max(0.6 * strong, _FAINTEST))
        # Corners of shadows look like ink, but less so in a narrow window, so it is reduced to the necessary size.
        needed = max(5, round(4 * thick_pen(mask)))
        if needed > 0.7 * window:
            break
        window = needed
        paper, contrast = _contrast(values, window, dark, sheet)
    low = min(max(2.5 * noise, 0.1 * strong), 0.3 * strong)  # excludes JPEG ripples around strokes
    strength = np.clip((contrast - low) / (0.95 * strong - low), 0, 1).astype(np.float32)
    return Ink(strength, mask, marks, _steps(paper))


def _contrast(values: np.ndarray, window: int, dark: bool, sheet: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the brightness of the paper and the contrast of each pixel, corrected for shadows; ink is light.

    Outside the sheet, if one was found, the contrast is 0.
    """
    paper = _paper(values, window)
    contrast = values - paper
    contrast = np.maximum(contrast - np.median(contrast), 0)
    if dark:  # a shadow dims paper and ink by the same factor
        light = np.maximum(255 - paper, 1)
        contrast *= np.clip(np.percentile(light[::4, ::4], 90) / light, 1, 2.5)
    return paper, contrast if sheet is None else contrast * sheet


def _paper(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the brightness of the paper, `f32[H,W]`: without ink, which is light, but with the edges of shadows.

    A square window reaches into a shadow's corner only if it is turned like the corner, so several turns are tried.
    """
    paper = opened(values, window)
    if not _steps(paper).any():
        return paper
    height, width = values.shape
    side = 2 * (int(np.hypot(height, width)) // 2 + 1)
    top, left = (side - height) // 2, (side - width) // 2
    square = Image.fromarray(np.pad(values, ((top, side - height - top), (left, side - width - left)), mode="edge"))
    half = square.resize((side // 2, side // 2), Image.Resampling.BOX)  # four times as fast
    for turn in _TURNS:
        turned = np.asarray(half.rotate(turn, Image.Resampling.BILINEAR))
        back = Image.fromarray(opened(turned, max(1, window // 2))).rotate(-turn, Image.Resampling.BILINEAR)
        back = back.resize(square.size, Image.Resampling.BILINEAR)
        paper = np.maximum(paper, np.asarray(back)[top : top + height, left : left + width])
    return np.minimum(paper, values)


def _steps(paper: np.ndarray) -> np.ndarray:
    """Finds abrupt changes in the brightness of the paper, `f32[H,W] -> bool[H,W]`."""
    steps = np.zeros(paper.shape, bool)
    apart = 8  # pixels
    down = np.abs(paper[apart:, 4:-4] - paper[:-apart, 4:-4]) > 20
    right = np.abs(paper[4:-4, apart:] - paper[4:-4, :-apart]) > 20
    steps[4:-4, 4:-4] = down | right
    return steps


def is_dark_on_light(values: np.ndarray) -> bool:
    """Returns whether a greyscale picture, `f32[H,W]`, is dark on light, by a majority of five votes.

    Is the border lighter than Otsu's threshold? After removing uneven light: is the border lighter than the mean, and
    are the brightness values skewed towards dark? Do thin dark details stand out more than thin light ones, in total
    and at their strongest? Each vote fails on some pictures: the first under a shadow, the next two on a digit without
    a margin, the last two on thick strokes.
    """
    small = np.round(shrunk(values, 64))
    flat = small - _median(small, max(3, int(min(small.shape) * 0.6) | 1))
    fine = shrunk(values, 128)
    window = max(3, int(min(fine.shape) * 0.1) | 1)
    thin_light, thin_dark = fine - opened(fine, window), -opened(-fine, window) - fine

    def border(image: np.ndarray) -> np.ndarray:
        return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])

    votes = [
        np.mean(border(small) > threshold_otsu(small)) > 0.5,
        np.median(border(flat)) > flat.mean(),
        np.mean((flat - flat.mean()) ** 3) < 0,
        np.sum(thin_dark**2) > np.sum(thin_light**2),
        np.percentile(thin_dark, 98) > np.percentile(thin_light, 98),
    ]
    return sum(map(bool, votes)) >= 3


def _median(values: np.ndarray, size: int) -> np.ndarray:
    """Returns the median over a window of odd `size` around each pixel of `f32[H,W]`, which holds whole numbers.

    It uses histograms, 25 times as fast as `scipy.ndimage.median_filter` for the large window used here.
    """
    half = size // 2
    padded = np.pad(values.astype(np.uint8), half, mode="edge")
    return np.asarray(median(padded, np.ones((size, size), np.uint8))[half:-half, half:-half])


def pen_width(mask: np.ndarray) -> float:
    """Returns the width of the strokes in pixels: about four times the mean distance of their pixels from the edge."""
    distance, factor = _depth(mask)
    inked = distance > 0
    return max(1.0, (4 * float(distance[inked].mean()) - 1) * factor) if inked.any() else 1.0


def thick_pen(mask: np.ndarray) -> float:
    """Returns the width of the thicker strokes in pixels, ignoring thin lines."""
    distance, factor = _depth(mask)
    ridge = (distance > 0) & (distance >= ndimage.maximum_filter(distance, 3))
    if not ridge.any():
        return 1.0
    widths = np.sort(distance[ridge])
    weights = np.cumsum(widths**1.5)  # limits thin lines, which may be many times as long as the strokes
    return 2 * factor * float(widths[np.searchsorted(weights, 0.8 * weights[-1])])


def _depth(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the distance of ink from its edge in a downsampled mask, `bool[H,W] -> f64[h,w]`, and the factor."""
    factor = max(1, min(mask.shape) // 300)  # the distance transform of a large mask is slow
    distance = ndimage.distance_transform_edt(np.pad(mask[::factor, ::factor], 1))
    if factor > 1 and distance.max() < 3:  # too coarse for this pen
        return ndimage.distance_transform_edt(np.pad(mask, 1)), 1
    return distance, factor


def opened(values: np.ndarray, size: int) -> np.ndarray:
    """Removes bright details narrower than `size` (morphological opening); straight edges of shadows stay in place."""
    padded = np.pad(values, size, mode="edge")
    return np.asarray(ndimage.grey_opening(padded, (size, size))[size:-size, size:-size])


def shrunk(values: np.ndarray, side: int) -> np.ndarray:
    """Downsamples an image by averaging so that no side exceeds `side` pixels, `f32[H,W] -> f32[h,w]`."""
    image = Image.fromarray(values)
    factor = max(1.0, max(image.size) / side)
    width, height = (max(1, round(length / factor)) for length in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def _denoised(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Smooths a noisy or dithered image; returns it with the standard deviation of the remaining noise."""
    if min(values.shape) <= 60:
        return values, _noise(values)
    # Dithered: many pixels are much lighter, or darker, than all four neighbours.
    middle = values[1:-1, 1:-1]
    around = np.stack([values[:-2, 1:-1], values[2:, 1:-1], values[1:-1, :-2], values[1:-1, 2:]])
    alone = (middle > around.max(axis=0) + 100) | (middle < around.min(axis=0) - 100)
    if alone.mean() > 0.02:
        smooth = ndimage.gaussian_filter(values, 2.5)
        return smooth, max(2.0, _noise(smooth))
    noise = _noise(values)
    if noise <= 1:
        return values, noise
    return ndimage.gaussian_filter(values, 1.0), 0.3 * noise


def _noise(values: np.ndarray) -> float:
    """Estimates the standard deviation of the noise from the differences between horizontal neighbours."""
    steps = np.abs(np.diff(values, axis=1))  # the median ignores edges
    return 1.4826 * float(np.median(steps)) / np.sqrt(2) if steps.size else 0.0


def _paper_window(values: np.ndarray) -> int:
    """Returns the size of a window that always contains some paper: several times the pen width; ink is light."""
    small = shrunk(values, 200)
    factor = max(values.shape) / max(small.shape)
    widest = max(3, round(min(small.shape) / 3) | 1)
    contrast = small - opened(small, widest)
    if contrast.max() <= _FAINTEST / 2:
        return round(widest * factor)
    mask = contrast > max(threshold_otsu(contrast), _FAINTEST / 2)
    return round(min(max(5, 4 * thick_pen(mask)), widest) * factor)
