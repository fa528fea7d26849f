"""From any picture to its digits as MNIST would have them: decode, find the ink, find the digits, draw them in 28x28.

No flags, no network and no files here: bytes come in, arrays go out.

    bytes -> grey u8[H,W] -> ink f32[H,W], 0 where there is paper -> groups of blobs, in reading order -> u8[28,28] each
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from mnist_flax.data.framing import frame
from mnist_flax.errors import UserError

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")

_SIDE = 1000  # pixels of a picture's longer side at most: enough for a page of digits, and averages much noise away
_FAINT = 10.0  # grey values of 255: what differs less from the paper is never ink


class PictureError(UserError):
    """A picture cannot be read, or holds no ink."""

    exit_status = 1


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
      grey: `u8[H,W]`, upright, transparent parts white, and no larger than there is use for.
      scale: pixels of the original to a pixel of `grey`.
    """

    grey: np.ndarray
    scale: float


class Digit(NamedTuple):
    """Something that may be a digit.

    Attributes:
      image: `u8[28,28]`, white on black, as MNIST has it.
      box: left, top, right, bottom in pixels of the picture as one sees it (turned as its EXIF data say); the right and
        bottom edges are exclusive.
    """

    image: np.ndarray
    box: tuple[int, int, int, int]


class _Blob(NamedTuple):
    """Ink that hangs together: its numbers in the label image, and its box, whose right and bottom are exclusive."""

    labels: tuple[int, ...]
    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


def read_digits(content: bytes) -> list[Digit]:
    """Finds the digits in a picture's file, in reading order: lines from top to bottom, each from left to right.

    Raises:
      PictureError: it is no picture, or a damaged, huge or blank one.
    """
    picture = decode(content)
    digits = find_digits(picture.grey)
    if not digits:
        raise PictureError("is blank: nothing in it stands out like ink on paper")
    height, width = picture.grey.shape
    limit = [round(side * picture.scale) for side in (width, height, width, height)]
    return [
        digit._replace(
            box=tuple(min(round(side * picture.scale), most) for side, most in zip(digit.box, limit, strict=True))
        )
        for digit in digits
    ]


# Decoding -------------------------------------------------------------------------------------------------------------


def decode(content: bytes) -> Picture:
    """Decodes a picture's file; of several frames or pages, the first.

    Raises:
      PictureError: it is no picture of a format in `FORMATS`, is damaged, or claims more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if not content:
        raise PictureError("is empty")
    Image.init()  # Pillow knows the rarer formats only from then on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, which do not matter here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width = image.width
                image.draft("L", (_SIDE, _SIDE))  # JPEG only: large ones are decoded at half their size or less
                scale = width / image.width
                upright = ImageOps.exif_transpose(_to_grey(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise PictureError(
                f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels, which this program does not open; make it smaller"
            ) from error
        except UnidentifiedImageError as error:
            hint = ", but HEIC; save it as JPEG" if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1") else ""
            raise PictureError(f"is no picture of a known format ({', '.join(FORMATS)}){hint}") from error
        except Exception as error:  # damaged files surface as almost any error of the decoders
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PictureError(f"is damaged, or not all there ({reason})") from error
    shrink = max(1.0, max(upright.size) / _SIDE)
    if shrink > 1:
        size = [max(1, round(side / shrink)) for side in upright.size]
        upright = upright.resize((size[0], size[1]), Image.Resampling.BOX)
    return Picture(np.asarray(upright), scale * shrink)


def _to_grey(image: Image.Image) -> Image.Image:
    """Turns any mode into `L`, keeping the EXIF data; what is transparent becomes white."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        grey = Image.fromarray(_to_bytes(np.asarray(image).astype(np.float64)))
    elif image.has_transparency_data:
        layers = image.convert("RGBA")
        grey = _over(layers, "white")
        if grey.getextrema()[0] == grey.getextrema()[1]:  # white ink on nothing
            grey = _over(layers, "black")
    else:
        grey = image.convert("L")
    grey.info.update(image.info)
    if exif := image.getexif():
        grey.getexif().update(exif)
    return grey


