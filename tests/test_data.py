"""Every source of a dataset, the cache, and what goes wrong."""

import contextlib
import functools
import hashlib
import http.server
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from idx_files import closed_url, make_official, random_arrays, write_files

from mnist_flax import config
from mnist_flax.config import Config
from mnist_flax.data import datasets
from mnist_flax.data import load as data
from mnist_flax.errors import DataError

RAW_DIR = os.environ.get("MNIST_FLAX_RAW_DIR", "")
NAMES = [name for name in config.DATASETS if name != "digits"]
needs_mnist = pytest.mark.skipif(not RAW_DIR, reason="needs the real files in $MNIST_FLAX_RAW_DIR")


@pytest.fixture(autouse=True)
def _no_folders_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNIST_FLAX_RAW_DIR", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What is logged from INFO on, as the level and the text."""
    logged: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(f"{record.levelname}: {record.getMessage()}")

    listener, level = Listener(), data.logger.level
    data.logger.addHandler(listener)
    data.logger.setLevel(logging.INFO)
    yield logged
    data.logger.setLevel(level)
    data.logger.removeHandler(listener)


class Published:
    """A small dataset whose official files are in a folder, under an address where nothing listens."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "mnist"):
        self.name, self.raw_dir, self.data_dir, self._patch = name, folder / "raw", folder / "tfds", monkeypatch
        self.arrays = random_arrays(name)
        write_files(self.raw_dir, name, self.arrays)
        self.at(closed_url())

    def at(self, url: str) -> None:
        make_official(self._patch, self.raw_dir, self.name, self.arrays, url)

    def config(self, **fields: Any) -> Config:
        fields = {"name": self.name, "data_dir": str(self.data_dir), **fields}
        return config.replace(
            Config(), train__batch_size=1, **{f"data__{field}": value for field, value in fields.items()}
        )

    def load(self, **fields: Any) -> data.Splits:
        return data.load_splits(self.config(**fields))

    def load_raw(self) -> data.Splits:
        return self.load(source="raw", raw_dir=str(self.raw_dir))

    def check(self, splits: data.Splits, source: str) -> None:
        assert (splits.name, splits.source) == (self.name, source)
        for split, (images, labels) in self.arrays.items():
            got = getattr(splits, split)
            assert got.image.dtype == np.uint8
            assert got.label.dtype == np.int32
            np.testing.assert_array_equal(got.image[..., 0], images)
            np.testing.assert_array_equal(got.label, labels)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    return Published(tmp_path, monkeypatch)


@contextlib.contextmanager
def served(folder: Path, handler: type[http.server.SimpleHTTPRequestHandler]) -> Iterator[str]:
    """Serves a folder on this machine; gives its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing about it."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class HalfHandler(Handler):
    """Announces the whole file, sends half, hangs up."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2])


class ScrambledHandler(Handler):
    """Sends as many bytes as it should, one of them wrong."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = bytearray(source.read())
        content[-20] ^= 1
        outputfile.write(content)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Sources --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_raw_files_are_prepared_then_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], name: str
) -> None:
    small = Published(tmp_path, monkeypatch, name)
    first = small.load(raw_dir=str(small.raw_dir))
    small.check(first, "raw")
    assert [message for message in messages if "preparing" in message] == messages
    monkeypatch.setattr(datasets, "read_copy", None)  # from here on, decoding would fail
    again = small.load()
    small.check(again, "tfds")
    assert again.fingerprint == first.fingerprint
    for source in ("tfds", "raw", "download"):
        small.check(small.load(source=source, raw_dir=str(small.raw_dir)), "tfds")


def test_raw_dir_comes_from_the_environment(small: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_FLAX_RAW_DIR", str(small.raw_dir))
    monkeypatch.setenv("TFDS_DATA_DIR", str(small.data_dir))
    small.check(small.load(data_dir=""), "raw")
    assert (small.data_dir / "mnist_flax" / "mnist" / "3.0.1" / "dataset_info.json").is_file()


@pytest.mark.parametrize("name", ["mnist", "emnist/letters"])
def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str], name: str) -> None:
    small = Published(tmp_path, monkeypatch, name)
    with served(small.raw_dir, Handler) as url:
        small.at(url)
        small.check(small.load(), "download")
    assert any(f"downloading {url}" in message for message in messages)
    shutil.rmtree(datasets.copy_dir(name, small.data_dir / "mnist_flax"))
    small.check(small.load(), "download")  # from the files that were kept, as nobody serves them any more


def test_interrupted_download_counts_as_unreachable(small: Published) -> None:
    with served(small.raw_dir, HalfHandler) as url:
        small.at(url)
        assert small.load().name == "digits"
        with pytest.raises(DataError, match="cannot be downloaded"):
            small.load(source="download")
    assert not small.data_dir.exists()


