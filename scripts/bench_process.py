"""Measures a whole run as the user experiences it: the wall-clock time of its process, and its peak memory.

    python scripts/bench_process.py --config=configs/default.py --repeats=3

Each repeat is `python -m mnist_flax.main` in a new workdir, after one untimed run that fills the compilation cache. The
seconds are split into training (from `summary.json`) and everything else: start-up, data, compiling or loading
programs, evaluating, saving, the report and shutdown. Peak memory is the maximum resident set size.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from mnist_flax import cli
from mnist_flax.config import Config, replace
from mnist_flax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_process(config: Config, **environment: str) -> tuple[dict[str, Any], float, float]:
    """Trains a config in a process of its own: returns its summary, its seconds and its peak memory in MiB.

    Raises:
      UserError: the process failed.
    """
    from mnist_flax.analysis.report.facts import config_source

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as told:
        file, workdir = pathlib.Path(folder, "config.py"), pathlib.Path(folder, "run")
        file.write_text(config_source(config))
        command = [sys.executable, "-m", "mnist_flax.main", f"--config={file}", f"--workdir={workdir}"]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=told, stderr=told)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise UserError(f"{' '.join(command)} failed:\n{told.read()}")
        summary = json.loads((workdir / "summary.json").read_text())
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return summary, seconds, usage.ru_maxrss / unit


def once(config: Config, programs: str) -> dict[str, float]:
    """Runs a config once, with the compilation cache in the folder `programs`."""
    summary, seconds, peak_mib = run_process(config, JAX_COMPILATION_CACHE_DIR=programs)
    return {
        "seconds": seconds,
        "train_seconds": summary["train_seconds"],
        "other_seconds": seconds - summary["train_seconds"],
        "peak_mib": peak_mib,
        "test_accuracy": summary["test_accuracy"],
    }


def bench(config: Config, repeats: int) -> dict[str, Any]:
    """Runs a config several times and returns all values and their medians."""
    runs = []
    with tempfile.TemporaryDirectory() as programs:
        for number in range(repeats + 1):
            run = once(config, programs)
            what = f"{run['seconds']:.2f} s, of which {run['train_seconds']:.2f} s training; {run['peak_mib']:.0f} MiB"
            print(what + ("" if number else " (warming up)"), file=sys.stderr, flush=True)
            runs += [run] if number else []
    columns = {name: [round(run[name], 4) for run in runs] for name in runs[0]}
    return {**{f"{name}_median": statistics.median(column) for name, column in columns.items()}, **columns}


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints the result."""
    del argv
    result = bench(replace(cli.config(), data__on_missing="error"), flags.FLAGS.repeats)
    from mnist_flax.run.provenance import provenance  # only now: JAX would take memory and threads from the processes

    made = cli.config_facts() | provenance()
    print(json.dumps({**result, **made}))


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_integer("repeats", 3, "runs that are measured", lower_bound=1)
    cli.run(main)