def _over(layers: Image.Image, colour: str) -> Image.Image:
    """Lays an RGBA image over a sheet of one colour."""
    return Image.alpha_composite(Image.new("RGBA", layers.size, colour), layers).convert("L")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Turns pixels of more than 8 bits into bytes: counts by the bits that are in use, other numbers by their range."""
    if not np.isfinite(values).all():
        raise ValueError("its pixels are not all finite")
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    if low >= 0 and high > 1:
        high = 2.0 ** max(8, int(high).bit_length()) - 1  # 255, 1023, 4095, ..., 65535
    return np.round((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)


# Ink ------------------------------------------------------------------------------------------------------------------


def find_digits(grey: np.ndarray) -> list[Digit]:
    """Finds what may be digits in a grey picture, `u8[H,W]`, in reading order; nothing in a blank one."""
    if (ready := _as_in_mnist(grey)) is not None:
        return [Digit(ready, (0, 0, 28, 28))]
    found = ink(grey)
    if found is None:
        return []
    strength, mask, marks = found
    mask = without_rulings(mask, marks)
    pen = _pen_width(mask)
    labels, blobs = _blobs(mask, pen)
    blobs = _join_broken(_without_specks(blobs, labels, pen), pen)
    blobs = [part for blob in blobs for part in _cut_touching(blob, labels, pen)]
    return [_draw(strength, labels, blob, pen) for line in _lines(blobs) for blob in _of_digit_size(line)]


def _as_in_mnist(grey: np.ndarray) -> np.ndarray | None:
    """Returns a picture that is one of MNIST's, or made like them, white on black and unchanged; None for any other."""
    if grey.shape != (28, 28):
        return None
    image = 255 - grey if is_dark_on_light(grey.astype(np.float32)) else grey
    sides = [np.ptp(np.flatnonzero(image.any(axis=axis))) + 1 for axis in (0, 1) if image.any()]
    if not sides or max(sides) != 20 or np.hypot(*np.subtract(ndimage.center_of_mass(image), 14)) > 1:
        return None
    return image


