"""Files that are not pictures are refused with a reason; pictures that once failed in trials are read."""

import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from drawings import STROKES, Array, difference, draw, draw_form, encode, only
from PIL import Image, ImageDraw

from mnist_flax.pictures import blobs
from mnist_flax.pictures import decode as decode_lib
from mnist_flax.pictures.decode import PictureError, decode
from mnist_flax.pictures.segment import read_digits


@pytest.fixture(scope="module")
def wanted() -> Array:
    return only(encode(draw("L"))).image


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (28, 28), (300, 200)])
def test_blank_picture_is_refused(value: int, shape: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="blank"):
        read_digits(encode(np.full(shape, value, np.uint8)))


def test_blank_picture_with_a_gradient_is_refused() -> None:
    with pytest.raises(PictureError, match="blank"):
        read_digits(encode(np.broadcast_to(np.linspace(100, 250, 300), (200, 300)).astype(np.uint8)))


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (30_000, 10_000):  # Pillow only warns up to twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(PictureError, match=f"more than {limit:,} pixels.*make it smaller"):
            read_digits(encode(draw("L")))


def test_webp_that_would_need_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # no limit for other formats
    assert only(encode(draw("L"), "WEBP"))
    monkeypatch.setattr(decode_lib, "_MAX_WEBP_PIXELS", 10_000)
    with pytest.raises(PictureError, match=r"more than 10,000 pixels.*make it smaller"):
        read_digits(encode(draw("L"), "WEBP"))
    assert only(encode(draw("L"), "PNG"))


def test_too_many_marks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    page = dense_page()[:400, :400]
    monkeypatch.setattr(blobs, "MAX_PIECES", len(read_digits(encode(page))))
    read_digits(encode(page))
    monkeypatch.setattr(blobs, "MAX_PIECES", blobs.MAX_PIECES - 1)
    with pytest.raises(PictureError, match=f"more than {blobs.MAX_PIECES} separate marks.*crop it"):
        read_digits(encode(page))


