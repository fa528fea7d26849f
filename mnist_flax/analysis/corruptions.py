"""The fifteen corruptions of MNIST-C (Mu and Gilmer, 2019), as pure functions of an image and its index.

Parameters and quirks are those of the published generator (github.com/google-research/mnist-c, `corruptions.py`); the
code and the random numbers are our own. Random numbers are a hash of the corruption's name, the image's index and the
position, so everyone gets the same set, and an image does not depend on the batch that it is in. A corruption draws the
same numbers at every severity.
"""

import functools
import zlib
from collections.abc import Callable
from math import cos, sin
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # [N,28,28], white on black
Floats = NDArray[np.float64]
Draw = Callable[..., Floats]  # draw(*shape) -> [N, *shape], uniform between 0 and 1; each call gives the same numbers

Matrix = tuple[tuple[float, float], tuple[float, float]]

SIZE = 28
MIDDLE = (SIZE - 1) / 2
_CHUNK = 500  # images per call, few enough that intermediate results stay in cache


class Corruption(NamedTuple):
    """A corruption and its levels of severity."""

    # `apply(images, draw, level) -> f64[N,28,28]`, grey levels before rounding
    apply: Callable[[Images, Draw, Any], Floats]
    levels: tuple[Any, ...]  # what `apply` takes at severities 1 to 5
    published: int  # the severity of MNIST-C
    affine: bool = False  # it moves every pixel by one affine map, as training augmentation does


def corrupt(name: str, images: Images, index: NDArray[np.integer[Any]], severity: int = 0) -> Images:
    """Corrupts images, `u8[N,28,28], int[N] -> u8[N,28,28]`, white on black.

    The `index` of each image in its dataset determines the random numbers. Severity is 1 to 5; 0 means that of MNIST-C.
    """
    corruption = CORRUPTIONS[name]
    level = corruption.levels[(severity or corruption.published) - 1]
    result = np.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        draw = functools.partial(hashed_uniform, name, index[part])
        result[part] = np.rint(np.clip(corruption.apply(images[part], draw, level), 0, 255))
    return result


def hashed_uniform(name: str, index: NDArray[np.integer[Any]], *shape: int) -> Floats:
    """Hashes a name, indices and positions to uniform numbers between 0 and 1: `[N, *shape]`."""
    key = _mix(np.uint64(zlib.crc32(name.encode())) << np.uint64(32) | index.astype(np.uint64))
    position = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (_mix(key[:, None] + position) >> np.uint64(11)).astype(np.float64)
    return np.asarray((bits + 0.5) * 2.0**-53).reshape(len(index), *shape)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


def _shot_noise(images: Images, draw: Draw, photons: int) -> Floats:
    """Draws Poisson photon counts by inverting the CDF, up to `photons`, because larger counts are white as well."""
    from scipy.stats import poisson

    cdf = poisson.cdf(np.arange(photons), np.arange(256)[:, None] / 255 * photons)
    uniform = draw(SIZE, SIZE)
    count = sum((uniform > cdf[:, k][images]).astype(np.float64) for k in range(photons))
    return np.asarray(count / photons * 255)


def _impulse_noise(images: Images, draw: Draw, share: float) -> Floats:
    """Sets a share of the pixels to black or white."""
    uniform = draw(2, SIZE, SIZE)
    return np.where(uniform[:, 0] <= share, np.where(uniform[:, 1] <= 0.5, 255.0, 0.0), images)


