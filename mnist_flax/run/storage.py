"""One checkpoint on disk: the only module that knows Orbax.

A checkpoint is a folder with two Orbax items: `state`, the arrays, and `record`, everything else that the run is at
that step, as JSON. `files.sha256` beside them holds a checksum of every file, in the format of `sha256sum -c`. No file
is given to Orbax before its checksum is compared: what the libraries below do with a damaged one is hard to foresee.
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
_SAVING = threading.Lock()  # Orbax gives concurrent saves, even of different runs, the same number, and confuses them


def checksums(folder: pathlib.Path) -> str:
    """Returns a line for every file in a checkpoint: its SHA-256 and its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n" for file in files
    )


def write(folder: pathlib.Path, state: Any, record: dict[str, Any]) -> None:
    """Writes a checkpoint without its checksums; all processes take part, each at the same call.

    Raises:
      Exception: of various types; Orbax and TensorStore report a full disk as a ValueError, for example.
    """
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    with _SAVING, _checkpointer(all_processes=True) as checkpointer:
        checkpointer.save(folder, args=items)


def restore_record(folder: pathlib.Path) -> Any:
    """Reads the record of a checkpoint.

    Raises:
      Exception: of various types, if any file of the checkpoint is not what was saved.
    """
    import orbax.checkpoint as ocp

    if not (folder / CHECKSUMS).is_file():
        raise ValueError(f"{CHECKSUMS} is missing")
    then, now = (folder / CHECKSUMS).read_text(), checksums(folder)
    for line in sorted(set(then.splitlines()) ^ set(now.splitlines())):
        raise ValueError(f"{line[66:]} is not what was saved")
    with _checkpointer() as checkpointer:
        return checkpointer.restore(folder, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]


def restore_state(folder: pathlib.Path, target: Any) -> Any:
    """Reads the arrays of a checkpoint into host memory; `target` has the same tree, shapes and types.

    Raises:
      Exception: of various types, if they cannot be read.
    """
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        return checkpointer.restore(folder, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]


@contextlib.contextmanager
def _checkpointer(*, all_processes: bool = False) -> Iterator[Any]:
    """Opens Orbax, and reports its failures by the raised exception alone.

    Args:
      all_processes: all processes make the same calls and wait for each other; otherwise this one acts alone.
    """
    import orbax.checkpoint as ocp

    # With named processes Orbax waits through JAX's coordination service. It would use a collective on the devices
    # otherwise, which would run between the training steps, because saving is in the background.
    index, count = jax.process_index(), jax.process_count()
    options = ocp.options.MultiprocessingOptions(
        primary_host=0 if all_processes else index,
        active_processes=set(range(count)) if all_processes else {index},
        barrier_sync_key_prefix="all" if all_processes else str(index),
    )
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=options)
        )
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            yield checkpointer
    except Exception:
        _silence_closed_loops()
        raise
    finally:
        absl.setLevel(level)


@functools.cache  # once
def _silence_closed_loops() -> None:
    """Hides what Python prints when threads of a failed save find their event loop closed, some time later."""
    report = sys.unraisablehook
    sys.unraisablehook = lambda failure: None if "loop is closed" in str(failure.exc_value) else report(failure)