def ink(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Tells ink from paper under any light.

    Args:
      grey: `u8[H,W]`, dark on light or light on dark.

    Returns:
      How strong the ink is at each pixel, `f32[H,W]` from 0 to 1; where it is, `bool[H,W]`; and where anything is that
      differs from the paper, however pale, `bool[H,W]`. None if there is none.
    """
    from skimage.filters import apply_hysteresis_threshold, threshold_otsu

    values = grey.astype(np.float32)
    if is_dark_on_light(values):
        values = 255 - values
    # The noise: how much neighbours differ where nothing is drawn. The median does not see edges.
    steps = np.abs(np.diff(values, axis=1))
    noise = 1.4826 * float(np.median(steps)) / np.sqrt(2) if steps.size else 0.0
    if noise > 1 and min(grey.shape) > 60:
        values = ndimage.gaussian_filter(values, 1.0)
        noise *= 0.3
    contrast = np.maximum(values - _paper(values), 0)
    candidate = contrast > max(_FAINT, 5 * noise)
    if candidate.sum() < 4:
        return None
    pen = np.round(contrast[candidate])  # a histogram fails on values that are all but equal
    strong = float(np.median(pen[pen >= threshold_otsu(pen)]))
    mask = apply_hysteresis_threshold(contrast, max(0.4 * strong, _FAINT), max(0.6 * strong, _FAINT))
    low = min(max(2.5 * noise, 0.1 * strong), 0.3 * strong)  # JPEG draws ripples around strokes
    return np.clip((contrast - low) / (0.95 * strong - low), 0, 1).astype(np.float32), mask, candidate


def is_dark_on_light(values: np.ndarray) -> bool:
    """Tells the polarity of a grey picture, `f32[H,W]`, by three votes.

    Is the border lighter than Otsu's threshold? And, once uneven light is taken out: is the border lighter than the
    mean, and do the few pixels that differ most differ towards dark? Each fails on some pictures: the first under a
    shadow, the others on a digit without a margin.
    """
    from skimage.filters import threshold_otsu

    small = np.round(_shrunk(values, 64))
    flat = small - ndimage.median_filter(small, size=max(3, int(min(small.shape) * 0.6) | 1), mode="nearest")

    def border(image: np.ndarray) -> np.ndarray:
        return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])

    votes = [
        np.mean(border(small) > threshold_otsu(small)) > 0.5,
        np.median(border(flat)) > flat.mean(),
        np.mean((flat - flat.mean()) ** 3) < 0,
    ]
    return sum(map(bool, votes)) >= 2


def _paper(values: np.ndarray) -> np.ndarray:
    """Estimates the brightness of the paper below the ink, `f32[H,W] -> f32[H,W]`, for light ink on dark paper.

    Opening takes away whatever is bright and narrower than a quarter of the picture, and keeps the edges of shadows.
    """
    small = _shrunk(values, 128)
    side = max(3, round(min(small.shape) / 4) | 1)
    # A slope is taken out first: opening is wrong near the border of one.
    y, x = np.mgrid[0 : small.shape[0], 0 : small.shape[1]]
    terms = np.stack([np.ones(small.size), x.ravel(), y.ravel()], axis=1)
    plane = (terms @ np.linalg.lstsq(terms, small.ravel())[0]).reshape(small.shape).astype(np.float32)
    paper = ndimage.grey_opening(small - plane, (side, side), mode="nearest")
    paper = plane + ndimage.gaussian_filter(paper, side / 8, mode="nearest")
    height, width = values.shape
    return np.asarray(Image.fromarray(paper).resize((width, height), Image.Resampling.BILINEAR))


def _shrunk(values: np.ndarray, side: int) -> np.ndarray:
    """Shrinks an image by averaging until no side is longer than `side` pixels, `f32[H,W] -> f32[h,w]`."""
    image = Image.fromarray(values)
    factor = max(1.0, max(image.size) / side)
    width, height = (max(1, round(length / factor)) for length in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def without_rulings(mask: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Takes printed lines and squares out of the ink, and leaves whole the strokes that cross them.

    A ruling is straight, nearly level or upright, runs from edge to edge, and is thinner than the pen.

    Args:
      mask: `bool[H,W]`, where ink is.
      marks: `bool[H,W]`, where anything is, however pale.

    Returns:
      `bool[H,W]`, the ink without rulings.
    """
    specks, _ = ndimage.label(marks, np.ones((3, 3)))
    marks = marks & (np.bincount(specks.ravel()) > 16)[specks]
    kept = mask
    thinnest = np.inf
    eighths = [np.arange(side) * 8 // side for side in mask.shape]
    for across, level in _straight_lines(marks):
        inside = np.abs(across) < 12
        counts = np.bincount(np.round(across[inside & marks]).astype(int) + 12, minlength=25)
        share = counts / np.maximum(1, np.bincount(np.round(across[inside]).astype(int) + 12, minlength=25))
        wide = np.flatnonzero(share > 0.5)
        if not len(wide):
            continue
        thickness = wide[-1] - wide[0] + 1
        band = (across >= wide[0] - 12.5) & (across < wide[-1] - 11.5)
        part = np.broadcast_to(eighths[1] if level else eighths[0][:, None], mask.shape)
        share = np.bincount(part[band & marks], minlength=8) / np.maximum(1, np.bincount(part[band], minlength=8))
        if share.min(where=np.bincount(part[band], minlength=8) > 8, initial=1.0) < 0.3:
            continue  # not from edge to edge
        thinnest = min(thinnest, thickness)
        band = (across >= wide[0] - 13) & (across <= wide[-1] - 11)
        erased = kept & ~band
        # A stroke that goes on at both sides of the band crosses it.
        length = int(thickness) + 5
        bridge = ndimage.binary_closing(np.pad(erased, length), np.ones((length, 3) if level else (3, length)))
        kept = erased | (kept & band & bridge[length:-length, length:-length])
    if kept is mask:
        return mask
    kept = ndimage.binary_opening(kept, np.ones((2, 2)))  # crumbs of the lines' edges
    # The bar of a 7 that fills its picture, or a lone 1, is no ruling: it is as thick as the rest, or all there is.
    return kept if kept.any() and thinnest < 0.8 * _pen_width(kept) else mask


def _straight_lines(marks: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """Finds lines from edge to edge: every pixel's signed distance from the line, `f32[H,W]`; whether it is level."""
    from skimage.transform import hough_line, hough_line_peaks

    height, width = marks.shape
    if min(height, width) < 80:  # too small to tell a line from a stroke
        return []
    half = marks[: height // 2 * 2, : width // 2 * 2].reshape(height // 2, 2, width // 2, 2).any((1, 3))
    half = ndimage.binary_dilation(half)
    turns = np.deg2rad(np.arange(-10, 10.01, 0.25))
    lines = []
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for upright in (0.0, np.pi / 2):
        votes, angles, distances = hough_line(half, upright + turns)
        reach = _chord(angles[None, :], distances[:, None], half.shape)
        share = np.where(reach > 0.5 * half.shape[1 if upright else 0], votes / np.maximum(reach, 1), 0)
        share = ndimage.gaussian_filter(np.minimum(share, 1.0), (1, 2))  # its peak is then in the middle of a plateau
        apart = max(3, min(half.shape) // 40)
        for _, angle, distance in zip(
            *hough_line_peaks(share, angles, distances, min_distance=apart, min_angle=len(turns), threshold=0.6),
            strict=True,
        ):
            lines.append((x * np.cos(angle) + y * np.sin(angle) - 2 * distance - 0.3, bool(upright)))
    return lines


def _chord(angle: np.ndarray, distance: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns how much of the line x cos(angle) + y sin(angle) = distance lies in an image of this shape, in pixels."""
    cos, sin = np.cos(angle), np.sin(angle)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The line is (distance cos - t sin, distance sin + t cos).
        xs = np.sort(np.stack([(distance * cos - edge) / sin for edge in (0, shape[1])]), axis=0)
        ys = np.sort(np.stack([(edge - distance * sin) / cos for edge in (0, shape[0])]), axis=0)
    low = np.fmax(np.where(np.abs(sin) > 1e-9, xs[0], -np.inf), np.where(np.abs(cos) > 1e-9, ys[0], -np.inf))
    high = np.fmin(np.where(np.abs(sin) > 1e-9, xs[1], np.inf), np.where(np.abs(cos) > 1e-9, ys[1], np.inf))
    return np.maximum(0, high - low)


def _pen_width(mask: np.ndarray) -> float:
    """Returns the width of the strokes in pixels: on average, a stroke's pixels are a quarter of it from its edge."""
    distance = ndimage.distance_transform_edt(mask)
    return max(1.0, 4 * float(distance[mask].mean()) - 1) if mask.any() else 1.0


# Digits ---------------------------------------------------------------------------------------------------------------


def _blobs(mask: np.ndarray, pen: float) -> tuple[np.ndarray, list[_Blob]]:
    """Numbers what hangs together, small gaps closed: `i32[H,W]`, 0 where there is no ink, and the blobs."""
    reach = max(0, round(pen / 4))
    near = ndimage.distance_transform_edt(~mask) <= reach if reach else mask
    labels, _ = ndimage.label(near, structure=np.ones((3, 3)))
    labels[~mask] = 0
    places = ndimage.find_objects(labels)
    return labels, [
        _Blob((number,), place[1].start, place[0].start, place[1].stop, place[0].stop)
        for number, place in enumerate(places, 1)
        if place
    ]


def _without_specks(blobs: list[_Blob], labels: np.ndarray, pen: float) -> list[_Blob]:
    """Leaves out dots, and what is left of rulings at the picture's edge."""
    if not blobs:
        return []
    areas = np.bincount(labels.ravel())
    tallest = max(blob.height for blob in blobs)
    largest = max(areas[1:])
    height, width = labels.shape

    def is_speck(blob: _Blob) -> bool:
        area = areas[blob.labels[0]]
        side = max(blob.height, blob.width)
        at_edge = blob.left == 0 or blob.top == 0 or blob.right == width or blob.bottom == height
        return (
            area < 0.03 * largest
            or side < max(0.15 * tallest, 1.2 * pen)
            or (side > 3 * pen and area < 0.4 * pen * side)  # a line much thinner than the pen
            or (at_edge and blob.width > 3 * blob.height)
        )

    # If it is all specks, the largest may be the digit.
    return [blob for blob in blobs if not is_speck(blob)] or [max(blobs, key=lambda blob: areas[blob.labels[0]])]


def _lines(blobs: list[_Blob]) -> list[list[_Blob]]:
    """Groups blobs into lines, from top to bottom; each is sorted from left to right.

    A blob belongs to a line when its middle lies within the line's height; the tallest blobs come first.
    """
    lines: list[list[_Blob]] = []
    for blob in sorted(blobs, key=lambda blob: -blob.height):
        middle = (blob.top + blob.bottom) / 2
        for line in lines:
            # The nearest member tells where a slanting line is.
            nearest = min(line, key=lambda other: abs(other.left + other.right - blob.left - blob.right))
            if nearest.top <= middle <= nearest.bottom:
                line.append(blob)
                break
        else:
            lines.append([blob])
    lines.sort(key=lambda line: np.mean([blob.top + blob.bottom for blob in line]))
    return [sorted(line, key=lambda blob: blob.left + blob.right) for line in lines]


def _join_broken(blobs: list[_Blob], pen: float) -> list[_Blob]:
    """Joins the strokes of a digit that do not touch: a piece clearly smaller than its host, above, below or near."""
    whole = list(blobs)
    for piece in sorted(blobs, key=lambda blob: blob.height):
        if piece not in whole:  # it has grown, and is no piece any more
            continue

        def is_host(host: _Blob, piece: _Blob = piece) -> bool:
            gap, union = _gap(host, piece), _union(host, piece)
            over = _overlap(host, piece) >= 0.25 * min(piece.width, host.width)
            return (
                host is not piece
                and piece.height <= 0.7 * host.height
                and gap <= (0.35 * host.height if over else max(2.0, 1.5 * pen))
                and union.width <= 1.5 * union.height
            )

        if hosts := [host for host in whole if is_host(host)]:
            host = min(hosts, key=lambda blob: (_gap(blob, piece), -_overlap(blob, piece)))
            whole[whole.index(host)] = _union(host, piece)
            whole.remove(piece)
    return whole


def _cut_touching(blob: _Blob, labels: np.ndarray, pen: float) -> list[_Blob]:
    """Cuts two digits apart that touch: a wide blob with a place near its middle where only one stroke passes.

    The right part gets a number of its own in `labels`.
    """
    if blob.width < 1.5 * blob.height:
        return [blob]
    window = labels[blob.top : blob.bottom, blob.left : blob.right]
    own = np.isin(window, blob.labels)
    third = blob.width // 3
    cut = third + int(np.argmin(own.sum(axis=0)[third:-third]))
    halves = own[:, :cut], own[:, cut:]
    heights = [np.ptp(np.flatnonzero(half.any(axis=1))) + 1 for half in halves]
    if own[:, cut].sum() > 1.3 * pen or min(heights) < 0.75 * blob.height:
        return [blob]
    number = int(labels.max()) + 1
    window[:, cut:][halves[1]] = number
    parts = []
    for numbers, half, offset in ((blob.labels, halves[0], 0), ((number,), halves[1], cut)):
        rows, columns = np.flatnonzero(half.any(axis=1)), np.flatnonzero(half.any(axis=0)) + offset
        parts.append(
            _Blob(
                numbers,
                blob.left + int(columns[0]),
                blob.top + int(rows[0]),
                blob.left + int(columns[-1]) + 1,
                blob.top + int(rows[-1]) + 1,
            )
        )
    return parts


def _of_digit_size(line: list[_Blob]) -> list[_Blob]:
    """Leaves out what is much lower than the rest of its line: a dash, a dot, a comma."""
    height = float(np.median([blob.height for blob in line if blob.height >= 0.5 * max(b.height for b in line)]))
    return [blob for blob in line if blob.height >= 0.4 * height]


def _overlap(one: _Blob, other: _Blob) -> int:
    """Returns how many columns two blobs share; negative: how many lie between them."""
    return min(one.right, other.right) - max(one.left, other.left)


def _gap(one: _Blob, other: _Blob) -> float:
    """Returns the distance between two boxes in pixels."""
    across = max(0, -_overlap(one, other))
    down = max(0, max(one.top, other.top) - min(one.bottom, other.bottom))
    return float(np.hypot(across, down))


def _union(one: _Blob, other: _Blob) -> _Blob:
    """Returns two blobs as one."""
    return _Blob(
        one.labels + other.labels,
        min(one.left, other.left),
        min(one.top, other.top),
        max(one.right, other.right),
        max(one.bottom, other.bottom),
    )


def _draw(strength: np.ndarray, labels: np.ndarray, blob: _Blob, pen: float) -> Digit:
    """Draws a blob as MNIST would have it."""
    margin = max(1, round(pen / 2))
    top, left = max(0, blob.top - margin), max(0, blob.left - margin)
    window = np.s_[top : blob.bottom + margin, left : blob.right + margin]
    own = np.isin(labels[window], blob.labels)
    near = ndimage.binary_dilation(own, iterations=margin) & ((labels[window] == 0) | own)
    image = np.where(near, strength[window], 0)
    # A thin stroke would fade in the small image: MNIST's are about two of twenty pixels wide.
    wanted = 0.1 * max(blob.height, blob.width)
    if pen < wanted:
        radius = (wanted - pen) / 2
        image = np.pad(image, int(np.ceil(radius)))
        size = int(np.ceil(radius))
        y, x = np.mgrid[-size : size + 1, -size : size + 1]
        image = ndimage.grey_dilation(image, footprint=np.hypot(x, y) <= max(radius, 0.5))
    return Digit(frame(np.round(image * 255).astype(np.uint8)), blob[1:])
