"""The log of a run: metrics of its steps and evaluations, in metrics.jsonl and TensorBoard."""

import json
import math
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mnist_flax.config import Config
from mnist_flax.errors import NonFiniteLossError
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.provenance import versions
from mnist_flax.run.schema import LINE, NUMBER, SPLITS, mismatches

Record = dict[str, Any]  # a JSON object, such as a line of metrics.jsonl
Sums = dict[str, float]  # summed over the examples of one or more steps: "loss", "accuracy" (number correct), ...
_NOT_SHOWN = {"step", "epoch", "split", "examples", "seconds"}  # every other key becomes a curve in TensorBoard


class RunLog:
    """The log of one run.

    Every checkpoint contains the whole log, and a resumed run rewrites its log files from it. This discards all that a
    killed run wrote after its last checkpoint, including a partial line.

    Attributes:
      step: the number of finished updates.
      seconds: training time, summed over restarts, without compiling, evaluating and saving, and without the steps
        that a killed process did after its last checkpoint.
      restarts: how often training was resumed from a checkpoint.
      origin: how the run started, as JSON.
      versions: `provenance.versions` at the start, and after each restart that changed it; the current one last.
    """

    def __init__(
        self, config: Config, workdir: pathlib.Path, saved: Record, *, learning_rate: Callable[[int], Any], writes: bool
    ) -> None:
        """Starts from `saved`: the record of a checkpoint, or, for a new run, a record with only an `origin`.

        Without `writes`, another process writes the files. `learning_rate` maps the number of finished updates to the
        learning rate of the next one.
        """
        self._config = config
        self._workdir = workdir
        self._learning_rate = learning_rate
        self.step: int = saved.get("step", 0)
        self.seconds: float = saved.get("seconds", 0.0)
        self.restarts: int = saved.get("restarts", -1) + 1
        self.origin: Record = saved["origin"]
        self.versions: list[dict[str, str]] = list(saved.get("versions", ()))
        if self.versions[-1:] != [versions()]:
            self.versions.append(versions())
        self._records: list[Record] = list(saved.get("log", ()))
        self._window: list[Sums] = list(saved.get("window", ()))  # one per step since the last train line
        self._epoch: Sums = dict(saved.get("epoch_sums", {}))  # over the epoch so far
        self._path = workdir / workdirs.METRICS if writes else None
        if self._path:
            workdirs.write_text(self._path, "".join(json.dumps(record) + "\n" for record in self._records))
        self._events: Events | None = None
        if writes and config.train.tensorboard:
            self._events = Events(workdir, self._records, self.seconds)

    def snapshot(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold so that a resumed run writes the same log."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "restarts": self.restarts,
            "origin": self.origin,
            "versions": list(self.versions),
            "log": list(self._records),
            "window": list(self._window),
            "epoch_sums": dict(self._epoch),
        }

    def add_steps(self, metrics: Mapping[str, np.ndarray], seconds: float) -> None:
        """Adds the next n steps, and the total time that they took.

        Each metric is an array `[n]` of sums over the examples of a step. `loss`, `accuracy` (number correct) and
        `examples` are required; other keys are logged in the same way, divided by `examples`.

        Raises:
          NonFiniteLossError: a loss is NaN or infinite.
          WorkdirError: a file cannot be written.
        """
        self.seconds += seconds
        steps_per_epoch = self._config.steps_per_epoch
        window = self._config.train.log_every_steps or steps_per_epoch
        names = ["loss", "accuracy", "examples", *sorted(metrics.keys() - {"loss", "accuracy", "examples"})]
        for values in zip(*(metrics[name].tolist() for name in names), strict=True):
            sums = dict(zip(names, values, strict=True))
            check_finite(sums["loss"], f"{self._workdir}: the loss of step {self.step + 1}")
            if self.step % steps_per_epoch == 0:
                self._epoch = {}
            self.step += 1
            self._window.append(sums)
            self._epoch = {name: self._epoch.get(name, 0) + value for name, value in sums.items()}
            if self.step % window == 0 or self.step % steps_per_epoch == 0:
                rate = {"learning_rate": float(self._learning_rate(self.step - 1))}
                self._write("train", means(self._window) | rate)
                self._window = []

    def add_evaluation(self, split: str, **scores: float) -> None:
        """Logs an evaluation on `holdout` or `test` at this step: `loss`, `accuracy`, `examples` and others.

        Raises:
          NonFiniteLossError: the loss is NaN or infinite.
          WorkdirError: a file cannot be written.
        """
        check_finite(scores["loss"], f"{self._workdir}: the loss on the {split} examples after step {self.step}")
        self._write(split, scores)

    def epoch_means(self) -> Record:
        """Returns the means over the epoch so far."""
        return means([self._epoch])

    def sync(self) -> None:
        """Flushes metrics.jsonl to disk, so that it survives a power failure.

        Raises:
          WorkdirError: it cannot be written.
        """
        if self._path:
            workdirs.sync(self._path)

    def _write(self, split: str, values: Record) -> None:
        position = {"step": self.step, "epoch": self.step / self._config.steps_per_epoch, "split": split}
        record = position | values | {"seconds": round(self.seconds, 3)}
        self._records.append(record)
        if self._path:
            workdirs.append_bytes(self._path, (json.dumps(record) + "\n").encode())
        if self._events:
            self._events.append(record)


