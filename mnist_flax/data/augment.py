"""Random distortions of training images, drawn and applied on the device."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates

from mnist_flax import rng
from mnist_flax.checks import within
from mnist_flax.data.registry import IMAGE_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random distortions of training images, each drawn uniformly between minus and plus its value; 0 means none.

    Attributes:
      shift: whole pixels, in x and in y.
      rotate: degrees.
      scale: fraction of the size (0.1: between 0.9 and 1.1 times).
      shear: degrees.
    """

    shift: int = 0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def check(self) -> Iterator[str]:
        """Yields a message for each wrong value."""
        yield from within("augment.shift", self.shift, 0, IMAGE_SIZE - 1)
        yield from within("augment.rotate", self.rotate, 0, 180)
        yield from within("augment.scale", self.scale, 0, 1, open_high=True)
        yield from within("augment.shear", self.shear, 0, 90, open_high=True)


def random_affine(config: AugmentConfig, key: Array) -> tuple[Array, Array]:
    """Draws the map from a pixel of the new image to its place in the old one: `f32[2,2]` and whole pixels `i32[2]`.

    Rows and columns are in the order (y, x), and counted from the middle of the image.
    """
    key_shift, key_rest = jax.random.split(key)
    shift = jax.random.randint(key_shift, (2,), -config.shift, config.shift + 1)
    rotate, scale, shear = jax.random.uniform(key_rest, (3,), minval=-1.0)
    angle = jnp.deg2rad(config.rotate) * rotate
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    shearing = jnp.eye(2).at[1, 0].set(jnp.tan(jnp.deg2rad(config.shear) * shear))
    return rotation @ shearing / (1.0 + config.scale * scale), shift


def distort(config: AugmentConfig, image: Array, key: Array) -> Array:
    """Distorts one image by one resampling, `u8[H,W,1] -> u8[H,W,1]`; what comes in from outside is paper (0)."""
    matrix, shift = random_affine(config, key)
    if not (config.rotate or config.scale or config.shear):
        # Whole pixels need no interpolation: the same values as below, in a seventh of the time on a CPU.
        padded = jnp.pad(image, ((config.shift, config.shift), (config.shift, config.shift), (0, 0)))
        return jax.lax.dynamic_slice(padded, (*(shift + config.shift), 0), image.shape)
    middle_y, middle_x = (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(image.shape[0]) - middle_y, jnp.arange(image.shape[1]) - middle_x, indexing="ij")
    old_y = matrix[0, 0] * y + matrix[0, 1] * x + middle_y + shift[0]
    old_x = matrix[1, 0] * y + matrix[1, 1] * x + middle_x + shift[1]
    values = map_coordinates(image[..., 0].astype(jnp.float32), [old_y, old_x], order=1)
    return jnp.round(values).astype(image.dtype)[..., None]


def augment(config: AugmentConfig, images: Array, key: Array) -> Array:
    """Distorts each image of a batch in its own way, `u8[B,H,W,1] -> u8[B,H,W,1]`."""
    if config == AugmentConfig():
        return images
    keys = rng.per_example(key, len(images))
    return jax.vmap(distort, in_axes=(None, 0, 0))(config, images, keys)
