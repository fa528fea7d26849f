"""Measures `mnist_flax.predict` on foreign pictures, and prints one line of JSON.

    python scripts/bench_predict.py --workdir=runs/default

Test images of the run's dataset are drawn anew as pictures that have little in common with it, saved as real files in
memory, and read as `python -m mnist_flax.predict` reads them:

- single: one digit; 40 to 1,200 pixels, off the centre, rotated by up to 8 degrees, thinner or thicker, dark on light
  or light on dark, tinted paper, noise, uneven light; JPEG of quality 40, PNG (grey, RGB, RGBA, palette), WebP, GIF,
  BMP, TIFF.
- row: five such digits side by side, of slightly different sizes and heights.
- ruled: such a row, dark on light, on lined or squared paper, with shadows, out of focus, in perspective; JPEG of
  quality 40 to 80.

The renderer shares no code with the reader. What was chosen in the reader was chosen with --split=train.
"""

import datetime
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from mnist_flax import cli

Array = np.ndarray


class Scene(NamedTuple):
    """A picture to be: how much ink covers each pixel, `f32[H,W]` in [0, 1]; its digits' size in pixels."""

    ink: Array
    digit_size: float


# Ink ------------------------------------------------------------------------------------------------------------------


def stroke(image: Array, size: float, random: np.random.Generator) -> Array:
    """Draws an image of the dataset with a sharp pen, `u8[28,28] -> f32[h,w]`.

    Args:
      image: white on black.
      size: of the digit's longer side, in pixels.
      random: for the pen's width and the rotation.
    """
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    tight = np.pad(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 4).astype(np.float32) / 255
    zoom = size / max(len(rows), len(columns))
    smooth = ndimage.zoom(tight, max(zoom, 4.0), order=3, grid_mode=True, mode="grid-constant")
    smooth = ndimage.rotate(smooth, random.uniform(-8, 8), order=1)
    level = random.uniform(0.3, 0.6)  # where the pen's edge runs: low draws thick, high draws thin
    ink = np.clip((smooth - level) * 4 + 0.5, 0, 1)
    if zoom < 4:
        height, width = (max(1, round(side * zoom / 4)) for side in ink.shape)
        ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    rows, columns = np.flatnonzero((ink > 0.1).any(1)), np.flatnonzero((ink > 0.1).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def single(images: Array, random: np.random.Generator) -> Scene:
    """Puts one digit anywhere on a sheet of any shape."""
    side = float(np.exp(random.uniform(np.log(40), np.log(1200))))
    height, width = (round(max(40, side * factor)) for factor in (1.0, random.uniform(0.7, 1.4)))
    size = min(height, width) * random.uniform(0.45, 0.9)
    ink = stroke(images[0], size, random)[: height - 2, : width - 2]
    sheet = np.zeros((height, width), np.float32)
    top, left = random.integers(1, height - ink.shape[0]), random.integers(1, width - ink.shape[1])
    sheet[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return Scene(sheet, size)


def row(images: Array, random: np.random.Generator, low: float = 24, high: float = 200) -> Scene:
    """Writes digits side by side, not quite equal in size, height and distance."""
    size = float(np.exp(random.uniform(np.log(low), np.log(high))))
    inks = [stroke(image, size * random.uniform(0.85, 1.15), random) for image in images]
    gaps = [round(size * random.uniform(0.15, 0.6)) for _ in inks]
    margins = [round(size * random.uniform(0.2, 1.0)) for _ in range(4)]
    width = sum(ink.shape[1] for ink in inks) + sum(gaps) + margins[0] + margins[1]
    height = round(1.5 * size) + margins[2] + margins[3]
    sheet = np.zeros((height, width), np.float32)
    left = margins[0]
    for ink, gap in zip(inks, gaps, strict=True):
        middle = margins[2] + 0.75 * size + size * random.uniform(-0.12, 0.12)
        top = max(1, round(middle - ink.shape[0] / 2))
        place = sheet[top : top + ink.shape[0], left : left + ink.shape[1]]
        np.maximum(place, ink[: place.shape[0]], out=place)
        left += ink.shape[1] + gap
    return Scene(sheet, size)


# Paper and light ------------------------------------------------------------------------------------------------------


def colours(random: np.random.Generator, dark_on_light: bool) -> tuple[Array, Array]:
    """Draws the colours of paper and ink, `f32[3]` each, that differ by at least 0.35 in brightness."""
    light = random.uniform(0.72, 1.0) - random.uniform(0, 0.18, 3)
    dark = light.mean() - random.uniform(0.35, 0.8) + random.uniform(-0.1, 0.1, 3)
    pair = np.clip(light, 0, 1).astype(np.float32), np.clip(dark, 0, 1).astype(np.float32)
    return pair if dark_on_light else (pair[1], pair[0])


def uneven_light(shape: tuple[int, ...], random: np.random.Generator, strength: float) -> Array:
    """Returns a slope of brightness across the sheet, `f32[H,W]`, at most 1."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    angle = random.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * x / shape[1] + np.sin(angle) * y / shape[0]
    return 1 - strength * (slope - slope.min()) / np.ptp(slope)


def shadow(shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Returns the shadow of a hand or a phone: the sheet beyond a wavy line is darker; its edge is soft, `f32[H,W]`."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    angle, place = random.uniform(0, 2 * np.pi), random.uniform(0.25, 0.75)
    across = np.cos(angle) * (x - place * shape[1]) + np.sin(angle) * (y - place * shape[0])
    along = -np.sin(angle) * x + np.cos(angle) * y
    side = max(shape)
    across += side * 0.04 * np.sin(along / side * random.uniform(3, 12) + random.uniform(0, 6))
    softness = side * random.uniform(0.01, 0.08)
    return 1 - random.uniform(0.15, 0.45) / (1 + np.exp(-np.clip(across / softness, -30, 30)))


def rulings(shape: tuple[int, ...], digit_size: float, random: np.random.Generator) -> Array:
    """Prints lines or squares on the paper, `f32[H,W]`: how much of the ruling's colour covers each pixel."""
    squared = random.random() < 0.5
    spacing = digit_size * (random.uniform(0.35, 1.0) if squared else random.uniform(0.6, 1.6))
    width = max(1.0, digit_size * random.uniform(0.008, 0.03))
    angle = np.deg2rad(random.uniform(-4, 4))
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    cover = np.zeros(shape, np.float32)
    for turn in (0.0, np.pi / 2) if squared else (0.0,):
        across = -np.sin(angle + turn) * x + np.cos(angle + turn) * y + random.uniform(0, spacing)
        distance = np.abs((across + spacing / 2) % spacing - spacing / 2)
        cover = np.maximum(cover, np.clip(width / 2 + 0.5 - distance, 0, 1))
    return cover


def perspective(pixels: Array, random: np.random.Generator) -> Array:
    """Looks at the sheet from slightly aside, `u8[H,W,3] -> u8[H,W,3]`."""
    height, width = pixels.shape[:2]
    corners = [(0, 0), (0, height), (width, height), (width, 0)]
    quad = [value + side * random.uniform(0, 0.03) * (1 if value == 0 else -1)
            for corner in corners for value, side in zip(corner, (width, height), strict=True)]  # fmt: skip
    image = Image.fromarray(pixels)
    return np.asarray(image.transform(image.size, Image.Transform.QUAD, quad, Image.Resampling.BICUBIC))


def to_bytes(values: Array) -> Array:
    """Turns brightness from 0 to 1 into bytes."""
    return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)


# Files ----------------------------------------------------------------------------------------------------------------


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Returns the bytes of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain_file(scene: Scene, random: np.random.Generator) -> bytes:
    """Draws a scene on plain paper and saves it in one of many ways."""
    dark_on_light = bool(random.random() < 0.6)
    paper, pen = colours(random, dark_on_light)
    way = random.choice(["jpeg", "rgb", "rgba", "grey", "palette", "webp", "gif", "bmp", "tiff"], p=[0.36] + [0.08] * 8)
    if way == "rgba":  # ink on nothing: a drawing program's way
        pixels = np.empty((*scene.ink.shape, 4), np.uint8)
        pixels[..., :3] = to_bytes(np.minimum(paper, pen) * 0.6)
        pixels[..., 3] = to_bytes(scene.ink)
        return encode(Image.fromarray(pixels), "PNG")
    sheet = paper + scene.ink[..., None] * (pen - paper)
    sheet = sheet * uneven_light(scene.ink.shape, random, random.uniform(0, 0.25))[..., None]
    noise = random.uniform(0, 0.06)
    sheet = sheet + random.normal(0, noise, sheet.shape).astype(np.float32)
    image = Image.fromarray(to_bytes(sheet))
    ways: dict[str, Callable[[], bytes]] = {
        "jpeg": lambda: encode(image, "JPEG", quality=40),
        "rgb": lambda: encode(image, "PNG", compress_level=1),
        "grey": lambda: encode(image.convert("L"), "PNG", compress_level=1),
        "palette": lambda: encode(image.quantize(32), "PNG", compress_level=1),
        "webp": lambda: encode(image, "WEBP", quality=40),
        "gif": lambda: encode(image, "GIF"),
        "bmp": lambda: encode(image, "BMP"),
        "tiff": lambda: encode(image, "TIFF"),
    }
    return ways[str(way)]()


def ruled_file(scene: Scene, random: np.random.Generator) -> bytes:
    """Draws a scene on lined or squared paper and takes a bad photograph of it."""
    paper, pen = colours(random, True)
    strength = random.uniform(0.15, 0.6)
    line = paper + strength * (pen - paper) + random.uniform(-0.08, 0.08, 3)
    sheet = paper + rulings(scene.ink.shape, scene.digit_size, random)[..., None] * (line - paper)
    sheet = sheet + scene.ink[..., None] * (pen - sheet)
    light = uneven_light(scene.ink.shape, random, random.uniform(0, 0.3)) * shadow(scene.ink.shape, random)
    sheet = ndimage.gaussian_filter(sheet * light[..., None], (*[random.uniform(0.3, 1.5)] * 2, 0))
    sheet = sheet + random.normal(0, random.uniform(0, 0.04), sheet.shape)
    return encode(Image.fromarray(perspective(to_bytes(sheet), random)), "JPEG", quality=int(random.integers(40, 81)))


SETS: dict[str, tuple[int, Callable[[Array, np.random.Generator], bytes]]] = {
    "single": (1, lambda images, random: plain_file(single(images, random), random)),
    "row": (5, lambda images, random: plain_file(row(images, random), random)),
    "ruled": (5, lambda images, random: ruled_file(row(images, random, 60, 220), random)),
}


# Reading --------------------------------------------------------------------------------------------------------------


def edits(read: Sequence[int], written: Sequence[int]) -> int:
    """Counts the digits that were missed, made up or misread: the least number of edits from one to the other."""
    costs = list(range(len(written) + 1))
    for i, digit in enumerate(read, 1):
        before, costs[0] = costs[0], i
        for j, wanted in enumerate(written, 1):
            before, costs[j] = costs[j], min(before + (digit != wanted), costs[j] + 1, costs[j - 1] + 1)
    return costs[-1]


def main(argv: Sequence[str]) -> None:
    """Renders, reads, counts."""
    del argv
    from mnist_flax import predict
    from mnist_flax.analysis import evaluation as evaluate
    from mnist_flax.data import load as data
    from mnist_flax.pictures import segment as pictures
    from mnist_flax.run import checkpoint, provenance
    from mnist_flax.step import eval_variables

    values = flags.FLAGS
    run = checkpoint.load_run(Path(values.workdir), values.checkpoint)
    variables = eval_variables(run.state)
    examples = getattr(data.load_splits(run.config), values.split)
    order = np.random.default_rng(values.seed).permutation(len(examples.label))
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "dataset": run.config.data.name, "split": values.split,
        "seed": values.seed, "step": int(run.state.step),
    }  # fmt: skip
    for number, (name, (length, draw)) in enumerate(SETS.items()):
        count: int = values.get_flag_value(name, 0)
        if not count:
            continue
        wrong = confident = exact = 0
        seconds = 0.0
        rows = np.resize(order, (count, length))
        for i, place in enumerate(tqdm(rows, name, file=sys.stderr, mininterval=1.0)):
            content = draw(examples.image[place][..., 0], np.random.default_rng((values.seed, number, i)))
            started = time.perf_counter()
            try:
                reading = predict.read_picture(run.config, variables, content)
            except pictures.PictureError:
                reading = []
            seconds += time.perf_counter() - started
            errors = edits([digit.digit for digit in reading], examples.label[place].tolist())
            if errors and values.mistakes:
                folder = Path(values.mistakes)
                folder.mkdir(parents=True, exist_ok=True)
                told = "".join(str(digit.digit) for digit in reading)
                written = "".join(map(str, examples.label[place]))
                Image.open(io.BytesIO(content)).convert("RGBA").save(folder / f"{name}-{i:04d}-{written}-as-{told}.png")
            wrong += min(errors, length)
            exact += not errors
            confident += any(not digit.doubtful for digit in reading)
        logits = evaluate.predict_logits(run.config, variables, examples.image[rows.reshape(-1)])
        plain = float(np.mean(logits.argmax(-1) == examples.label[rows.reshape(-1)]))
        result[name] = {
            "pictures": count, "digits": count * length, "plain_accuracy": round(plain, 4),
            "digits_read": round(1 - wrong / (count * length), 4), "pictures_read": round(exact / count, 4),
            "doubtful": count - confident, "milliseconds_per_picture": round(1000 * seconds / count, 1),
        }  # fmt: skip
        print(json.dumps({name: result[name]}), file=sys.stderr)
    print(json.dumps({**result, **provenance.provenance()}))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the folder of a run", required=True)
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step")
    flags.DEFINE_enum("split", "test", ["test", "train"], "which images are drawn; choose on train, report test")
    flags.DEFINE_integer("seed", 0, "of the renderer", lower_bound=0)
    flags.DEFINE_integer("single", 2000, "pictures of one digit; 0 leaves them out", lower_bound=0)
    flags.DEFINE_integer("row", 400, "pictures of five digits; 0 leaves them out", lower_bound=0)
    flags.DEFINE_integer(
        "ruled", 300, "pictures of five digits on lined or squared paper; 0 leaves them out", lower_bound=0
    )
    flags.DEFINE_string("mistakes", None, "a folder for the pictures that are read wrongly")
    cli.run(main)
