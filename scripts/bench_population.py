"""Compares a population with the same number of single runs, in turns; prints one JSON line with seconds and ratio.

    python scripts/bench_population.py --config=configs/tiny.py --seeds=10 --repeats=3

Each side is what a user would run: `mnist_flax.main` once for each seed, without report and demo page, and
`mnist_flax.population` once. Seconds are those of whole processes, including start-up and compilation: each side starts
with an empty compilation cache. Fields with `train` in their names cover the training steps alone. Use a quiet machine.
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
from mnist_flax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
# As for the members of a population.
BARE = ("--config.train.report=False", "--config.train.demo=False", "--config.data.on_missing=error")


def execute(module: str, programs: pathlib.Path, *arguments: str) -> tuple[float, str]:
    """Runs a command of the package, and returns its seconds and its standard error; `programs` is the compile cache.

    Raises:
      UserError: the command failed.
    """
    command = [sys.executable, "-m", f"mnist_flax.{module}", f"--config={flags.FLAGS.config}", *arguments]
    started = time.perf_counter()
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(programs)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr}")
    print(f"{module} {' '.join(arguments[:1])}: {seconds:.1f} s", file=sys.stderr)
    return seconds, done.stderr


def train_seconds(runs: Sequence[pathlib.Path]) -> float:
    """Returns the total training time of finished runs, in seconds."""
    return sum(json.loads((run / "summary.json").read_text())["train_seconds"] for run in runs)


def once(seeds: range, folder: pathlib.Path) -> dict[str, Any]:
    """Trains both ways; returns the seconds, and whether the accuracies are the same."""
    singles = [folder / f"single-{seed}" for seed in seeds]
    single_seconds = sum(
        execute("main", folder / "programs-singles", f"--config.seed={seed}", f"--workdir={run}", *BARE)[0]
        for seed, run in zip(seeds, singles, strict=True)
    )
    population = folder / "population"
    seconds, told = execute(
        "population", folder / "programs-population", f"--seeds={len(seeds)}", f"--workdir={population}"
    )
    members = [population / "members" / f"seed-{seed}" for seed in seeds]
    accuracies = [[json.loads((run / "summary.json").read_text())["test_accuracy"] for run in runs]
                  for runs in (singles, members)]  # fmt: skip
    return {
        "singles": single_seconds,
        "population": seconds,
        "singles_train": train_seconds(singles),
        "population_train": train_seconds(members),
        "compiled": told.count("compiled in"),
        "same_accuracies": accuracies[0] == accuracies[1],
    }


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints the result."""
    del argv
    rounds = []
    for _ in range(flags.FLAGS.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(once(range(flags.FLAGS.seeds), pathlib.Path(folder)))
    ratios = [one["population"] / one["singles"] for one in rounds]
    train_ratios = [one["population_train"] / one["singles_train"] for one in rounds]
    from mnist_flax.run.provenance import provenance  # imported here so that a wrong flag fails before JAX loads

    result = {
        "config": flags.FLAGS.config,
        "seeds": flags.FLAGS.seeds,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "train_ratio": round(statistics.median(train_ratios), 3),
        "train_ratios": [round(ratio, 3) for ratio in train_ratios],
        "population_seconds": [round(one["population"], 2) for one in rounds],
        "singles_seconds": [round(one["singles"], 2) for one in rounds],
        "population_train_seconds": [round(one["population_train"], 2) for one in rounds],
        "singles_train_seconds": [round(one["singles_train"], 2) for one in rounds],
        "programs_compiled": max(one["compiled"] for one in rounds),
        "same_accuracies": all(one["same_accuracies"] for one in rounds),
        **provenance(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    flags.DEFINE_string("config", "configs/tiny.py", "of the runs; seeds are counted from 0")
    flags.DEFINE_integer("seeds", 10, "how many runs, and members", lower_bound=2)
    flags.DEFINE_integer("repeats", 3, "how often each side is timed, in turns", lower_bound=1)
    cli.run(main)
