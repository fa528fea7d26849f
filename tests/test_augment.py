"""Augmentation: the random parameters of each operation, and its effect on an image."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.scipy.ndimage import map_coordinates

from mnist_flax import rng
from mnist_flax.data.augment import AUGMENTATIONS, Augmentation, AugmentConfig, augment, distort, resampled, source
from mnist_flax.data.splits import Examples

KEY = rng.root_key(0)
LABELS = jnp.arange(10_000) % 10
LABEL = LABELS[0]
SHAPE = (28, 28)


def strengths(**given: Any) -> AugmentConfig:
    """A config section; operations that are not named are off."""
    return AugmentConfig(**given)


def keys(count: int) -> list[Array]:
    return [jax.random.fold_in(KEY, i) for i in range(count)]


def jit_distort(**strengths: float) -> Callable[..., Array]:
    """Compiles `distort` for an image of the first class and a key."""
    return jax.jit(lambda image, key: distort(strengths, image, LABEL, key))


def sources(count: int, **strengths: float) -> Array:
    """The coordinates to sample from for that many keys, `f32[N,2,H,W]`."""
    return jax.jit(jax.vmap(lambda key: jnp.stack(source(strengths, SHAPE, key))))(jnp.stack(keys(count)))


def test_augment_with_everything_off_returns_the_images(examples: Examples) -> None:
    images = jnp.asarray(examples.image[:4])
    assert augment(strengths(), images, LABELS[: len(images)], KEY) is images


def test_shift_moves_whole_pixels_and_fills_with_background(examples: Examples) -> None:
    image, shift = np.asarray(examples.image[0]), jit_distort(shift=2)
    # Drawn as for the first presets, whose results must stay the same bit for bit.
    draw = jax.jit(lambda key: jax.random.randint(jax.random.split(key)[0], (2,), -2, 3))
    seen = set()
    for key in keys(60):
        dy, dx = np.asarray(draw(key)).tolist()
        seen.add((dy, dx))
        expected = np.pad(image, ((2, 2), (2, 2), (0, 0)))[2 + dy : 30 + dy, 2 + dx : 30 + dx]
        np.testing.assert_array_equal(shift(image, key), expected)
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == {-2, -1, 0, 1, 2}


def test_shift_by_resampling_equals_shift_by_slicing(examples: Examples) -> None:
    by_slicing, by_resampling = jit_distort(shift=3), jit_distort(rotate=1e-6, shift=3)
    for key in keys(5):
        np.testing.assert_array_equal(by_resampling(examples.image[1], key), by_slicing(examples.image[1], key))


def test_resampled_equals_map_coordinates(examples: Examples) -> None:
    image = jnp.asarray(examples.image[3])
    y, x = jax.random.uniform(KEY, (2, *SHAPE), minval=-4.0, maxval=32.0)
    expected = map_coordinates(image[..., 0].astype(jnp.float32), [y, x], order=1)
    assert np.abs(np.asarray(resampled(image, y, x))[..., 0] - np.asarray(expected)).max() <= 0.51


def at_the_limit(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Makes every uniform draw return this value."""
    monkeypatch.setattr("jax.random.uniform", lambda key, minval: jnp.full((), value))