def _glass_blur(images: Images, draw: Draw, level: tuple[float, int, int]) -> Floats:
    """Swaps neighbouring pixels at random between two blurs, which run along columns only, as in the published code."""
    sigma, distance, rounds = level
    pixels = _blurred(images, (sigma, 0)).astype(np.uint8).reshape(-1, SIZE**2)
    places = range(SIZE - distance, distance, -1)
    uniform = draw(rounds, len(places) ** 2, 3).transpose(1, 2, 3, 0).reshape(-1, 3, len(images)).copy()
    swap = uniform[:, 0] < 0.5
    moves = (uniform[:, 1:] * 2 * distance).astype(np.int64) - distance
    row = np.arange(len(images))
    visits = [(y, x) for _ in range(rounds) for y in places for x in places]
    for (y, x), is_swapped, (down, right) in zip(visits, swap, moves, strict=True):
        who, here = row[is_swapped], y * SIZE + x
        there = here + (down * SIZE + right)[is_swapped]
        pixels[who, here], pixels[who, there] = pixels[who, there], pixels[who, here]
    return _blurred(pixels.reshape(images.shape), (sigma, 0))


def _blurred(images: NDArray[Any], sigma: tuple[float, float]) -> Floats:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(images.astype(np.float64), (0, *sigma), mode="nearest"))


def _motion_blur(images: Images, draw: Draw, level: tuple[int, float]) -> Floats:
    """Blurs to one side with Gaussian weights, like ImageMagick's motion blur, at a random -45 to 45 degrees."""
    radius, sigma = level
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    angle = np.deg2rad(draw(1)[:, 0] * 90 - 45)
    down, right = (np.ceil(np.outer(trig(angle), steps) - 0.5).astype(np.int64) for trig in (np.sin, np.cos))
    axis, who = np.arange(SIZE), np.arange(len(images))[:, None, None]
    result = np.zeros(images.shape)
    for k, weight in enumerate(weights):
        y = np.clip(axis + down[:, k, None], 0, SIZE - 1)[:, :, None]
        x = np.clip(axis + right[:, k, None], 0, SIZE - 1)[:, None, :]
        result += weight * images[who, y, x]
    return result


def _signs(draw: Draw, count: int) -> NDArray[np.int64]:
    return np.where(draw(count) < 0.5, -1, 1)


def _affine(matrix_of: Callable[[float, int], Matrix]) -> Callable[[Images, Draw, float], Floats]:
    """Returns a corruption that fills pixel (x, y), relative to the centre, from `matrix_of(level, sign) @ (x, y)`.

    A random sign is drawn for each image. Values between pixels are interpolated linearly, and those outside are black.
    """

    def apply(images: Images, draw: Draw, level: float) -> Floats:
        signs, result = _signs(draw, 1)[:, 0], np.empty(images.shape)
        for sign in (-1, 1):
            part = images[signs == sign].reshape(-1, SIZE**2).T.astype(np.float64)
            result[signs == sign] = (_sampling(*matrix_of(level, sign)) @ part).T.reshape(-1, SIZE, SIZE)
        return result

    return apply


@functools.cache
def _sampling(*matrix: tuple[float, float]) -> Any:
    """Returns the weight of each input pixel (column) in each output pixel (row), sparse `f64[784,784]`."""
    from scipy.ndimage import map_coordinates
    from scipy.sparse import csr_matrix

    y, x = np.indices((SIZE, SIZE)).reshape(2, -1) - MIDDLE
    from_x, from_y = np.array(matrix) @ [x, y] + MIDDLE
    pixels = np.eye(SIZE**2).reshape(-1, SIZE, SIZE)
    return csr_matrix([map_coordinates(pixel, [from_y, from_x], order=1, mode="grid-constant") for pixel in pixels]).T


def _translate(images: Images, draw: Draw, pixels: int) -> Floats:
    """Shifts diagonally, by `pixels` along each axis."""
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels)))
    signs = _signs(draw, 2)
    y, x = (np.arange(SIZE) + pixels + pixels * signs[:, axis, None] for axis in (1, 0))
    return padded[np.arange(len(images))[:, None, None], y[:, :, None], x[:, None, :]].astype(np.float64)


