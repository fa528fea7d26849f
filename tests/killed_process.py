"""Runs `mnist_flax.main` with the given flags, and kills itself when its log reaches a step.

python tests/killed_process.py STEP [flags of main]
"""

import os
import runpy
import signal
import sys
from collections.abc import Mapping

import numpy as np

from mnist_flax.run.log import RunLog

take_in = RunLog.add_steps


def steps_and_die(self: RunLog, metrics: Mapping[str, np.ndarray], seconds: float) -> None:
    """Ends this process like a power cut, as soon as it has logged step `die_at`."""
    take_in(self, metrics, seconds)
    if self.step >= die_at:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_at = int(sys.argv.pop(1))
    RunLog.add_steps = steps_and_die  # type: ignore[method-assign]
    runpy.run_module("mnist_flax.main", run_name="__main__", alter_sys=True)
