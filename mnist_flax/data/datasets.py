"""The datasets as TFDS builders that need no TensorFlow, and the digits embedded in scikit-learn.

TFDS' own builders unzip, parse and encode with TensorFlow. The subclasses here keep their names, versions, features,
addresses and checksums, and do the same work with numpy and Pillow; what they write is a normal TFDS folder in
array_record format. Two things differ on purpose: records stay in the order of the original files, and the images of
EMNIST, which its files hold transposed, are stored upright.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urljoin

import numpy as np
from absl import logging

from mnist_flax.data.framing import frame
from mnist_flax.errors import DataError

# Also part of the path of a prepared copy, which is looked for without importing TFDS.
VERSIONS = {"mnist": "3.0.1", "fashion_mnist": "3.0.1", "kmnist": "3.0.1", "emnist": "3.1.0"}
SPLITS = ("train", "test")
UPRIGHT = "The images are stored upright."  # told by the description of our EMNIST, unlike that of TFDS'

_SIDE = 28
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_EMNIST_MEMBERS = ("gzip/emnist-{}-{}-images-idx3-ubyte.gz", "gzip/emnist-{}-{}-labels-idx1-ubyte.gz")


class Examples(NamedTuple):
    """Images `u8[N,28,28,1]`, white on black, and labels `i32[N]`, on the host or on the device."""

    image: Any  # np.ndarray or jax.Array: most functions take either
    label: Any


class OfficialFile(NamedTuple):
    """A file as its publisher has it, by TFDS' registry; `size` in bytes, `sha256` in hexadecimal."""

    name: str
    url: str
    size: int
    sha256: str


def copy_dir(name: str, data_dir: Path) -> Path:
    """Returns where TFDS keeps the prepared copy of a dataset, such as `mnist` or `emnist/letters`."""
    return data_dir / name / VERSIONS[family(name)]


def official_files(name: str) -> tuple[OfficialFile, ...]:
    """Returns the files that a dataset is made of."""
    cls = builder_class(family(name))
    files = [""] if family(name) == "emnist" else itertools.chain(*_FILES.values())  # EMNIST: one zip with all in it
    urls = [urljoin(cls.URL, file) for file in files]
    infos = cls.url_infos
    return tuple(OfficialFile(infos[url].filename, url, int(infos[url].size), infos[url].checksum) for url in urls)


def check_file(path: Path, official: OfficialFile) -> None:
    """Checks that a file is byte for byte what its publisher has.

    Raises:
      DataError: it is missing, cannot be read, or has another size or SHA-256.
    """
    remedy = f"fetch it from {official.url}"
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file; {remedy}")
        size = path.stat().st_size
        if size != official.size:
            raise DataError(f"{path}: {size} bytes instead of {official.size}{_whose(size)}; {remedy}")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable, or {remedy}") from error
    if sha256 != official.sha256:
        raise DataError(f"{path}: damaged, its SHA-256 is {sha256} instead of {official.sha256}; {remedy}")


def _whose(size: int) -> str:
    """Returns a hint when the size is that of another official file: names are alike, and files are easily swapped."""
    for name in VERSIONS:
        for file in official_files(name):
            if file.size == size:
                return f", the size of {name}'s {file.name}"
    return ""


def prepare(name: str, *, raw_dir: Path, data_dir: Path, num_examples: Mapping[str, int]) -> None:
    """Writes a dataset's TFDS folder `copy_dir(name, data_dir)` from its official files in `raw_dir`.

    Raises:
      DataError: a file does not hold what it should.
      OSError: the folder cannot be written.
    """
    import tensorflow_datasets as tfds

    # TFDS takes from manual_dir what it would download otherwise, and checks it all the same.
    with _quiet():
        _builder(name, data_dir, num_examples).download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                manual_dir=raw_dir, try_download_gcs=False, force_checksums_validation=True
            ),
        )


