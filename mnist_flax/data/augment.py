"""Random augmentation of training images, on the device: one entry of `AUGMENTATIONS` for each operation.

To add an operation, add an entry before the config is built; the config field `augment.<name>` sets its strength.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from mnist_flax import rng
from mnist_flax.checks import of_type, within
from mnist_flax.data.pens import CLASSES, pens
from mnist_flax.errors import ConfigError
from mnist_flax.external import naming_the_line

MAX_PIECES = 2  # the most pieces that `clutter` adds to an image
MAX_SHIFT = 12  # the largest shift of a piece along each axis, in pixels

Move = Callable[[float, Array, Array, Array], tuple[Array, Array]]  # strength, y, x, key
Change = Callable[[float, Array, Array], Array]  # strength, image, key
Rewrite = Callable[[float, Array, Array, Array], Array]  # strength, image, label, key


@dataclass(frozen=True)
class Augmentation:
    """A random operation, drawn independently for each image.

    A geometric operation has `move(strength, y, x, key) -> (y, x)`: it maps output pixel coordinates `f32[H,W]`,
    relative to the centre of the image, to the coordinates to sample from. All moves share one resampling.
    Any other operation has `change(strength, image, key) -> image`, on `u8[H,W,1]`, or, if it depends on the class,
    `rewrite(strength, image, label, key) -> image`.

    Attributes:
      strength: what the strength in the config means, with its unit.
      high: the largest strength; the smallest is 0, which turns the operation off.
      open_high: `high` itself is not allowed.
      whole: the strength is an integer.
      classes: label -> class name, if the operation applies only to these labels; datasets that name them differently
        are refused.
    """

    strength: str
    high: float
    move: Move | None = None
    change: Change | None = None
    rewrite: Rewrite | None = None
    open_high: bool = False
    whole: bool = False
    classes: Mapping[int, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if sum(operation is not None for operation in (self.move, self.change, self.rewrite)) != 1:
            raise ValueError("an Augmentation has one of move, change and rewrite")


def shift(pixels: float, y: Array, x: Array, key: Array) -> tuple[Array, Array]:
    """Shifts by whole pixels, drawn independently for each axis."""
    drawn = _drawn_shift(pixels, key)
    return y + drawn[0], x + drawn[1]


def rotate(degrees: float, y: Array, x: Array, key: Array) -> tuple[Array, Array]:
    """Rotates around the centre."""
    angle = _symmetric(key, np.deg2rad(degrees))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return cos * y - sin * x, sin * y + cos * x


def scale(share: float, y: Array, x: Array, key: Array) -> tuple[Array, Array]:
    """Scales around the centre."""
    size = 1.0 + _symmetric(key, share)
    return y / size, x / size


def shear(degrees: float, y: Array, x: Array, key: Array) -> tuple[Array, Array]:
    """Shears: shifts each row sideways in proportion to its distance from the centre."""
    return y, x + jnp.tan(_symmetric(key, np.deg2rad(degrees))) * y


def elastic(pixels: float, y: Array, x: Array, key: Array) -> tuple[Array, Array]:
    """Displaces pixels by grid noise interpolated with B-splines (elastic: Simard, Steinkraus and Platt, 2003)."""
    basis = _spline_basis(*y.shape)
    noise = jax.random.normal(key, (2, len(basis)))
    field = pixels * (noise @ basis).reshape(2, *y.shape)
    y, x = jax.lax.optimization_barrier((y + field[0], x + field[1]))  # or XLA:CPU repeats the product for each use
    return y, x


def stroke(share: float, image: Array, key: Array) -> Array:
    """Thickens or thins strokes: blends the image with the maximum or minimum of each 3x3 neighbourhood."""
    amount = _symmetric(key, share)
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    extremes = []
    for extreme in (jnp.maximum, jnp.minimum):
        rows = extreme(extreme(padded[:-2], padded[1:-1]), padded[2:])
        extremes.append(extreme(extreme(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]))
    target = jnp.where(amount > 0, extremes[0], extremes[1]).astype(jnp.float32)
    return jnp.round(image + jnp.abs(amount) * (target - image)).astype(image.dtype)


def erase(pixels: float, image: Array, key: Array) -> Array:
    """Erases a square around a random pixel, clipped at the border (cutout: DeVries and Taylor, 2017)."""
    height, width = image.shape[:2]
    middle = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    corner = middle - int(pixels) // 2
    rows, columns = (jnp.arange(n) - corner[axis] for axis, n in enumerate((height, width)))
    inside = ((rows >= 0) & (rows < pixels))[:, None] & ((columns >= 0) & (columns < pixels))[None, :]
    return jnp.where(inside[..., None], jnp.zeros_like(image), image)


def clutter(pixels: float, image: Array, key: Array) -> Array:
    """Adds mirrored or rotated pieces of the digit's own strokes, like stray marks around a digit on a form.

    Each piece is a square around a random pixel, added at a random place with probability 1/2; where it overlaps the
    digit, the lighter pixel is kept. Mnih et al. (2014) trained on MNIST cluttered with pieces of other digits.
    """
    size = jnp.array(image.shape[:2])
    result = image
    for piece_key in jax.random.split(key, MAX_PIECES):
        at, to, turn = jax.random.split(piece_key, 3)
        middle = jax.random.randint(at, (2,), 0, size)
        rows, columns = (jnp.abs(jnp.arange(n) - middle[axis]) <= pixels / 2 for axis, n in enumerate(image.shape[:2]))
        piece = jnp.where((rows[:, None] & columns[None, :])[..., None], image, jnp.zeros_like(image))
        flips = jax.random.bernoulli(turn, shape=(4,))
        piece = jnp.where(flips[0], piece[::-1], piece)
        piece = jnp.where(flips[1], piece[:, ::-1], piece)
        piece = jnp.where(flips[2], piece.transpose(1, 0, 2), piece)
        result = jnp.where(flips[3], jnp.maximum(result, shifted(piece, MAX_SHIFT, to)), result)
    return result


# Rewrites are applied first, then all moves at once, then changes, each in the order below. Moves map output to input
# coordinates, so their effects on the image come in the reverse order.
AUGMENTATIONS: dict[str, Augmentation] = {
    "pens": Augmentation("share of ones and sevens rewritten with a flag or a bar", 1, rewrite=pens, classes=CLASSES),
    "elastic": Augmentation("sd of the displacement, in pixels", 10, move=elastic),
    "shear": Augmentation("largest slant, in degrees", 90, move=shear, open_high=True),
    "rotate": Augmentation("largest angle, in degrees", 180, move=rotate),
    "scale": Augmentation("largest change of size, as a share", 1, move=scale, open_high=True),
    "shift": Augmentation("largest shift, in whole pixels", 27, move=shift, whole=True),
    "stroke": Augmentation(
        "largest weight of the 3x3 maximum (thicker) or minimum (thinner), blended into the image", 1, change=stroke
    ),
    "clutter": Augmentation(
        "side of the added pieces of strokes, in pixels, rounded up to an odd number", 28, change=clutter, whole=True
    ),
    "erase": Augmentation("side of the blanked square, in pixels", 28, change=erase, whole=True),
}


@dataclass(frozen=True, init=False)
class AugmentConfig:
    """One field for each entry of `AUGMENTATIONS`: the strength of the operation; 0 turns it off.

    Attributes:
      strengths: name and strength of each enabled operation, in the order of `AUGMENTATIONS`.
    """

    strengths: tuple[tuple[str, float], ...]

    def __init__(self, **strengths: float) -> None:
        if unknown := strengths.keys() - AUGMENTATIONS.keys():
            raise TypeError(f"no such augmentation: {', '.join(sorted(unknown))}")
        on = tuple((name, strengths[name]) for name in AUGMENTATIONS if strengths.get(name))
        object.__setattr__(self, "strengths", on)

    def __getattr__(self, name: str) -> float:
        if name not in AUGMENTATIONS:
            raise AttributeError(name)
        return self.to_dict()[name]

    def to_dict(self) -> dict[str, float]:
        """Returns all strengths by name."""
        on = dict(self.strengths)
        return {name: on.get(name, kind(0)) for name, kind in self.field_types().items()}

    def entries(self) -> tuple[Augmentation, ...]:
        """Returns the enabled operations."""
        return tuple(AUGMENTATIONS[name] for name, _ in self.strengths)

    @staticmethod
    def field_types() -> dict[str, type]:
        """Returns the type of each field.

        Raises:
          ConfigError: an entry is not an `Augmentation`.
        """
        for message in of_type("AUGMENTATIONS", AUGMENTATIONS, Augmentation):
            raise ConfigError(message)
        return {name: int if entry.whole else float for name, entry in AUGMENTATIONS.items()}

    def check(self, class_names: Sequence[str]) -> Iterator[str]:
        """Yields a message for each strength that is out of range, or whose operation does not fit these classes."""
        for name, strength in self.strengths:
            entry = AUGMENTATIONS[name]
            if any(class_names[label : label + 1] != (wanted,) for label, wanted in entry.classes.items()):
                wanted = ", ".join(entry.classes.values())
                yield f"config.augment.{name} = {strength}: must be 0 for a dataset without the classes {wanted}"
            yield from within(f"augment.{name}", strength, 0, entry.high, open_high=entry.open_high)


def augment(config: AugmentConfig, images: Array, labels: Array, key: Array) -> Array:
    """Augments each image of a batch independently, `u8[B,H,W,1], i32[B] -> u8[B,H,W,1]`.

    Args:
      config: the strengths.
      images: background pixels are 0, and so are pixels that come from outside the image.
      labels: their classes.
      key: the step's key. An image's random numbers depend on its index in the batch, not on other images or devices.
    """
    if not config.strengths:
        return images
    keys = rng.per_example(key, len(images))
    return jax.vmap(functools.partial(distort, dict(config.strengths)))(images, labels, keys)


def distort(strengths: dict[str, float], image: Array, label: Array, key: Array) -> Array:
    """Applies the operations with these strengths to one image, `u8[H,W,1], i32[] -> u8[H,W,1]`."""
    for name, strength in strengths.items():
        if rewrite := AUGMENTATIONS[name].rewrite:
            image = _changed(name, rewrite, strength, image, label, _key(key, name))
    moves = {name for name in strengths if AUGMENTATIONS[name].move}
    if moves == {"shift"}:
        image = shifted(image, strengths["shift"], _key(key, "shift"))
    elif moves:
        image = resampled(image, *source(strengths, (image.shape[0], image.shape[1]), key))
    for name, strength in strengths.items():
        if change := AUGMENTATIONS[name].change:
            image = _changed(name, change, strength, image, _key(key, name))
    return image


def _changed(name: str, operation: Callable[..., Array], strength: float, image: Array, *arguments: Array) -> Array:
    with naming_the_line(f"config.augment.{name}", operation):
        changed = operation(strength, image, *arguments)
        if (changed.shape, changed.dtype) != (image.shape, image.dtype):
            raise ConfigError(
                f"config.augment.{name}: returns {changed.dtype}{list(changed.shape)} for an image of"
                f" {image.dtype}{list(image.shape)}; shape and type must stay the same"
            )
    return changed


def source(strengths: dict[str, float], shape: tuple[int, int], key: Array) -> tuple[Array, Array]:
    """Returns the coordinates to sample each output pixel from, rows and columns `f32[H,W]`, for all moves combined."""
    middle = [(n - 1) / 2 for n in shape]
    y, x = jnp.meshgrid(*(jnp.arange(n) - m for n, m in zip(shape, middle, strict=True)), indexing="ij")
    for name, strength in strengths.items():
        if move := AUGMENTATIONS[name].move:
            with naming_the_line(f"config.augment.{name}", move):
                y, x = move(strength, y, x, _key(key, name))
                if not y.shape == x.shape == shape:
                    raise ConfigError(f"config.augment.{name}: returns coordinates of shapes {y.shape} and {x.shape}")
    return y + middle[0], x + middle[1]


def resampled(image: Array, y: Array, x: Array) -> Array:
    """Samples `u8[H,W,1]` bilinearly at the coordinates `f32[H,W]`; pixels outside are 0.

    The four neighbours of a point are packed into one 32-bit word, so one gather replaces four. The barriers keep
    XLA:CPU from recomputing indices and words for each pixel. Shift, rotation, scale and shear of 128 images take
    0.55 ms on one core (with `jax.scipy.ndimage.map_coordinates`: 1.2 ms on jax 0.12, 0.46 ms on jax 0.10).
    """
    height, width = image.shape[:2]
    y, x = jnp.clip(y, -1, height) + 1, jnp.clip(x, -1, width) + 1  # as coordinates in the padded image
    top, left = jnp.minimum(y.astype(jnp.int32), height), jnp.minimum(x.astype(jnp.int32), width)
    padded = jnp.pad(image[..., 0].astype(jnp.int32), 1)
    words = padded[:-1, :-1] | padded[:-1, 1:] << 8 | padded[1:, :-1] << 16 | padded[1:, 1:] << 24
    words, index, below, right = jax.lax.optimization_barrier((words, top * (width + 1) + left, y - top, x - left))
    word = jax.lax.optimization_barrier(words.reshape(-1).at[index].get(mode="promise_in_bounds"))
    corners = [(word >> bits & 255).astype(jnp.float32) for bits in (0, 8, 16, 24)]
    upper = corners[0] + (corners[1] - corners[0]) * right
    lower = corners[2] + (corners[3] - corners[2]) * right
    grey: Array = jax.lax.optimization_barrier(jnp.round(upper + (lower - upper) * below).astype(image.dtype))
    return grey[..., None]


def shifted(image: Array, pixels: float, key: Array) -> Array:
    """Shifts by whole pixels without interpolation: the same result as `resampled`, but faster."""
    limit = int(pixels)
    padded = jnp.pad(image, ((limit, limit), (limit, limit), (0, 0)))
    return jax.lax.dynamic_slice(padded, (*(_drawn_shift(limit, key) + limit), 0), image.shape)


def _key(key: Array, name: str) -> Array:
    """Returns the key of one operation on one image; shift derives it differently so that old results stay the same."""
    return jax.random.split(key)[0] if name == "shift" else rng.stream(key, name)


def _drawn_shift(pixels: float, key: Array) -> Array:
    return jax.random.randint(key, (2,), -int(pixels), int(pixels) + 1)


def _symmetric(key: Array, limit: float) -> Array:
    """Draws uniformly from -limit to limit."""
    return limit * jax.random.uniform(key, minval=-1.0)


@functools.cache
def _spline_basis(height: int, width: int, spacing: float = 9.0) -> NDArray[np.float32]:
    """Returns the weight of each grid point at each pixel, `f32[G,H*W]`, scaled to keep the variance of the noise."""

    def weights(size: int) -> NDArray[np.float64]:
        knots = np.arange(-1, np.ceil((size - 1) / spacing) + 2) * spacing
        t = np.abs(np.arange(size)[:, None] - knots) / spacing
        spline = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
        return spline / np.linalg.norm(spline, axis=1, keepdims=True)

    rows, columns = weights(height), weights(width)
    basis = np.einsum("yg,xk->gkyx", rows, columns).reshape(rows.shape[1] * columns.shape[1], -1)
    return basis.astype(np.float32)
