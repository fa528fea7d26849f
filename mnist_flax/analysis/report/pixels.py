"""Pictures made of pixels: digits, filters and activations, as PNG."""

import base64
import io

import numpy as np

# Okabe and Ito's (2008) vermillion and blue, which everyone can tell apart; both show on light and on dark paper.
POSITIVE = (213, 94, 0)
NEGATIVE = (0, 114, 178)


def png(pixels: np.ndarray, scale: int = 1) -> bytes:
    """Encodes grey `u8[H,W]` or coloured `u8[H,W,4]` pixels, each as a square of `scale` pixels."""
    from PIL import Image

    enlarged = np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(enlarged)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(picture: bytes) -> str:
    """Returns a PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def sheet(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Arranges pictures in rows with gaps between, `[N,h,w,...] -> [H,W,...]`; places that are left over are zeros."""
    count, height, width = images.shape[:3]
    columns = min(columns, max(count, 1))
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, *images.shape[3:]), images.dtype)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def colors(values: np.ndarray, limit: float) -> np.ndarray:
    """Paints numbers, `f32[...] -> u8[...,4]`: above 0 orange, below 0 blue, the nearer to 0 the more transparent.

    Args:
      values: any numbers.
      limit: the magnitude that is painted opaque.
    """
    strength = np.clip(np.abs(values) / (limit or 1.0), 0, 1)
    painted = np.where((values >= 0)[..., None], POSITIVE, NEGATIVE)
    alpha = np.rint(255 * strength)[..., None]
    return np.concatenate([painted, alpha], axis=-1).astype(np.uint8)
