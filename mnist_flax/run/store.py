"""Saves, restores and prunes the checkpoints of a run during training.

A checkpoint is written under a temporary name, flushed to disk, and only then renamed to its step number. So a folder
whose name is a number was complete when it was renamed, and its checksums show whether it is still intact.

Orbax's `CheckpointManager` (0.12.8) was tried and is not used. It has no hook between writing and renaming, where
checksums and fsync belong. It deletes a checkpoint without renaming it first, so a kill leaves a damaged folder that
looks finished. If the newest checkpoint is damaged, it raises an error instead of restoring the previous one.
"""

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mnist_flax.config import Config
from mnist_flax.errors import UserError, WorkdirError, reason
from mnist_flax.run import checkpoint, checkpoint_files, processes
from mnist_flax.run import workdir as workdirs
from mnist_flax.step import TrainState

_UNFINISHED = ".unfinished"  # the suffix of a checkpoint while it is written, and while it is deleted


class Store:
    """The checkpoints of one run; created by `open_store`."""

    def __init__(
        self, config: Config, fingerprint: str, workdir: pathlib.Path, executor: concurrent.futures.Executor
    ) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._workdir = workdir
        self._folder = workdir / workdirs.CHECKPOINTS
        self._executor = executor
        self._saving: concurrent.futures.Future[None] | None = None

    @functools.cached_property
    def _holdouts(self) -> dict[int, dict[str, float] | None]:
        """The hold-out scores of each readable checkpoint, read when this process first saves one.

        Checkpoints that cannot be read are never deleted.
        """
        return checkpoint.holdouts(self._folder)

    def save(self, state: TrainState, record: dict[str, Any], *, holdout: dict[str, float] | None = None) -> None:
        """Saves in the background; the arrays are copied before this returns, so the state may be donated.

        Args:
          state: its step becomes the name of the checkpoint.
          record: what `RunLog.snapshot` returns.
          holdout: loss and accuracy on hold-out rows, if evaluated at this step.

        Raises:
          WorkdirError: the previous save failed.
        """
        self.wait()
        arrays = jax.tree.map(np.array, jax.device_get(state))
        identity = {"schema": checkpoint.SCHEMA, "config": self._config.to_dict(), "fingerprint": self._fingerprint}
        record = {**identity, "arrays": checkpoint.layout(arrays), "holdout": holdout, **record}
        self._saving = self._executor.submit(self._write, arrays, record)

    def wait(self) -> None:
        """Waits until the last save is on disk; raises its error if it failed. Earlier checkpoints are kept."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def restore_latest(self) -> tuple[checkpoint.Run | None, list[str]]:
        """Restores the newest intact checkpoint, and returns a message for each damaged one that was skipped.

        Damaged checkpoints are moved to a separate folder, so that their steps can be saved again. With several
        processes, the primary chooses the checkpoint and the others load the same one.

        Raises:
          WorkdirError: the newest readable checkpoint belongs to another run or another version of the program.
        """
        found, skipped = self._newest_good() if processes.is_primary() else (None, [])
        (chosen,) = processes.agree(found.record["step"] if found else -1)
        if chosen >= 0 and not found:
            found = checkpoint.load_run(self._workdir, str(chosen))
        return found, skipped

    def _newest_good(self) -> tuple[checkpoint.Run | None, list[str]]:
        skipped: list[str] = []
        for step in reversed(checkpoint.steps_in(self._folder)):
            try:
                return checkpoint.read_run(self._folder / str(step), (self._config, self._fingerprint)), skipped
            except UserError:
                raise
            except Exception as error:  # of many types: its files are damaged, or cannot be read
                flaw = f"checkpoint {step} {checkpoint.flaw(error)}"
                if checkpoint.is_unreadable(error):
                    raise WorkdirError(f"{self._folder}: {flaw}; {workdirs.REMEDY_RESUME}") from error
                skipped.append(f"{flaw}: moved to {self._set_aside(step)}")
        return None, skipped

    def _set_aside(self, step: int) -> pathlib.Path:
        parent = workdirs.subfolder(self._workdir, workdirs.DAMAGED)
        names = (f"{step}" + f"-{number}" * (number > 1) for number in itertools.count(1))
        target = next(parent / name for name in names if not os.path.lexists(parent / name))
        with workdirs.as_workdir_error(target):
            (self._folder / str(step)).rename(target)
        return target

    def _write(self, arrays: TrainState, record: dict[str, Any]) -> None:
        """Writes a checkpoint, then prunes old ones; all but the primary only take part in Orbax's collective save."""
        step = int(arrays.step)
        unfinished = self._folder / f"{step}{_UNFINISHED}"
        if not processes.is_primary():
            checkpoint_files.write(unfinished, arrays, record)
            return
        holdouts = self._holdouts
        try:
            workdirs.subfolder(self._workdir, workdirs.CHECKPOINTS)
            needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + 2**16
            if shutil.disk_usage(self._folder).free < needed:  # better to fail now than halfway
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            checkpoint_files.write(unfinished, arrays, record)
            workdirs.write_text(unfinished / checkpoint_files.CHECKSUMS, checkpoint_files.checksums(unfinished))
            for path in (*unfinished.rglob("*"), unfinished):
                workdirs.sync(path)
            unfinished.rename(self._folder / str(step))
            workdirs.sync(self._folder)
            holdouts[step] = record["holdout"]
        except Exception as error:  # TensorStore reports a full disk as a ValueError
            _clean(self._folder)
            steps = checkpoint.steps_in(self._folder)
            then = f"continues from the newest checkpoint: {max(steps)}" if steps else "starts again"
            raise WorkdirError(
                f"{self._folder}: checkpoint {step} cannot be written ({reason(error)}); fix that, and the"
                f" same command {then}"
            ) from error
        try:
            self._prune()
        except OSError as error:
            raise WorkdirError(
                f"{self._folder}: checkpoint {step} is saved, but older ones cannot be deleted"
                f" ({reason(error)}); {workdirs.REMEDY_RESUME}"
            ) from error

    def _prune(self) -> None:
        """Deletes all but the `keep_latest` newest checkpoints and the `keep_best` best by hold-out scores."""
        limits = self._config.checkpoint
        scores = {step: checkpoint.sort_key(holdout) for step, holdout in self._holdouts.items() if holdout}
        best = sorted(scores, key=lambda step: (scores[step], step), reverse=True)[: limits.keep_best]
        latest = sorted(self._holdouts)[-limits.keep_latest :]
        for step in self._holdouts.keys() - {*best, *latest}:
            # Renamed first, so that a process killed during deletion leaves nothing that looks like a checkpoint.
            with contextlib.suppress(FileNotFoundError):  # someone else has deleted it
                workdirs.remove((self._folder / str(step)).rename(self._folder / f"{step}{_UNFINISHED}"))
            del self._holdouts[step]


@contextlib.contextmanager
def open_store(config: Config, fingerprint: str, workdir: pathlib.Path) -> Iterator[Store]:
    """Opens the checkpoints of a run after deleting unfinished ones; on exit, waits for the save in progress.

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


def _clean(folder: pathlib.Path) -> None:
    """Deletes unfinished checkpoints, including the temporary folders that Orbax derives from our names."""
    if folder.is_symlink():
        return
    for leftover in folder.glob(f"*{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            workdirs.remove(leftover)
