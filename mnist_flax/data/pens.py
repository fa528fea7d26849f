"""Digit shapes that are rare in MNIST, which comes from the United States: ones with flags and feet, barred sevens."""

import jax
import jax.numpy as jnp
from jax import Array

from mnist_flax import rng

CLASSES = {1: "1", 7: "7"}  # the labels that are rewritten, and their names
INK = 128  # a pixel at least this bright belongs to the stroke


def pens(share: float, image: Array, label: Array, key: Array) -> Array:
    """Adds strokes to some ones and sevens as they are written in much of Europe, `u8[H,W,1] -> u8[H,W,1]`.

    With probability `share`, a one gets a flag at its top and, in a third of these cases, a foot; a seven gets a bar
    through its stem. Other labels stay as they are.
    """
    height, width = image.shape[:2]
    grey = image[..., 0].astype(jnp.float32)
    draws = {name: jax.random.uniform(rng.stream(key, name)) for name in ("use", "foot", "length", "angle", "place")}
    rows = jnp.arange(height)
    inked = jnp.any(image[..., 0] >= INK, axis=1)
    top, bottom = jnp.argmax(inked), height - 1 - jnp.argmax(inked[::-1])
    tall = (bottom - top + 1).astype(jnp.float32)

    def column(row: Array) -> Array:
        """Returns the mean column of the ink in a row."""
        weights = jnp.sum(jnp.where(rows == row, grey.T, 0.0), axis=1)
        return jnp.sum(weights * jnp.arange(width)) / jnp.maximum(jnp.sum(weights), 1.0)

    half = jnp.clip(jnp.sum(grey) / 255.0 / tall / 2.0, 0.8, 2.0)  # half the stroke width, as if all ink were one stem
    reach = tall * (0.25 + 0.3 * draws["length"])
    slope = jnp.deg2rad(30.0 + 45.0 * draws["angle"])  # angle between the flag and the vertical
    top_x, bottom_x = column(top), column(bottom)
    flag = _line(grey, (top, top_x), (top + reach * jnp.cos(slope), top_x - reach * jnp.sin(slope)), half)
    foot = _line(grey, (bottom, bottom_x - reach / 2), (bottom, bottom_x + reach / 2), half)
    one = jnp.maximum(flag, jnp.where(draws["foot"] < 1 / 3, foot, 0.0))
    middle = jnp.round(top + tall * (0.4 + 0.25 * draws["place"])).astype(jnp.int32)
    x, tilt = column(middle), reach * (draws["angle"] - 0.5) / 2
    seven = _line(grey, (middle + tilt, x - reach / 2), (middle - tilt, x + reach / 2), half)
    added = jnp.where(label == 1, one, jnp.where(label == 7, seven, 0.0))
    written = jnp.round(jnp.maximum(grey, added)).astype(image.dtype)[..., None]
    return jnp.where((draws["use"] < share) & jnp.any(inked), written, image)


def _line(grey: Array, start: tuple[Array, Array], end: tuple[Array, Array], half: Array) -> Array:
    """Draws a straight stroke between two points (row, column) on black, `f32[H,W]`; `half` is half its width."""
    y, x = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in grey.shape), indexing="ij")
    down, right = end[0] - start[0], end[1] - start[1]
    along = ((y - start[0]) * down + (x - start[1]) * right) / jnp.maximum(down**2 + right**2, 1e-6)
    along = jnp.clip(along, 0.0, 1.0)
    distance = jnp.hypot(y - start[0] - along * down, x - start[1] - along * right)
    return 255.0 * jnp.clip(half + 0.5 - distance, 0.0, 1.0)
