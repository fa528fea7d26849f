"""Framing: other digits are scaled and placed as MNIST places its digits."""

import gzip

import numpy as np
import pytest
from idx_files import real_folder

from mnist_flax.data.embedded import embedded_digits
from mnist_flax.data.framing import BOX_SIZE, CENTRE, frame

pytestmark = pytest.mark.smoke


def offsets(images: np.ndarray) -> np.ndarray:
    """Distances of the centres of mass from (14, 14), rows and columns, `u8[N,28,28] -> f64[N,2]`."""
    mass = images.astype(np.float64)
    total = mass.sum(axis=(1, 2))
    return np.stack([mass.sum(axis=3 - axis) @ np.arange(28) / total - CENTRE for axis in (1, 2)], axis=1)


def longer_sides(images: np.ndarray) -> np.ndarray:
    """The longer side of each ink bounding box, `u8[N,28,28] -> i64[N]`."""
    return np.array([max(np.ptp(np.flatnonzero(image.any(axis=axis))) + 1 for axis in (0, 1)) for image in images])


def test_frame_scales_a_square_to_the_box() -> None:
    square = np.zeros((40, 60), np.uint8)
    square[5:15, 7:17] = 200
    expected = np.zeros((28, 28), np.uint8)
    expected[4:24, 4:24] = 255  # its centre of mass can be at 13.5 or 14.5; the smaller is used
    np.testing.assert_array_equal(frame(square), expected)


def test_frame_keeps_the_aspect_ratio() -> None:
    bar = np.zeros((40, 60), np.uint8)
    bar[5:15, 7:9] = 255
    expected = np.zeros((28, 28), np.uint8)
    expected[4:24, 12:16] = 255
    np.testing.assert_array_equal(frame(bar), expected)


def test_frame_stays_inside_the_image() -> None:
    heavy_top = np.full((20, 20), 1, np.uint8)
    heavy_top[:2] = 255  # its centre of mass would move the box past the lower edge
    assert frame(heavy_top)[8:].any(axis=1).all()


def test_frame_stretches_faint_ink() -> None:
    dot = np.zeros((9, 9), np.uint8)
    dot[3, 3] = 1
    assert frame(dot).max() == 255


def test_frame_without_ink_is_black() -> None:
    for shape in ((9, 5), (28, 28), (1, 1)):
        assert not frame(np.zeros(shape, np.uint8)).any()
    far_apart = np.zeros((500, 500), np.uint8)
    far_apart[0, 0] = far_apart[-1, -1] = 1  # scaling down leaves nothing of it
    assert not frame(far_apart).any()


def test_frame_leaves_a_framed_digit_alone() -> None:
    for image in embedded_digits()[1].image[..., 0]:
        np.testing.assert_array_equal(frame(image), image)


def test_embedded_digits_are_framed_like_mnist() -> None:
    images = np.concatenate([split.image for split in embedded_digits()])[..., 0]
    assert np.median(images) == 0  # white on black
    assert (images.max(axis=(1, 2)) == 255).all()
    assert (longer_sides(images) == BOX_SIZE).all()
    assert abs(offsets(images)).max() <= 0.51  # placed to the nearest pixel


def test_mnist_is_framed_as_the_docstring_of_frame_says() -> None:
    content = gzip.decompress((real_folder("mnist") / "train-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
    distance = offsets(images)
    np.testing.assert_allclose(distance.mean(axis=0) + CENTRE, [13.996, 14.007], atol=5e-4)
    np.testing.assert_allclose(distance.std(axis=0), 0.29, atol=5e-3)
    assert (abs(distance).max(axis=1) <= 0.5).sum() == 59_998
    assert (longer_sides(images) == BOX_SIZE).sum() == 59_987
    brightest = images.max(axis=(1, 2))
    assert brightest.min() == 254
    assert round(float((brightest == 255).mean()), 3) == 0.9