def test_rotate_by_a_quarter_turn_is_exact(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_limit(monkeypatch, 1.0)
    image = jnp.asarray(examples.image[2])
    turned = np.asarray(distort({"rotate": 90.0}, image, LABEL, KEY))[..., 0].astype(int)
    matches = [np.abs(turned - np.rot90(image[..., 0].astype(int), k)).max() <= 1 for k in (1, -1)]
    assert sorted(matches) == [False, True]  # it turns in exactly one direction; grey values may round differently


@pytest.fixture
def square() -> Array:
    """10 x 10 pixels of ink in the middle."""
    return jnp.zeros((28, 28, 1), jnp.uint8).at[9:19, 9:19].set(255)


def test_scale_changes_the_area_and_shear_slants(square: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_limit(monkeypatch, 1.0)
    larger = np.asarray(distort({"scale": 0.4}, square, LABEL, KEY)).astype(float)
    assert larger.sum() / square.sum() == pytest.approx(1.4**2, rel=0.02)
    sheared = np.asarray(distort({"shear": 30.0}, square, LABEL, KEY)).astype(float)
    assert sheared.sum() / square.sum() == pytest.approx(1.0, rel=0.02)
    rows = sheared[..., 0].sum(axis=1)
    middle = (sheared[..., 0] * np.arange(28)).sum(axis=1)[rows > 0] / rows[rows > 0]
    assert abs(np.diff(middle).mean()) == pytest.approx(np.tan(np.deg2rad(30)), rel=0.1)


def test_elastic_moves_smoothly_by_the_given_sd() -> None:
    middle = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"))
    fields = np.asarray(sources(300, elastic=0.7)) - middle
    sd = fields.std(axis=0)
    assert sd.min() > 0.55
    assert sd.max() < 0.85
    assert abs(fields.mean()) < 0.05
    assert np.abs(np.diff(fields, axis=-1)).max() < 0.5  # pixels keep their order


def test_stroke_at_full_strength_is_dilation_or_erosion(square: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    for amount, side in ((1.0, 12), (-1.0, 8), (0.0, 10)):
        at_the_limit(monkeypatch, amount)
        assert (np.asarray(distort({"stroke": 1.0}, square, LABEL, KEY)) == 255).sum() == side**2


def test_clutter_adds_pieces_of_the_image(examples: Examples) -> None:
    image, clutter = examples.image[0], jit_distort(clutter=8)
    added = 0
    for key in jax.random.split(jax.random.key(0), 20):
        changed = np.asarray(clutter(image, key)).astype(int) - image
        assert changed.min() >= 0  # no pixel gets darker
        assert np.count_nonzero(changed) <= 2 * 9 * 9
        added += bool(changed.any())
    assert added > 5
    assert not np.asarray(clutter(np.zeros_like(image), jax.random.key(1))).any()


def test_erase_blanks_one_square(examples: Examples) -> None:
    ink, erase = np.full((28, 28, 1), 255, np.uint8), jit_distort(erase=6)
    for key in keys(20):
        blank = np.argwhere(np.asarray(erase(ink, key))[..., 0] == 0)
        height, width = np.ptp(blank, axis=0) + 1
        assert len(blank) == height * width
        assert max(height, width) <= 6
        assert min(height, width) >= 3


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_entry_changes_images_and_keeps_shape_and_type(name: str, examples: Examples) -> None:
    images = jnp.asarray(examples.image[:8])
    strength = 6 if AUGMENTATIONS[name].whole else 0.9
    changed = jax.jit(functools.partial(augment, strengths(**{name: strength})))
    out = changed(images, np.ones(len(images), np.int32), KEY)
    assert (out.dtype, out.shape) == (images.dtype, images.shape)
    assert (np.asarray(out) != np.asarray(images)).any(axis=(1, 2, 3)).sum() >= 5


def test_augment_depends_on_the_place_in_the_batch_but_not_on_its_size(examples: Examples) -> None:
    config = strengths(shift=2, rotate=10.0, scale=0.1, shear=5.0, elastic=0.5, stroke=0.3, erase=4)
    images = jnp.repeat(jnp.asarray(examples.image[:1]), 8, axis=0)
    augment_all = jax.jit(functools.partial(augment, config))
    out = augment_all(images, LABELS[: len(images)], KEY)
    assert len({np.asarray(image).tobytes() for image in out}) == 8
    np.testing.assert_array_equal(augment_all(images[:3], LABELS[:3], KEY), out[:3])


def test_draws_of_one_operation_do_not_depend_on_the_others() -> None:
    for name in ("rotate", "scale", "elastic"):
        alone, again = np.asarray(sources(1, **{name: 0.3})), np.asarray(sources(1, **{name: 0.3}, shift=2))
        # `shift` moves all pixels alike, so the difference is constant.
        assert np.ptp(again - alone, axis=(0, 2, 3)).max() < 1e-4


def test_rotate_and_scale_stay_within_their_limits() -> None:
    for y, x in np.asarray(sources(50, rotate=20.0, scale=0.2)):
        along = np.array([y[0, 1] - y[0, 0], x[0, 1] - x[0, 0]])  # a step to the right
        assert 0.8 <= 1 / np.linalg.norm(along) <= 1.2
        assert abs(np.rad2deg(np.arctan2(*along))) <= 20


def test_a_new_entry_works_without_other_changes(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    def invert(strength: float, image: Array, key: Array) -> Array:
        return jnp.where(jax.random.uniform(key) < strength, 255 - image, image)

    def mirror(strength: float, y: Array, x: Array, key: Array) -> tuple[Array, Array]:
        return y, jnp.where(jax.random.uniform(key) < strength, -x, x)

    monkeypatch.setitem(AUGMENTATIONS, "invert", Augmentation("probability", 1, change=invert))
    monkeypatch.setitem(AUGMENTATIONS, "mirror", Augmentation("probability", 1, move=mirror))
    images = jnp.asarray(examples.image[:2])
    out = augment(strengths(invert=1.0, mirror=1.0), images, LABELS[: len(images)], KEY)
    np.testing.assert_array_equal(out, 255 - images[:, :, ::-1])


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(TypeError, match="no such augmentation: rotat"):
        AugmentConfig(rotat=10.0)


def test_an_entry_is_one_kind_of_operation() -> None:
    with pytest.raises(ValueError, match="one of move, change and rewrite"):
        Augmentation("nothing", 1)
    with pytest.raises(ValueError, match="one of move, change and rewrite"):
        dataclasses.replace(AUGMENTATIONS["erase"], move=AUGMENTATIONS["shift"].move)