@pytest.mark.parametrize("kind", decode_lib.FORMATS)
def test_truncated_picture_is_refused(kind: str) -> None:
    content = encode(Image.effect_noise((200, 200), 50), kind)
    with pytest.raises(PictureError, match=r"damaged|not a picture"):
        read_digits(content[: len(content) // 2])


def test_file_that_is_no_picture_is_refused() -> None:
    for content, reason in {
        b"": "is empty",
        b"Dear diary": "not a picture in a known format",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not a picture in a known format",
        b"\0\0\0\x18ftypheic\0\0\0\0": "HEIC; save it as JPEG",
        b"%PDF-1.7\n": "PDF; save it as JPEG",
    }.items():
        with pytest.raises(PictureError, match=reason):
            read_digits(content)


def test_large_jpeg_is_reduced_when_decoded() -> None:
    picture = decode(encode(np.full((2400, 3600), 200, np.uint8), "JPEG"))
    assert max(picture.grey.shape) <= 1000
    assert picture.scale == pytest.approx(3600 / picture.grey.shape[1], rel=0.01)


# Pictures that once failed in trials ----------------------------------------------------------------------------------


def test_damaged_exif_data_are_ignored(wanted: Array) -> None:
    content = encode(draw("L"), "JPEG", quality=95, exif=b"Exif\0\0" + b"\x37\x11junk" * 9)
    assert difference(only(content).image, wanted) < 3


def test_dithered_photograph_is_read(wanted: Array) -> None:
    grey = 70 + draw("L", 200, 20) * 0.6
    image = Image.fromarray(grey.astype(np.uint8)).convert("1")
    assert difference(only(encode(image)).image, wanted) < 25


@pytest.mark.parametrize("width", [3, 8, 20])
def test_dark_grid_is_no_digit(wanted: Array, width: int) -> None:
    """The lines of the grid are as dark as the pen, the widest as thick, and some cross the digit."""
    grey = draw("L", 200, 20).copy()
    for place in range(60, 400, 110):
        grey[place - 40 : place - 40 + width] = 0
        grey[:, place : place + width] = 0
    assert difference(only(encode(grey)).image, wanted) < (20 if width == 20 else 12)


def test_boxes_from_margin_to_margin_are_no_digits() -> None:
    """Their sides are strokes like a 1 once the long lines above and below them are erased."""
    digits = np.hstack([np.pad(draw(name, 70, 14), ((10, 10), (0, 0)), constant_values=255) for name in "7L7L7"])
    page = np.pad(digits, ((100, 200), (12, 12)), constant_values=255).copy()
    for x in range(12, page.shape[1], 140):
        page[100:260, x - 3 : x + 3] = 0
    for y in (100, 254):
        page[y : y + 6, 9:-9] = 0
    turned = Image.fromarray(page).rotate(2, Image.Resampling.BICUBIC, fillcolor=255)
    assert len(read_digits(encode(turned))) == 5


def test_boxes_cut_off_by_the_edge_are_no_digits() -> None:
    page = np.full((420, 800), 255, np.uint8)
    for left, name in ((80, "7"), (440, "L")):
        page[50:250, left + 30 : left + 230] = draw(name, 100, 30)
        for top in (30, 370):
            box = page[top : top + 290, left : left + 260]
            box[:16] = box[274:] = box[:, :16] = box[:, -16:] = 0
    turned = Image.fromarray(page).rotate(-2, Image.Resampling.BICUBIC, fillcolor=255)
    assert len(read_digits(encode(turned))) == 2


def test_open_grid_that_digits_touch_is_erased() -> None:
    """No line runs along the left, right, upper or lower side of this grid."""
    page = np.full((460, 900), 255, np.uint8)
    for place, name in enumerate("7L77L"):
        digit = draw(name, 90, 14)
        left = 50 + 160 * place
        page[150:330, left : left + 180] = np.minimum(page[150:330, left : left + 180], digit)
    for x in range(100, 900, 160):
        page[30:430, x - 4 : x + 4] = 0
    for y in (140, 290):
        page[y - 4 : y + 4, 14:886] = 0
    turned = Image.fromarray(page).rotate(3, Image.Resampling.BICUBIC, fillcolor=255)
    digits = read_digits(encode(turned))
    assert len(digits) == 5 and max(digit.box[3] - digit.box[1] for digit in digits) < 150


@pytest.mark.parametrize(("rows", "cell", "line"), [(10, 80, 8), (33, 30, 2)], ids=["large", "small"])
def test_form_is_read_without_its_grid(rows: int, cell: int, line: int) -> None:
    page, places = draw_form(rows, cell, line)
    digits = read_digits(encode(page))
    assert len(digits) == len(places) and not any(digit.suspect for digit in digits)
    middles = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (digit.box for digit in digits)]
    np.testing.assert_allclose(middles, places, atol=cell / 8)


@pytest.mark.parametrize("turn", [-22, 22])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_steep_row_is_read_from_left_to_right(turn: int, count: int) -> None:
    row = np.hstack([draw("1" if place else "7", 80, 8) for place in range(count)])
    page = Image.fromarray(np.pad(row, 60, constant_values=255)).rotate(turn, expand=True, fillcolor=255)
    digits = read_digits(encode(page))
    places = [digit.box[0] for digit in digits]
    assert len(digits) == count and places == sorted(places)


@pytest.mark.parametrize("sides", [4, 3], ids=["whole", "cut off"])
def test_boxes_of_a_turned_row_are_not_read_as_digits(sides: int) -> None:
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


def test_corner_of_a_turned_shadow_is_no_ink(wanted: Array) -> None:
    grey = draw("L", 200, 20).astype(float)
    y, x = np.mgrid[0:400, 0:400]
    photo = (20 + 0.85 * grey) * np.where(x - 155 > np.abs(y - 180), 0.3, 1.0)
    assert difference(only(encode(photo.astype(np.uint8))).image, wanted) < 3


def test_sheet_half_in_shadow_on_a_dark_table_is_dark_on_light(wanted: Array) -> None:
    grey = draw("L", 200, 20).astype(float)
    photo = np.pad(40 + 0.6 * grey, ((60, 60), (0, 200)), constant_values=110)
    y, x = np.mgrid[0:520, 0:600]
    photo *= np.where(5 * x + y < 1500, 0.35, 1.0)
    assert difference(only(encode(photo.astype(np.uint8))).image, wanted) < 12


@pytest.mark.parametrize("turn", [0, 20])
def test_joints_of_a_table_are_no_digits(turn: int) -> None:
    """The sheet is hardly brighter than the table, so it is not found, and hides a part of each joint."""
    sheet = np.hstack([draw("7", 70, 12), draw("L", 70, 12)]) // 255
    y, x = np.mgrid[0:600, 0:700]
    table = np.where((x % 240 < 12) | (y % 260 < 12), 40, 130).astype(np.uint8)
    photo = Image.fromarray(table)
    turned = Image.fromarray(np.where(sheet, 145, 30).astype(np.uint8)).rotate(-turn, expand=True)
    covered = Image.new("L", (sheet.shape[1], sheet.shape[0]), 255).rotate(-turn, expand=True)
    photo.paste(turned, (200, 150), covered)
    digits = read_digits(encode(photo))
    assert len(digits) == 2
    for digit, name in zip(digits, "7L", strict=True):
        assert difference(digit.image, only(encode(draw(name, 70, 12))).image) < 14


def test_boxes_with_a_broken_side_are_no_digits() -> None:
    """Only one line runs along the whole row, and its ends are open, so it is not a grid."""
    page = np.full((260, 540), 255, np.uint8)
    for place, name in enumerate("7L7"):
        page[40:220, 30 + 150 * place : 210 + 150 * place] = draw(name, 90, 14)
    page[211:219, 45:495] = page[41:49, 110:260] = page[41:49, 300:430] = 0
    for x in (195, 345):
        page[45:215, x - 4 : x + 4] = 0
    turned = Image.fromarray(page).rotate(4, Image.Resampling.BICUBIC, expand=True, fillcolor=255)
    digits = read_digits(encode(turned))
    assert len(digits) == 3 and max(digit.box[3] - digit.box[1] for digit in digits) < 130


def test_filled_six_at_the_edge_of_a_shadow_is_a_digit() -> None:
    image = Image.new("L", (500, 240), 255)
    pen = ImageDraw.Draw(image)
    pen.ellipse((60, 110, 140, 190), fill=0)
    pen.line((75, 130, 90, 60, 110, 40), fill=0, width=20)
    image.paste(Image.fromarray(draw("7")), (250, 20))
    photo = np.asarray(image).astype(float) * np.where(np.arange(500) < 105, 0.6, 1.0)
    assert len(read_digits(encode(photo.astype(np.uint8)))) == 2


def test_what_the_edge_cuts_off_is_suspect() -> None:
    page = np.vstack([np.hstack([draw(name) for name in "L7"]), np.hstack([draw(name) for name in "7L"])])
    assert [digit.suspect for digit in read_digits(encode(page))] == [False] * 4
    assert [digit.suspect for digit in read_digits(encode(page[:320]))] == [False, False, True, True]


def dense_page() -> Array:
    page = np.full((1000, 1000), 255, np.uint8)
    for row in range(4, 990, 14):
        for column in range(4, 990, 14):
            page[row : row + 9, column : column + 2] = 0
    return page


def long_thin_lines() -> Array:
    y, x = np.mgrid[0:1000, 0:1000]
    return np.where(np.isin(np.abs(x - y), [0, 1, 300, 301]), 0, 255).astype(np.uint8)


BOUNDED = """
import pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
from mnist_flax.pictures.segment import read_digits
print(len(read_digits(sys.stdin.buffer.read())))
print(pathlib.Path("/proc/self/status").read_text())
"""


@pytest.mark.parametrize(("page", "count"), [(dense_page, 71 * 71), (long_thin_lines, 3)])
def test_dense_or_large_picture_is_read_within_bounds(page: Callable[[], Array], count: int) -> None:
    """30 s is generous: each takes at most 4 s, and took minutes with an algorithm of quadratic time."""
    done = subprocess.run([sys.executable, "-c", BOUNDED], input=encode(page()), capture_output=True, timeout=250)
    assert not done.returncode, (done.returncode, done.stderr)
    first, *status = done.stdout.decode().splitlines()
    assert int(first) == count
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", "\n".join(status))
    assert int(peak) < 2**20


def test_tiny_marks_are_read() -> None:
    page = np.full((9, 9), 255, np.uint8)
    page[2, 2:4] = page[6, 2:4] = 0
    assert read_digits(encode(page))


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
