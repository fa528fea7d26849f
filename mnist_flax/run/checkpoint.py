"""Reads and checks the checkpoints of a run: `checkpoints/<step>/`, as `store` writes them."""

import contextlib
import errno
import hashlib
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mnist_flax import external
from mnist_flax.config import Config, differences
from mnist_flax.errors import ConfigError, UserError, WorkdirError, failures_as, reason
from mnist_flax.run import checkpoint_files
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.schema import LINE, NUMBER, mismatches
from mnist_flax.step import TrainState, state_shapes

logger = logging.getLogger(__name__)

_UNREADABLE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}
SCHEMA = 2  # the version of the checkpoint format; incremented when older programs cannot read it correctly

# The schema of a record; `schema.mismatches` says how to read it.
_RECORD = {
    "schema": int,
    "config": {},
    "fingerprint": str,
    "arrays": {"*": str},
    "holdout": ({"loss": NUMBER, "accuracy": NUMBER}, None),
    "step": int,
    "seconds": NUMBER,
    "restarts": int,
    "origin": {
        "fork": ({"workdir": str, "step": int}, None),
        "teacher?": ({"workdir": str, "networks": int, "digest": str}, None),  # missing in older checkpoints
        "setup?": {"*": str},  # missing in older checkpoints
        "versions": {"*": str},
    },
    "versions": [{"*": str}],
    "log": [LINE],
    "window": [{"loss": NUMBER, "accuracy": NUMBER, "examples": NUMBER, "*": NUMBER}],
    "epoch_sums": {"*": NUMBER},
}


class Run(NamedTuple):
    """A run as it was at one of its checkpoints.

    Attributes:
      config: the config with which the checkpoint was saved.
      state: the arrays.
      record: everything else, as JSON: `schema`, `config`, `fingerprint` of the data, `arrays` (names and shapes),
        `holdout` (loss and accuracy if they were measured at this step, or None), and what `RunLog.snapshot` returns.
    """

    config: Config
    state: TrainState
    record: dict[str, Any]


def leaves(state: Any) -> dict[str, Any]:
    """Returns the leaves of a tree keyed by path, such as `.params['Conv_0']['kernel']`."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def layout(state: Any) -> dict[str, str]:
    """Returns the dtype and shape of every leaf keyed by path, such as `float32(3, 3, 1, 32)`."""
    return {name: f"{leaf.dtype}{leaf.shape}" for name, leaf in leaves(state).items()}


def digest(state: Any) -> str:
    """Returns the SHA-256 of a tree in host memory: of the names, types and values of its leaves."""
    found = hashlib.sha256()
    for name, leaf in leaves(state).items():
        found.update(f"{name} {leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


def sort_key(holdout: Mapping[str, float]) -> tuple[float, float]:
    """Returns the sort key of a checkpoint, highest for the best: hold-out accuracy, then negative loss."""
    return holdout["accuracy"], -holdout["loss"]


def steps_in(folder: pathlib.Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a folder, ascending; empty if the folder does not exist.

    Raises:
      WorkdirError: it cannot be read.
    """
    return sorted(int(name) for name in workdirs.names_in(folder) if name.isdecimal() and str(int(name)) == name)


def holdouts(folder: pathlib.Path) -> dict[int, dict[str, float] | None]:
    """Reads the hold-out loss and accuracy of every checkpoint that can be read; None where they were not measured."""
    found: dict[int, dict[str, float] | None] = {}
    for step in steps_in(folder):
        try:
            found[step] = read_record(folder / str(step))["holdout"]
        except Exception as error:  # of many types
            logger.warning("%s is not compared with the others: %s", folder / str(step), flaw(error))
    return found


def flaw(error: Exception) -> str:
    """Returns what is wrong with a checkpoint that raised an error: it is damaged, or cannot be used or read now."""
    if isinstance(error, UserError):
        return f"cannot be used ({error})"
    return f"{'cannot be read' if is_unreadable(error) else 'is damaged'} ({reason(error)})"


def is_unreadable(error: Exception) -> bool:
    """Returns whether an error says nothing about the content of a file, such as missing permissions."""
    return isinstance(error, OSError) and error.errno in _UNREADABLE


def load_run(workdir: pathlib.Path, which: str = "latest") -> Run:
    """Reads a checkpoint, saved from any kind or number of devices, without changing anything on disk.

    Args:
      workdir: the run's folder; another process may be writing to it.
      which: `latest`, `best` (on held-out rows) or a step.

    Raises:
      WorkdirError: there is no such checkpoint, or it is damaged, or another version of the program wrote it.
    """
    folder = workdir / workdirs.CHECKPOINTS
    while True:
        step = _choose(folder, which)
        try:
            run = read_run(folder / str(step))
            break
        except UserError:
            raise
        except Exception as error:  # of many types: its files are damaged, or cannot be read
            kept = steps_in(folder)
            others = ", ".join(str(other) for other in kept if other != step) or "none"
            if step in kept or others == "none":
                raise WorkdirError(f"{workdir}: checkpoint {step} {flaw(error)}; the others are: {others}") from error
        # A running process has just deleted this checkpoint, after saving newer ones: choose again.
    then, now = run.record["origin"].get("setup") or {}, external.digests(run.config.program.code)
    if changed := [name for name in now if then.get(name, now[name]) != now[name]]:
        logger.warning("%s: this code has changed since the run began: %s", workdir, ", ".join(changed))
    return run


