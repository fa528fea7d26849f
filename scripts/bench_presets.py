"""Trains presets over several seeds and prints one JSON line for each: accuracy at the last step, and seconds.

    python scripts/bench_presets.py --presets=default,three_conv_adam --seeds=5 [--target=0.99]

Every run is a full one, through `train.fit`. Its test accuracy is measured once, after the last step, on the whole test
set, and no choice depends on it. The seconds are those of the whole training (no compiling, evaluating or saving); use
a quiet machine. With a target, the line also counts the runs that reach it at the last step.
"""

import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from mnist_flax import cli, preset
from mnist_flax.config import replace


def statistics_of(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Returns mean, standard deviation and the 95 % interval of the mean; for one value, the last two are None."""
    from mnist_flax.analysis.statistics import spread_of

    if len(values) == 1:
        return {f"{name}_mean": values[0], f"{name}_sd": None, f"{name}_interval": None}
    return {f"{name}_{part}": value for part, value in spread_of(values).items()}


def bench(name: str, seeds: Sequence[int], target: float = 0.0) -> dict[str, Any]:
    """Trains one preset with each seed; returns the statistics, and the number of runs that reach the target."""
    from mnist_flax.train import fit

    summaries = []
    config = preset.load_config(name)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            off = {"train__tensorboard": False, "train__report": False, "train__demo": False}
            quick = replace(config, seed=seed, data__on_missing="error", **off)
            fit(quick, pathlib.Path(folder, "run"))
            summaries.append(json.loads(pathlib.Path(folder, "run", "summary.json").read_text()))
            print(f"{name} seed {seed}: {summaries[-1]['test_accuracy']:.4f}", file=sys.stderr)
    accuracies = [summary["test_accuracy"] for summary in summaries]
    seconds = [summary["train_seconds"] for summary in summaries]
    reached = {"target": target, "reached": sum(accuracy >= target for accuracy in accuracies)} if target else {}
    last = summaries[-1]
    return {
        "preset": name,
        "dataset": last["dataset"],
        "n": len(seeds),
        "seeds": list(seeds),
        "test_examples": last["test_examples"],
        **statistics_of("accuracy", accuracies),
        "accuracies": accuracies,
        **reached,
        "train_seconds_median": statistics.median(seconds),
        **statistics_of("train_seconds", seconds),
        "train_seconds": seconds,
        "parameters": last["parameters"],
        "device": last["device"],
        "versions": last["versions"],
        "git_commit": last["git_commit"],
        "date": last["date"],
    }


def main(argv: Sequence[str]) -> None:
    """Benchmarks the presets named by the flags."""
    del argv
    seeds = range(flags.FLAGS.first_seed, flags.FLAGS.first_seed + flags.FLAGS.seeds)
    for name in flags.FLAGS.presets:
        preset.find_preset(name)  # a misspelt name must not cost the results of the others
    for name in flags.FLAGS.presets:
        print(json.dumps(bench(name, seeds, flags.FLAGS.target)), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("presets", "default", "names of files in configs/")
    flags.DEFINE_integer("seeds", 5, "how many seeds", lower_bound=1)
    flags.DEFINE_float("target", 0.0, "a test accuracy, such as 0.99, to count the runs that reach it", 0.0, 1.0)
    flags.DEFINE_integer("first_seed", 0, "the first seed", lower_bound=0)
    cli.run(main)