def check_finite(value: float, subject: str) -> None:
    """Checks that a loss or weight is finite: with NaN or infinity, further training would only corrupt the weights.

    Raises:
      NonFiniteLossError: `value` is NaN or infinite; the message begins with `subject`.
    """
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"{subject} is {value}; start again in another --workdir, with a lower config.optimizer.learning_rate or"
            " with config.optimizer.clip_norm set"
        )


def means(steps: Sequence[Sums]) -> Record:
    """Returns each metric's mean over all examples of the steps, and the number of these examples.

    A metric that only some steps have, because it was new when the run resumed, is averaged over those steps. A mean
    that is not finite becomes None, because JSON has no NaN or infinity.
    """
    record: Record = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        having = [step for step in steps if name in step]
        total = math.fsum(step[name] for step in having) if all(math.isfinite(s[name]) for s in having) else math.nan
        mean = total / math.fsum(step["examples"] for step in having)
        record[name] = int(total) if name == "examples" else mean if math.isfinite(mean) else None
    return record


def read_log(workdir: pathlib.Path, until: float = math.inf) -> list[Record]:
    """Returns the lines of a run's log up to a step; none if the file is missing or damaged."""
    try:
        lines = (workdir / workdirs.METRICS).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []
    scored = {**LINE, "loss": NUMBER, "accuracy": NUMBER, "examples": int}
    shapes = dict.fromkeys(SPLITS, scored) | {"train": {**scored, "learning_rate": NUMBER}}
    if any(mismatches(records, [LINE], "log")):
        return []
    if any(record["split"] not in shapes or any(mismatches(record, shapes[record["split"]], "")) for record in records):
        return []
    return [record for record in records if record["step"] <= until]


class Events:
    """A TensorBoard event file, complete after each `append`; a resumed run rewrites it.

    tensorboardX's own writer queues events for a background thread, so a killed process loses the last ones, and the
    writer hangs on a full disk. So only its protocol buffers and checksum are used. The wall time of an event is the
    start time of the process plus the training time since then, so TensorBoard's `relative` axis shows training time.
    """

    def __init__(self, workdir: pathlib.Path, records: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Replaces all earlier event files by one with the records so far; `seconds` is the training time so far."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = workdirs.subfolder(workdir, workdirs.TENSORBOARD)
        now = time.time()
        self._path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        self._origin = now - seconds
        with workdirs.as_workdir_error(folder):
            for old in folder.glob("*tfevents*"):
                old.unlink()
        version = Event(wall_time=self._origin, file_version="brain.Event:2")
        # This makes a running TensorBoard discard what it read from the earlier files.
        start = Event(wall_time=self._origin, step=0, session_log=SessionLog(status=SessionLog.START))
        workdirs.append_bytes(self._path, _frame(version) + _frame(start) + b"".join(map(self._event, records)))

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line of metrics.jsonl.

        Raises:
          WorkdirError: the file cannot be written.
        """
        workdirs.append_bytes(self._path, self._event(record))

    def _event(self, record: Mapping[str, Any]) -> bytes:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        shown = {name: value for name, value in record.items() if name not in _NOT_SHOWN and value is not None}
        values = [Summary.Value(tag=f"{record['split']}/{name}", simple_value=value) for name, value in shown.items()]
        wall_time = self._origin + record["seconds"]
        return _frame(Event(wall_time=wall_time, step=record["step"], summary=Summary(value=values)))


def _frame(event: Any) -> bytes:
    """Frames an event as a TFRecord: length, checksum of the length, data, checksum of the data."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    parts = (struct.pack("<Q", len(data)), data)
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)
