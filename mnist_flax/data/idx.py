"""Reads IDX files, the format in which MNIST was published."""

import contextlib
import gzip
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from mnist_flax.data.registry import IMAGE_SIZE, Dataset
from mnist_flax.data.splits import Examples
from mnist_flax.errors import DataError


def read_files(dataset: Dataset, folder: Path) -> tuple[Examples, Examples]:
    """Reads the training and test splits from a dataset's files, with all images upright.

    Raises:
      DataError: a file is missing, damaged, or does not contain what the dataset's entry says.
    """
    shapes = [shape for rows in dataset.split_sizes.values() for shape in ((rows, IMAGE_SIZE, IMAGE_SIZE), (rows,))]
    names = dataset.archive_members or [str(file.path_in(folder)) for file in dataset.files]
    with contextlib.ExitStack() as stack:
        try:
            if dataset.archive_members:
                archive = stack.enter_context(zipfile.ZipFile(folder / dataset.files[0].name))
                files = [stack.enter_context(archive.open(name)) for name in names]
            else:
                files = [stack.enter_context(open(name, "rb")) for name in names]
            arrays = [read_idx(*file) for file in zip(files, names, shapes, strict=True)]
        except (OSError, zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{folder / dataset.files[0].name}: cannot be read ({error})") from error
    splits = []
    for name, images, labels in zip(names[1::2], arrays[::2], arrays[1::2], strict=True):
        if labels.max() >= dataset.num_classes:
            raise DataError(
                f"{name}: contains label {labels.max()}, but there are {dataset.num_classes} classes, with the labels 0"
                f" to {dataset.num_classes - 1}"
            )
        upright = images.transpose(0, 2, 1) if dataset.transposed else images
        splits.append(Examples(upright[..., None], labels.astype(np.int32)))
    return splits[0], splits[1]


def read_idx(file: IO[bytes], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not, which must have exactly this shape.

    Never decompresses more than the shape needs, whatever the file claims or contains.

    Raises:
      DataError: the file is damaged or contains something else; the message calls it `name`.
    """
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)  # 8: the elements are unsigned bytes
    size = int(np.prod(shape))
    try:
        start = file.read(2)
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file
        found = stream.read(len(header))
        # Try to read one byte too many: reaching the end of the file also makes gzip check its CRC.
        body = stream.read(size + 1) if found == header else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: is truncated or damaged ({error})") from error
    if found != header:
        raise DataError(f"{name}: should contain bytes of shape {shape}, but {_describe(found)}")
    if len(body) != size:
        count = "more" if len(body) > size else f"only {len(body)}"
        raise DataError(f"{name}: should contain {size} values, but contains {count}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _describe(header: bytes) -> str:
    """Describes what the header of a file claims."""
    if not header.startswith(b"\0\0\x08"):
        return f"starts with 0x{header[:4].hex()}, so it is not an IDX file of bytes"
    if len(header) < 8:
        return "ends within its header"
    sizes = struct.unpack_from(f">{len(header) // 4 - 1}I", header, 4)[: header[3]]
    return f"its header says {' x '.join(map(str, sizes))}{' x ...' * (header[3] > len(sizes))}"
