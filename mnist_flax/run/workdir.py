"""The folder of a run: its file names, its lock, and atomic writes.

A run's folder may come from an untrusted source. So the functions here do not write through symbolic links inside it:
`write_bytes` replaces a link, `append_bytes` and `subfolder` raise an error. Always write with these functions, to
paths from `inside` or `subfolder`. If something cannot be written (a full disk, a link in the way), they raise
WorkdirError.
"""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import filelock

from mnist_flax.errors import WorkdirError, reason

Folder = str | os.PathLike[str]  # what a caller from outside may pass

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
WEIGHTS = "weights.safetensors"
CHECKPOINTS = "checkpoints"
DAMAGED = "checkpoints_damaged"
TENSORBOARD = "tensorboard"
MEMBERS = "members"  # in the folder of a population: the folders of its runs
REMEDY_RESUME = "fix that, and the same command continues from the newest checkpoint"
REMEDY_OUTPUT = "name another folder with --output=DIR"
_LOCK = ".mnist_flax.lock"
_OWNER = ".mnist_flax.owner.json"
_CONFIG_FIELDS = {"seed", "data", "model", "optimizer", "checkpoint"}  # of a run's config, in all versions
_LINK = "a symbolic link, which is not followed inside a run's folder"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_IN_USE_SECONDS = 60  # no file takes longer to write


def check(workdir: pathlib.Path) -> None:
    """Checks, without writing anything, that `workdir` is unused or holds a run or a population.

    Raises:
      WorkdirError: it is not a folder, cannot be read, or holds something that is not a run.
    """
    try:
        os.path.abspath(workdir).encode()  # checkpoints cannot be written to a path that is not UTF-8
    except UnicodeEncodeError as error:
        remedy = "name a folder whose path is valid UTF-8, or set PYTHONUTF8=1 if this one is"
        raise WorkdirError(f"--workdir={workdir}: checkpoints cannot be written to this path; {remedy}") from error
    names = names_in(workdir, f"--workdir={workdir}")
    members = [workdir / MEMBERS / name for name in names_in(workdir / MEMBERS)] if MEMBERS in names else []
    if names and not any(map(holds_run, [workdir, *members])):
        raise WorkdirError(f"--workdir={workdir}: holds {min(names)!r} but no {CONFIG} of a run; name another folder")


def holds_run(folder: pathlib.Path) -> bool:
    """Returns whether a folder was claimed, or holds the config of a run; a copy may have lost the hidden file."""
    return os.path.lexists(folder / _LOCK) or read_json(folder / CONFIG).keys() >= _CONFIG_FIELDS


def names_in(folder: pathlib.Path, subject: str = "") -> set[str]:
    """Returns the names in a folder; none if it does not exist. `subject` replaces the folder in messages.

    Raises:
      WorkdirError: it is not a folder, or cannot be read.
    """
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()
    except (OSError, ValueError) as error:  # such as a name that is too long, or contains a zero byte
        problem = f"cannot be read ({reason(error)}); name another folder"
        problem = "is a file; name a folder" if os.path.isfile(folder) else problem
        raise WorkdirError(f"{subject or folder}: {problem}") from error


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Creates `workdir` and locks it for this process; at the end, removes it if no file of a run was written.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
      WorkdirError: another process holds the lock, or the folder cannot be written.
    """
    check(workdir)
    new = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    lock = filelock.FileLock(workdir / _LOCK)
    try:
        with as_workdir_error(f"--workdir={workdir}", "name another folder"):
            workdir.mkdir(parents=True, exist_ok=True)
            inside(workdir, _LOCK)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise WorkdirError(
                    f"--workdir={workdir}: in use by {_owner(workdir)}; wait for it, stop it, or name another folder"
                ) from None
            _remove_temporary_files(workdir)
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        write_text(workdir / _OWNER, json.dumps(owner) + "\n")
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            if lock.is_locked and set(os.listdir(workdir)) <= {_LOCK, _OWNER}:
                (workdir / _OWNER).unlink(missing_ok=True)
                (workdir / _LOCK).unlink()
        for folder in new:
            with contextlib.suppress(OSError, ValueError):
                folder.rmdir()  # deletes only empty folders
        lock.release()


def _owner(workdir: pathlib.Path) -> str:
    owner = read_json(workdir / _OWNER)
    try:
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except KeyError:
        return "another process"


def _remove_temporary_files(workdir: pathlib.Path) -> None:
    """Deletes temporary files that `write_bytes` left when a process was killed, but none younger than a minute."""
    folders = [workdir, *(path for path in workdir.iterdir() if path.is_dir() and not path.is_symlink())]
    for path in (path for folder in folders for path in folder.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _IN_USE_SECONDS:
                path.unlink()


@contextlib.contextmanager
def as_workdir_error(subject: object, remedy: str = REMEDY_RESUME) -> Iterator[None]:
    """Converts an OSError raised inside into `<subject>: cannot be written (<reason>); <remedy>`.

    Raises:
      WorkdirError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        why = _LINK if error.errno == errno.ELOOP else reason(error)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "allow more with `ulimit -n`, or train fewer runs together"
        raise WorkdirError(f"{subject}: cannot be written ({why}); {remedy}") from error


