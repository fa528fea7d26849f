"""IDX files, valid and invalid."""

import gzip
import io
import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from idx_files import FILE_NAMES, Arrays, check_arrays, idx, random_arrays, write_files

from mnist_flax import config
from mnist_flax.data.idx import read_files, read_idx
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS, Dataset
from mnist_flax.errors import DataError


def packed(*header: int, body: bytes = b"", dims: str = "") -> bytes:
    return gzip.compress(struct.pack(f">4B{dims}", *header) + body)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 28, 28), (2, 5)])
def test_read_idx_returns_what_was_written(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.testing.assert_array_equal(read_idx(io.BytesIO(idx(array)), "f", shape), array)
    np.testing.assert_array_equal(read_idx(io.BytesIO(gzip.decompress(idx(array))), "f", shape), array)


GOOD = idx(np.zeros((4, 3, 2)))


BAD = {
    "empty": (b"", "starts with 0x, so it is not an IDX file"),
    "truncated": (GOOD[:-9], "is truncated or damaged"),
    "wrong CRC": (GOOD[:-8] + b"abcd" + GOOD[-4:], "is truncated or damaged"),
    "damaged inside": (GOOD[:12] + b"\xff\xff\xff" + GOOD[15:], "is truncated or damaged"),
    "wrong magic": (packed(1, 2, 8, 3, 4, 3, 2, dims="3I", body=bytes(24)), "not an IDX file of bytes"),
    "floats": (packed(0, 0, 13, 3, 4, 3, 2, dims="3I", body=bytes(96)), "not an IDX file of bytes"),
    "2^31 rows": (packed(0, 0, 8, 3, 2**31, 3, 2, dims="3I", body=bytes(24)), "2147483648 x 3 x 2"),
    "other count": (idx(np.zeros((5, 3, 2))), r"shape \(4, 3, 2\), but its header says 5 x 3 x 2$"),
    "labels": (idx(np.zeros(4)), "its header says 4$"),
    "more dimensions": (idx(np.zeros((4, 3, 2, 1))), r"its header says 4 x 3 x 2 x \.\.\.$"),
    "too few": (packed(0, 0, 8, 3, 4, 3, 2, dims="3I", body=bytes(23)), "24 values, but contains only 23"),
    "too many": (packed(0, 0, 8, 3, 4, 3, 2, dims="3I", body=bytes(25)), "24 values, but contains more"),
    "header only": (packed(0, 0, 8, 3), "ends within its header"),
    "not gzipped, too few": (gzip.decompress(GOOD)[:-1], "24 values, but contains only 23"),
}


@pytest.mark.parametrize("kind", BAD)
def test_read_idx_is_strict(kind: str) -> None:
    content, message = BAD[kind]
    with pytest.raises(DataError, match=f"the-file: .*{message}"):
        read_idx(io.BytesIO(content), "the-file", (4, 3, 2))


def test_gzip_bomb_is_not_unpacked() -> None:
    bomb = io.BytesIO(packed(0, 0, 8, 3, 4, 3, 2, dims="3I", body=bytes(1 << 26)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="contains more"):
            read_idx(bomb, "bomb", (4, 3, 2))
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def shrunk(name: str, num_classes: int) -> Dataset:
    """Returns an entry like that of a dataset, but with 70 training and 50 test rows."""
    known = DATASETS[name]
    return Dataset(
        num_classes=num_classes,
        num_train=70,
        num_test=50,
        files=known.files,
        archive_members=known.archive_members,
        transposed=known.transposed,
    )


@pytest.mark.parametrize(
    ("size", "message"), [(2, "starts with 0x0000, so it is not an IDX file"), (7, "ends within its header")]
)
def test_truncated_header_is_described(size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_idx(io.BytesIO(b"\0\0\x08\x03\0\0\0\x04"[:size]), "file", (4, 3, 2))


@pytest.mark.parametrize("name", ["mnist", "emnist/letters"])
def test_read_files_rejects_what_does_not_fit_together(tmp_path: Path, name: str) -> None:
    def read(train: tuple[np.ndarray, np.ndarray], num_classes: int) -> None:
        write_files(tmp_path, name, {**random_arrays("mnist"), "train": train})
        read_files(shrunk(name, num_classes), tmp_path)

    images, labels = random_arrays(name)["train"]
    read((images, labels), 37)
    with pytest.raises(DataError, match=r"labels-idx1.*contains label 9, but there are 9 classes"):
        read((images, labels % 10), 9)
    with pytest.raises(DataError, match=r"labels-idx1.*its header says 69"):
        read((images, labels[:69]), 37)
    with pytest.raises(DataError, match=r"images-idx3.*69 x 28 x 28"):
        read((images[:69], labels), 37)


@pytest.mark.parametrize("kind", ["no zip", "truncated", "without the member", "encrypted", "missing"])
def test_read_files_rejects_a_wrong_zip(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "gzip.zip"
    write_files(tmp_path, "emnist/letters", random_arrays("emnist/letters"))
    if kind == "no zip":
        path.write_bytes(b"<html>sign in to this network</html>")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "encrypted":
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
    elif kind == "missing":
        path.unlink()
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("gzip/readme.txt", "")
    with pytest.raises(DataError, match=r"gzip\.zip: cannot be read"):
        read_files(shrunk("emnist/letters", 37), tmp_path)


def test_read_idx_names_a_damaged_member_of_a_zip() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images", gzip.decompress(GOOD))
    content = bytearray(buffer.getvalue())
    content[30 + len("images")] = 0xFF  # the first byte of the deflated data: a block of an unknown type
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        archive.open("images") as file,
        pytest.raises(DataError, match=r"^images: is truncated or damaged"),
    ):
        read_idx(file, "images", (2, 3, 4))


# Fuzzing --------------------------------------------------------------------------------------------------------------


def mutate(content: bytes, source: random.Random) -> bytes:
    """Damages a gzipped file, in its compressed bytes or in its content, mostly in the header."""
    packed_inside = source.random() < 0.6
    data = bytearray(gzip.decompress(content) if packed_inside else content)
    for _ in range(source.choice((1, 1, 2, 8))):
        place = source.randrange(min(len(data), source.choice((8, 20, len(data)))) or 1)
        match source.choice(("flip", "set", "cut", "insert", "repeat", "swap")):
            case "flip" if data:
                data[place] ^= 1 << source.randrange(8)
            case "set" if data:
                data[place] = source.choice((0, 1, 3, 8, 127, 255))
            case "cut":
                del data[place : place + source.choice((1, 4, 100, len(data)))]
            case "insert":
                data[place:place] = source.randbytes(source.choice((1, 4, 100)))
            case "repeat":
                data += data[-source.choice((1, 784, 10_000)) :]
            case "swap" if data:
                other = source.randrange(len(data))
                data[place], data[other] = data[other], data[place]
            case _:
                pass
    return gzip.compress(bytes(data), 1, mtime=0) if packed_inside and source.random() < 0.9 else bytes(data)


def parse(content: bytes) -> np.ndarray | None:
    """An independent reader: the array if the file is a whole IDX file of bytes, gzipped or not, else None."""
    try:
        data = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error):
        return None
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        return None
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    body = data[4 + 4 * data[3] :]
    return np.frombuffer(body, np.uint8).reshape(shape) if len(body) == np.prod(shape, dtype=object) else None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_give_an_error_or_the_right_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    arrays: Arrays = random_arrays("mnist", num_train=12, num_test=11, seed=seed)
    monkeypatch.setitem(DATASETS, "fuzzed", Dataset(num_classes=10, num_train=12, num_test=11))
    write_files(tmp_path, "fuzzed", arrays)
    wanted = config.replace(config.Config(), data__name="fuzzed", data__raw_dir=str(tmp_path), train__batch_size=1)
    source = random.Random(seed)
    accepted = 0
    for _ in range(750):
        place = source.randrange(4)
        path = tmp_path / FILE_NAMES[place]
        original = path.read_bytes()
        path.write_bytes(mutate(original, source))
        split, part = "train" if place < 2 else "test", place % 2
        try:
            got = load_splits(wanted.data)
        except DataError as error:
            assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error)
        else:
            array = parse(path.read_bytes())
            pair = list(arrays[split])
            assert array is not None and array.shape == pair[part].shape
            pair[part] = array
            assert pair[1].max() < 10
            check_arrays(got, {**arrays, split: (pair[0], pair[1])})
            accepted += 1
        path.write_bytes(original)
    assert 20 < accepted < 700  # pixels and labels may be changed; everything else is an error
