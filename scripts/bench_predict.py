"""Measures `mnist_flax.predict` on pictures unlike its training data, and prints one line of JSON.

    python scripts/bench_predict.py --workdir=runs/default

Test images of the run's dataset are rendered as pictures of very different appearance, saved as image files in a
temporary folder, and read with `python -m mnist_flax.predict`:

- single: one digit; 40 to 1,200 pixels, off centre, rotated by up to 8 degrees, thinner or thicker, dark on light
  or light on dark, tinted paper, noise, uneven light; JPEG of quality 40, PNG (grey, RGB, RGBA, palette), WebP, GIF,
  BMP, TIFF.
- row: five such digits side by side, of slightly different sizes and heights.
- ruled: such a row, dark on light, on lined or squared paper, with shadows, out of focus, in perspective; JPEG of
  quality 40 to 80.
- table, shadow, grid, turned: photographs of one to five digits; see render_photographs.py.

The renderer shares no code with the reader that `predict` uses. The reader was tuned with --split=train only.
"""

import functools
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import render_photographs as photographs
from absl import flags
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from mnist_flax import cli
from mnist_flax.errors import UserError

Array = np.ndarray


class Scene(NamedTuple):
    """What is drawn on the paper: the ink coverage of each pixel, `f32[H,W]` in [0, 1]; the digit size in pixels."""

    ink: Array
    digit_size: float


# Ink ------------------------------------------------------------------------------------------------------------------