def inside(workdir: pathlib.Path, *names: str, remedy: str = REMEDY_RESUME) -> pathlib.Path:
    """Returns a path inside a run's folder, and checks that no part of it below `workdir` is a symbolic link.

    Raises:
      WorkdirError: the path, or a folder above it within `workdir`, is a symbolic link.
    """
    path = workdir
    for name in names:
        path = path / name
        with as_workdir_error(path, remedy):
            if path.is_symlink():
                raise OSError(errno.ELOOP, _LINK)
    return path


def results_folder(workdir: pathlib.Path, name: str, checkpoint: str) -> pathlib.Path:
    """Returns a folder for results inside `workdir`: `name`, or `name-checkpoint` if it is not the latest checkpoint.

    Raises:
      WorkdirError: as for `subfolder`.
    """
    return subfolder(workdir, name if checkpoint == "latest" else f"{name}-{checkpoint}", remedy=REMEDY_OUTPUT)


def subfolder(workdir: pathlib.Path, *names: str, remedy: str = REMEDY_RESUME) -> pathlib.Path:
    """Creates a folder inside a run's folder if it is missing, and returns it.

    Raises:
      WorkdirError: it cannot be created, or a symbolic link or a file is in the way.
    """
    folder = inside(workdir, *names, remedy=remedy)
    with as_workdir_error(folder, remedy):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def from_here(path: pathlib.Path) -> str:
    """Returns how a command names a folder: by its path inside the working directory, or else by its absolute path."""
    absolute, here = path.absolute(), pathlib.Path.cwd()
    is_inside = absolute != here and absolute.is_relative_to(here)
    return (absolute.relative_to(here) if is_inside else absolute).as_posix()


def shown(path: pathlib.Path) -> str:
    """Returns how a page names a folder: by its path inside the working directory, or else by its last part."""
    named = pathlib.PurePosixPath(from_here(path))
    return named.name if named.is_absolute() else str(named)


def create_output(folder: pathlib.Path) -> pathlib.Path:
    """Creates the folder that `--output` names if it is missing, and returns it.

    Raises:
      WorkdirError: it cannot be created.
    """
    with as_workdir_error(f"--output={folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_bytes(path: pathlib.Path, content: bytes, *, remedy: str = REMEDY_RESUME) -> None:
    """Writes a file atomically: readers see all of the old or all of the new content, even after a power failure.

    A symbolic link at `path` is replaced, not followed. The folder must exist: create it with `subfolder`.

    Raises:
      WorkdirError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with as_workdir_error(path, remedy):
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_text(path: pathlib.Path, text: str, *, remedy: str = REMEDY_RESUME) -> None:
    """Writes UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode(), remedy=remedy)


def append_bytes(path: pathlib.Path, content: bytes) -> None:
    """Appends to a file and closes it: nothing stays in a buffer that a crash would lose or a forked process repeat.

    Raises:
      WorkdirError: the disk is full, or the file cannot be written or is a symbolic link.
    """
    with as_workdir_error(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW, 0o666)
        with open(descriptor, "ab") as file:
            file.write(content)


def remove(path: pathlib.Path) -> None:
    """Deletes a file, a folder with its content, or a symbolic link, but never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: pathlib.Path) -> None:
    """Flushes a file, or the entries of a folder, to disk, so that they survive a power failure.

    Raises:
      WorkdirError: it cannot be flushed to disk.
    """
    with as_workdir_error(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if the path is no regular file, or does not contain an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
