"""Pictures: from any file to digits as in MNIST. The digits here are drawn with lines, so no dataset is needed."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mnist_flax.pictures import decode as decode_lib
from mnist_flax.pictures import segment as pictures
from mnist_flax.pictures.decode import PictureError, decode
from mnist_flax.pictures.segment import find_digits, read_digits

Array = np.ndarray

# Strokes in a box of 100x100; the last number of a digit's entry is how many strokes do not touch the others.
STROKES: dict[str, list[list[tuple[int, int]]]] = {
    "1": [[(50, 0), (50, 100)]],
    "4": [[(30, 0), (20, 55), (80, 55)], [(65, 20), (65, 100)]],
    "7": [[(20, 5), (80, 5), (40, 100)]],
    "L": [[(25, 0), (25, 100), (75, 100)]],  # no digit, but not symmetric in any way
    "5": [[(45, 22), (30, 45), (70, 60), (60, 95), (25, 95)], [(45, 2), (80, 2)]],
}


def draw(name: str, size: int = 100, width: int = 10) -> Array:
    """Draws black on white, with a margin of half the size: u8[2*size,2*size]."""
    image = Image.new("L", (2 * size, 2 * size), 255)
    for line in STROKES[name]:
        points = [(size / 2 + x * size / 100, size / 2 + y * size / 100) for x, y in line]
        ImageDraw.Draw(image).line(points, fill=0, width=width, joint="curve")
    return np.asarray(image)


def encode(image: Image.Image | Array, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def only(content: bytes) -> pictures.Digit:
    (digit,) = read_digits(content)
    return digit


def difference(one: Array, other: Array) -> float:
    """The mean difference of grey values; two unlike digits differ by 30 and more."""
    return float(np.abs(one.astype(float) - other).mean())


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


# Formats and modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", decode_lib.FORMATS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_formats(wanted: Array, kind: str, mode: str) -> None:
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
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "12 bits in 16": Image.fromarray(grey.astype(np.uint16) * 16),
    }


@pytest.mark.parametrize("name", modes())
def test_modes(wanted: Array, name: str) -> None:
    image = modes()[name]
    assert difference(only(encode(image)).image, wanted) < 3


def test_bits_in_use_tell_white() -> None:
    for bits in (8, 10, 12, 16):
        deep = draw("L").astype(np.uint16) << (bits - 8)
        assert decode(encode(deep)).grey.max() >= 254


def test_floating_point_tiff(wanted: Array) -> None:
    assert difference(only(encode(draw("L").astype(np.float32) / 255, "TIFF")).image, wanted) < 3
    with pytest.raises(PictureError, match="finite"):
        read_digits(encode(np.full((9, 9), np.nan, np.float32), "TIFF"))


def test_cmyk_jpeg(wanted: Array) -> None:
    assert difference(only(encode(Image.fromarray(draw("L")).convert("CMYK"), "JPEG")).image, wanted) < 3


def test_palette_with_transparency(wanted: Array) -> None:
    # All colours are black; only transparency tells ink from paper.
    image = Image.fromarray((draw("L") < 128).astype(np.uint8)).convert("P")
    image.putpalette([0] * 768)
    assert difference(only(encode(image, "GIF", transparency=0)).image, wanted) < 6
    assert difference(only(encode(image, "PNG", transparency=bytes([0, 255]))).image, wanted) < 6


def test_first_frame_counts(wanted: Array) -> None:
    frames = [Image.fromarray(draw("L")), Image.fromarray(draw("7"))]
    for kind in ("GIF", "TIFF", "WEBP"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert difference(only(content).image, wanted) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(wanted: Array, orientation: int, kind: str) -> None:
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
def test_polarity(name: str) -> None:
    dark, light = (only(encode(image)).image for image in (draw(name), 255 - draw(name)))
    assert difference(dark, light) < 0.5


@pytest.mark.parametrize("size", [20, 50, 200, 600])
def test_any_size(wanted: Array, size: int) -> None:
    assert difference(only(encode(draw("L", size, max(2, size // 10)))).image, wanted) < 12


def test_thin_strokes_do_not_fade() -> None:
    thin = only(encode(draw("L", size=400, width=3))).image
    assert thin.max() == 255
    assert (thin > 128).sum() > 40


def test_ink_may_touch_the_border() -> None:
    grey = draw("7")[50:155, 65:140]
    assert grey.min(axis=0)[0] == 255 or grey[0].min() == 0
    assert difference(only(encode(grey)).image, only(encode(draw("7"))).image) < 10


def test_uneven_light_noise_and_shadow(wanted: Array) -> None:
    grey = draw("L", 200, 20).astype(float)
    light = np.linspace(1.0, 0.4, 400)[None, :] * np.where(np.arange(400) > 230, 0.7, 1.0)[:, None]
    noisy = (60 + grey * 0.7) * light + np.random.default_rng(0).normal(0, 5, grey.shape)
    photo = np.clip(noisy, 0, 255).astype(np.uint8)
    assert difference(only(encode(photo)).image, wanted) < 12


@pytest.mark.parametrize("squared", [False, True])
def test_rulings_are_taken_out(wanted: Array, squared: bool) -> None:
    grey = draw("L", 200, 22).copy()
    for place in range(35, 400, 70):
        grey[place : place + 3] = np.minimum(grey[place : place + 3], 90)
        if squared:
            grey[:, place : place + 3] = np.minimum(grey[:, place : place + 3], 90)
    assert difference(only(encode(grey)).image, wanted) < 12


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


def test_reading_order() -> None:
    names = [["7", "L", "1"], ["1", "7", "L"]]
    lines = [np.concatenate([draw(name)[:, 40:160] for name in line], axis=1) for line in names]
    lines[0] = np.roll(lines[0], 25, axis=0)  # the lines are not quite level with themselves
    lines[1] = np.asarray(Image.fromarray(lines[1]).resize((432, 240)))  # and of different heights
    lines[0] = np.pad(lines[0], ((0, 0), (0, 72)), constant_values=255)
    digits = read_digits(encode(np.concatenate(lines)))
    assert len(digits) == 6
    for digit, name in zip(digits, names[0] + names[1], strict=True):
        assert difference(digit.image, only(encode(draw(name))).image) < 6
    boxes = np.array([digit.box for digit in digits])
    assert (np.diff(boxes[:3, 0]) > 0).all() and (np.diff(boxes[3:, 0]) > 0).all()
    assert boxes[:3, 3].max() < boxes[3:, 1].min() + 60


def test_slanting_row() -> None:
    row = np.concatenate([np.roll(draw("7")[:, 40:160], 40 - 18 * i, axis=0) for i in range(5)], axis=1)
    boxes = [digit.box for digit in read_digits(encode(row))]
    assert len(boxes) == 5
    assert boxes == sorted(boxes)


def test_touching_digits_are_cut() -> None:
    one = np.asarray(Image.fromarray(draw("L")[40:160, 70:126]).resize((90, 120)))
    two = np.concatenate([one, one], axis=1)  # the foot of the first touches the stem of the second
    two = np.pad(two, 40, constant_values=255)
    assert len(read_digits(encode(two))) == 2


# As MNIST was made ----------------------------------------------------------------------------------------------------


def test_digit_in_mnist_style_is_left_alone(wanted: Array) -> None:
    np.testing.assert_array_equal(only(encode(wanted)).image, wanted)
    np.testing.assert_array_equal(only(encode(255 - wanted)).image, wanted)


def test_round_trip_through_a_larger_picture(wanted: Array) -> None:
    (digit,) = find_digits(np.pad(wanted, 30))
    assert difference(digit.image, wanted) < 3
    large = np.asarray(Image.fromarray(wanted).resize((280, 280), Image.Resampling.BICUBIC))
    assert difference(only(encode(255 - large)).image, wanted) < 12


# What is no picture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (28, 28), (300, 200)])
def test_blank(value: int, shape: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="blank"):
        read_digits(encode(np.full(shape, value, np.uint8)))


def test_blank_with_a_gradient() -> None:
    with pytest.raises(PictureError, match="blank"):
        read_digits(encode(np.broadcast_to(np.linspace(100, 250, 300), (200, 300)).astype(np.uint8)))


def test_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (30_000, 10_000):  # Pillow only warns up to twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(PictureError, match=f"more than {limit:,} pixels.*make it smaller"):
            read_digits(encode(draw("L")))


@pytest.mark.parametrize("kind", decode_lib.FORMATS)
def test_truncated(kind: str) -> None:
    content = encode(Image.effect_noise((200, 200), 50), kind)
    with pytest.raises(PictureError, match=r"damaged|no picture"):
        read_digits(content[: len(content) // 2])


def test_not_a_picture() -> None:
    for content, reason in {
        b"": "is empty",
        b"Dear diary": "no picture of a known format",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "no picture of a known format",
        b"\0\0\0\x18ftypheic\0\0\0\0": "HEIC; save it as JPEG",
    }.items():
        with pytest.raises(PictureError, match=reason):
            read_digits(content)


def test_large_jpeg_is_reduced_when_decoded() -> None:
    picture = decode(encode(np.full((2400, 3600), 200, np.uint8), "JPEG"))
    assert max(picture.grey.shape) <= 1000
    assert picture.scale == pytest.approx(3600 / picture.grey.shape[1], rel=0.01)


# What outside trials broke ---------------------------------------------------------------------------


def test_damaged_exif_data_are_ignored(wanted: Array) -> None:
    content = encode(draw("L"), "JPEG", quality=95, exif=b"Exif\0\0" + b"\x37\x11junk" * 9)
    assert difference(only(content).image, wanted) < 3


def test_dithered_photograph_is_read(wanted: Array) -> None:
    grey = 70 + draw("L", 200, 20) * 0.6
    image = Image.fromarray(grey.astype(np.uint8)).convert("1")
    assert difference(only(encode(image)).image, wanted) < 25


@pytest.mark.parametrize("width", [3, 8])
def test_dark_grid_is_no_digit(width: int) -> None:
    """Lines as dark as the pen, and nearly as thick; one of them crosses the digit."""
    grey = draw("L", 200, 20).copy()
    for place in range(30, 400, 110):
        grey[place : place + width] = 0
        grey[:, place : place + width] = 0
    assert len(read_digits(encode(grey))) == 1


@pytest.mark.parametrize("turn", [-22, 22])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_steep_row_is_read_from_left_to_right(turn: int, count: int) -> None:
    row = np.hstack([draw("1" if place else "7", 80, 8) for place in range(count)])
    page = Image.fromarray(np.pad(row, 60, constant_values=255)).rotate(turn, expand=True, fillcolor=255)
    digits = read_digits(encode(page))
    places = [digit.box[0] for digit in digits]
    assert len(digits) == count and places == sorted(places)


@pytest.mark.parametrize("sides", [4, 3], ids=["whole", "cut off"])
def test_row_of_boxes_that_is_turned_is_no_digit(sides: int) -> None:
    cell = draw("7", 80, 10).copy()
    cell[10:150, 10:13] = cell[10:150, -13:-10] = cell[10:13, 10:-10] = 0
    if sides == 4:
        cell[147:150, 10:-10] = 0
    row = np.pad(np.hstack([cell[:, 10:-10]] * 4), 60, constant_values=255)
    digits = read_digits(encode(Image.fromarray(row).rotate(-5, expand=True, fillcolor=255)))
    assert len(digits) == 4


def test_sheet_on_a_table_is_found_and_levelled(wanted: Array) -> None:
    sheet = Image.fromarray(draw("L", 200, 20)).rotate(-20, Image.Resampling.BICUBIC, expand=True, fillcolor=60)
    photo = Image.new("L", (700, 650), 60)
    photo.paste(sheet, (80, 60))
    assert difference(only(encode(photo)).image, wanted) < 14


def test_hard_shadow_is_no_ink(wanted: Array) -> None:
    grey = draw("L", 200, 20).astype(float)
    y, x = np.mgrid[0:400, 0:400]
    photo = (20 + 0.85 * grey) * np.where(x + 0.4 * y > 300, 0.5, 1.0)
    assert difference(only(encode(photo.astype(np.uint8))).image, wanted) < 12


def test_page_of_thousands_of_marks_is_read() -> None:
    page = np.full((1000, 1000), 255, np.uint8)
    for row in range(4, 990, 14):
        for column in range(4, 990, 14):
            page[row : row + 9, column : column + 2] = 0
    assert len(read_digits(encode(page))) == 71 * 71


@pytest.mark.slow
def test_mutated_pictures_are_read_or_refused() -> None:
    random = np.random.default_rng(0)
    whole = [encode(draw(name), kind) for name in STROKES for kind in decode_lib.FORMATS]
    for _ in range(400):
        content = bytearray(whole[random.integers(len(whole))])
        for place in random.integers(0, len(content), random.integers(1, 12)):
            content[place] = random.integers(256)
        if random.random() < 0.3:
            del content[random.integers(1, len(content)) :]
        try:
            digits = read_digits(bytes(content))
        except PictureError:
            continue
        assert all(digit.image.shape == (28, 28) and digit.image.dtype == np.uint8 for digit in digits)
