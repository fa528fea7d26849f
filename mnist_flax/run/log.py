"""What a run tells: one writer, several sinks (the console, metrics.jsonl, TensorBoard)."""

import json
import logging
import math
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mnist_flax.config import Config
from mnist_flax.errors import NonFiniteLossError
from mnist_flax.run import workdir as workdirs

logger = logging.getLogger(__name__)

Record = dict[str, Any]  # one line of metrics.jsonl


class RunLog:
    """The log of a run.

    What it knows goes into every checkpoint, and a resumed run starts from there: its files are written anew, so what a
    killed run wrote after its last checkpoint, or half wrote, or had not written yet, makes no difference.

    Attributes:
      step: finished updates.
      seconds: of the training that led here, over all processes that took part; compiling, evaluating and saving do not
        count, nor does what a killed process did after its last checkpoint.
      restarts: how often that training was resumed from a checkpoint.
      origin: how the run began, as JSON.
    """

    def __init__(
        self,
        config: Config,
        folder: pathlib.Path | None,
        saved: Mapping[str, Any],
        learning_rate: Callable[[int], Any],
    ) -> None:
        """Starts from the record of a checkpoint, or from one that holds nothing but an origin.

        Args:
          config: of the run.
          folder: of the run; None keeps the log and writes nothing, for another process does.
          saved: the record.
          learning_rate: by the number of finished updates.

        Raises:
          WorkdirError: the files cannot be written.
        """
        self._config = config
        self._rate = learning_rate
        self.step: int = saved.get("step", 0)
        self.seconds: float = saved.get("seconds", 0.0)
        self.restarts: int = saved.get("restarts", -1) + 1
        self.origin: Mapping[str, Any] = saved["origin"]
        self._records: list[Record] = list(saved.get("log", ()))
        # Loss, correct and examples: of each step since the last train line, and summed over the epoch so far.
        self._window: list[dict[str, float]] = list(saved.get("window", ()))
        self._epoch: dict[str, float] = saved.get("epoch_sums", {})
        self._metrics = folder / workdirs.METRICS if folder else None
        if self._metrics:
            workdirs.write_text(self._metrics, "".join(json.dumps(record) + "\n" for record in self._records))
        self._events = Events(folder / workdirs.TENSORBOARD) if folder and config.train.tensorboard else None
        if self._events:
            self._events.start(self._records, self.seconds)

    def snapshot(self) -> dict[str, Any]:
        """Returns what a checkpoint at this step has to hold for a resumed run to write the same log."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "restarts": self.restarts,
            "origin": self.origin,
            "log": list(self._records),
            "window": list(self._window),
            "epoch_sums": dict(self._epoch),
        }

    def steps(self, metrics: Mapping[str, np.ndarray], seconds: float) -> None:
        """Takes in the steps that follow the last one.

        Args:
          metrics: sums over the examples of each step, `[n]`, with `loss`, `accuracy`, `examples` and any others.
          seconds: that they took.

        Raises:
          NonFiniteLossError: a loss is NaN or infinite.
          WorkdirError: a file cannot be written.
        """
        self.seconds += seconds
        steps_per_epoch = self._config.steps_per_epoch
        window = self._config.train.log_every_steps or steps_per_epoch
        names = list(metrics)
        for values in zip(*(metrics[name].tolist() for name in names), strict=True):
            sums = dict(zip(names, values, strict=True))
            check_finite(sums["loss"], f"the loss of step {self.step + 1}")
            if self.step % steps_per_epoch == 0:
                self._epoch = {}
            self.step += 1
            self._window.append(sums)
            self._epoch = {name: self._epoch.get(name, 0) + value for name, value in sums.items()}
            if self.step % window == 0 or self.step % steps_per_epoch == 0:
                rate = {"learning_rate": float(self._rate(self.step - 1))}
                self._write("train", average(self._window) | rate)
                self._window = []

    def epoch_average(self) -> Record:
        """Returns the averages over the epoch so far."""
        return average([self._epoch])

    def evaluation(self, split: str, *, loss: float, accuracy: float, examples: int) -> None:
        """Takes in an evaluation on `holdout` or `test` at this step.

        Raises:
          NonFiniteLossError: the loss is NaN or infinite.
          WorkdirError: a file cannot be written.
        """
        check_finite(loss, f"the loss on the {split} examples after step {self.step}")
        self._write(split, {"loss": loss, "accuracy": accuracy, "examples": examples})

    def sync(self) -> None:
        """Waits until metrics.jsonl is safe from a power cut.

        Raises:
          WorkdirError: it cannot be written.
        """
        if self._metrics:
            workdirs.sync(self._metrics)

    def _write(self, split: str, values: Record) -> None:
        place = {"step": self.step, "epoch": self.step / self._config.steps_per_epoch, "split": split}
        record = place | values | {"seconds": round(self.seconds, 3)}
        self._records.append(record)
        if self._metrics:
            workdirs.append_bytes(self._metrics, (json.dumps(record) + "\n").encode())
        if self._events:
            self._events.append(record)


def check_finite(value: float, what: str) -> None:
    """Stops a run that would only spoil its weights.

    Raises:
      NonFiniteLossError: `value` is NaN or infinite; the message opens with `what`.
    """
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"{what} is {value}: training stopped, the last good checkpoint is kept; lower"
            " config.optimizer.learning_rate, or set config.optimizer.clip_norm, in another --workdir"
        )


def average(steps: list[dict[str, float]]) -> Record:
    """Returns the averages over the examples of some steps, given the sums of each; every example counts once."""
    sums = {name: math.fsum(step[name] for step in steps) for name in steps[0]}
    examples = int(sums.pop("examples"))
    return {**{name: total / examples for name, total in sums.items()}, "examples": examples}


class Events:
    """TensorBoard's view of metrics.jsonl: one event file, whole after every line, made anew when a run is resumed.

    tensorboardX's own writer puts events through a queue to a thread: a killed process loses the last ones, and on a
    full disk it waits for ever. So only its protocol buffers and checksum are used. The wall time of an event is the
    process's start plus the seconds of training, so `relative` on TensorBoard's axis means training time.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._origin = time.time()
        self._path = folder / f"events.out.tfevents.{self._origin:.6f}.{socket.gethostname()}"

    def start(self, records: list[Record], seconds: float) -> None:
        """Writes the events of earlier processes into a new file, in place of their own.

        Raises:
          WorkdirError: the file cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._origin -= seconds
        with workdirs.speaking(self._folder):
            self._folder.mkdir(exist_ok=True)
            for old in self._folder.glob("*tfevents*"):
                old.unlink()
        # The second event makes a TensorBoard that is looking forget what it read from the file of before.
        first = (
            Event(wall_time=self._origin, file_version="brain.Event:2"),
            Event(wall_time=self._origin, step=0, session_log=SessionLog(status=SessionLog.START)),
        )
        content = b"".join(map(_frame, first)) + b"".join(map(self._event, records))
        workdirs.append_bytes(self._path, content)

    def append(self, record: Record) -> None:
        """Adds a line of metrics.jsonl.

        Raises:
          WorkdirError: the file cannot be written.
        """
        workdirs.append_bytes(self._path, self._event(record))

    def _event(self, record: Record) -> bytes:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        names = [name for name in record if name not in ("step", "epoch", "split", "seconds", "examples")]
        values = [Summary.Value(tag=f"{record['split']}/{name}", simple_value=record[name]) for name in names]
        wall_time = self._origin + record["seconds"]
        return _frame(Event(wall_time=wall_time, step=record["step"], summary=Summary(value=values)))


def _frame(event: Any) -> bytes:
    """Puts an event between its length and its checksums, as TFRecord files have it."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


