"""Saving and restoring a run with Orbax; the only file that knows it."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mnist_flax import rng
from mnist_flax import workdir as workdirs
from mnist_flax.config import Config, differences
from mnist_flax.errors import ConfigError, WorkdirError
from mnist_flax.step import TrainState, init_state

SCHEMA = 1  # of what a checkpoint holds; raised when an older program could not read it rightly


class Checkpoint(NamedTuple):
    """What is saved at a step.

    Attributes:
      state: the arrays.
      record: what else the run is at this step, as JSON: its config, the fingerprint of its data, its log so far, ...
    """

    state: TrainState
    record: dict[str, Any]


def digest(state: Any) -> str:
    """Returns the SHA-256 of every leaf's place, type, shape and bytes, as 64 hex digits."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        array = np.ascontiguousarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def refuse_other_run(record: dict[str, Any], config: Config, fingerprint: str, workdir: pathlib.Path) -> None:
    """Stops when a checkpoint is not of the run that `config` and the data describe.

    Raises:
      WorkdirError: lists each field that differs, with both values.
    """
    if record["schema"] != SCHEMA:
        raise WorkdirError(
            f"{workdir}: its checkpoints have schema {record['schema']}, this program reads {SCHEMA};"
            " use the version of the program that wrote them, or another --workdir"
        )
    try:
        changed = differences(Config.from_dict(record["config"]), config)
    except ConfigError as error:
        raise WorkdirError(f"{workdir}: was written by another version of the program ({error})") from error
    lines = [f"  config.{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items()]
    if record["fingerprint"] != fingerprint:
        lines.append(f"  fingerprint of the data: {record['fingerprint']} there, {fingerprint} now")
    if lines:
        raise WorkdirError(
            f"{workdir}: holds a run that differs from this one:\n" + "\n".join(lines) + "\nName another --workdir to"
            " start a new run, or give these fields their old values to go on with the old one."
        )


class Store:
    """The checkpoints of one run; `open_store` makes it."""

    def __init__(self, config: Config, fingerprint: str, workdir: pathlib.Path, manager: Any) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._workdir = workdir
        self._manager = manager

    def save(self, state: TrainState, record: dict[str, Any], *, holdout: dict[str, float] | None = None) -> None:
        """Saves in the background; the arrays are copied before it returns, so the state may be donated.

        Args:
          state: after its step.
          record: JSON values.
          holdout: loss and accuracy on hold-out rows, if they were just measured.
        """
        import orbax.checkpoint as ocp

        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        identity = {"schema": SCHEMA, "config": self._config.to_dict(), "fingerprint": self._fingerprint}
        record = {**identity, "digest": digest(state), **record}
        arrays = jax.tree.map(jax.numpy.copy, state)
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=items, metrics=holdout)

    def wait(self) -> None:
        """Returns when everything saved is on the disk."""
        self._manager.wait_until_finished()

    def restore_latest(self) -> tuple[Checkpoint | None, list[str]]:
        """Restores the newest good checkpoint.

        Returns:
          The checkpoint, None if there is no good one, and a line for each damaged one that was passed over. Those are
          moved into a folder beside, so that their steps can be saved again.

        Raises:
          WorkdirError: the newest readable one is of another run.
        """
        skipped: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                record = _read_record(self._manager, step)
                refuse_other_run(record, self._config, self._fingerprint, self._workdir)
                return Checkpoint(_read_state(self._manager, step, self._config, record), record), skipped
            except WorkdirError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                skipped.append(f"checkpoint {step} is damaged ({_reason(error)}); moved to {workdirs.DAMAGED}/")
                self._set_aside(step)
        return None, skipped

    def _set_aside(self, step: int) -> None:
        folder = self._workdir / workdirs.DAMAGED
        folder.mkdir(exist_ok=True)
        (self._workdir / workdirs.CHECKPOINTS / str(step)).rename(folder / f"{step}-{len(list(folder.iterdir()))}")
        self._manager.reload()


