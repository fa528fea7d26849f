"""The folder of a run: where its files are, who owns it, and how a file gets there whole or not at all."""

import contextlib
import datetime
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import filelock

from mnist_flax.errors import WorkdirError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
WEIGHTS = "weights.safetensors"
CHECKPOINTS = "checkpoints"
DAMAGED = "checkpoints_damaged"
TENSORBOARD = "tensorboard"
_LOCK = ".lock"
_OWNER = ".owner.json"


def check(workdir: pathlib.Path) -> None:
    """Looks, without touching anything, whether a run can live in `workdir`.

    Raises:
      WorkdirError: it is no folder, or holds something that is no run.
    """
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"--workdir={workdir}: is a file; name a folder")
    if workdir.is_dir():
        strangers = sorted({path.name for path in workdir.iterdir()} - {_LOCK, _OWNER})
        if strangers and not (workdir / CONFIG).exists():
            raise WorkdirError(
                f"--workdir={workdir}: holds {strangers[0]!r} but no {CONFIG}, so it is no run; name another folder"
            )


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Makes `workdir` and holds it for this process alone.

    The operating system frees the lock when its process ends, however it ends, so a dead run is no obstacle.

    Raises:
      WorkdirError: another process holds it, or it cannot be written.
    """
    check(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / _LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise WorkdirError(
            f"--workdir={workdir}: in use by {_describe_owner(workdir)}; wait for it, stop it, or name another folder"
        ) from None
    except OSError as error:
        raise WorkdirError(f"--workdir={workdir}: cannot be written ({error.strerror}); name another folder") from error
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        write_text(workdir / _OWNER, json.dumps(owner))
        yield
    finally:
        lock.release()


def _describe_owner(workdir: pathlib.Path) -> str:
    try:
        owner = json.loads((workdir / _OWNER).read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that whoever looks sees the old content or the new, whole, even after a power cut.

    Raises:
      WorkdirError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise WorkdirError(f"{path}: cannot be written ({error.strerror})") from error


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode())


def read_json(path: pathlib.Path) -> Any:
    """Returns what a JSON file holds, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
