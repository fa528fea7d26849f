"""Saving and restoring a run with Orbax; the only file that knows it.

A checkpoint is a folder `checkpoints/<step>/` as Orbax writes and reads it, with two items: `state`, the arrays, and
`record`, what else the run is at that step, as JSON. Beside them `files.sha256` holds a checksum of every file, as
`sha256sum -c` reads it. The folder is written under another name, and renamed when it is whole and on the disk: so one
whose name is a number was finished once, and the checksums tell whether it still is what it was. No file is given to
Orbax before they are compared: what the libraries below it make of a damaged one is hard to foresee, and loud.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mnist_flax import rng
from mnist_flax.config import Config, differences
from mnist_flax.errors import ConfigError, WorkdirError
from mnist_flax.run import processes
from mnist_flax.run import workdir as workdirs
from mnist_flax.step import TrainState, init_state

SCHEMA = 1  # of what a checkpoint holds; raised when an older program could not read it rightly
_CHECKSUMS = "files.sha256"
_UNFINISHED = ".unfinished"  # the ending of a checkpoint's name while it is written, and again while it is deleted
_SAVING = threading.Lock()  # two saves at once, of different runs too, spoil each other: Orbax numbers them as one


class Run(NamedTuple):
    """A run as it was at one of its checkpoints.

    Attributes:
      config: of the run.
      state: the arrays.
      record: what else the run was at this step, as JSON: `schema`, `config`, `fingerprint` of the data, `arrays`
        (names and shapes), `holdout` (loss and accuracy, if they were just measured), and what
        `logs.RunLog.snapshot` returns.
    """

    config: Config
    state: TrainState
    record: dict[str, Any]


def leaves(state: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their places, such as `.params['Conv_0']['kernel']`."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def layout(state: Any) -> dict[str, str]:
    """Returns type and shape of every leaf by its place, such as `float32(3, 3, 1, 32)`."""
    return {name: f"{leaf.dtype}{leaf.shape}" for name, leaf in leaves(state).items()}


def checksums(folder: pathlib.Path) -> str:
    """Returns a line for every file in a checkpoint: its SHA-256 and its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n" for file in files
    )


def merit(holdout: Mapping[str, float]) -> tuple[float, float]:
    """Returns what the best checkpoint has most of: accuracy on hold-out rows, and at the same accuracy a low loss."""
    return holdout["accuracy"], -holdout["loss"]