@contextlib.contextmanager
def open_store(config: Config, fingerprint: str, workdir: pathlib.Path) -> Iterator[Store]:
    """Opens the checkpoints of a run to go on with; on leaving, whatever is being saved is finished.

    Kept are the newest `checkpoint.keep_latest` and, of those with hold-out rows, the best `checkpoint.keep_best` by
    accuracy, ties by loss.
    """
    import orbax.checkpoint as ocp

    managers = ocp.checkpoint_managers
    policy = managers.AnyPreservationPolicy(
        [
            managers.LatestN(config.checkpoint.keep_latest),
            managers.BestN(_merit, n=config.checkpoint.keep_best, keep_checkpoints_without_metrics=False),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=lambda holdout: holdout["accuracy"],  # only so that Orbax saves the metrics with the checkpoint
        cleanup_tmp_directories=True,
    )
    with ocp.CheckpointManager(workdir.absolute() / workdirs.CHECKPOINTS, options=options) as manager:
        yield Store(config, fingerprint, workdir, manager)


class Run(NamedTuple):
    """A run as it was at one of its checkpoints."""

    config: Config
    state: TrainState
    record: dict[str, Any]


def load_run(workdir: pathlib.Path, which: str = "latest") -> Run:
    """Reads a checkpoint of a run to look at, from whatever kind and number of devices, without changing anything.

    Args:
      workdir: the run's folder.
      which: `latest`, `best` (on hold-out rows) or a step.

    Raises:
      WorkdirError: there is no such checkpoint, or it is damaged.
    """
    import orbax.checkpoint as ocp

    folder = workdir.absolute() / workdirs.CHECKPOINTS
    if not folder.is_dir():
        raise WorkdirError(f"--workdir={workdir}: holds no {workdirs.CHECKPOINTS}/; name the folder of a run")
    options = ocp.CheckpointManagerOptions(read_only=True, best_fn=lambda holdout: holdout["accuracy"])
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps())
        merits = {step: _merit(scores) for step in steps if (scores := manager.metrics(step))}
        step = {"latest": max(steps, default=None), "best": max(merits, key=lambda s: merits[s], default=None)}.get(
            which, int(which) if which.isdecimal() else None
        )
        if step not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise WorkdirError(f"{workdir}: has no checkpoint {which!r}; kept are the steps: {kept}")
        try:
            record = _read_record(manager, step)
            config = Config.from_dict(record["config"])
            return Run(config, _read_state(manager, step, config, record), record)
        except Exception as error:
            raise WorkdirError(f"{workdir}: checkpoint {step} is damaged ({_reason(error)})") from error


def _merit(holdout: Mapping[str, float]) -> tuple[float, float]:
    return holdout["accuracy"], -holdout["loss"]


def _read_record(manager: Any, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    record: dict[str, Any] = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
    return record


def _read_state(manager: Any, step: int, config: Config, record: Mapping[str, Any]) -> TrainState:
    """Reads the arrays onto this process's first device and checks them against their digest."""
    import orbax.checkpoint as ocp

    shapes = jax.eval_shape(lambda: init_state(config, rng.root_key(0)))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    state: TrainState = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
    if digest(state) != record["digest"]:
        raise ValueError("its arrays do not have the digest they were saved with")
    return state


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def save_weights(config: Config, workdir: pathlib.Path, variables: Mapping[str, Any]) -> None:
    """Writes what `forward` needs into `weights.safetensors`, a file that needs no framework to read.

    The names are paths such as `params/Block_0/bias`; the metadata holds the config as JSON.

    Raises:
      WorkdirError: the file cannot be written.
    """
    from safetensors.numpy import save

    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(dict(variables)))
    arrays = {"/".join(str(key.key) for key in path): np.ascontiguousarray(leaf) for path, leaf in leaves}
    content = save(arrays, metadata={"config": json.dumps(config.to_dict())})
    workdirs.write_bytes(workdir / workdirs.WEIGHTS, content)