def _fog(images: Images, draw: Draw, level: tuple[float, float]) -> Floats:
    """Adds the corner of a cloud, a 256x256 fractal made by the diamond-square algorithm.

    Only the visible part of the cloud gets the two finest of its eight levels. The cloud is scaled by the minimum and
    maximum of the first six.
    """
    thickness, decay = level
    uniform = draw(64 * 64 - 1 + 3 * (12**2 + 24**2))
    cloud, used, amplitude = np.zeros((len(images), 1, 1)), 0, 100.0**2
    for _ in range(8):
        if cloud.shape[1] == 64:
            low, high = (extreme(cloud, axis=(1, 2), keepdims=True) for extreme in (np.min, np.max))
            # The cloud is periodic. This keeps what lies from 8 pixels before its corner to 36 pixels after it.
            cloud = np.roll(cloud, 2, axis=(1, 2))[:, :12, :12]
        count = 3 * cloud.shape[1] ** 2
        noise = amplitude * (2 * uniform[:, used : used + count] - 1)
        cloud = _refined(cloud, noise.reshape(len(images), 3, *cloud.shape[1:]))
        used, amplitude = used + count, amplitude / decay**2
    cloud = np.clip((cloud[:, 8:36, 8:36] - low) / (high - low), 0, 1)
    brightest = images.max(axis=(1, 2), keepdims=True) / 255
    return np.asarray((images + 255 * thickness * cloud) * brightest / (brightest + thickness))


def _refined(grid: Floats, noise: Floats) -> Floats:
    """Doubles the resolution of periodic maps, `[N,K,K], [N,3,K,K] -> [N,2K,2K]`: one round of diamond-square."""
    right, below = np.roll(grid, -1, axis=2), np.roll(grid, -1, axis=1)
    fine = np.empty((len(grid), 2 * grid.shape[1], 2 * grid.shape[2]))
    centre = (grid + right + below + np.roll(right, -1, axis=1)) / 4 + noise[:, 0]
    fine[:, ::2, ::2], fine[:, 1::2, 1::2] = grid, centre
    fine[:, ::2, 1::2] = (grid + right + centre + np.roll(centre, 1, axis=1)) / 4 + noise[:, 1]
    fine[:, 1::2, ::2] = (grid + below + centre + np.roll(centre, 1, axis=2)) / 4 + noise[:, 2]
    return fine


def _spatter(images: Images, draw: Draw, level: tuple[float, float, float, float, float]) -> Floats:
    """Covers parts of the image with dark grey mud."""
    from scipy.special import ndtri

    mean, sd, smoothing, threshold, edge = level
    liquid = _blurred(mean + sd * ndtri(draw(SIZE, SIZE)), (smoothing, smoothing))
    mud = _blurred(liquid > threshold, (edge, edge))
    mud[mud < 0.8] = 0
    return np.asarray(images * (1 - mud) + 63 * mud)


def _line(column: tuple[float, float], row: tuple[float, float]) -> Floats:
    """Draws a line with soft edges between two points, `f64[28,28]` from 0 to 1."""
    y, x = np.indices((SIZE, SIZE))
    if column[0] == column[1]:
        return np.zeros((SIZE, SIZE))
    slope = (row[1] - row[0]) / (column[1] - column[0])
    distance = np.abs(y - slope * (x - column[0]) - row[0])
    line = np.clip(np.log(1 - np.clip(distance, 0, 2.3 - 1e-10) / 2.3) + 1, 0, 1)
    line[:, : max(0, int(np.floor(column[0])))] = 0
    line[:, int(np.ceil(column[1])) :] = 0
    return line