class Store:
    """The checkpoints of one run; `open_store` makes it."""

    def __init__(
        self, config: Config, fingerprint: str, workdir: pathlib.Path, executor: concurrent.futures.Executor
    ) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._workdir = workdir
        self._folder = workdir.absolute() / workdirs.CHECKPOINTS
        self._executor = executor
        self._saving: concurrent.futures.Future[None] | None = None
        self._holdouts = _holdouts(self._folder)

    def save(self, state: TrainState, record: dict[str, Any], *, holdout: dict[str, float] | None = None) -> None:
        """Saves in the background; the arrays are copied before it returns, so the state may be donated.

        Args:
          state: after its step.
          record: JSON values, not changed afterwards.
          holdout: loss and accuracy on hold-out rows, if they were just measured.

        Raises:
          WorkdirError: the save before this one failed.
        """
        self.wait()
        arrays = jax.tree.map(np.array, jax.device_get(state))
        identity = {"schema": SCHEMA, "config": self._config.to_dict(), "fingerprint": self._fingerprint}
        record = {**identity, "arrays": layout(arrays), "holdout": holdout, **record}
        self._saving = self._executor.submit(self._write, arrays, record)

    def wait(self) -> None:
        """Returns when everything saved is on the disk.

        Raises:
          WorkdirError: it cannot be written; what was there before is kept.
        """
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def preemption(self, call: int) -> int:
        """Returns SIGTERM if one of several processes got it, otherwise 0; a single process hears its own signals.

        Args:
          call: counts the calls of this from 0, in all processes alike: JAX's service tells all at the same one.
        """
        if jax.process_count() == 1:
            return 0
        from orbax.checkpoint import multihost

        return signal.SIGTERM if multihost.reached_preemption(call) else 0

    def restore_latest(self) -> tuple[Run | None, list[str]]:
        """Restores the newest good checkpoint.

        Returns:
          The run as it was there, None if there is no good one, and a line for each damaged one that was passed over.
          Those are moved into a folder beside, so that their steps can be saved again.

        Of several processes the primary chooses, and the others read what it chose.

        Raises:
          WorkdirError: the newest readable one is of another run.
        """
        found, skipped = self._newest_good() if processes.is_primary() else (None, [])
        (chosen,) = processes.agree(found.record["step"] if found else -1)
        if chosen >= 0 and not found:
            found = load_run(self._workdir, str(chosen))
        return found, skipped

    def _newest_good(self) -> tuple[Run | None, list[str]]:
        skipped: list[str] = []
        for step in reversed(steps_in(self._folder)):
            try:
                record = _read_record(self._folder / str(step))
                refuse_other_run(record, self._config, self._fingerprint, self._workdir)
                state = _read_state(self._folder / str(step), self._config, record)
                return Run(self._config, state, record), skipped
            except WorkdirError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                skipped.append(f"checkpoint {step} is damaged ({_reason(error)}): moved to {self._set_aside(step)}")
        return None, skipped

    def _set_aside(self, step: int) -> pathlib.Path:
        parent = self._workdir / workdirs.DAMAGED
        names = (f"{step}" + f"-{number}" * (number > 1) for number in range(1, 10**6))
        target = next(parent / name for name in names if not (parent / name).exists())
        with workdirs.speaking(target):
            parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        del self._holdouts[step]
        return target

    def _write(self, arrays: TrainState, record: dict[str, Any]) -> None:
        """Writes a checkpoint, and then deletes those that need not be kept any longer.

        All processes take part in what Orbax does; the rest is left to the primary.
        """
        import orbax.checkpoint as ocp

        step = int(arrays.step)
        unfinished = self._folder / f"{step}{_UNFINISHED}"
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
        if not processes.is_primary():
            with _SAVING, _checkpointer(everybody=True) as checkpointer:
                checkpointer.save(unfinished, args=items)
            return
        try:
            self._folder.mkdir(exist_ok=True)
            needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + 2**16
            if shutil.disk_usage(self._folder).free < needed:  # better than to fail half way
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with _SAVING, _checkpointer(everybody=True) as checkpointer:
                checkpointer.save(unfinished, args=items)
            (unfinished / _CHECKSUMS).write_text(checksums(unfinished))
            for path in (*unfinished.rglob("*"), unfinished):
                workdirs.sync(path)
            unfinished.rename(self._folder / str(step))
            workdirs.sync(self._folder)
            self._holdouts[step] = record["holdout"]
            self._prune()
        except Exception as error:  # TensorStore tells of a disk that fails by a ValueError
            _clean(self._folder)
            raise WorkdirError(
                f"{self._folder}: checkpoint {step} cannot be written ({_reason(error)}); mend that, and the same"
                f" command goes on from the newest one that is there: {max(steps_in(self._folder), default='none')}"
            ) from error

    def _prune(self) -> None:
        """Deletes all but the newest and, of those with hold-out rows, the best."""
        cadence = self._config.checkpoint
        judged = {step: merit(holdout) for step, holdout in self._holdouts.items() if holdout}
        best = sorted(judged, key=lambda step: (judged[step], step), reverse=True)[: cadence.keep_best]
        latest = sorted(self._holdouts)[-cadence.keep_latest :]
        for step in self._holdouts.keys() - {*best, *latest}:
            # Under another name first: a process that dies in between leaves nothing that looks like a checkpoint.
            shutil.rmtree((self._folder / str(step)).rename(self._folder / f"{step}{_UNFINISHED}"))
            del self._holdouts[step]


