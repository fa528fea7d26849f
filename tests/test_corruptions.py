"""The corruptions of MNIST-C: deterministic, reproducible, and equal to their definitions."""

import functools
import os
import pathlib

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kstest
from skimage.transform import AffineTransform, warp

from mnist_flax.analysis.corruptions import CORRUPTIONS, corrupt, hashed_uniform
from mnist_flax.data.embedded import embedded_digits

GOLDEN = pathlib.Path(__file__).parent / "golden_corruptions.npz"
NAMES = sorted(CORRUPTIONS)


@functools.cache
def digits() -> NDArray[np.uint8]:
    return np.asarray(embedded_digits()[1].image)[:40, :, :, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_depends_on_image_and_index_alone(name: str) -> None:
    index = np.arange(700)
    images = np.resize(digits(), (700, 28, 28))
    together = corrupt(name, images, index)
    assert together.dtype == np.uint8
    for i in (0, 39, 499, 500, 699):
        np.testing.assert_array_equal(corrupt(name, images[[i]], index[[i]])[0], together[i])


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_matches_its_golden_images(name: str) -> None:
    made = corrupt(name, digits()[:4], np.array([0, 1, 947, 9999]))
    if os.environ.get("UPDATE_GOLDEN"):
        stored = golden() if GOLDEN.exists() else {}
        np.savez_compressed(GOLDEN, allow_pickle=False, **(stored | {name: made}))
    difference = made.astype(int) - golden()[name].astype(int)
    assert np.abs(difference).max() <= 1  # rounding may differ between versions of SciPy
    assert np.mean(difference != 0) < 0.01


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("canny_edges", "dotted_line", "zigzag")])
def test_a_higher_severity_changes_an_image_more(name: str) -> None:
    images, index = digits(), np.arange(40)
    changes = [np.abs(corrupt(name, images, index, s).astype(float) - images).mean() for s in (1, 5)]
    if name not in ("glass_blur", "spatter"):  # by this measure, their published levels do not increase
        assert 0 < changes[0] < changes[1]
    assert all(changes)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_blank_images_can_be_corrupted(name: str) -> None:
    assert corrupt(name, digits()[:0], np.arange(0)).shape == (0, 28, 28)
    for grey in (0, 255):
        draw = functools.partial(hashed_uniform, name, np.arange(1))
        blank = np.full((1, 28, 28), grey, np.uint8)
        assert np.isfinite(CORRUPTIONS[name].apply(blank, draw, CORRUPTIONS[name].levels[-1])).all()


def test_hashed_numbers_are_uniform_and_independent() -> None:
    numbers = hashed_uniform("a name", np.arange(500), 400)
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.01
    other = hashed_uniform("another name", np.arange(500), 400)
    assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < 0.01


@pytest.mark.parametrize(("name", "matrix"), [
    ("rotate", lambda s: [[np.cos(0.4), -s * np.sin(0.4)], [s * np.sin(0.4), np.cos(0.4)]]),
    ("shear", lambda s: [[1, -s * np.sin(0.4)], [0, np.cos(0.4)]]),
    ("scale", lambda s: [[1 / 0.7, 0], [0, 1 / 0.7]]),
])  # fmt: skip
def test_an_affine_corruption_equals_the_warp_of_scikit_image(name: str, matrix: object) -> None:
    assert callable(matrix)
    made, ways = corrupt(name, digits(), np.arange(40)), set()
    for image, result in zip(digits(), made, strict=True):
        for way in (-1, 1):
            full = np.eye(3)
            full[:2, :2] = matrix(way)
            full[:2, 2] = 13.5 - full[:2, :2] @ [13.5, 13.5]
            expected = warp(image.astype(float), AffineTransform(full), order=1)
            if np.abs(result - expected).max() < 0.51:
                ways.add(way)
                break
        else:
            pytest.fail("neither direction")
    assert ways == {-1, 1} or name == "scale"


def test_translate_moves_diagonally_by_whole_pixels() -> None:
    for image, result in zip(digits(), corrupt("translate", digits(), np.arange(40), 2), strict=True):
        moves = [np.roll(image, (y, x), axis=(0, 1)) for y in (-2, 2) for x in (-2, 2)]
        assert any(np.array_equal(result[2:-2, 2:-2], move[2:-2, 2:-2]) for move in moves)


def test_shot_noise_has_the_moments_of_a_poisson_count() -> None:
    grey = np.full((300, 28, 28), 51, np.uint8)  # 0.2 of white
    counts = corrupt("shot_noise", grey, np.arange(300), 1) / 255 * 60
    assert counts.mean() == pytest.approx(12, rel=0.01)
    assert counts.var() == pytest.approx(12, rel=0.03)


def test_impulse_noise_changes_its_share_half_to_white() -> None:
    made = corrupt("impulse_noise", np.full((300, 28, 28), 100, np.uint8), np.arange(300))
    assert np.mean(made == 255) == pytest.approx(0.085, abs=0.003)
    assert np.mean(made == 0) == pytest.approx(0.085, abs=0.003)


def test_blurs_keep_the_amount_of_ink() -> None:
    for name in ("glass_blur", "motion_blur"):
        made = corrupt(name, digits(), np.arange(40))
        assert made.sum() == pytest.approx(digits().sum(), rel=0.03)
        assert made.std() < digits().std()


def test_stripe_and_brightness_are_exact() -> None:
    stripe = corrupt("stripe", digits(), np.arange(40))
    np.testing.assert_array_equal(stripe[:, :, 7:21], digits()[:, :, 7:21])
    np.testing.assert_array_equal(stripe[:, :, :7], 255 - digits()[:, :, :7])
    np.testing.assert_array_equal(stripe[:, :, 21:], 255 - digits()[:, :, 21:])
    brighter = np.minimum(digits() + 127.5, 255)
    assert np.abs(corrupt("brightness", digits(), np.arange(40)) - brighter).max() <= 0.5


def test_fog_is_between_the_faint_digit_and_white_and_smooth() -> None:
    made = corrupt("fog", digits(), np.arange(40)).astype(float)
    brightest = digits().max(axis=(1, 2), keepdims=True) / 255
    faint = digits() * brightest / (brightest + 3)
    fog = made - faint
    assert fog.min() >= -0.51
    assert np.abs(np.diff(fog, axis=2)).mean() < 10 < fog.std()


def test_lines_only_add_light() -> None:
    for name in ("dotted_line", "zigzag"):
        made = corrupt(name, digits(), np.arange(40))
        assert (made >= digits()).all()
        assert 10 < np.mean(made > digits(), axis=(1, 2)).mean() * 784 < 200


def test_spatter_is_mud_of_one_grey() -> None:
    made = corrupt("spatter", np.zeros((40, 28, 28), np.uint8), np.arange(40))
    assert set(np.unique(made)) <= {0, *range(50, 64)}
    assert 0.01 < np.mean(made > 0) < 0.6