@functools.cache
def _dots(start: int, end: int) -> Floats:
    """Draws a dotted line across the image."""
    return _line((0, 27), (start, end)) * (np.arange(SIZE) // 2 % 2)


@functools.cache
def _zigzags(start: int, rise: int) -> Floats:
    """Draws a zigzag from column 2 to 25, with teeth that are 4 pixels wide and 2 high."""
    first, last, tooth, height = 2, 25, 2.0, 2.0
    angle = np.arctan(rise / (last - first))
    length = (last - first) / np.cos(angle)
    turns = int((length - tooth) // (2 * tooth)) + 1
    points = [(0.0, 0.0), *(((2 * i + 1) * tooth, (-1) ** i * height) for i in range(turns))]
    rest = length - 2 * tooth * (length // (2 * tooth))
    if rest:
        points.append((length, points[-1][1] / (2 * rest)))
    along, aside = np.array(points).T
    x = np.cos(angle) * along - np.sin(angle) * aside + first
    y = np.sin(angle) * along + np.cos(angle) * aside + start
    segments = [_line((x[i], x[i + 1]), (y[i], y[i + 1])) for i in range(len(x) - 1)]
    return np.sum(segments, axis=0)


def _overlaid(
    line: Callable[[int, int], Floats], low: int, high: int, images: Images, draw: Draw, count: int
) -> Floats:
    """Draws `count` lines over each image, each from two random integers: 0 to 26, and `low` to `high - 1`."""
    numbers = np.add((draw(count, 2) * (27, high - low)).astype(int), (0, low))
    lines = [[line(int(start), int(other)) for start, other in of_image] for of_image in numbers]
    return np.asarray(images + 255 * np.array([sum(of_image) for of_image in lines]))


def _canny_edges(images: Images, draw: Draw, sigma: float) -> Floats:
    """Keeps only the edges (Canny, 1986)."""
    from skimage.feature import canny

    return np.array([canny(image / 255, sigma=sigma) for image in images]) * 255.0


def _stripe(images: Images, draw: Draw, width: int) -> Floats:
    """Inverts a stripe at the left and one at the right."""
    return np.where(np.abs(np.arange(SIZE) - MIDDLE) > MIDDLE - width, 255.0 - images, images)


# The levels are published ones, except those of the last four corruptions, which have only one level in MNIST-C.
CORRUPTIONS: dict[str, Corruption] = {
    "shot_noise": Corruption(_shot_noise, (60, 25, 12, 5, 3), 5),
    "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), 4),
    "glass_blur": Corruption(_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)), 1),
    "motion_blur": Corruption(_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), 1),
    # Slants by an angle in radians and stretches a little, as scikit-image's shear did in 2019.
    "shear": Corruption(_affine(lambda a, sign: ((1, -sign * sin(a)), (0, cos(a)))), (0.2, 0.4, 0.6, 0.8, 1), 2, True),
    "scale": Corruption(_affine(lambda size, _: ((1 / size, 0), (0, 1 / size))), (0.9, 0.8, 0.7, 0.6, 0.5), 3, True),
    "rotate": Corruption(
        _affine(lambda a, sign: ((cos(a), -sign * sin(a)), (sign * sin(a), cos(a)))), (0.2, 0.4, 0.6, 0.8, 1), 2, True
    ),
    "brightness": Corruption(lambda images, draw, amount: images + 255.0 * amount, (0.1, 0.2, 0.3, 0.4, 0.5), 5),
    "translate": Corruption(_translate, (1, 2, 3, 4, 5), 3, True),
    "fog": Corruption(_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), 5),
    "spatter": Corruption(
        _spatter,
        (
            (0.65, 0.3, 4, 0.69, 0.6),
            (0.65, 0.3, 3, 0.68, 0.6),
            (0.65, 0.3, 2, 0.68, 0.5),
            (0.65, 0.3, 1, 0.65, 1.5),
            (0.67, 0.4, 1, 0.65, 1.5),
        ),
        4,
    ),
    "stripe": Corruption(_stripe, (3, 5, 7, 9, 11), 3),
    "dotted_line": Corruption(functools.partial(_overlaid, _dots, 0, 27), (1, 2, 3, 4, 5), 1),
    "zigzag": Corruption(functools.partial(_overlaid, _zigzags, -5, 5), (1, 2, 3, 4, 5), 1),
    "canny_edges": Corruption(_canny_edges, (1.0, 1.25, 1.5, 1.75, 2.0), 1),
}
