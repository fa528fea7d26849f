"""Pictures: digits in any file are framed as in MNIST. The tests draw digits with lines, so no dataset is needed."""

import numpy as np
import pytest
from drawings import Array, difference, draw, encode, only
from PIL import Image, ImageDraw

from mnist_flax.pictures import blobs, lines
from mnist_flax.pictures import decode as decode_lib
from mnist_flax.pictures.decode import PictureError, decode
from mnist_flax.pictures.segment import find_digits, read_digits


@pytest.fixture(scope="module")
def wanted() -> Array:
    return only(encode(draw("L"))).image


def test_digit_is_framed_as_in_mnist(wanted: Array) -> None:
    rows, columns = np.flatnonzero(wanted.any(1)), np.flatnonzero(wanted.any(0))
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    mass = wanted / wanted.sum()
    assert abs((mass.sum(1) @ np.arange(28)) - 14) <= 0.6
    assert abs((mass.sum(0) @ np.arange(28)) - 14) <= 0.6
    assert wanted.dtype == np.uint8
    assert wanted.max() == 255
    assert len(np.unique(only(encode(draw("7"))).image)) > 10  # anti-aliased


def test_box_is_where_the_digit_is() -> None:
    left, top, right, bottom = only(encode(draw("L"))).box
    np.testing.assert_allclose([left, top, right, bottom], [70, 50, 125, 155], atol=8)
    large = only(encode(draw("L", size=1000, width=100))).box
    np.testing.assert_allclose(large, [700, 500, 1250, 1550], atol=80)


def test_box_lies_within_the_picture_at_its_original_size() -> None:
    picture = np.full((3001, 4000), 255, np.uint8)
    picture[2000:, 1900:2100] = 0
    assert only(encode(picture)).box[3] == 3001


# Formats and modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", decode_lib.FORMATS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_digit_is_the_same_in_every_file_format(wanted: Array, kind: str, mode: str) -> None:
    assert difference(only(encode(Image.fromarray(draw("L")).convert(mode), kind)).image, wanted) < 3


def modes() -> dict[str, Image.Image]:
    grey = draw("L")
    image = Image.fromarray(grey)
    alpha = Image.fromarray(255 - grey)
    black, white = Image.new("L", image.size, 0), Image.new("L", image.size, 255)
    palette = image.convert("RGB").quantize(16)
    return {
        "1": image.convert("1"),
        "P": palette,
        "LA over white": Image.merge("LA", [black, alpha]),
        "RGBA over white": Image.merge("RGBA", [black, black, black, alpha]),
        "RGBA opaque": image.convert("RGBA"),
        "white ink on nothing": Image.merge("RGBA", [white, white, white, alpha]),
        "nearly white ink on nothing": Image.merge("RGBA", [Image.new("L", image.size, 250)] * 3 + [alpha]),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "12 bits in 16": Image.fromarray(grey.astype(np.uint16) * 16),
    }


@pytest.mark.parametrize("name", modes())
def test_digit_is_the_same_in_every_mode(wanted: Array, name: str) -> None:
    image = modes()[name]
    assert difference(only(encode(image)).image, wanted) < 3


def test_white_level_follows_the_bits_in_use() -> None:
    for bits in (8, 10, 12, 16):
        deep = draw("L").astype(np.uint16) << (bits - 8)
        assert decode(encode(deep)).grey.max() >= 254


def test_floating_point_tiff_is_read_unless_it_has_nan(wanted: Array) -> None:
    assert difference(only(encode(draw("L").astype(np.float32) / 255, "TIFF")).image, wanted) < 3
    with pytest.raises(PictureError, match="finite"):
        read_digits(encode(np.full((9, 9), np.nan, np.float32), "TIFF"))


def test_cmyk_jpeg_is_read(wanted: Array) -> None:
    assert difference(only(encode(Image.fromarray(draw("L")).convert("CMYK"), "JPEG")).image, wanted) < 3


def test_palette_with_transparency_is_read(wanted: Array) -> None:
    # All colours are black; only transparency separates ink from paper.
    image = Image.fromarray((draw("L") < 128).astype(np.uint8)).convert("P")
    image.putpalette([0] * 768)
    assert difference(only(encode(image, "GIF", transparency=0)).image, wanted) < 6
    assert difference(only(encode(image, "PNG", transparency=bytes([0, 255]))).image, wanted) < 6


