"""Preparing a dataset once: unusable copies, wrong data, full disks and several processes."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
from idx_files import Published, tree

import mnist_flax
from mnist_flax.data import prepare
from mnist_flax.data.registry import DATASETS
from mnist_flax.errors import DataError

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
def test_unusable_copy_is_skipped_and_left_alone(small: Published, data_messages: list[str], flaw: str) -> None:
    damage, message = FLAWS[flaw]
    small.load_raw()
    copy = small.data_dir / "mnist" / "3.0.1"  # as if others had prepared it
    shutil.move(small.copy, copy)
    shutil.rmtree(small.own)
    damage(copy)
    before = {path: path.read_bytes() for path in copy.iterdir()}
    data_messages.clear()
    with pytest.raises(DataError, match=message):
        small.load(source="tfds")
    small.check(small.load(raw_dir=str(small.raw_dir)), "raw")
    (line,) = (text for text in data_messages if text.startswith("INFO: not used"))
    assert re.search(message, line)
    assert {path: path.read_bytes() for path in copy.iterdir()} == before
    small.check(small.load(source="tfds"), "tfds")


@pytest.mark.parametrize("flaw", FLAWS)
def test_our_own_damaged_copy_is_replaced(small: Published, flaw: str) -> None:
    small.load_raw()
    small.cache.unlink()
    FLAWS[flaw][0](small.copy)
    small.check(small.load_raw(), "raw")
    small.check(small.load(source="tfds"), "tfds")


def test_transposed_emnist_copy_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Published(tmp_path, monkeypatch, "emnist/digits")
    small.load_raw()
    edit_info(lambda info: info.update(description="Note: Like the original EMNIST data, ..."), small.copy)
    with pytest.raises(DataError, match="images are transposed"):
        small.load(source="tfds")


# Wrong data -----------------------------------------------------------------------------------------------------------


def test_a_damaged_fingerprint_of_a_copy_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Published(tmp_path, monkeypatch)
    small.load_raw()
    (small.copy / prepare.FINGERPRINT_FILE).write_bytes(b"\xff\xfe\x00")
    small.cache.unlink()
    with pytest.raises(DataError, match=f"{small.copy}: its images and labels are not those of"):
        small.load(source="tfds")


def swap_splits(small: Published) -> None:
    """Replaces the test records by the training records, as if the folder had been put together by hand."""
    shutil.copy(next(small.copy.glob("*train*")), next(small.copy.glob("*test*")))


@pytest.mark.parametrize("known", ["in the registry", "from preparing"])
@pytest.mark.parametrize("name", ["mnist", "emnist/letters"])
def test_swapped_records_stop_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str, name: str
) -> None:
    small = Published(tmp_path, monkeypatch, name)
    fingerprint = small.load_raw().fingerprint
    if known == "in the registry":
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], fingerprint=fingerprint))
        (small.copy / prepare.FINGERPRINT_FILE).write_text("0" * 64)  # the registry takes precedence
    small.cache.unlink()
    swap_splits(small)
    for source in ("auto", "tfds", "raw", "download"):
        for _ in range(2):  # first decoded, then from the cache
            with pytest.raises(
                DataError, match=rf"{small.copy}: its images and labels are not those of {name}"
            ) as error:
                small.load(source=source, raw_dir=str(small.raw_dir))
            assert "fingerprint" in str(error.value) and "instead of " + fingerprint[:12] in str(error.value)
            assert "delete this folder" in str(error.value)
    shutil.rmtree(small.copy)
    small.check(small.load(raw_dir=str(small.raw_dir)), "raw")


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_dir", ["a file", "under a file", "/proc/mnist"])
def test_data_dir_that_cannot_be_written_is_an_error(small: Published, tmp_path: Path, data_dir: str) -> None:
    (tmp_path / "a file").touch()
    folder = {"a file": tmp_path / "a file", "under a file": tmp_path / "a file" / "b" / "c"}.get(data_dir, data_dir)
    with pytest.raises(DataError, match=rf"{folder}/mnist_flax: cannot prepare mnist there .*--config\.data\.data_dir"):
        small.load(source="raw", raw_dir=str(small.raw_dir), data_dir=str(folder))
    assert tree(tmp_path) == ["a file", "raw", *(f"raw/{path.name}" for path in sorted(small.raw_dir.iterdir()))]


@pytest.mark.parametrize("source", ["raw", "download"])
def test_too_little_free_space_is_reported_before_anything_is_written(
    small: Published, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    usage = namedtuple("usage", "free")
    needed = 120 * prepare._BYTES_PER_ROW
    if source == "download":
        needed += sum(file.size for file in DATASETS["mnist"].files)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    message = rf"cannot prepare mnist there \(it needs {needed / 1e6:.1f} MB, .* free some space"
    with pytest.raises(DataError, match=message):
        small.load(source=source, raw_dir=str(small.raw_dir))
    assert not small.data_dir.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    monkeypatch.setattr(
        prepare, "download_files", lambda _, folder: shutil.copytree(small.raw_dir, folder, dirs_exist_ok=True)
    )
    small.check(small.load(source=source, raw_dir=str(small.raw_dir)), source)


def test_disk_that_fills_up_gives_a_clear_error(small: Published) -> None:
    with start(small, "full") as process:  # the process may write at most 1000 bytes into a file
        _, stderr = process.communicate()
    last = stderr.splitlines()[-1]
    assert last.startswith(f"DataError: {small.own}: cannot prepare mnist there (")
    assert "File too large" in last and "free some space, or choose a folder" in last
    assert "Traceback" not in stderr
    assert not small.data_dir.exists()
    small.check(small.load_raw(), "raw")


# Several processes ----------------------------------------------------------------------------------------------------

PROGRAM = """
import logging, os, resource, signal, sys
from pathlib import Path
import pytest
from idx_files import closed_url, make_official, random_arrays
from mnist_flax import config
from mnist_flax.data import tfds_copy
from mnist_flax.data.load import load_splits
from mnist_flax.errors import DataError
logging.basicConfig(level=logging.INFO, format="%(message)s")
raw_dir, data_dir, fault = sys.argv[1:]
make_official(pytest.MonkeyPatch(), Path(raw_dir), "mnist", random_arrays("mnist"), closed_url())
if fault == "killed":
    tfds_copy.encode_png = lambda image: os.kill(os.getpid(), signal.SIGKILL)