def _choose(folder: pathlib.Path, which: str) -> int:
    steps = steps_in(folder)
    if not steps and not folder.parent.exists():
        raise WorkdirError(f"{folder.parent}: no such folder; name a run's folder")
    if not steps:
        remedy = "name a run's folder"
        inside = [folder.parent / name for name in sorted(workdirs.names_in(folder.parent))]
        if runs := [path for path in inside if workdirs.holds_run(path)]:
            remedy += f", such as {runs[0]}"
        if (folder.parent / workdirs.CONFIG).is_file():
            remedy = "its run stopped before the first checkpoint, so repeat the command that started it"
        raise WorkdirError(f"{folder.parent}: holds no {folder.name}/ of a run; {remedy}")
    if which == "latest":
        return steps[-1]
    if which == "best":
        ranked = {step: sort_key(holdout) for step, holdout in holdouts(folder).items() if holdout}
        if not ranked:
            raise WorkdirError(
                f"{folder.parent}: has no best checkpoint, because none was evaluated on hold-out rows; use"
                " --checkpoint=latest"
            )
        return max(ranked, key=lambda step: (ranked[step], step))
    kept = [str(step) for step in steps]
    if which not in kept:
        raise WorkdirError(
            f"{folder.parent}: has no checkpoint {which!r}; choose latest, best or a step: {', '.join(kept)}"
        )
    return int(which)


def read_run(path: pathlib.Path, same_as: tuple[Config, str] | None = None) -> Run:
    """Reads the checkpoint in a folder.

    Args:
      path: the folder.
      same_as: the config of a run and the fingerprint of its data; if given, the checkpoint must belong to that run.

    Raises:
      UserError: another program or version wrote it, it belongs to another run, or it is intact but cannot be used.
      Exception: of various types, if its files are damaged or cannot be read.
    """
    record = read_record(path)
    workdir = path.parent.parent
    try:
        config = Config.from_dict(_without_unused(record["config"]))
    except ConfigError as error:
        raise WorkdirError(
            f"{workdir}: was written by another version of this program, or by a script that extends it ({error}); use"
            " that version or script, or name another --workdir"
        ) from error
    if same_as:
        _check_same_run(workdir, config, record, *same_as)
    with _intact(path):
        return Run(config, _read_state(path, config, record), record)


def _intact(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Converts errors in reading an intact checkpoint, so that it is not treated as damaged.

    An OSError stays: a file cannot be read, or has been deleted in the meantime.
    """
    before = f"{path}: is intact, but cannot be used"  # for example because of too little memory
    return failures_as(WorkdirError, before, "; fix that, and repeat the command", unchanged=OSError)


def _without_unused(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved config without the augmentations that are off: their entries may be those of another script."""
    augment = values.get("augment")
    if not isinstance(augment, dict):
        return values
    return values | {"augment": {name: strength for name, strength in augment.items() if strength}}


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """Reads and checks the record of a checkpoint; raises the same errors as `read_run`."""
    checkpoint_files.verify(path)
    with _intact(path):
        record: dict[str, Any] = checkpoint_files.restore(path, "record")
    schema = record.get("schema") if isinstance(record, dict) else None
    if type(schema) is int and schema != SCHEMA:
        age = "a newer" if schema > SCHEMA else "an older"
        raise WorkdirError(
            f"{path}: was written by {age} version of this program (schema {schema} there, {SCHEMA} now); use that"
            " version to continue the run, or name another --workdir to start anew"
        )
    for mistake in mismatches(record, _RECORD, "record"):
        raise _foreign(path, mistake)
    if str(record["step"]) != path.name:
        raise _foreign(path, f"record.step = {record['step']}: must be {path.name}")
    return record


def _foreign(path: pathlib.Path, mistake: str) -> WorkdirError:
    return WorkdirError(
        f"{path}: contains something that this program does not write ({mistake}); delete that folder to continue from"
        " the checkpoint before it, or name another --workdir"
    )


def _read_state(path: pathlib.Path, config: Config, record: Mapping[str, Any]) -> TrainState:
    """Reads the arrays into host memory."""
    shapes = state_shapes(config.program)
    there, now = record["arrays"], layout(shapes)
    for name in now | there:
        if now.get(name) != there.get(name):
            raise WorkdirError(
                f"{path}: was written by another version of this program, of optax, or of your own network ({name}:"
                f" {there.get(name)} there, {now.get(name)} now); use that version, or another --workdir"
            )
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    state: TrainState = checkpoint_files.restore(path, "state", target)
    if int(state.step) != record["step"]:
        raise _foreign(path, f"state.step = {int(state.step)}: must be {record['step']}")
    return state


def _check_same_run(
    workdir: pathlib.Path, saved: Config, record: Mapping[str, Any], config: Config, fingerprint: str
) -> None:
    """Checks that a checkpoint belongs to the run that `config` and the data define."""
    changed = differences(saved, config)
    lines = [f"  config.{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items()]
    if record["fingerprint"] != fingerprint:
        lines.append(f"  fingerprint of the data: {record['fingerprint']} there, {fingerprint} now")
    if lines:
        can_fork = workdir.parent.name != workdirs.MEMBERS and not any(name.startswith("model.") for name in changed)
        raise WorkdirError(
            f"{workdir}: holds a run that differs from this one:\n" + "\n".join(lines) + "\nTo continue that run, set"
            " these to their old values. To start a new one, name another --workdir"
            + (f"; with --fork={workdir} it starts from that run's weights." if can_fork else ".")
        )
    if record["step"] > config.num_steps:
        raise WorkdirError(
            f"{workdir}: holds a run that is already at step {record['step']}, past the end of this one, which has"
            f" {config.num_steps} (config.train.epochs = {config.train.epochs}); raise config.train.epochs, or name"
            " another --workdir"
        )