def read_copy(name: str, data_dir: Path, num_examples: Mapping[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Decodes a prepared copy: split -> (u8[N,28,28,1], i32[N])."""
    import tensorflow_datasets as tfds
    from PIL import Image

    with _quiet():
        builder = _builder(name, data_dir, num_examples)
        # Left to TFDS, decoding an image takes longer, and warns that OpenCV is not installed.
        sources = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
        splits = {}
        for split in SPLITS:
            source = sources[split]
            images = np.empty((len(source), _SIDE, _SIDE, 1), np.uint8)
            labels = np.empty(len(source), np.int32)
            for start in range(0, len(source), 1000):  # one by one takes twice as long
                rows = range(start, min(start + 1000, len(source)))
                for i, record in zip(rows, source.__getitems__(rows), strict=True):
                    images[i, ..., 0] = np.asarray(Image.open(io.BytesIO(record["image"])))
                    labels[i] = record["label"]
            splits[split] = images, labels
    return splits


def family(name: str) -> str:
    """Returns the name without the config: emnist of emnist/letters."""
    return name.partition("/")[0]


def _builder(name: str, data_dir: Path, num_examples: Mapping[str, int]) -> Any:
    """Returns the TFDS builder of a dataset in a folder."""
    return builder_class(family(name))(
        num_examples=num_examples,
        data_dir=data_dir,
        config=name.partition("/")[2] or None,
        file_format="array_record",
    )


@functools.cache
def builder_class(dataset: str) -> Any:
    """Returns the TFDS builder class of `mnist`, `fashion_mnist`, `kmnist` or `emnist`."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import mnist

    bases = {
        "mnist": mnist.MNIST,
        "fashion_mnist": mnist.FashionMNIST,
        "kmnist": mnist.KMNIST,
        "emnist": mnist.EMNIST,
    }
    base = bases[dataset]

    class Builder(base, skip_registration=True):  # type: ignore[misc, valid-type, call-arg]
        name = dataset
        VERSION = tfds.core.Version(VERSIONS[dataset])
        url_infos = base.url_infos

        def __init__(self, *, num_examples: Mapping[str, int], **kwargs: Any):
            self.num_examples = num_examples
            super().__init__(**kwargs)

        def _info(self) -> Any:
            info = super()._info()
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{info.description.partition('Note:')[0]} {UPRIGHT}",
                features=info.features,
                supervised_keys=info.supervised_keys,
                homepage=info.homepage,
                citation=info.citation,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            paths = dl_manager.download({file.name: file.url for file in official_files(dataset)})
            return {split: self._generate_examples(split, paths) for split in SPLITS}

        def _generate_examples(self, split: str, paths: Mapping[str, Path]) -> Iterator[tuple[int, dict[str, Any]]]:
            config = self.builder_config.name if self.builder_config else ""
            num_classes = self.info.features["label"].num_classes
            images, labels = read_split(split, paths, config, self.num_examples[split], num_classes)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": _png(image), "label": int(label)}

    return Builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing, logging and drawing progress bars, and afterwards sets all back as it was."""
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


def _png(image: np.ndarray) -> bytes:
    """Encodes a grey image as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_split(
    split: str, paths: Mapping[str, Path], config: str, num_examples: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images, upright, and the labels of one split from official files: u8[N,28,28], u8[N].

    Args:
      split: `train` or `test`.
      paths: where each official file is, by its name.
      config: of EMNIST, such as `letters`; empty for the others.
      num_examples: the N that the files must hold.
      num_classes: labels must be below.

    Raises:
      DataError: a file does not hold what it should.
    """
    shapes = (num_examples, _SIDE, _SIDE), (num_examples,)
    if not config:
        names = [str(paths[file]) for file in _FILES[split]]
        with open(names[0], "rb") as first, open(names[1], "rb") as second:
            images, labels = read_idx(first, names[0], shapes[0]), read_idx(second, names[1], shapes[1])
    else:
        (path,) = paths.values()
        names = [member.format(config, split) for member in _EMNIST_MEMBERS]
        try:
            with zipfile.ZipFile(path) as archive, archive.open(names[0]) as first, archive.open(names[1]) as second:
                images, labels = read_idx(first, names[0], shapes[0]), read_idx(second, names[1], shapes[1])
        except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{path}: not the zip file it should be ({error}); fetch it again") from error
        images = images.transpose(0, 2, 1)
    if labels.max(initial=0) >= num_classes:
        raise DataError(f"{names[1]}: holds label {labels.max()}, but there are {num_classes} classes; fetch it again")
    return images, labels


def read_idx(file: IO[bytes], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a gzipped IDX file of bytes that must have this very shape.

    No more is decompressed than the shape needs, whatever the file claims or contains.

    Raises:
      DataError: the file is anything else; the message calls it `name`.
    """
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)  # 8: the elements are unsigned bytes
    size = int(np.prod(shape))
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            found = stream.read(len(header))
            # One byte more than there should be: at the file's end this also makes gzip check its CRC.
            body = stream.read(size + 1) if found == header else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: not a whole gzip file ({error}); fetch it again") from error
    if found != header:
        raise DataError(f"{name}: should hold bytes of shape {shape}, but {_claim(found)}; fetch it again")
    if len(body) != size:
        more = "more" if len(body) > size else f"{len(body)}"
        raise DataError(f"{name}: should hold {size} values, but holds {more}; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _claim(header: bytes) -> str:
    """Says in words what the header of an IDX file claims."""
    if header[:3] != b"\0\0\x08" or len(header) < 8:
        return f"begins with 0x{header[:4].hex()}, which is no IDX file of bytes"
    sizes = struct.unpack_from(f">{len(header) // 4 - 1}I", header, 4)
    return f"its header claims {header[3]} dimensions, the first of them {' x '.join(map(str, sizes[: header[3]]))}"


def embedded_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Draws scikit-learn's 1,797 handwritten digits of 8x8 as MNIST has them: split -> (u8[N,28,28,1], i32[N]).

    Every fifth row or so of the rows sorted by digit goes to the test split, 360 in all: stratified, and the same
    everywhere, as no random numbers are drawn. Both splits keep the original order.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.stack([frame((image * 255 / 16).astype(np.uint8)) for image in digits.images])[..., None]
    labels = digits.target.astype(np.int32)
    num_test = 360
    by_digit = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), bool)
    is_test[by_digit[(2 * np.arange(num_test) + 1) * len(labels) // (2 * num_test)]] = True
    return {"train": (images[~is_test], labels[~is_test]), "test": (images[is_test], labels[is_test])}
