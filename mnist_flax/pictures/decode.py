"""Decodes image files in common formats to upright greyscale pictures of limited size."""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mnist_flax.errors import UserError, reason
from mnist_flax.pictures.ink import shrunk

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".pdf")  # often pictures, but Pillow cannot read them by itself

_SIDE = 1000  # pixels: larger pictures are averaged down to this longest side, enough for a page of digits
_MAX_WEBP_PIXELS = 50_000_000  # Pillow decodes WEBP whole, and needs 16 bytes per pixel


class PictureError(UserError):
    """A picture cannot be read, or contains no ink."""

    exit_status = 1


class Picture(NamedTuple):
    """A decoded picture."""

    # `u8[H,W]`, upright, at most 1,000 pixels a side; transparent parts are white, or black if the ink is white
    grey: np.ndarray
    size: tuple[int, int]  # width and height of the original, upright

    @property
    def scale(self) -> float:
        """Original pixels per pixel of `grey`, along each axis."""
        return max(self.size) / max(self.grey.shape)


def decode(content: bytes) -> Picture:
    """Decodes an image file; if it has several frames or pages, only the first.

    Raises:
      PictureError: the file is empty or damaged, is not in one of the `FORMATS`, or has more pixels, according to its
        header, than `PIL.Image.MAX_IMAGE_PIXELS` or the limit for WEBP.
    """
    if not content:
        raise PictureError("is empty")
    limit = Image.MAX_IMAGE_PIXELS or 0
    Image.init()  # registers the less common formats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about metadata, which is not used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                size = image.size
                if image.format == "WEBP":
                    limit = min(limit or _MAX_WEBP_PIXELS, _MAX_WEBP_PIXELS)
                    if image.width * image.height > limit:
                        raise Image.DecompressionBombError
                image.draft("L", (_SIDE, _SIDE))  # JPEG only: decodes large images at half their size or less
                stored = _to_grey(image)
                grey = _upright(stored, image)
                size = size if grey.size == stored.size else size[::-1]
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise PictureError(
                f"has more than {limit:,} pixels, which this program does not open; make it smaller"
            ) from error
        except UnidentifiedImageError as error:
            brands = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}
            foreign = brands.get(content[8:12]) if content[4:8] == b"ftyp" else None
            foreign = "PDF" if content.startswith(b"%PDF-") else foreign
            hint = f", but {foreign}; save it as JPEG" if foreign else ""
            raise PictureError(f"is not a picture in a known format ({', '.join(FORMATS)}){hint}") from error
        except MemoryError:  # `read_one` reports it
            raise
        except Exception as error:  # decoders raise almost anything for a damaged file
            raise PictureError(f"cannot be decoded; it may be damaged ({reason(error)})") from error
    return Picture(shrunk(np.asarray(grey), _SIDE), size)


def _upright(grey: Image.Image, image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation of `image` to `grey`; damaged EXIF data is ignored."""
    try:
        grey.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(grey)
    except Exception:  # Pillow raises almost anything for damaged EXIF data
        return grey


def _to_grey(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit greyscale, and downsamples it if it is large."""
    factor = max(1, max(image.size) // _SIDE)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return _deep_to_bytes(image).reduce(factor)
    if not image.has_transparency_data:
        return image.convert("L").reduce(factor)
    grey = _over(image, "white").reduce(factor)
    if _contrast(grey) < 32:  # perhaps light ink on a transparent background
        grey = max(grey, _over(image, "black").reduce(factor), key=_contrast)
    return grey


def _contrast(grey: Image.Image) -> int:
    """Returns the difference between the lightest and the darkest pixel."""
    return int(np.ptp(np.asarray(grey)))


def _over(layers: Image.Image, colour: str) -> Image.Image:
    """Composites an image with transparency over a solid colour."""
    layers = layers.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, colour), layers).convert("L")


def _deep_to_bytes(image: Image.Image) -> Image.Image:
    """Scales pixels of more than 8 bits to 8 bits.

    If no value is negative and the largest is above 1, black is 0 and white is the highest number with the bits in use.
    Otherwise, black is 0 or the lowest negative value, and white is the largest value.
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("its pixels are not all finite")
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if low >= 0 and high > 1:
        high = 2.0 ** max(8, int(high).bit_length()) - 1  # 255, 1023, 4095, ..., 65535
    scaled = np.subtract(values, low, dtype=np.float32)  # float64 would need twice the memory
    scaled *= 255 / max(high - low, 1e-9)
    return Image.fromarray(np.round(scaled, out=scaled).astype(np.uint8))
