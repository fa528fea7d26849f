"""Renders a dataset's images as photographs of handwritten digits, as a phone would take them on a desk.

Used by bench_predict.py. The renderer shares no code with the reader that `predict` uses. The kinds:

- table: a sheet on a table, with the sheet's edge in view on one to four sides.
- shadow: a sheet under a hard shadow, which may fall across the digits.
- grid: digits on a printed grid or in the boxes of a form. The lines are about as dark as the pen and may touch digits.
- turned: a sheet rotated by 15 to 25 degrees, plain or lined; the table may be in view.
"""

import io

import numpy as np
from PIL import Image
from scipy import ndimage

Array = np.ndarray
KINDS = ("table", "shadow", "grid", "turned")


def pen_stroke(image: Array, size: float, random: np.random.Generator) -> Array:
    """Redraws an image with a sharp pen, `u8[28,28] -> f32[h,w]`, so that its longer side is `size` pixels."""
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    tight = np.pad(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 4).astype(np.float32) / 255
    zoom = max(size / max(len(rows), len(columns)), 4.0)
    smooth = ndimage.zoom(tight, zoom, order=3, grid_mode=True, mode="grid-constant")
    smooth = ndimage.rotate(smooth, random.uniform(-6, 6), order=1)
    y, x = np.mgrid[0 : smooth.shape[0], 0 : smooth.shape[1]].astype(np.float32)
    waves = [random.uniform(0, 0.02) * size * np.sin(2 * np.pi * along / size * random.uniform(0.5, 1.5)
             + random.uniform(0, 6)) for along in (x, y)]  # fmt: skip
    smooth = ndimage.map_coordinates(smooth, [y + waves[0], x + waves[1]], order=1)
    ink = np.clip((smooth - random.uniform(0.3, 0.6)) * 4 + 0.5, 0, 1)
    rows, columns = np.flatnonzero((ink > 0.2).any(1)), np.flatnonzero((ink > 0.2).any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    factor = size / max(ink.shape)
    height, width = (max(2, round(side * factor)) for side in ink.shape)
    return np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))