def stroke(image: Array, size: float, random: np.random.Generator) -> Array:
    """Redraws an image of the dataset at any size with sharp edges, `u8[28,28] -> f32[h,w]`.

    Args:
      image: white on black.
      size: the length of the digit's longer side, in pixels.
      random: draws the pen width and the rotation.
    """
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    tight = np.pad(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 4).astype(np.float32) / 255
    zoom = size / max(len(rows), len(columns))
    smooth = ndimage.zoom(tight, max(zoom, 4.0), order=3, grid_mode=True, mode="grid-constant")
    smooth = ndimage.rotate(smooth, random.uniform(-8, 8), order=1)
    level = random.uniform(0.3, 0.6)  # the threshold at the edge of a stroke: low makes it thick, high makes it thin
    ink = np.clip((smooth - level) * 4 + 0.5, 0, 1)
    if zoom < 4:
        height, width = (max(1, round(side * zoom / 4)) for side in ink.shape)
        ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    rows, columns = np.flatnonzero((ink > 0.1).any(1)), np.flatnonzero((ink > 0.1).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def single(images: Array, random: np.random.Generator) -> Scene:
    """Puts one digit at a random place on a sheet of random shape."""
    side = float(np.exp(random.uniform(np.log(40), np.log(1200))))
    height, width = (round(max(40, side * factor)) for factor in (1.0, random.uniform(0.7, 1.4)))
    size = min(height, width) * random.uniform(0.45, 0.9)
    ink = stroke(images[0], size, random)[: height - 2, : width - 2]
    sheet = np.zeros((height, width), np.float32)
    top, left = random.integers(1, height - ink.shape[0]), random.integers(1, width - ink.shape[1])
    sheet[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return Scene(sheet, size)


def row(images: Array, random: np.random.Generator, low: float = 24, high: float = 200) -> Scene:
    """Puts digits side by side, with slightly different sizes, heights and gaps."""
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
    """Draws random colours for paper and ink, `f32[3]` each, at least 0.25 apart in brightness."""
    light = random.uniform(0.72, 1.0) - random.uniform(0, 0.18, 3)
    dark = light.mean() - random.uniform(0.35, 0.8) + random.uniform(-0.1, 0.1, 3)
    pair = np.clip(light, 0, 1).astype(np.float32), np.clip(dark, 0, 1).astype(np.float32)
    return pair if dark_on_light else (pair[1], pair[0])


def shadow(shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Returns the shadow of a hand or a phone, `f32[H,W]`: darker on one side of a wavy line, with a soft edge."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    angle, place = random.uniform(0, 2 * np.pi), random.uniform(0.25, 0.75)
    across = np.cos(angle) * (x - place * shape[1]) + np.sin(angle) * (y - place * shape[0])
    along = -np.sin(angle) * x + np.cos(angle) * y
    side = max(shape)
    across += side * 0.04 * np.sin(along / side * random.uniform(3, 12) + random.uniform(0, 6))
    softness = side * random.uniform(0.01, 0.08)
    return 1 - random.uniform(0.15, 0.45) / (1 + np.exp(-np.clip(across / softness, -30, 30)))


def rulings(shape: tuple[int, ...], digit_size: float, random: np.random.Generator) -> Array:
    """Returns how much of each pixel printed lines or squares cover, `f32[H,W]` in [0, 1]."""
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
    """Applies a slight perspective distortion, `u8[H,W,3] -> u8[H,W,3]`."""
    height, width = pixels.shape[:2]
    corners = [(0, 0), (0, height), (width, height), (width, 0)]
    quad = [value + side * random.uniform(0, 0.03) * (1 if value == 0 else -1)
            for corner in corners for value, side in zip(corner, (width, height), strict=True)]  # fmt: skip
    image = Image.fromarray(pixels)
    return np.asarray(image.transform(image.size, Image.Transform.QUAD, quad, Image.Resampling.BICUBIC))


def to_bytes(values: Array) -> Array:
    """Converts brightness in [0, 1] to bytes."""
    return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)


# Files ----------------------------------------------------------------------------------------------------------------


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encodes an image in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain_file(scene: Scene, random: np.random.Generator) -> bytes:
    """Draws a scene on plain paper and encodes it in a random format."""
    dark_on_light = bool(random.random() < 0.6)
    paper, pen = colours(random, dark_on_light)
    way = random.choice(["jpeg", "rgb", "rgba", "grey", "palette", "webp", "gif", "bmp", "tiff"], p=[0.36] + [0.08] * 8)
    if way == "rgba":  # ink on a transparent background, as drawing programs save it
        pixels = np.empty((*scene.ink.shape, 4), np.uint8)
        pixels[..., :3] = to_bytes(np.minimum(paper, pen) * 0.6)
        pixels[..., 3] = to_bytes(scene.ink)
        return encode(Image.fromarray(pixels), "PNG")
    sheet = paper + scene.ink[..., None] * (pen - paper)
    strength = random.uniform(0, 0.25)
    sheet = sheet * photographs.uneven_light(scene.ink.shape, random.uniform(0, 2 * np.pi), strength)[..., None]
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
    """Draws a scene on lined or squared paper, and simulates a bad photograph of it."""
    paper, pen = colours(random, True)
    strength = random.uniform(0.15, 0.6)
    line = paper + strength * (pen - paper) + random.uniform(-0.08, 0.08, 3)
    sheet = paper + rulings(scene.ink.shape, scene.digit_size, random)[..., None] * (line - paper)
    sheet = sheet + scene.ink[..., None] * (pen - sheet)
    strength = random.uniform(0, 0.3)
    light = photographs.uneven_light(scene.ink.shape, random.uniform(0, 2 * np.pi), strength)
    light = light * shadow(scene.ink.shape, random)
    sheet = ndimage.gaussian_filter(sheet * light[..., None], (*[random.uniform(0.3, 1.5)] * 2, 0))
    sheet = sheet + random.normal(0, random.uniform(0, 0.04), sheet.shape)
    return encode(Image.fromarray(perspective(to_bytes(sheet), random)), "JPEG", quality=int(random.integers(40, 81)))


SETS: dict[str, tuple[int, Callable[[Array, np.random.Generator], bytes]]] = {
    "single": (1, lambda images, random: plain_file(single(images, random), random)),
    "row": (5, lambda images, random: plain_file(row(images, random), random)),
    "ruled": (5, lambda images, random: ruled_file(row(images, random, 60, 220), random)),
    # 0 means a random number of digits, one to five.
    **{kind: (0, functools.partial(photographs.photograph, kind)) for kind in photographs.KINDS},
}


# Reading --------------------------------------------------------------------------------------------------------------


def align(read: Sequence[int], written: Sequence[int]) -> tuple[int, list[bool]]:
    """Aligns the digits read with the true ones: the edit distance, and whether each digit read is correct."""
    costs = np.zeros((len(read) + 1, len(written) + 1), int)
    costs[:, 0], costs[0] = np.arange(len(read) + 1), np.arange(len(written) + 1)
    for i, digit in enumerate(read, 1):
        for j, wanted in enumerate(written, 1):
            costs[i, j] = min(costs[i - 1, j - 1] + (digit != wanted), costs[i - 1, j] + 1, costs[i, j - 1] + 1)
    right = [False] * len(read)
    i, j = len(read), len(written)
    while i and j:
        if costs[i, j] == costs[i - 1, j - 1] + (read[i - 1] != written[j - 1]):
            i, j = i - 1, j - 1
            right[i] = read[i] == written[j]
        elif costs[i, j] == costs[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return int(costs[-1, -1]), right


def score(lines: Sequence[dict[str, Any]], written: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Computes the scores of `predict --json`; `lines` is its parsed output, in order."""
    counts = dict.fromkeys(("wrong", "exact", "flagged", "found", "confident_wrong", "right_doubted"), 0)
    for line, truth in zip(lines, written, strict=True):
        digits = line.get("digits", [])
        edits, right = align([digit["digit"] for digit in digits], truth)
        counts["wrong"] += min(edits, len(truth))
        counts["exact"] += not edits
        counts["flagged"] += bool(edits) and (not digits or any(digit["doubtful"] for digit in digits))
        counts["found"] += len(digits)
        for digit, is_right in zip(digits, right, strict=True):
            counts["confident_wrong"] += not is_right and not digit["doubtful"]
            counts["right_doubted"] += is_right and digit["doubtful"]
    total, missed = sum(map(len, written)), len(lines) - counts["exact"]
    return {
        "pictures": len(lines), "digits": total, "digits_read": round(1 - counts["wrong"] / total, 4),
        "pictures_read": round(counts["exact"] / len(lines), 4),
        "misses_flagged": round(counts["flagged"] / missed, 4) if missed else None,
        "confident_and_wrong": round(counts["confident_wrong"] / max(1, counts["found"]), 4),
        "right_but_doubted": counts["right_doubted"],
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Renders the pictures, runs `predict` on them, and prints the scores."""
    del argv
    from mnist_flax.analysis.evaluation import load_predictor
    from mnist_flax.analysis.run_data import load_data
    from mnist_flax.run.provenance import provenance

    values = flags.FLAGS
    _, info = load_predictor(Path(values.workdir), values.checkpoint)
    _, splits = load_data(info.config, info.fingerprint, {})
    examples = getattr(splits, values.split)
    result: dict[str, Any] = {
        "dataset": info.config.data.name,
        "split": values.split,
        "seed": values.seed,
        "step": info.steps[0],
    }
    for number, (name, (length, draw)) in enumerate(SETS.items()):
        count: int = values.get_flag_value(name, 0)
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            written = []
            for i in tqdm(range(count), name, file=sys.stderr, mininterval=1.0):
                random = np.random.default_rng((values.seed, number, i))
                rows = random.integers(len(examples.label), size=length or random.integers(1, 6))
                written.append(examples.label[rows].tolist())
                content = draw(examples.image[rows][..., 0], random)
                (Path(folder) / f"{i:05d}.png").write_bytes(content)
            command = [sys.executable, "-m", "mnist_flax.predict", f"--workdir={values.workdir}",
                       f"--checkpoint={values.checkpoint}", "--json", folder]  # fmt: skip
            started = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            seconds = time.perf_counter() - started
            if done.returncode not in (0, 1):  # 1: a picture could not be read
                raise UserError(f"predict failed with status {done.returncode}")
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            result[name] = {**score(lines, written), "seconds": round(seconds, 1)}
        print(json.dumps({name: result[name]}), file=sys.stderr)
    print(json.dumps({**result, **provenance()}))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the folder of a run", required=True)
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step")
    flags.DEFINE_enum("split", "test", ["test", "train"], "which images are drawn; choose on train, report test")
    flags.DEFINE_integer("seed", 0, "seed of the renderer", lower_bound=0)
    flags.DEFINE_integer("single", 2000, "pictures of one digit; 0 leaves them out", lower_bound=0)
    flags.DEFINE_integer("row", 400, "pictures of five digits; 0 leaves them out", lower_bound=0)
    flags.DEFINE_integer(
        "ruled", 300, "pictures of five digits on lined or squared paper; 0 leaves them out", lower_bound=0
    )
    for photograph_kind in photographs.KINDS:
        flags.DEFINE_integer(photograph_kind, 30, "photographs of one to five digits", lower_bound=0)
    cli.run(main)
