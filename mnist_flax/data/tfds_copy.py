"""Prepared copies: TFDS folders, written and read without TensorFlow.

TFDS' own builders parse and encode with TensorFlow. The subclass here keeps their names, versions and features, but
does the same work without it, and writes a normal TFDS folder in array_record format. Two things differ on purpose:
records stay in the order of the original files, and EMNIST's images are stored upright.
"""

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from absl import logging

from mnist_flax.data.registry import DATASETS, IMAGE_SIZE
from mnist_flax.data.splits import Examples

_UPRIGHT = "The images are stored upright."  # in the description of our copies, not in TFDS's own


def copy_dir(name: str, data_dir: Path) -> Path:
    """Returns the TFDS folder of a dataset, such as `DATA_DIR/emnist/letters/3.1.0`."""
    return data_dir / name / DATASETS[name].tfds_version


def find_flaw(name: str, data_dir: Path) -> str:
    """Returns why a prepared copy is unusable, according to its dataset_info.json; empty if it is usable."""
    try:
        info = json.loads((copy_dir(name, data_dir) / "dataset_info.json").read_bytes())
        rows = {split["name"]: sum(map(int, split["shardLengths"])) for split in info["splits"]}
        if info["fileFormat"] != "array_record":
            return f"its format is {info['fileFormat']}, which only TensorFlow reads"
        if not info.get("disableShuffling"):
            return "its records were shuffled when they were written"
        if DATASETS[name].transposed and _UPRIGHT not in info["description"]:
            return "its images are transposed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "it is incomplete: dataset_info.json is missing or cannot be read"
    expected = DATASETS[name].split_sizes
    return "" if rows == expected else f"its numbers of rows are {rows}, not {expected}"


def write_copy(name: str, train: Examples, test: Examples, data_dir: Path) -> None:
    """Writes the TFDS folder `copy_dir(name, data_dir)`; raises OSError if it cannot be written."""
    with _quiet():
        try:
            _builder(name, data_dir, train=train, test=test).download_and_prepare()
        except RuntimeError as error:  # TFDS raises it for any file error, such as a full disk
            raise OSError(str(error)) from error


def read_copy(name: str, data_dir: Path) -> tuple[Examples, Examples]:
    """Decodes the training and the test split of a prepared copy; a damaged record can raise almost any error."""
    import tensorflow_datasets as tfds
    from PIL import Image

    with _quiet():
        # If TFDS decoded the images, it would take longer and warn that OpenCV is not installed.
        sources = _builder(name, data_dir).as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
        splits = []
        for source in (sources["train"], sources["test"]):
            images = np.empty((len(source), IMAGE_SIZE, IMAGE_SIZE, 1), np.uint8)
            labels = np.empty(len(source), np.int32)
            for start in range(0, len(source), 1000):  # one by one takes twice as long
                rows = range(start, min(start + 1000, len(source)))
                for i, record in zip(rows, source.__getitems__(rows), strict=True):
                    images[i, ..., 0] = np.asarray(Image.open(io.BytesIO(record["image"])))
                    labels[i] = record["label"]
            splits.append(Examples(images, labels))
    return splits[0], splits[1]


def _builder(name: str, data_dir: Path, **examples: Examples) -> Any:
    """Returns the TFDS builder of a dataset in a folder; it can write the given examples."""
    import tensorflow_datasets as tfds

    family, _, config = name.partition("/")
    stock, version = tfds.builder_cls(family), tfds.core.Version(DATASETS[name].tfds_version)

    class Builder(stock, skip_registration=True):  # type: ignore[misc, valid-type, call-arg]
        name = family
        VERSION = version
        url_infos: Mapping[str, Any] = MappingProxyType({})  # there is nothing to download

        def _info(self) -> Any:
            info = super()._info()
            info.as_proto.description = f"{info.description.partition('Note:')[0]} {_UPRIGHT}"
            info.as_proto.disable_shuffling = True
            return info

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            return {split: self._generate_examples(part) for split, part in examples.items()}

        def _generate_examples(self, part: Examples) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, (image, label) in enumerate(zip(part.image, part.label, strict=True)):
                yield i, {"image": encode_png(image[..., 0]), "label": int(label)}

    return Builder(data_dir=data_dir, config=config or None, file_format="array_record")


def encode_png(image: np.ndarray) -> bytes:
    """Encodes a grey image, `u8[H,W]`, as PNG (W3C, 2003), in a third of Pillow's time for one this small."""
    height, width = image.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter type: 0, no filter
    rows[:, 1:] = image
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey, default methods, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing, logging and drawing progress bars, and restores its settings afterwards."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import tqdm_utils

    verbosity, bars = logging.get_verbosity(), tqdm_utils._active
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.display_progress_bar(bars)