def blotches(shape: tuple[int, ...], scale: float, random: np.random.Generator) -> Array:
    """Returns a smooth random texture of a given grain size, `f32[H,W]`, with mean 0 and standard deviation 1."""
    small = random.normal(size=[max(2, round(side / scale)) for side in shape])
    image = Image.fromarray(small.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    values = np.asarray(image)
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def write_sheet(images: Array, kind: str, random: np.random.Generator) -> Array:
    """Writes digits in one line on a sheet; returns the ink coverage, `f32[H,W]`."""
    size = float(random.uniform(70, 200))
    pitch = size * random.uniform(1.1, 1.7)
    roomy = 0.3 if kind == "grid" else 0.8
    height = round(size * random.uniform(1.5, 1.5 + 3 * roomy))
    width = round(pitch * len(images) + size * random.uniform(0.4, 0.4 + 3 * roomy))
    height, width = max(height, round(width * 0.4)), max(width, round(height * 0.7))
    cover = np.zeros((height, width), np.float32)
    left = random.uniform(0.15, 0.85) * (width - pitch * len(images))
    middle = random.uniform(size * 0.7, height - size * 0.7)
    for place, image in enumerate(images):
        ink = pen_stroke(image, size * random.uniform(0.85, 1.1), random)
        x = round(left + pitch * (place + 0.5) - ink.shape[1] / 2 + size * random.uniform(-0.05, 0.05))
        y = round(middle - ink.shape[0] / 2 + size * random.uniform(-0.06, 0.06))
        x, y = max(2, x), max(2, y)
        part = cover[y : y + ink.shape[0], x : x + ink.shape[1]]
        np.maximum(part, ink[: part.shape[0], : part.shape[1]], out=part)
    if kind == "grid" and random.random() < 0.5:
        cover = np.maximum(cover, form_cells(cover.shape, size, pitch, left, middle, len(images), random))
    elif kind == "grid":
        cover = np.maximum(cover, printed_grid(cover.shape, size, random))
    return cover


def form_cells(
    shape: tuple[int, ...],
    size: float,
    pitch: float,
    left: float,
    middle: float,
    count: int,
    random: np.random.Generator,
) -> Array:
    """Prints a box around each digit, in one row or with empty rows above and below, `f32[H,W]`."""
    width = max(1.0, size * random.uniform(0.015, 0.09))
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    cell = size * random.uniform(1.05, 1.5)
    rows = random.integers(0, 3)
    apart = 0.0 if random.random() < 0.6 else pitch * random.uniform(0.03, 0.1)  # between separate boxes
    cover = np.zeros(shape, np.float32)
    for row in range(-int(rows), int(rows) + 1):
        centre = middle + row * (cell + 2 * apart)
        for place in range(count):
            across = np.abs(x - (left + pitch * (place + 0.5))) - (pitch / 2 - apart)
            down = np.abs(y - centre) - cell / 2
            cover = np.maximum(cover, np.clip(width / 2 + 0.5 - np.abs(np.maximum(across, down)), 0, 1))
    return cover * random.uniform(0.6, 1.0)


def printed_grid(shape: tuple[int, ...], size: float, random: np.random.Generator) -> Array:
    """Prints squares or lines over the whole sheet, `f32[H,W]`."""
    width = max(1.0, size * random.uniform(0.012, 0.08))
    spacing = size * random.uniform(0.7, 1.8)
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    cover = np.zeros(shape, np.float32)
    for values in (y, x) if random.random() < 0.75 else (y,):
        distance = np.abs((values + random.uniform(0, spacing)) % spacing - spacing / 2)
        cover = np.maximum(cover, np.clip(width / 2 + 0.5 - distance, 0, 1))
    return cover * random.uniform(0.6, 1.0)


def table_top(shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Paints a table top, `f32[H,W,3]`: wood, cloth, plain or tiles, from dark to light."""
    colour = np.clip(random.uniform(0.08, 0.75) * np.array([1.0, *random.uniform(0.55, 1.05, 2)]), 0, 1)
    kind = random.choice(["wood", "cloth", "plain", "tiles"])
    texture: np.ndarray
    if kind == "wood":
        grain = random.uniform(20, 60)
        stretched = blotches((shape[0], max(2, shape[1] // 12)), grain / 6, random)
        texture = np.asarray(Image.fromarray(stretched).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
        texture = np.sin(3 * texture) if random.random() < 0.5 else texture
    elif kind == "cloth":
        texture = random.normal(size=shape).astype(np.float32)
    elif kind == "tiles":
        y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
        side = random.uniform(0.2, 0.6) * shape[1]
        lines = np.minimum((x + 37) % side, (y + 11) % side) < 0.012 * shape[1]
        texture = -6.0 * lines.astype(np.float32)
    else:
        texture = 0.3 * blotches(shape, shape[1] / 3, random)
    return np.clip(colour * (1 + random.uniform(0.03, 0.12) * texture[..., None]), 0, 1).astype(np.float32)


def hard_shadow(shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Returns the brightness under the sharp shadow of a straight edge, of fingers or of a phone, `f32[H,W]`."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    side = max(shape)
    angle = random.uniform(0, 2 * np.pi)
    across = np.cos(angle) * (x - random.uniform(0.3, 0.7) * shape[1]) + np.sin(angle) * (
        y - random.uniform(0.3, 0.7) * shape[0]
    )
    along = -np.sin(angle) * x + np.cos(angle) * y
    kind = random.choice(["edge", "fingers", "phone"])
    if kind == "fingers":
        across = across + side * random.uniform(0.05, 0.15) * np.abs(np.sin(along / side * random.uniform(4, 9)))
    elif kind == "phone":
        across = np.maximum(across, np.abs(along - along.mean()) - side * random.uniform(0.15, 0.35))
    softness = random.uniform(0.3, 3.0)
    return 1 - random.uniform(0.35, 0.7) / (1 + np.exp(np.clip(across / softness, -30, 30)))


def photograph(kind: str, images: Array, random: np.random.Generator) -> bytes:
    """Writes a line of digits and photographs it, `u8[N,28,28]` -> the bytes of a JPEG."""
    cover = write_sheet(images, kind, random)
    light = random.uniform(0.75, 1.0)
    paper = np.clip(light - random.uniform(0, 0.12, 3), 0, 1)
    pen = np.clip(paper.mean() * random.uniform(0.1, 0.45) + random.uniform(-0.05, 0.1, 3), 0, 1)
    sheet = paper + 0.012 * blotches(cover.shape, random.uniform(1, 8), random)[..., None]
    if kind in ("turned", "table") and random.random() < 0.35:
        y = np.mgrid[0 : cover.shape[0], 0 : cover.shape[1]][0]
        spacing = cover.shape[0] * random.uniform(0.15, 0.4)
        lined = 0.6 * np.clip(1.2 - np.abs((y + random.uniform(0, spacing)) % spacing - spacing / 2), 0, 1)
        sheet = sheet + lined[..., None] * (random.uniform(0.5, 0.8) * paper - sheet)
    sheet = sheet + cover[..., None] * (pen - sheet)
    # The sheet's corners in the photograph.
    height, width = cover.shape
    shows_table = kind == "table" or (kind == "turned" and random.random() < 0.6)
    turn = np.deg2rad(random.choice([-1, 1]) * random.uniform(15, 25) if kind == "turned" else random.uniform(-5, 5))
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], float) - (width / 2, height / 2)
    corners *= 1 + random.uniform(-0.03, 0.03, corners.shape)
    corners = corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    low, high = corners.min(0), corners.max(0)
    if shows_table:
        margins = random.uniform(0.03, 0.35, 4) * np.where(random.random(4) < 0.7, 1, -0.15)
        margins[random.integers(4)] = random.uniform(0.08, 0.35)
        low, high = low - margins[:2] * (high - low), high + margins[2:] * (high - low)
    frame_size = np.maximum(high - low, 60)
    zoom = random.uniform(500, 1800) / frame_size.max()
    frame_width, frame_height = (max(40, round(side * zoom)) for side in frame_size)
    target = (corners - low) * zoom
    source = [(0, 0), (width, 0), (width, height), (0, height)]
    rows, values = [], []
    for (tx, ty), (sx, sy) in zip(target, source, strict=True):
        rows += [[tx, ty, 1, 0, 0, 0, -sx * tx, -sx * ty], [0, 0, 0, tx, ty, 1, -sy * tx, -sy * ty]]
        values += [sx, sy]
    coefficients = np.linalg.solve(np.array(rows), np.array(values))

    def project(layer: Array) -> Array:
        image = Image.fromarray(np.round(np.clip(layer, 0, 1) * 255).astype(np.uint8))
        size = (frame_width, frame_height)
        moved = image.transform(size, Image.Transform.PERSPECTIVE, tuple(coefficients), Image.Resampling.BICUBIC)
        return np.asarray(moved).astype(np.float32) / 255

    if shows_table:
        inside = project(np.ones(cover.shape))[..., None]
        cast = ndimage.shift(ndimage.gaussian_filter(inside[..., 0], 6), random.uniform(-8, 8, 2), mode="nearest")
        table = table_top(inside.shape[:2], random) * (1 - random.uniform(0, 0.5) * cast[..., None])
        photo = table + inside * (project(sheet) - table)
    else:  # the paper extends beyond the frame
        photo = paper + project(np.ones(cover.shape))[..., None] * (project(sheet) - paper)
    return develop(photo, kind, random)


def uneven_light(shape: tuple[int, ...], angle: float, strength: float) -> Array:
    """Returns a linear brightness gradient across a picture, `f32[H,W]`, at most 1."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    slope = np.cos(angle) * x / shape[1] + np.sin(angle) * y / shape[0]
    return 1 - strength * (slope - slope.min()) / np.ptp(slope)


def develop(photo: Array, kind: str, random: np.random.Generator) -> bytes:
    """Adds uneven light, blur and noise to a scene and saves it, `f32[H,W,3]` -> the bytes of a JPEG."""
    angle = random.uniform(0, 2 * np.pi)
    light = uneven_light(photo.shape[:2], angle, random.uniform(0, 0.3))
    if kind == "shadow" or random.random() < 0.15:
        light = light * hard_shadow(light.shape, random)
    photo = ndimage.gaussian_filter(photo * light[..., None], (*[random.uniform(0.3, 1.6)] * 2, 0))
    photo = photo + random.normal(0, random.uniform(0.003, 0.03), photo.shape)
    buffer = io.BytesIO()
    pixels = np.round(np.clip(photo, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(random.integers(50, 93)))
    return buffer.getvalue()
