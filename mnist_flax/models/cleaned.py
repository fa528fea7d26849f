"""A plain convolutional network that first cleans its image: it removes specks and anything wider than a stroke."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from mnist_flax.models.cnn import CNN, CNNConfig

WINDOW = 9  # pixels; few strokes in MNIST are as wide
MIN_PEAK = 0.1  # the contrast is stretched by at most 1 / MIN_PEAK, so that faint noise does not become white


@dataclass(frozen=True, kw_only=True)
class CleanedCNNConfig(CNNConfig):
    """A `cnn` that first cleans its images: it removes specks and the background, and stretches the contrast."""

    def seen_size(self, size: int) -> int:
        """Returns the full size: the cleaning reads the whole image."""
        return size

    def check(self, size: int) -> Iterator[str]:
        """Yields a message for each invalid value."""
        yield from super().check(size)
        if self.pixel_mean:
            yield f"config.model.pixel_mean = {self.pixel_mean}: must be 0: the background is subtracted"

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        """Builds the network."""
        return CleanedCNN(self, num_classes, train)


class CleanedCNN(CNN):
    """The network of a `CleanedCNNConfig`; its parameters are those of a `CNN`."""

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps scaled pixels to logits, `f32[B,H,W,1] -> f32[B,C]`."""
        return super().__call__(cleaned(x), mask)


def cleaned(x: Array) -> Array:
    """Removes specks and the background, smooths, and stretches the contrast to [0, 1], `f32[B,H,W,1] -> f32[B,H,W,1]`.

    Clean digits change little. The background is the greyscale morphological opening with a square of 9x9 pixels, and
    the image minus its opening is called the white top-hat.
    """
    x = despeckled(x)
    background = x
    for sign in (-1, 1):  # the minimum over the window, then the maximum
        rows = nn.max_pool(sign * background, (WINDOW, 1), padding="SAME")
        background = sign * nn.max_pool(rows, (1, WINDOW), padding="SAME")
    ink = x - background
    ink = blurred(ink)
    return ink / jnp.maximum(ink.max((1, 2, 3), keepdims=True), MIN_PEAK)


def blurred(x: Array) -> Array:
    """Averages each pixel's 3x3 neighbourhood with the weights 1, 2, 1 along each axis, padding with black."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 16


def despeckled(x: Array) -> Array:
    """Clips each pixel to between the third smallest and the third largest value of its 3x3 neighbourhood."""
    height, width = x.shape[1:3]
    x = jnp.concatenate([x[:, :1], x, x[:, -1:]], axis=1)
    x = jnp.concatenate([x[:, :, :1], x, x[:, :, -1:]], axis=2)
    low, middle, high = _sorted(*(x[:, i : i + height] for i in range(3)))
    # The values of a neighbourhood, sorted along columns and then along rows: a1 a2 a3 / b1 b2 b3 / c1 c2 c3.
    # a1 is the smallest; the next two are among a2, a3, b1 and c1. The largest values mirror this.
    (_, a2, a3), (b1, _, b3), (c1, c2, _) = (
        _sorted(*(row[:, :, i : i + width] for i in range(3))) for row in (low, middle, high)
    )
    third_smallest = jnp.minimum(jnp.maximum(a2, b1), jnp.minimum(a3, c1))
    third_largest = jnp.maximum(jnp.minimum(c2, b3), jnp.maximum(c1, a3))
    return jnp.clip(x[:, 1:-1, 1:-1], third_smallest, third_largest)


def _sorted(a: Array, b: Array, c: Array) -> tuple[Array, Array, Array]:
    """Sorts three arrays elementwise."""
    a, b = jnp.minimum(a, b), jnp.maximum(a, b)
    b, c = jnp.minimum(b, c), jnp.maximum(b, c)
    return jnp.minimum(a, b), jnp.maximum(a, b), c
