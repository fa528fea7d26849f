"""Writes and reads one checkpoint on disk, with Orbax.

A checkpoint is a folder with two Orbax items: `state`, the arrays, and `record`, the rest of the run's state at that
step, as JSON. `files.sha256` beside them holds the checksum of every file, in the format of `sha256sum -c`. Checksums
are verified before Orbax reads any file, because the libraries under Orbax behave unpredictably on damaged files.
"""

import contextlib
import functools
import hashlib
import logging
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

CHECKSUMS = "files.sha256"
# One operation at a time: Orbax gives concurrent saves the same number and mixes them up, even across runs, and the log
# level below belongs to the whole process.
_ORBAX = threading.RLock()


def checksums(folder: pathlib.Path) -> str:
    """Returns one line for each file in a checkpoint: its SHA-256 and its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n" for file in files
    )


def write(folder: pathlib.Path, state: Any, record: dict[str, Any]) -> None:
    """Writes a checkpoint without its checksums; all processes must call this together.

    Raises:
      Exception: of various types; Orbax and TensorStore report a full disk as a ValueError, for example.
    """
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    with _checkpointer(all_processes=True) as checkpointer:
        checkpointer.save(folder.absolute(), args=items)


def verify(folder: pathlib.Path) -> None:
    """Checks that every file of a checkpoint is what was saved.

    Raises:
      Exception: of various types, if one is not, or cannot be read.
    """
    if not (folder / CHECKSUMS).is_file():
        raise ValueError(f"{CHECKSUMS} is missing")
    then, now = (folder / CHECKSUMS).read_text(), checksums(folder)
    for line in sorted(set(then.splitlines()) ^ set(now.splitlines())):
        raise ValueError(f"{line[66:]} is not what was saved")


def restore(folder: pathlib.Path, item: str, target: Any = None) -> Any:
    """Reads the `record` of a checkpoint, or its `state` into host memory; `target` has its tree, shapes and dtypes.

    Raises:
      Exception: of various types, if it cannot be read.
    """
    import orbax.checkpoint as ocp

    how = ocp.args.JsonRestore() if target is None else ocp.args.StandardRestore(target)
    with _checkpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**{item: how}))[item]


@contextlib.contextmanager
def _checkpointer(*, all_processes: bool = False) -> Iterator[Any]:
    """Opens an Orbax checkpointer whose failures raise an exception but log nothing.

    With `all_processes`, every process makes the same calls and waits for the others; otherwise this one acts alone.
    """
    import orbax.checkpoint as ocp

    # If the processes are listed, Orbax synchronises them through JAX's coordination service. Otherwise it would run a
    # collective on the devices between two training steps, because saving happens in the background.
    index, count = jax.process_index(), jax.process_count()
    options = ocp.options.MultiprocessingOptions(
        primary_host=0 if all_processes else index,
        active_processes=set(range(count)) if all_processes else {index},
        barrier_sync_key_prefix="all" if all_processes else str(index),
    )
    _silence_closed_loops()
    absl = logging.getLogger("absl")
    with _ORBAX:
        level = absl.level
        absl.setLevel(logging.CRITICAL)
        try:
            handler = ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=options)
            )
            with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
                yield checkpointer
        finally:
            absl.setLevel(level)


@functools.cache  # runs only once
def _silence_closed_loops() -> None:
    """Hides the errors that Python prints when threads of a failed save find their event loop closed."""
    report = sys.unraisablehook
    sys.unraisablehook = lambda failure: None if "loop is closed" in str(failure.exc_value) else report(failure)
