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
MEMBERS = "members"  # in the folder of a population: those of its runs
_LOCK = ".mnist_flax.lock"  # not "lock": its name also marks the folder as ours
_OWNER = ".mnist_flax.owner.json"


def check(workdir: pathlib.Path) -> None:
    """Looks, without touching anything, whether a run can live in `workdir`.

    Raises:
      WorkdirError: it is no folder, cannot be read, or holds something that is no run.
    """
    try:
        if workdir.exists() and not workdir.is_dir():
            raise WorkdirError(f"--workdir={workdir}: is a file; name a folder")
        names = {path.name for path in workdir.iterdir()} if workdir.is_dir() else set()
    except (OSError, ValueError) as error:  # such as a name that is too long, or holds a zero byte
        raise WorkdirError(f"--workdir={workdir}: cannot be read ({_why(error)}); name another folder") from error
    if names and not names & {CONFIG, _LOCK}:
        raise WorkdirError(
            f"--workdir={workdir}: holds {min(names)!r} but no {CONFIG}, so it is no run; name another folder"
        )


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Makes `workdir` and holds it for this process alone; if nothing is written into it, it is removed again.

    The operating system frees the lock when its process ends, however it ends, so a dead run is no obstacle.

    Raises:
      WorkdirError: another process holds it, or it cannot be written.
    """
    check(workdir)
    new = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    lock = filelock.FileLock(workdir / _LOCK)
    try:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise WorkdirError(
                f"--workdir={workdir}: in use by {_owner(workdir)}; wait for it, stop it, or name another folder"
            ) from None
        except (OSError, ValueError) as error:
            raise WorkdirError(
                f"--workdir={workdir}: cannot be written ({_why(error)}); name another folder"
            ) from error
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        write_text(workdir / _OWNER, json.dumps(owner) + "\n")
        yield
    finally:
        if lock.is_locked and {path.name for path in workdir.iterdir()} <= {_LOCK, _OWNER}:
            (workdir / _OWNER).unlink(missing_ok=True)
            (workdir / _LOCK).unlink()
        for folder in new:
            with contextlib.suppress(OSError, ValueError):
                folder.rmdir()  # fails, as it should, where anything is inside
        lock.release()


def _owner(workdir: pathlib.Path) -> str:
    owner = read_json(workdir / _OWNER)
    try:
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def speaking(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system says about a file that cannot be written into a message.

    Raises:
      WorkdirError: an OSError was raised inside.
    """
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{path}: cannot be written ({_why(error)}); mend that, and the same command goes on from the newest"
            " checkpoint"
        ) from error


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that whoever looks sees the old content or the new, whole, even after a power cut.

    Raises:
      WorkdirError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with speaking(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode())


def append_bytes(path: pathlib.Path, content: bytes) -> None:
    """Appends to a file, which is closed again, so that no later failure can lose or double what was written.

    Raises:
      WorkdirError: the disk is full, or the file cannot be written.
    """
    with speaking(path), path.open("ab") as file:
        file.write(content)


def sync(path: pathlib.Path) -> None:
    """Waits until a file's or a folder's content is safe from a power cut.

    Raises:
      WorkdirError: the system cannot write it.
    """
    with speaking(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: pathlib.Path) -> Any:
    """Returns what a JSON file holds, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