if fault == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
fields = dict(data__raw_dir=raw_dir, data__data_dir=data_dir, train__batch_size=1)
try:
    splits = load_splits(config.replace(config.Config(), **fields).data)
except DataError as error:
    sys.exit(f"DataError: {error}")
assert "tensorflow" not in sys.modules
print(splits.source, splits.fingerprint)
"""


def start(small: Published, fault: str = "") -> subprocess.Popen[str]:
    roots = [str(Path(mnist_flax.__file__).parents[1]), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(small.raw_dir), str(small.data_dir), fault],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_prepare_once(small: Published) -> None:
    own = small.own
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


def test_waiting_process_prepares_after_the_other_fails(small: Published, data_messages: list[str]) -> None:
    own = small.own
    own.mkdir(parents=True)
    with filelock.FileLock(own / "lock"):
        thread = threading.Thread(target=small.load_raw)
        thread.start()
        while not data_messages:
            time.sleep(0.01)
        (own / "lock").unlink()
        own.rmdir()
    thread.join()
    small.check(small.load(), "tfds")


def test_leftovers_of_a_killed_process_are_removed(small: Published) -> None:
    with start(small, "killed") as process:
        process.communicate()
    assert process.returncode == -9
    own = small.own
    assert list(own.glob("preparing-*"))
    (own / "decoded").mkdir()
    for name, age in (("mnist.npz.1.tmp", 3600), ("mnist.npz.2.tmp", 0)):  # another process is writing the second
        (own / "decoded" / name).touch()
        os.utime(own / "decoded" / name, (time.time() - age,) * 2)
    small.check(small.load_raw(), "raw")
    assert sorted(path.name for path in own.iterdir()) == ["decoded", "lock", "mnist"]
    assert sorted(path.name for path in (own / "decoded").iterdir()) == ["mnist.npz", "mnist.npz.2.tmp"]


def test_loading_a_prepared_copy_imports_no_heavy_library(small: Published) -> None:
    small.load_raw()
    program = f"""
import dataclasses, sys
from mnist_flax import config
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS
DATASETS["mnist"] = dataclasses.replace(
    DATASETS["mnist"], num_train=70, num_test=50, fingerprint="", doubtful_test_rows=()
)
fields = dict(data__data_dir={str(small.data_dir)!r}, train__batch_size=1)
assert load_splits(config.replace(config.Config(), **fields).data).source == "tfds"
heavy = ("tensorflow", "tensorflow_datasets", "PIL", "sklearn", "requests")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(mnist_flax.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
