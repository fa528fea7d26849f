"""The bitmap pictures of a report, as PNG: digits, filters and activations."""

import base64
import io

import jax
import numpy as np

from mnist_flax import rng
from mnist_flax.analysis.evaluation import Facts
from mnist_flax.analysis.report import layers
from mnist_flax.config import Config, Program
from mnist_flax.data import batches
from mnist_flax.data.augment import augment
from mnist_flax.data.splits import Splits
from mnist_flax.step import Variables

# Vermilion and blue of the colour-blind-safe palette of Okabe and Ito (2008), visible in light and in dark mode.
POSITIVE = (213, 94, 0)
NEGATIVE = (0, 114, 178)

CHANNELS = 32  # channels shown per layer, at most
STAGES = 12  # layers whose inputs are shown, at most
NUM_EXAMPLES = 4  # digits whose activations are shown
TRAINING_IMAGES, VARIANTS = 10, 7  # training images shown, and augmented copies of each
ON_PAGE = ("filters", "augmented")  # the sheets shown on the page


def png(pixels: np.ndarray, scale: int = 1) -> bytes:
    """Encodes grey `u8[H,W]` or coloured `u8[H,W,4]` pixels, each as a square of `scale` pixels."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(picture: bytes) -> str:
    """Returns a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def sheet(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Arranges pictures in a grid with gaps between them, `[N,h,w,...] -> [H,W,...]`; empty cells are 0."""
    count, height, width = images.shape[:3]
    columns = min(columns, max(count, 1))
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, *images.shape[3:]), images.dtype)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def colors(values: np.ndarray, limit: float) -> np.ndarray:
    """Maps numbers to colours, `f32[...] -> u8[...,4]`: vermilion above 0, blue below, opaque from `limit` on."""
    strength = np.clip(np.abs(values) / (limit or 1.0), 0, 1)
    painted = np.where((values >= 0)[..., None], POSITIVE, NEGATIVE)
    alpha = np.rint(255 * strength)[..., None]
    return np.concatenate([painted, alpha], axis=-1).astype(np.uint8)


def thumbnails(facts: Facts, images: np.ndarray) -> dict[int, str]:
    """Returns the test images that the page shows as data URIs, keyed by row."""
    galleries = [gallery for gallery in facts["galleries"].values() if isinstance(gallery, list)]
    rows = {example["row"] for gallery in galleries for example in gallery}
    rows.update(*(pair["rows"] for pair in facts["confused_pairs"]))
    return {row: data_uri(png(images[row, :, :, 0])) for row in sorted(rows)}


def sheets(
    program: Program, variables: Variables, galleries: Facts, augmented_images: np.ndarray, images: np.ndarray
) -> dict[str, bytes]:
    """Draws the first layer's filters, `augmented` training images, and each gallery in the order of `metrics.json`.

    Sheets that do not apply to the run are left out.
    """
    drawn = {}
    filters = layers.first_filters(program, variables)
    if filters is not None:
        drawn["filters"] = png(sheet(colors(filters[:CHANNELS], float(np.abs(filters[:CHANNELS]).max())), 8), 12)
    if len(augmented_images):
        drawn["augmented"] = png(sheet(augmented_images[..., 0], 1 + VARIANTS, gap=2), 2)
    for name, gallery in galleries.items():
        if isinstance(gallery, list) and gallery:
            digits = images[[example["row"] for example in gallery], :, :, 0]
            drawn[name] = png(sheet(digits, 8, gap=2), 3)
    return drawn


def augmented(config: Config, splits: Splits) -> tuple[np.ndarray, np.ndarray]:
    """Augments a few training images, spread over the classes, as training does.

    Returns:
      Their rows, and each original followed by its `VARIANTS` augmented copies, `u8[N*(1+VARIANTS),28,28,1]`; empty if
      the run has no augmentation.
    """
    train, _ = batches.rows_of(splits.train.label, config.data)
    if not config.augment.strengths:
        return train[:0], splits.train.image[:0]
    rows = batches.spread_rows(splits.train.label, train, min(TRAINING_IMAGES, len(train)))
    rows = rows[np.argsort(splits.train.label[rows], kind="stable")]
    originals = splits.train.image[rows]
    repeated, labels = (np.repeat(array, VARIANTS, axis=0) for array in (originals, splits.train.label[rows]))

    def draw(images: jax.Array, labels: jax.Array, root: jax.Array) -> jax.Array:
        return augment(config.augment, images, labels, rng.stream(root, "augment", 0))

    # Compiled without optimisation: compiling takes longer than running, and this halves the compile time.
    unoptimised = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 0})
    variants = np.asarray(unoptimised(repeated, labels, rng.root_key(config.seed)))
    of_row = variants.reshape(len(rows), VARIANTS, *originals.shape[1:])
    return rows, np.concatenate([originals[:, None], of_row], axis=1).reshape(-1, *originals.shape[1:])


def draw_layer_inputs(
    program: Program, variables: Variables, galleries: Facts, images: np.ndarray
) -> tuple[Facts, list[list[str]]]:
    """Draws the input of each layer for a few digits: some classified correctly, and the worst mistake.

    Returns:
      What is drawn: the examples, and each layer's name, shape and number of channels shown; and a picture for each
      layer and example. Within a layer, the same value has the same colour.
    """
    mistakes, correct = galleries["mistakes"][:1], galleries["correct"]
    # The gallery is sorted by class, so evenly spaced examples cover the classes.
    wanted = min(NUM_EXAMPLES - len(mistakes), len(correct))
    examples = [correct[i] for i in np.linspace(0, len(correct) - 1, wanted).astype(int)] + mistakes
    found = layers.layer_inputs(program, variables, images[[example["row"] for example in examples]])
    found = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, STAGES).astype(int))]
    stages, drawn = [], []
    for name, values in found:
        is_map = values.ndim == 4
        if is_map:
            tiles, columns = np.moveaxis(values, -1, 1)[:, :CHANNELS], 8
        else:  # a vector: each value is a tile of one pixel
            tiles, columns = values.reshape(len(values), -1)[:, :, None, None], 10 if name == "logits" else 16
        colored = colors(tiles, float(np.abs(tiles).max()))
        drawn.append([data_uri(png(sheet(example, columns, gap=int(is_map)), 2)) for example in colored])
        stages.append({"name": name, "shape": values.shape[1:], "channels": tiles.shape[1]})
    return {"examples": examples, "stages": stages}, drawn