@contextlib.contextmanager
def open_store(config: Config, fingerprint: str, workdir: pathlib.Path) -> Iterator[Store]:
    """Opens the checkpoints of a run to go on with; on leaving, whatever is being saved is finished.

    What an earlier process left unfinished is deleted. Kept are the newest `checkpoint.keep_latest` and, of those with
    hold-out rows, the best `checkpoint.keep_best`.

    Raises:
      WorkdirError: the last save failed.
    """
    if processes.is_primary():
        _clean(workdir / workdirs.CHECKPOINTS)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
        store = Store(config, fingerprint, workdir, executor)
        try:
            yield store
        finally:
            store.wait()


def load_run(workdir: pathlib.Path, which: str = "latest") -> Run:
    """Reads a checkpoint of a run to look at, from whatever kind and number of devices, without changing anything.

    Args:
      workdir: the run's folder.
      which: `latest`, `best` (on hold-out rows) or a step.

    Raises:
      WorkdirError: there is no such checkpoint, or it is damaged, or another version of the program wrote it.
    """
    folder = workdir.absolute() / workdirs.CHECKPOINTS
    steps = steps_in(folder)
    if not steps:
        raise WorkdirError(f"--workdir={workdir}: holds no {workdirs.CHECKPOINTS}/ of a run; name a run's folder")
    step = _best(folder) if which == "best" else {"latest": str(steps[-1])}.get(which, which)
    if step not in map(str, steps):
        raise WorkdirError(f"{workdir}: has no checkpoint {which!r}; kept are the steps: {', '.join(map(str, steps))}")
    try:
        record = _read_record(folder / step)
        config = _read_config(record, workdir)
        return Run(config, _read_state(folder / step, config, record), record)
    except WorkdirError:
        raise
    except Exception as error:
        others = ", ".join(str(other) for other in steps if str(other) != step) or "none"
        raise WorkdirError(
            f"{workdir}: checkpoint {step} is damaged ({_reason(error)}); there are these others: {others}"
        ) from error


def _best(folder: pathlib.Path) -> str:
    """Returns the best checkpoint on hold-out rows, of those whose records can be read; empty if there is none."""
    judged = {step: merit(holdout) for step, holdout in _holdouts(folder).items() if holdout}
    return str(max(judged, key=lambda step: (judged[step], step))) if judged else ""


def _holdouts(folder: pathlib.Path) -> dict[int, dict[str, float] | None]:
    """Reads loss and accuracy on hold-out rows of every checkpoint, None where they were not measured."""
    holdouts: dict[int, dict[str, float] | None] = {}
    for step in steps_in(folder):
        try:
            holdouts[step] = _read_record(folder / str(step))["holdout"]
        except Exception:  # damaged; whoever restores it says so
            holdouts[step] = None
    return holdouts


