"""What a run tells: one writer, several sinks (the console, metrics.jsonl, TensorBoard)."""

import json
import logging
import math
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from mnist_flax.config import Config
from mnist_flax.errors import NonFiniteLossError
from mnist_flax.optimizer import schedule
from mnist_flax.run import workdir as workdirs
from mnist_flax.step import StepMetrics

logger = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0  # without a terminal, at most this long between two lines

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
        self, config: Config, folder: pathlib.Path | None, saved: Mapping[str, Any], *, quiet: bool = False
    ) -> None:
        """Starts from the record of a checkpoint, or from one that holds nothing but an origin.

        Args:
          config: of the run.
          folder: of the run; None keeps the log and writes nothing, for another process does.
          saved: the record.
          quiet: show no progress, for another does.

        Raises:
          WorkdirError: the files cannot be written.
        """
        self._config = config
        self._rate = schedule(config)
        self.step: int = saved.get("step", 0)
        self.seconds: float = saved.get("seconds", 0.0)
        self.restarts: int = saved.get("restarts", -1) + 1
        self.origin: Mapping[str, Any] = saved["origin"]
        self._records: list[Record] = list(saved.get("log", ()))
        # Loss, correct and examples: of each step since the last train line, and summed over the epoch so far.
        self._window: list[list[float]] = list(saved.get("window", ()))
        self._epoch: list[float] = saved.get("epoch_sums", [0.0, 0, 0])
        self._metrics = folder / workdirs.METRICS if folder else None
        if self._metrics:
            workdirs.write_text(self._metrics, "".join(json.dumps(record) + "\n" for record in self._records))
        self._events = Events(folder / workdirs.TENSORBOARD) if folder and config.train.tensorboard else None
        if self._events:
            self._events.start(self._records, self.seconds)
        self._progress = Progress(config, self.step, quiet=quiet)

    def snapshot(self) -> dict[str, Any]:
        """Returns what a checkpoint at this step has to hold for a resumed run to write the same log."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "restarts": self.restarts,
            "origin": self.origin,
            "log": list(self._records),
            "window": list(self._window),
            "epoch_sums": list(self._epoch),
        }

    def steps(self, sums: StepMetrics, seconds: float) -> None:
        """Takes in the steps that follow the last one.

        Args:
          sums: of each step, `[n]`.
          seconds: that they took.

        Raises:
          NonFiniteLossError: a loss is NaN or infinite.
          WorkdirError: a file cannot be written.
        """
        self.seconds += seconds
        steps_per_epoch = self._config.steps_per_epoch
        window = self._config.train.log_every_steps or steps_per_epoch
        for step_sums in zip(*(column.tolist() for column in sums), strict=True):
            refuse_non_finite(step_sums[0], f"the loss of step {self.step + 1}")
            if self.step % steps_per_epoch == 0:
                self._epoch = [0.0, 0, 0]
            self.step += 1
            self._window.append(list(step_sums))
            self._epoch = [total + value for total, value in zip(self._epoch, step_sums, strict=True)]
            if self.step % window == 0 or self.step % steps_per_epoch == 0:
                rate = {"learning_rate": float(self._rate(self.step - 1))}
                self._write("train", average(self._window) | rate)
                self._window = []
        self._progress.update(self.step, sum(sums.examples.tolist()), seconds, average([self._epoch]))

    def evaluation(self, split: str, *, loss: float, accuracy: float, examples: int) -> None:
        """Takes in an evaluation on `holdout` or `test` at this step.

        Raises:
          NonFiniteLossError: the loss is NaN or infinite.
          WorkdirError: a file cannot be written.
        """
        refuse_non_finite(loss, f"the loss on the {split} examples after step {self.step}")
        self._write(split, {"loss": loss, "accuracy": accuracy, "examples": examples})
        self._progress.holdout = accuracy

    def epoch_line(self) -> None:
        """Prints where the run is at the end of an epoch."""
        self._progress.line(self.step, average([self._epoch]))

    def sync(self) -> None:
        """Waits until metrics.jsonl is safe from a power cut.

        Raises:
          WorkdirError: it cannot be written.
        """
        if self._metrics:
            workdirs.sync(self._metrics)

    def close(self) -> None:
        """Leaves the progress bar; the files are not kept open."""
        self._progress.close()

    def _write(self, split: str, values: Record) -> None:
        place = {"step": self.step, "epoch": self.step / self._config.steps_per_epoch, "split": split}
        record = place | values | {"seconds": round(self.seconds, 3)}
        self._records.append(record)
        if self._metrics:
            workdirs.append_bytes(self._metrics, (json.dumps(record) + "\n").encode())
        if self._events:
            self._events.append(record)


def refuse_non_finite(value: float, what: str) -> None:
    """Stops a run that would only spoil its weights.

    Raises:
      NonFiniteLossError: `value` is NaN or infinite; the message opens with `what`.
    """
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"{what} is {value}: training stopped, the last good checkpoint is kept; lower"
            " config.optimizer.learning_rate, or set config.optimizer.clip_norm, in another --workdir"
        )


def average(steps: list[list[float]]) -> Record:
    """Returns loss and accuracy over the examples of some steps, given the sums of each; every example counts once."""
    loss, correct, examples = (math.fsum(column) for column in zip(*steps, strict=True))
    return {"loss": loss / examples, "accuracy": correct / examples, "examples": int(examples)}


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

        names = [name for name in ("loss", "accuracy", "learning_rate") if name in record]
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


class Progress:
    """Where the training is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, config: Config, step: int, *, quiet: bool) -> None:
        """Starts at `step`; a quiet one shows nothing of itself."""
        self._config = config
        self._total = config.num_train * config.train.epochs
        self._done = examples_until(config, step)
        self._is_quiet = quiet or sys.stderr.isatty()  # prints no lines of its own accord
        self._bar = tqdm(
            total=self._total,
            initial=self._done,
            unit="img",
            unit_scale=True,
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._examples, self._seconds = 0, 0.0  # of this process, for its speed
        self._line_due = time.monotonic() + PLAIN_LINE_SECONDS
        self.holdout: float | None = None  # accuracy, when last measured

    def update(self, step: int, examples: int, seconds: float, epoch: Record) -> None:
        """Shows that training has come to `step`, with `examples` more in `seconds` more."""
        self._examples += examples
        self._seconds += seconds
        self._done += examples
        number = -(-step // self._config.steps_per_epoch)
        self._bar.set_description(f"epoch {number}/{self._config.train.epochs}", refresh=False)
        self._bar.set_postfix_str(f"loss {epoch['loss']:.4f}, accuracy {epoch['accuracy']:.2%}", refresh=False)
        self._bar.update(examples)
        if not self._is_quiet and time.monotonic() >= self._line_due:
            self.line(step, epoch)

    def line(self, step: int, epoch: Record) -> None:
        """Prints the averages of the epoch so far, this process's speed, and the time that is left."""
        rate = self._examples / max(self._seconds, 1e-9)
        left = tqdm.format_interval((self._total - self._done) / max(rate, 1e-9))
        held_out = "" if self.holdout is None else f"  hold-out {self.holdout:.2%}"
        logger.info(
            "epoch %.4g/%d  loss %.4f  accuracy %s%s  %s images/s  %s left",
            step / self._config.steps_per_epoch, self._config.train.epochs, epoch["loss"],
            f"{epoch['accuracy']:.2%}", held_out, f"{rate:,.0f}", left,
        )  # fmt: skip
        self._line_due = time.monotonic() + PLAIN_LINE_SECONDS

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def examples_until(config: Config, step: int) -> int:
    """Returns how many examples `step` updates have seen; an epoch's last batch may hold fewer than the others."""
    epochs, steps = divmod(step, config.steps_per_epoch)
    return epochs * config.num_train + steps * config.train.batch_size
