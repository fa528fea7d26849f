"""Where training is: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from mnist_flax.config import Config

logger = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0  # without a terminal, at most this long between two lines


class Progress:
    """Shows the progress of M runs of one length that train together."""

    def __init__(self, config: Config, step: int, num_runs: int) -> None:
        """Starts at `step`."""
        self._config, self._num_runs = config, num_runs
        self._total = num_runs * config.num_train * config.train.epochs
        self._done = num_runs * examples_until(config, step)
        self._examples, self._seconds = 0, 0.0  # of this process, for its speed
        self._line_due = time.monotonic() + PLAIN_LINE_SECONDS
        self._bar = tqdm(
            total=self._total,
            initial=self._done,
            unit="img",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def update(self, step: int, seconds: float, averages: Sequence[Mapping[str, Any]]) -> None:
        """Shows that all runs have come to `step`, in `seconds` more; `averages` are those of the epoch so far."""
        done = self._num_runs * examples_until(self._config, step)
        examples, self._done = done - self._done, done
        self._examples += examples
        self._seconds += seconds
        epoch = -(-step // self._config.steps_per_epoch)
        loss, accuracy = (np.mean([average[name] for average in averages]) for name in ("loss", "accuracy"))
        self._bar.set_description(f"epoch {epoch}/{self._config.train.epochs}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
        self._bar.update(examples)
        if self._bar.disable and time.monotonic() >= self._line_due:
            self.line(step, averages, [])

    def line(
        self, step: int, averages: Sequence[Mapping[str, Any]], holdouts: Sequence[Mapping[str, Any] | None]
    ) -> None:
        """Prints the averages of the epoch so far, the accuracy on hold-out rows, the speed and the time left."""
        rate = self._examples / max(self._seconds, 1e-9)
        loss, accuracy = (np.mean([average[name] for average in averages]) for name in ("loss", "accuracy"))
        held_out = [scores["accuracy"] for scores in holdouts if scores]
        text = f"  hold-out {np.mean(held_out):.2%}" if held_out else ""
        if len(held_out) > 1:
            text += f" ({min(held_out):.2%} to {max(held_out):.2%})"
        logger.info(
            "epoch %.4g/%d%s  loss %.4f  accuracy %.2f%%%s  %s images/s  %s left",
            step / self._config.steps_per_epoch, self._config.train.epochs,
            f" of {self._num_runs} runs" if self._num_runs > 1 else "", loss, 100 * accuracy, text, f"{rate:,.0f}",
            tqdm.format_interval((self._total - self._done) / max(rate, 1e-9)),
        )  # fmt: skip
        self._line_due = time.monotonic() + PLAIN_LINE_SECONDS

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def examples_until(config: Config, step: int) -> int:
    """Returns how many examples `step` updates have used; an epoch's last batch may hold fewer than the others."""
    epochs, steps = divmod(step, config.steps_per_epoch)
    return epochs * config.num_train + steps * config.train.batch_size