def _clean(folder: pathlib.Path) -> None:
    """Deletes what was not finished: by us, or under our name by Orbax."""
    for leftover in folder.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def steps_in(folder: pathlib.Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a folder, ascending; none if there is no such folder."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def refuse_other_run(record: Mapping[str, Any], config: Config, fingerprint: str, workdir: pathlib.Path) -> None:
    """Stops when a checkpoint is not of the run that `config` and the data describe.

    Raises:
      WorkdirError: lists each field that differs, with both values.
    """
    changed = differences(_read_config(record, workdir), config)
    lines = [f"  config.{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items()]
    if record["fingerprint"] != fingerprint:
        lines.append(f"  fingerprint of the data: {record['fingerprint']} there, {fingerprint} now")
    if lines:
        raise WorkdirError(
            f"{workdir}: holds a run that differs from this one:\n" + "\n".join(lines) + "\nTo go on with that run,"
            " give these their old values. To start a new one, name another --workdir; with"
            f" --fork={workdir} it starts from that run's weights."
        )
    if record["step"] > config.num_steps:
        raise WorkdirError(
            f"{workdir}: holds a run that is at step {record['step']} already, past the end of this one, which has"
            f" {config.num_steps} (config.train.epochs = {config.train.epochs}); raise config.train.epochs, or name"
            " another --workdir"
        )


def _read_config(record: Mapping[str, Any], workdir: pathlib.Path) -> Config:
    """Reads the config that a checkpoint was saved with.

    Raises:
      WorkdirError: the checkpoint was written by another version of the program.
    """
    if record["schema"] != SCHEMA:
        age = "a newer" if record["schema"] > SCHEMA else "an older"
        raise WorkdirError(
            f"{workdir}: was written by {age} version of this program (schema {record['schema']} there, {SCHEMA} now);"
            " use that version, or name another --workdir"
        )
    try:
        return Config.from_dict(record["config"])
    except ConfigError as error:
        raise WorkdirError(
            f"{workdir}: was written by another version of this program ({error}); use that version, or name another"
            " --workdir"
        ) from error


@contextlib.contextmanager
def _checkpointer(*, everybody: bool = False) -> Iterator[Any]:
    """Opens Orbax, and keeps a failure from being told in other ways than by the exception that it raises.

    Args:
      everybody: all processes do the same and wait for each other; otherwise this one acts alone.
    """
    import orbax.checkpoint as ocp

    # Named, all or one, so that they wait by JAX's coordination service: a collective on the devices would get between
    # the steps, for saving is in the background.
    index, count = jax.process_index(), jax.process_count()
    options = ocp.options.MultiprocessingOptions(
        primary_host=0 if everybody else index,
        active_processes=set(range(count)) if everybody else {index},
        barrier_sync_key_prefix="all" if everybody else str(index),
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
        # Threads of Orbax and TensorStore go on to fail and to tell of it, some when the event loop is gone.
        tell = sys.unraisablehook
        sys.unraisablehook = lambda failure: None if "loop is closed" in str(failure.exc_value) else tell(failure)
        raise
    absl.setLevel(level)


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    """Reads the record of a checkpoint.

    Raises:
      Exception: of some kind, if any file of the checkpoint is not what was saved.
    """
    import orbax.checkpoint as ocp

    then, now = (path / _CHECKSUMS).read_text(), checksums(path)
    for line in sorted(set(then.splitlines()) ^ set(now.splitlines())):
        raise ValueError(f"{line[66:]} is not what was saved")
    with _checkpointer() as checkpointer:
        items = checkpointer.restore(path, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
    record: dict[str, Any] = items["record"]
    return record


def _read_state(path: pathlib.Path, config: Config, record: Mapping[str, Any]) -> TrainState:
    """Reads the arrays onto the default device.

    Raises:
      WorkdirError: they are not the arrays that this program would have for this config.
    """
    import orbax.checkpoint as ocp

    shapes = jax.eval_shape(lambda: init_state(config.program, rng.root_key(0)))
    wanted = layout(shapes)
    for name in (*wanted, *record["arrays"]):
        if wanted.get(name) != record["arrays"].get(name):
            raise WorkdirError(
                f"{path}: was written by another version of this program or of optax ({name}:"
                f" {record['arrays'].get(name)} there, {wanted.get(name)} now); use that version, or another --workdir"
            )
    # Read to the host: nothing of the devices that they were saved from, or are now for, matters to the file.
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    with _checkpointer() as checkpointer:
        items = checkpointer.restore(path, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
    state: TrainState = jax.device_put(items["state"])
    return state


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def save_weights(config: Config, workdir: pathlib.Path, variables: Mapping[str, Any]) -> None:
    """Writes what `forward` needs into `weights.safetensors`, a file that needs no framework to read.

    The names are paths such as `params/Conv_0/kernel`; the metadata holds the config as JSON.

    Raises:
      WorkdirError: the file cannot be written.
    """
    from safetensors.numpy import save

    by_path = jax.tree_util.tree_leaves_with_path(jax.device_get(dict(variables)))
    arrays = {"/".join(str(key.key) for key in path): np.ascontiguousarray(leaf) for path, leaf in by_path}
    content = save(arrays, metadata={"config": json.dumps(config.to_dict())})
    workdirs.write_bytes(workdir / workdirs.WEIGHTS, content)
