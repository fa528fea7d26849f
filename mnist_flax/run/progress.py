"""Training progress on the console: a progress bar on a terminal, otherwise a line from time to time."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from mnist_flax.config import Config

logger = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0  # without a terminal, a line is printed this long after the last one

Scores = Mapping[str, Any]  # "loss", "accuracy" and others


class Progress:
    """Shows the progress of runs that train together; `quiet` draws no bar and prints no lines between epochs."""

    def __init__(self, config: Config, step: int, *, num_runs: int = 1, quiet: bool = False) -> None:
        self._config = config
        self._num_runs = num_runs
        self._total = num_runs * config.num_train_rows * config.train.epochs
        self._first = self._done = self._images_until(step)
        self._seconds = 0.0
        self._holdouts: Sequence[Scores] = ()
        is_terminal = sys.stderr.isatty()
        self._prints_between_epochs = not quiet and not is_terminal
        self._line_due = time.monotonic() + PLAIN_LINE_SECONDS
        hidden = quiet or not is_terminal
        self._bar = tqdm(
            total=self._total, initial=self._done, disable=hidden, dynamic_ncols=True, leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}|",
        )  # fmt: skip
        self.close = self._bar.close

    def _images_until(self, step: int) -> int:
        """Returns how many images all runs together have seen; the last batch of an epoch may be smaller."""
        epochs, steps = divmod(step, self._config.steps_per_epoch)
        return self._num_runs * (epochs * self._config.num_train_rows + steps * self._config.train.batch_size)

    def update(self, step: int, seconds: float, epochs: Sequence[Scores]) -> None:
        """Shows that all runs have reached `step`; `seconds` is the training time since the last call.

        `epochs` holds each run's means over the epoch so far.
        """
        before, self._done = self._done, self._images_until(step)
        self._seconds += seconds
        number = -(-step // self._config.steps_per_epoch)
        loss, accuracy = (sum(epoch[name] for epoch in epochs) / len(epochs) for name in ("loss", "accuracy"))
        position = f"epoch {number}/{self._config.train.epochs}"
        scores = f"loss {loss:.4f}  accuracy {accuracy:.2%}"
        self._bar.set_description_str(f"{position}  {scores}  {self._left()} left", refresh=False)
        self._bar.update(self._done - before)
        if self._prints_between_epochs and time.monotonic() >= self._line_due:
            self._line(step, epochs)

    def _rate(self) -> float:
        return (self._done - self._first) / max(self._seconds, 1e-9)

    def _left(self) -> str:
        return str(tqdm.format_interval((self._total - self._done) / max(self._rate(), 1e-9)))

    def epoch_line(self, step: int, epochs: Sequence[Scores], holdouts: Sequence[Scores | None]) -> None:
        """Prints a line at the end of an epoch; `holdouts` holds each run's scores on its held-out rows, if any."""
        self._holdouts = [holdout for holdout in holdouts if holdout]
        self._line(step, epochs)

    def _line(self, step: int, epochs: Sequence[Scores]) -> None:
        position = f"epoch {step / self._config.steps_per_epoch:.4g}/{self._config.train.epochs}"
        held_out = [holdout["accuracy"] for holdout in self._holdouts]
        text = f"  hold-out {sum(held_out) / len(held_out):.2%}" if held_out else ""
        if self._num_runs > 1:
            position += f" of {self._num_runs} members"
            text += f" ({min(held_out):.2%} to {max(held_out):.2%})" if held_out else ""
        else:
            position += f"  loss {epochs[0]['loss']:.4f}  accuracy {epochs[0]['accuracy']:.2%}"
        logger.info("%s%s  %s images/s  %s left", position, text, f"{self._rate():,.0f}", self._left())
        self._line_due = time.monotonic() + PLAIN_LINE_SECONDS
