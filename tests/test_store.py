"""Saving: a checkpoint that cannot be written or deleted gives one message, and loses nothing else."""

import logging
import pathlib
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from saved_runs import FINGERPRINT, initial_state, restored, save, save_two
from small_run import SMALL, steps

from mnist_flax.config import replace
from mnist_flax.errors import WorkdirError
from mnist_flax.run import checkpoint_files
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.store import Store, open_store


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run with checkpoints at 3 and 6."""
    return save_two(tmp_path)


def test_failed_write_gives_one_message_and_loses_only_that_checkpoint(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Store._write

    def write_little(*arguments: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with (
        monkeypatch.context() as patch,
        pytest.raises(WorkdirError, match=r"checkpoint 9 cannot be written \(.*[Ff]ile"),
    ):
        patch.setattr(Store, "_write", write_little)
        with open_store(SMALL, FINGERPRINT, workdir) as store:
            save(store, initial_state(), 9)
    time.sleep(0.5)  # TensorStore's threads are still writing; a real restart would be another process
    assert restored(workdir) == (6, [])
    assert steps(workdir) == [3, 6]


@pytest.fixture
def tiny_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 500 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_last_good_checkpoint(tiny_disk: pathlib.Path) -> None:
    with (
        pytest.raises(
            WorkdirError, match=r"checkpoint \d+ cannot be written \(.*\); .+ from the newest .*: \d+$"
        ) as error,
        open_store(replace(SMALL, checkpoint__keep_latest=9), FINGERPRINT, tiny_disk) as store,
    ):
        for step in range(1, 20):
            save(store, initial_state(), step)
    kept = steps(tiny_disk)
    assert 1 <= len(kept) < 19
    assert str(error.value).endswith(f" {kept[-1]}")
    assert "No space left" in str(error.value)
    assert restored(tiny_disk) == (kept[-1], [])


def test_failed_save_is_reported_by_the_next_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise WorkdirError("full")

    monkeypatch.setattr(Store, "_write", fail)
    with open_store(SMALL, FINGERPRINT, tmp_path) as store:
        save(store, initial_state(), 1)
        with pytest.raises(WorkdirError, match="full"):
            save(store, initial_state(), 2)


def test_saving_does_not_wait_for_the_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(Store, "_write", lambda *_: released.wait(60))
    with open_store(SMALL, FINGERPRINT, tmp_path) as store:
        save(store, initial_state(), 1)
        assert not released.is_set()
        released.set()


def test_reading_and_writing_at_the_same_time_leave_the_log_level_alone() -> None:
    absl, entered = logging.getLogger("absl"), threading.Event()
    level = absl.level

    def read() -> None:
        with checkpoint_files._checkpointer():
            entered.set()

    with checkpoint_files._checkpointer():
        thread = threading.Thread(target=read)
        thread.start()
        assert not entered.wait(0.2)  # it would take the silenced level for the one to restore
    thread.join()
    assert entered.is_set()
    assert absl.level == level


def test_old_checkpoints_that_cannot_be_deleted_give_one_message(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: pathlib.Path) -> None:
        raise PermissionError(13, "Permission denied")

    message = r"checkpoint 9 is saved, but older ones cannot be deleted \(Permission denied\); fix that"
    with pytest.raises(WorkdirError, match=message), monkeypatch.context() as patch:
        patch.setattr(workdirs, "remove", refuse)
        with open_store(replace(SMALL, checkpoint__keep_latest=1), FINGERPRINT, workdir) as store:
            save(store, initial_state(), 9)
    assert restored(workdir) == (9, [])


def test_an_old_checkpoint_that_someone_deletes_is_no_error(workdir: pathlib.Path) -> None:
    config = replace(SMALL, checkpoint__keep_latest=2, checkpoint__keep_best=0)
    with open_store(config, FINGERPRINT, workdir) as store:
        save(store, initial_state(), 9)
        store.wait()
        shutil.rmtree(workdir / workdirs.CHECKPOINTS / "6")
        save(store, initial_state(), 12)
    assert steps(workdir) == [9, 12]


def test_a_first_checkpoint_that_cannot_be_written_promises_no_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write", refuse)
    with (
        pytest.raises(WorkdirError, match=r"No space left on device\); fix that, and the same command starts again$"),
        open_store(SMALL, FINGERPRINT, tmp_path) as store,
    ):
        save(store, initial_state(), 1)
