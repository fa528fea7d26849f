"""What a run tells: one writer, several sinks (the console, metrics.jsonl, TensorBoard)."""

import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from mnist_flax import workdir as workdirs
from mnist_flax.config import Config
from mnist_flax.errors import NonFiniteLossError
from mnist_flax.evaluate import Evaluation
from mnist_flax.optimizer import schedule
from mnist_flax.step import StepMetrics

logger = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0  # without a terminal, at most this long between two lines

Record = dict[str, Any]  # one line of metrics.jsonl


class RunLog:
    """The log of a run.

    What it knows goes into every checkpoint, and a resumed run starts from there: so a line that a killed run wrote
    after its last checkpoint, or half wrote, is gone before the resumed run writes it again.

    Attributes:
      step: finished updates.
      seconds: of training, over all processes that took part; compiling, evaluating and saving do not count.
      restarts: how often the run was resumed.
    """

    def __init__(self, config: Config, folder: pathlib.Path, saved: Mapping[str, Any]) -> None:
        """Starts from the record of a checkpoint, or from an empty one.

        Raises:
          WorkdirError: the files cannot be written.
        """
        self._config = config
        self._rate = schedule(config)
        self.step: int = saved.get("step", 0)
        self.seconds: float = saved.get("seconds", 0.0)
        self.restarts: int = saved.get("restarts", -1) + 1
        self._records: list[Record] = list(saved.get("log", ()))
        # The steps since the last train line, each with its sums.
        self._window: list[list[float]] = [list(step) for step in saved.get("window", ())]
        self._epoch: list[list[float]] = []
        self._progress = Progress(config, self.step)
        path = folder / workdirs.METRICS
        workdirs.write_text(path, "".join(json.dumps(record) + "\n" for record in self._records))
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = None
        if config.train.tensorboard:
            from tensorboardX import SummaryWriter

            # TensorBoard forgets what an earlier process wrote from purge_step on, so the curves join up.
            self._events = SummaryWriter(str(folder / workdirs.TENSORBOARD), purge_step=self.step + 1)

    def snapshot(self) -> dict[str, Any]:
        """Returns what a checkpoint at this step has to hold for a resumed run to write the same log."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "restarts": self.restarts,
            "log": self._records,
            "window": self._window,
        }

    def steps(self, sums: StepMetrics, seconds: float) -> None:
        """Takes in the steps that follow the last one.

        Args:
          sums: of each step, `[n]`.
          seconds: that they took.

        Raises:
          NonFiniteLossError: a loss is NaN or infinite.
        """
        self.seconds += seconds
        steps_per_epoch = self._config.steps_per_epoch
        window = self._config.train.log_every_steps or steps_per_epoch
        for step_sums in zip(*(column.tolist() for column in sums), strict=True):
            self.step += 1
            if not math.isfinite(step_sums[0]):
                raise NonFiniteLossError(
                    f"the loss of step {self.step} is {step_sums[0]}: training stopped, the last good checkpoint is"
                    " kept; lower config.optimizer.learning_rate, or set config.optimizer.clip_norm"
                )
            if self.step % steps_per_epoch == 1 or steps_per_epoch == 1:
                self._epoch = []
            self._window.append(list(step_sums))
            self._epoch.append(list(step_sums))
            if self.step % window == 0 or self.step % steps_per_epoch == 0:
                rate = {"learning_rate": float(self._rate(self.step - 1))}
                self._write("train", average(self._window) | rate)
                self._window = []
        self._progress.update(self.step, sum(sums.examples.tolist()), seconds, average(self._epoch))

    def evaluation(self, split: str, evaluation: Evaluation) -> None:
        """Takes in an evaluation on `holdout` or `test` at this step."""
        scores = {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "examples": evaluation.examples}
        self._write(split, scores)
        self._progress.holdout = evaluation.accuracy

    def epoch_line(self) -> None:
        """Prints where the run is at the end of an epoch."""
        self._progress.line(self.step, average(self._epoch))

    def close(self) -> None:
        """Finishes the files and the bar."""
        self._progress.close()
        self._file.close()
        if self._events:
            self._events.close()

    def _write(self, split: str, values: Record) -> None:
        place = {"step": self.step, "epoch": self.step / self._config.steps_per_epoch, "split": split}
        record = place | values | {"seconds": round(self.seconds, 3)}
        self._records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events:
            for name in ("loss", "accuracy", "learning_rate"):
                if name in record:
                    self._events.add_scalar(f"{split}/{name}", record[name], self.step)


def average(steps: list[list[float]]) -> Record:
    """Returns loss and accuracy over the examples of some steps, given the sums of each; every example counts once."""
    loss, correct, examples = (math.fsum(column) for column in zip(*steps, strict=True))
    return {"loss": loss / examples, "accuracy": correct / examples, "examples": int(examples)}


class Progress:
    """Where the training is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, config: Config, step: int) -> None:
        """Starts at `step`."""
        self._config = config
        self._total = config.num_train * config.train.epochs
        self._done = examples_until(config, step)
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=self._total,
            initial=self._done,
            unit="img",
            unit_scale=True,
            disable=not self._is_terminal,
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
        if not self._is_terminal and time.monotonic() >= self._line_due:
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