def test_first_frame_is_read(wanted: Array) -> None:
    frames = [Image.fromarray(draw("L")), Image.fromarray(draw("7"))]
    for kind in ("GIF", "TIFF", "WEBP"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert difference(only(content).image, wanted) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(wanted: Array, orientation: int, kind: str) -> None:
    transpose = Image.Transpose
    undo = {
        2: transpose.FLIP_LEFT_RIGHT, 3: transpose.ROTATE_180, 4: transpose.FLIP_TOP_BOTTOM, 5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90, 7: transpose.TRANSVERSE, 8: transpose.ROTATE_270,
    }  # fmt: skip
    image = Image.fromarray(draw("L"))
    stored = image.transpose(undo[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    digit = only(encode(stored, kind, exif=exif))
    assert difference(digit.image, wanted) < 3
    np.testing.assert_allclose(digit.box, [70, 50, 125, 155], atol=8)


# Polarity, size, paper ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1", "7", "L"])
def test_dark_and_light_ink_give_the_same_digit(name: str) -> None:
    dark, light = (only(encode(image)).image for image in (draw(name), 255 - draw(name)))
    assert difference(dark, light) < 0.5


@pytest.mark.parametrize("size", [20, 50, 200, 600])
def test_digit_is_the_same_at_any_size(wanted: Array, size: int) -> None:
    assert difference(only(encode(draw("L", size, max(2, size // 10)))).image, wanted) < 12


def test_thin_strokes_do_not_fade() -> None:
    thin = only(encode(draw("L", size=400, width=3))).image
    assert thin.max() == 255
    assert (thin > 128).sum() > 40


def test_ink_may_touch_the_border() -> None:
    grey = draw("7")[50:155, 65:140]
    assert grey.min(axis=0)[0] == 255 or grey[0].min() == 0
    assert difference(only(encode(grey)).image, only(encode(draw("7"))).image) < 10


def test_uneven_light_noise_and_shadow_do_not_change_the_digit(wanted: Array) -> None:
    grey = draw("L", 200, 20).astype(float)
    light = np.linspace(1.0, 0.4, 400)[None, :] * np.where(np.arange(400) > 230, 0.7, 1.0)[:, None]
    noisy = (60 + grey * 0.7) * light + np.random.default_rng(0).normal(0, 5, grey.shape)
    photo = np.clip(noisy, 0, 255).astype(np.uint8)
    assert difference(only(encode(photo)).image, wanted) < 12


@pytest.mark.parametrize("squared", [False, True])
def test_ruled_lines_are_removed(wanted: Array, squared: bool) -> None:
    grey = draw("L", 200, 22).copy()
    for place in range(35, 400, 70):
        grey[place : place + 3] = np.minimum(grey[place : place + 3], 90)
        if squared:
            grey[:, place : place + 3] = np.minimum(grey[:, place : place + 3], 90)
    assert difference(only(encode(grey)).image, wanted) < 12


@pytest.mark.parametrize("margin", [0, 3, 30])
def test_straight_one_as_tall_as_its_picture_is_no_ruled_line(margin: int) -> None:
    row = np.hstack([draw(name, 110, 16)[55:165, 50:170] for name in "417"])
    digits = read_digits(encode(np.pad(row, margin, constant_values=255)))
    assert [digit.suspect for digit in digits] == [False] * 3


def test_ruled_line_as_thick_as_the_pen_is_removed(wanted: Array) -> None:
    grey = draw("L").copy()
    grey[:, 20:30] = 0
    assert difference(only(encode(grey)).image, wanted) < 1


@pytest.mark.parametrize("turn", [0, 10, 35])
@pytest.mark.parametrize(("width", "height"), [(70, 90), (80, 80), (95, 85)])
def test_a_zero_in_thick_strokes_is_not_taken_for_a_printed_box(width: int, height: int, turn: int) -> None:
    image = Image.new("L", (160, 160))
    left, top = 80 - width // 2, 80 - height // 2
    ImageDraw.Draw(image).ellipse((left, top, left + width, top + height), outline=255, width=10)
    digit = only(encode(np.asarray(image.rotate(turn, Image.Resampling.BICUBIC))))
    assert not digit.suspect
    assert (digit.image[12:16, 12:16] == 0).all()
    assert min(digit.box[2] - digit.box[0], digit.box[3] - digit.box[1]) > 60


@pytest.mark.parametrize("speck", [(4, 4), (10, 10), (18, 2), (1, 50)])
def test_specks_are_no_digits(wanted: Array, speck: tuple[int, int]) -> None:
    grey = draw("L").copy()
    for row, column in ((10, 10), (10, 140), (180, 60), (110, 10)):
        grey[row : row + speck[0], column : column + speck[1]] = 0
    assert difference(only(encode(grey)).image, wanted) < 1


# Several digits -------------------------------------------------------------------------------------------------------


def test_strokes_that_do_not_touch_are_one_digit() -> None:
    digit = only(encode(draw("5")))
    np.testing.assert_allclose(digit.box, [70, 47, 135, 150], atol=9)


def test_digits_are_read_line_by_line_from_left_to_right() -> None:
    names = [["7", "L", "1"], ["1", "7", "L"]]
    lines = [np.concatenate([draw(name)[:, 40:160] for name in line], axis=1) for line in names]
    lines[0] = np.roll(lines[0], 25, axis=0)  # the first line is 25 pixels lower
    lines[1] = np.asarray(Image.fromarray(lines[1]).resize((432, 240)))  # and the second is larger
    lines[0] = np.pad(lines[0], ((0, 0), (0, 72)), constant_values=255)
    digits = read_digits(encode(np.concatenate(lines)))
    assert len(digits) == 6
    for digit, name in zip(digits, names[0] + names[1], strict=True):
        assert difference(digit.image, only(encode(draw(name))).image) < 6
    boxes = np.array([digit.box for digit in digits])
    assert (np.diff(boxes[:3, 0]) > 0).all() and (np.diff(boxes[3:, 0]) > 0).all()
    assert boxes[:3, 3].max() < boxes[3:, 1].min() + 60


@pytest.mark.parametrize("rows", [1, 3])
def test_tall_stroke_beside_digits_is_no_digit(rows: int) -> None:
    row = np.hstack([draw(name, 60, 6) for name in "7L4"])
    page = np.pad(np.vstack([row] * rows), ((100, 100), (60, 0)), constant_values=255)
    page[20:-20, 30:37] = 0
    digits = read_digits(encode(page))
    assert len(digits) == 3 * rows
    for digit, name in zip(digits, "7L4" * rows, strict=True):
        assert difference(digit.image, only(encode(draw(name, 60, 6))).image) < 1


def test_two_digits_far_apart_are_not_levelled(wanted: Array) -> None:
    page = np.full((400, 600), 255, np.uint8)
    page[:200, :200] = page[-200:, -200:] = draw("L")
    for digit in read_digits(encode(page)):
        assert difference(digit.image, wanted) < 1


def test_slanting_row_is_read_from_left_to_right() -> None:
    row = np.concatenate([np.roll(draw("7")[:, 40:160], 40 - 18 * i, axis=0) for i in range(5)], axis=1)
    boxes = [digit.box for digit in read_digits(encode(row))]
    assert len(boxes) == 5
    assert boxes == sorted(boxes)


def test_touching_digits_are_cut() -> None:
    one = np.asarray(Image.fromarray(draw("L")[40:160, 70:126]).resize((90, 120)))
    two = np.concatenate([one, one], axis=1)  # the foot of the first touches the stem of the second
    two = np.pad(two, 40, constant_values=255)
    assert len(read_digits(encode(two))) == 2


# Digits that are already framed ---------------------------------------------------------------------------------------


def test_digit_in_mnist_style_is_left_alone(wanted: Array) -> None:
    np.testing.assert_array_equal(only(encode(wanted)).image, wanted)
    np.testing.assert_array_equal(only(encode(255 - wanted)).image, wanted)


def test_digit_in_a_larger_picture_is_framed_alike(wanted: Array) -> None:
    (digit,) = find_digits(np.pad(wanted, 30))
    assert difference(digit.image, wanted) < 3
    large = np.asarray(Image.fromarray(wanted).resize((280, 280), Image.Resampling.BICUBIC))
    assert difference(only(encode(255 - large)).image, wanted) < 12


def test_a_piece_two_pixels_wide_has_no_slope() -> None:
    piece = np.zeros((31, 2), bool)
    piece[15, 1] = True  # the only column of the line lies at x = 0
    assert lines._fitted(piece, 0.0, 15) == (0.0, 15)


def test_a_small_piece_mostly_at_the_edge_of_a_shadow_is_not_a_digit() -> None:
    mask = np.zeros((60, 60), bool)
    mask[10:50, 10:15] = True  # a one
    mask[30:42, 40:43] = mask[39:42, 40:52] = True  # a corner
    nowhere, along_it = np.zeros((60, 60), bool), np.zeros((60, 60), bool)
    along_it[:, 40:] = True
    found = [len(blobs.find_blobs(mask, steps, 4.0)[1]) for steps in (nowhere, along_it)]
    assert found == [2, 1]