@pytest.mark.parametrize("source", ["auto", "download"])
def test_wrong_download_is_an_error(small: Published, source: str) -> None:
    with served(small.raw_dir, ScrambledHandler) as url:
        small.at(url)
        with pytest.raises(DataError, match=r"does not send the official file: .*SHA-256"):
            small.load(source=source)
    assert not small.data_dir.exists()


def test_download_reads_no_more_than_it_should(small: Published) -> None:
    path = small.raw_dir / "train-images-idx3-ubyte.gz"
    with served(small.raw_dir, Handler) as url:
        small.at(url)
        path.write_bytes(path.read_bytes() + bytes(1 << 20))
        with pytest.raises(DataError, match="sends more than"):
            small.load(source="download")
    assert not small.data_dir.exists()


def test_missing_page_is_no_download(small: Published, tmp_path: Path) -> None:
    with served(tmp_path, Handler) as url:
        small.at(url)
        with pytest.raises(DataError, match="404"):
            small.load(source="download")


def test_silent_host_is_given_up(small: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(data._TIMEOUTS) < 30
    monkeypatch.setattr(data, "_TIMEOUTS", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        small.at(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(DataError, match=r"(?s)cannot be downloaded: .*timed out.*MNIST_FLAX_RAW_DIR"):
            small.load(source="download")


def test_unreachable_host_falls_back_to_digits_loudly(small: Published, messages: list[str]) -> None:
    splits = small.load()
    assert (splits.name, splits.source) == ("digits", "embedded")
    assert len(splits.train.label) == 1437
    (warning,) = (message for message in messages if message.startswith("WARNING"))
    for part in ("NOT mnist", "no prepared copy in", "$MNIST_FLAX_RAW_DIR", "127.0.0.1", "on_missing=error"):
        assert part in warning
    assert warning.count("\n") >= 8
    assert not small.data_dir.exists()


def test_on_missing_error_says_what_was_tried(small: Published) -> None:
    with pytest.raises(DataError) as raised:
        small.load(on_missing="error")
    for part in (f"no prepared copy in {small.data_dir}", "neither config.data.raw_dir nor", "127.0.0.1", "Connect"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [("tfds", "no prepared copy in"), ("raw", "neither config.data.raw_dir nor"), ("download", "cannot be downloaded")],
)
def test_explicit_source_never_falls_back(small: Published, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        small.load(source=source)
    assert f"config.data.source = '{source}'" in str(raised.value)
    assert not small.data_dir.exists()


def test_digits_need_no_folder(small: Published) -> None:
    splits = small.load(name="digits", data_dir="/dev/null")
    assert (splits.name, splits.source) == ("digits", "embedded")
    assert splits.train.image.shape == (1437, 28, 28, 1)
    assert splits.fingerprint == small.load(name="digits").fingerprint


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit", "swapped", "no folder"])
@pytest.mark.parametrize("source", ["auto", "raw"])
def test_damaged_raw_files_are_named(small: Published, damage: str, source: str) -> None:
    path = small.raw_dir / "t10k-labels-idx1-ubyte.gz"
    raw_dir, content = str(small.raw_dir), bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        message = "no such file; fetch it from http"
    elif damage == "truncated":
        path.write_bytes(content[:-3])
        message = f"{len(content) - 3} bytes instead of {len(content)}; fetch it from http"
    elif damage == "one bit":
        content[20] ^= 4
        path.write_bytes(content)
        message = f"SHA-256 is {hashlib.sha256(content).hexdigest()} instead of "
    elif damage == "swapped":
        shutil.copy(small.raw_dir / "train-images-idx3-ubyte.gz", path)
        message = "the size of mnist's train-images-idx3-ubyte.gz"
    else:
        raw_dir += "x"
        message = "no such file; fetch it from http"
    with pytest.raises(DataError) as raised:
        small.load(source=source, raw_dir=raw_dir)
    assert str(raised.value).startswith(f"config.data.raw_dir = {raw_dir!r} does not hold mnist: {raw_dir}/t")
    assert message in str(raised.value)
    assert "config.data.source=download" in str(raised.value)
    assert not small.data_dir.exists()


def test_official_files_with_wrong_content_leave_nothing(small: Published) -> None:
    images, labels = small.arrays["train"]
    write_files(small.raw_dir, small.name, {"train": (images, labels + 9), "test": small.arrays["test"]})
    small.at(closed_url())
    with pytest.raises(DataError, match="holds label 18, but there are 10 classes"):
        small.load_raw()
    assert not small.data_dir.exists()


@pytest.mark.parametrize("data_dir", ["a file", "under a file", "/proc/mnist"])
def test_data_dir_that_cannot_be_written(small: Published, tmp_path: Path, data_dir: str) -> None:
    (tmp_path / "a file").touch()
    folder = {"a file": tmp_path / "a file", "under a file": tmp_path / "a file" / "b" / "c"}.get(data_dir, data_dir)
    with pytest.raises(DataError, match=rf"{folder}/mnist_flax: cannot prepare mnist there .*--config\.data\.data_dir"):
        small.load(source="raw", raw_dir=str(small.raw_dir), data_dir=str(folder))
    assert tree(tmp_path) == ["a file", "raw", *(f"raw/{path.name}" for path in sorted(small.raw_dir.iterdir()))]


# Prepared copies and the cache ----------------------------------------------------------------------------------------


def edit_info(change: Callable[[dict[str, Any]], Any], copy: Path) -> None:
    path = copy / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


FLAWS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of TensorFlow": (
        functools.partial(edit_info, lambda info: info.update(fileFormat="tfrecord")),
        "format is tfrecord",
    ),
    "shuffled": (functools.partial(edit_info, lambda info: info.pop("disableShuffling")), "were shuffled"),
    "another size": (
        functools.partial(edit_info, lambda info: info["splits"][0].update(shardLengths=["3"])),
        r"rows are \{'train': 3, 'test': 50\}, not \{'train': 70, 'test': 50\}",
    ),
    "incomplete": (lambda copy: (copy / "dataset_info.json").unlink(), "is incomplete"),
    "damaged info": (lambda copy: (copy / "dataset_info.json").write_text("[]"), "is incomplete"),
    "truncated records": (
        lambda copy: next(copy.glob("*train*")).write_bytes(next(copy.glob("*train*")).read_bytes()[:5000]),
        "records cannot be read",
    ),
    "no records": (lambda copy: next(copy.glob("*test*")).unlink(), "records cannot be read"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_copy_that_cannot_be_used_is_no_obstacle(small: Published, messages: list[str], flaw: str) -> None:
    spoil, message = FLAWS[flaw]
    small.load_raw()
    shutil.move(small.data_dir / "mnist_flax" / "mnist", small.data_dir / "mnist")  # as if others had prepared it
    shutil.rmtree(small.data_dir / "mnist_flax")
    spoil(small.data_dir / "mnist" / "3.0.1")
    before = {path: path.read_bytes() for path in (small.data_dir / "mnist" / "3.0.1").iterdir()}
    messages.clear()
    with pytest.raises(DataError, match=message):
        small.load(source="tfds")
    small.check(small.load(raw_dir=str(small.raw_dir)), "raw")
    (line,) = (text for text in messages if text.startswith("INFO: not used"))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line)
    assert {path: path.read_bytes() for path in (small.data_dir / "mnist" / "3.0.1").iterdir()} == before
    small.check(small.load(source="tfds"), "tfds")


@pytest.mark.parametrize("flaw", FLAWS)
def test_our_own_damaged_copy_is_replaced(small: Published, flaw: str) -> None:
    small.load_raw()
    (small.data_dir / "mnist_flax" / "decoded" / "mnist.npz").unlink()
    FLAWS[flaw][0](small.data_dir / "mnist_flax" / "mnist" / "3.0.1")
    small.check(small.load_raw(), "raw")
    small.check(small.load(source="tfds"), "tfds")


def test_transposed_emnist_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Published(tmp_path, monkeypatch, "emnist/digits")
    small.load_raw()
    copy = small.data_dir / "mnist_flax" / "emnist" / "digits" / "3.1.0"
    edit_info(lambda info: info.update(description="Note: Like the original EMNIST data, ..."), copy)
    with pytest.raises(DataError, match="images are transposed"):
        small.load(source="tfds")


def test_cache_of_another_copy_is_not_used(small: Published) -> None:
    small.load_raw()
    copy = small.data_dir / "mnist_flax" / "mnist" / "3.0.1"
    other = Published(small.data_dir / "other", small._patch)
    other.arrays["train"] = other.arrays["train"][0] ^ 1, other.arrays["train"][1]
    write_files(other.raw_dir, "mnist", other.arrays)
    other.at(closed_url())
    other.load_raw()
    shutil.rmtree(copy)
    shutil.move(other.data_dir / "mnist_flax" / "mnist" / "3.0.1", copy)
    other.check(small.load(source="tfds"), "tfds")


class Touch:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("damage", ["pixel", "fingerprint", "truncated", "empty", "no archive", "pickle"])
def test_damaged_cache_is_rebuilt(small: Published, tmp_path: Path, messages: list[str], damage: str) -> None:
    small.load_raw()
    cache = small.data_dir / "mnist_flax" / "decoded" / "mnist.npz"
    if damage in ("pixel", "fingerprint"):  # well-formed, so that no checksum of the zip format helps
        with np.load(cache) as arrays:
            content = dict(arrays)
        if damage == "pixel":
            content["test_image"][7, 3, 3, 0] ^= 1
        else:
            content["fingerprint"] = np.array("0" * 64)
        np.savez(cache, **content)
    elif damage == "pickle":  # which would run whatever its maker likes, were it opened as one
        with np.load(cache) as arrays:
            np.savez(cache, **{**arrays, "train_label": np.array([Touch(tmp_path / "run")], object)})
    else:
        cache.write_bytes({"truncated": cache.read_bytes()[:-5000], "empty": b"", "no archive": b"x" * 5000}[damage])
    messages.clear()
    small.check(small.load(), "tfds")
    assert len(messages) == 1
    assert f"{cache} is damaged" in messages[0]
    assert not (tmp_path / "run").exists()
    small.check(small.load(), "tfds")
    assert len(messages) == 1


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Forbids writing to a folder; root, whom no permission binds, is an ordinary user meanwhile."""
    root = os.geteuid() == 0
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def test_read_only_folder(small: Published, messages: list[str]) -> None:
    small.load_raw()
    with tempfile.TemporaryDirectory() as shared:  # unlike tmp_path, it can be opened to other users
        os.chmod(shared, 0o755)
        small.data_dir = Path(shutil.copytree(small.data_dir, Path(shared, "tfds")))
        (small.data_dir / "mnist_flax" / "decoded" / "mnist.npz").unlink()
        raw_dir, closed = shutil.copytree(small.raw_dir, Path(shared, "raw")), Path(shared, "closed")
        raw_dir.chmod(0o755)
        closed.mkdir(mode=0)
        messages.clear()
        before = tree(small.data_dir)
        with read_only(small.data_dir):
            for _ in range(2):
                small.check(small.load(), "tfds")
            with pytest.raises(DataError, match=r"Permission denied.*--config\.data\.data_dir"):
                data._prepare("fashion_mnist", small.data_dir, Path("/"))
            with pytest.raises(DataError, match=r"Permission denied"):
                small.load(source="raw", raw_dir=str(raw_dir), data_dir=str(closed / "tfds"))
        assert tree(small.data_dir) == before
    assert len(messages) == 2
    assert all("cannot be kept ([Errno 13] Permission denied" in message for message in messages)


# Several processes ----------------------------------------------------------------------------------------------------

PROGRAM = """
import logging, os, signal, sys
from pathlib import Path
import pytest
from idx_files import closed_url, make_official, random_arrays
from mnist_flax import config
from mnist_flax.data import load as data, datasets
logging.basicConfig(level=logging.INFO, format="%(message)s")
raw_dir, data_dir, deadly = sys.argv[1:]
make_official(pytest.MonkeyPatch(), Path(raw_dir), "mnist", random_arrays("mnist"), closed_url())
if deadly:
    datasets._png = lambda image: os.kill(os.getpid(), signal.SIGKILL)
fields = dict(data__raw_dir=raw_dir, data__data_dir=data_dir, train__batch_size=1)
splits = data.load_splits(config.replace(config.Config(), **fields))
assert "tensorflow" not in sys.modules
print(splits.source, splits.fingerprint)
"""


def start(small: Published, deadly: bool = False) -> subprocess.Popen[str]:
    roots = [str(Path(data.__file__).parents[1]), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(small.raw_dir), str(small.data_dir), "deadly" * deadly],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_prepare_once(small: Published) -> None:
    own = small.data_dir / "mnist_flax"
    own.mkdir(parents=True)
    with filelock.FileLock(own / "lock"):
        processes = [start(small), start(small)]
        first_lines = [process.stderr.readline() for process in processes if process.stderr]
    results = [process.communicate() for process in processes]
    assert all("waiting for another process" in line for line in first_lines)
    assert [process.returncode for process in processes] == [0, 0], results
    assert sorted("preparing" in stderr for _, stderr in results) == [False, True]
    fingerprint = small.load().fingerprint
    assert sorted(stdout for stdout, _ in results) == [f"raw {fingerprint}\n", f"tfds {fingerprint}\n"]


def test_waiting_outlives_the_failure_of_another(small: Published, messages: list[str]) -> None:
    own = small.data_dir / "mnist_flax"
    own.mkdir(parents=True)
    with filelock.FileLock(own / "lock"):
        thread = threading.Thread(target=small.load_raw)
        thread.start()
        while not messages:
            time.sleep(0.01)
        (own / "lock").unlink()
        own.rmdir()
    thread.join()
    small.check(small.load(), "tfds")


def test_killed_process_is_no_obstacle(small: Published) -> None:
    with start(small, deadly=True) as process:
        process.communicate()
    assert process.returncode == -9
    own = small.data_dir / "mnist_flax"
    assert list(own.glob("preparing-*"))
    (own / "decoded").mkdir()
    (own / "decoded" / "mnist.npz.1.tmp").touch()
    small.check(small.load_raw(), "raw")
    assert sorted(path.name for path in own.iterdir()) == ["decoded", "lock", "mnist"]
    assert [path.name for path in (own / "decoded").iterdir()] == ["mnist.npz"]


def test_imports_are_light(small: Published) -> None:
    small.load_raw()
    program = f"""
import sys
from mnist_flax.data import load as data
from mnist_flax import config
config.DATASETS["mnist"] = config.DatasetInfo(10, 70, 50)
fields = dict(data__data_dir={str(small.data_dir)!r}, train__batch_size=1)
assert data.load_splits(config.replace(config.Config(), **fields)).source == "tfds"
heavy = ("tensorflow", "tensorflow_datasets", "PIL", "sklearn", "requests", "filelock", "jax")
print([name for name in heavy if name in sys.modules])
"""
    root = str(Path(data.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


# The config of the dataset in hand ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> data.Splits:
    return data.load_splits(config.replace(Config(), data__name="digits"))


def test_follow_keeps_the_config_of_the_dataset_asked_for(digits: data.Splits) -> None:
    same = config.replace(Config(), data__name="digits", data__holdout=100)
    assert data.follow(same, digits) is same


def test_follow_scales_the_rows(digits: data.Splits) -> None:
    wanted = config.replace(Config(), seed=3, data__num_train=30_000, data__holdout=6_000, train__batch_size=64)
    got = data.follow(wanted, digits)
    assert (got.data.name, got.data.num_train, got.data.holdout, got.train.batch_size) == ("digits", 718, 144, 64)
    assert config.replace(got, data=wanted.to_dict()["data"]) == wanted
    assert got.seed == 3
    assert data.follow(Config(), digits).num_train == 1437


@pytest.mark.parametrize("name", NAMES)
def test_follow_is_always_valid(digits: data.Splits, name: str) -> None:
    info, most = config.DATASETS[name], 10**9
    for num_train, holdout, batch_size in itertools.product(
        (0, 5, 11, 63, 200, most), (0, 62, 199, most), (1, 64, most)
    ):
        num_train = min(num_train, info.num_train)
        rows = num_train or info.num_train
        holdout = min(holdout, rows - 1)
        if 0 < holdout < info.num_classes:
            holdout = 0
        batch_size = min(batch_size, rows - holdout)
        wanted = config.replace(
            Config(), data__name=name, data__num_train=num_train, data__holdout=holdout, train__batch_size=batch_size
        )
        got = data.follow(wanted, digits)
        assert got.data.name == "digits"
        assert got.data.num_train <= num_train
        assert got.data.holdout <= holdout
        assert (got.data.holdout == 0) == (holdout == 0)
        assert got.train.batch_size <= batch_size


# The real files -------------------------------------------------------------------------------------------------------


@needs_mnist
def test_real_mnist(tmp_path: Path) -> None:
    import gzip

    wanted = config.replace(Config(), data__raw_dir=RAW_DIR, data__data_dir=str(tmp_path))
    splits = data.load_splits(wanted)
    assert (splits.name, splits.source) == ("mnist", "raw")
    assert splits.fingerprint == "ceda791d3e53beaf95f8e213c414aa4d975006504eff93f785d685ecea3e892c"
    np.testing.assert_array_equal(splits.train.label[:3], [5, 0, 4])
    np.testing.assert_array_equal(splits.test.label[:3], [7, 2, 1])
    per_class = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    np.testing.assert_array_equal(np.bincount(splits.train.label), per_class)
    per_class = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(splits.test.label), per_class)
    for split, prefix, rows in ((splits.train, "train", 60_000), (splits.test, "t10k", 10_000)):
        images = gzip.decompress(Path(RAW_DIR, f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress(Path(RAW_DIR, f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        assert split.image.shape == (rows, 28, 28, 1)
        assert split.image.tobytes() == images
        assert split.label.astype(np.uint8).tobytes() == labels
    assert data.load_splits(wanted)._replace(train=splits.train, test=splits.test) == splits._replace(source="tfds")
