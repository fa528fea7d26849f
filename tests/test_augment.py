"""Random distortions: what they draw, and what they do to an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax import rng
from mnist_flax.config import AugmentConfig
from mnist_flax.data.augment import augment, distort, random_affine
from mnist_flax.data.splits import Examples

KEY = rng.root_key(0)


def test_no_distortion_leaves_the_images_alone(examples: Examples) -> None:
    images = jnp.asarray(examples.image[:4])
    assert augment(AugmentConfig(), images, KEY) is images


def test_a_shift_moves_whole_pixels_and_brings_in_paper(examples: Examples) -> None:
    image = np.asarray(examples.image[0])
    seen = set()
    for i in range(60):
        key = jax.random.fold_in(KEY, i)
        dy, dx = (int(pixels) for pixels in random_affine(AugmentConfig(shift=2), key)[1])
        seen.add((dy, dx))
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        expected = padded[2 + dy : 30 + dy, 2 + dx : 30 + dx]
        np.testing.assert_array_equal(distort(AugmentConfig(shift=2), jnp.asarray(image), key), expected)
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == {-2, -1, 0, 1, 2}


def test_resampling_at_whole_pixels_equals_the_shift(examples: Examples) -> None:
    # A rotation so small that it moves no pixel takes the other path.
    image = jnp.asarray(examples.image[1])
    for i in range(5):
        key = jax.random.fold_in(KEY, i)
        shifted = distort(AugmentConfig(shift=3), image, key)
        np.testing.assert_array_equal(distort(AugmentConfig(shift=3, rotate=1e-6), image, key), shifted)


def at_the_limit(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Makes every uniform draw the same."""
    monkeypatch.setattr("jax.random.uniform", lambda key, shape, minval: jnp.full(shape, value))


def test_a_quarter_turn_is_exact(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_limit(monkeypatch, 1.0)
    image = jnp.asarray(examples.image[2])
    turned = np.asarray(distort(AugmentConfig(rotate=90.0), image, KEY))[..., 0].astype(int)
    matches = [np.abs(turned - np.rot90(image[..., 0].astype(int), k)).max() <= 1 for k in (1, -1)]
    assert sorted(matches) == [False, True]  # one of the two directions, up to the rounding of grey values


def test_scale_and_shear_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    square = np.zeros((28, 28, 1), np.uint8)
    square[9:19, 9:19] = 255  # 10 x 10, in the middle
    at_the_limit(monkeypatch, 1.0)
    larger = np.asarray(distort(AugmentConfig(scale=0.4), jnp.asarray(square), KEY)).astype(float)
    assert larger.sum() / square.sum() == pytest.approx(1.4**2, rel=0.02)
    sheared = np.asarray(distort(AugmentConfig(shear=30.0), jnp.asarray(square), KEY)).astype(float)
    assert sheared.sum() / square.sum() == pytest.approx(1.0, rel=0.02)
    rows = sheared[..., 0].sum(axis=1)
    middle = (sheared[..., 0] * np.arange(28)).sum(axis=1)[rows > 0] / rows[rows > 0]
    assert abs(np.diff(middle).mean()) == pytest.approx(np.tan(np.deg2rad(30)), rel=0.1)


def test_an_image_is_distorted_in_its_own_way_whatever_the_batch(examples: Examples) -> None:
    config = AugmentConfig(shift=2, rotate=10.0, scale=0.1, shear=5.0)
    images = jnp.repeat(jnp.asarray(examples.image[:1]), 8, axis=0)
    out = augment(config, images, KEY)
    assert out.dtype == jnp.uint8
    assert out.shape == images.shape
    assert len({np.asarray(image).tobytes() for image in out}) == 8
    np.testing.assert_array_equal(augment(config, images[:3], KEY), out[:3])


def test_draws_stay_within_their_limits() -> None:
    config = AugmentConfig(rotate=20.0, scale=0.2)
    for i in range(50):
        matrix, shift = random_affine(config, jax.random.fold_in(KEY, i))
        size = 1 / np.sqrt(np.linalg.det(np.asarray(matrix)))
        angle = np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0]))
        assert 0.8 <= size <= 1.2
        assert abs(angle) <= 20
        assert not np.asarray(shift).any()
