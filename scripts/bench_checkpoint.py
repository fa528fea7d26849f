"""Measures the cost of checkpoints: a run that saves after every epoch against one that saves only at the end.

    python scripts/bench_checkpoint.py [--config=configs/default.py] [--config.data.num_train=12000] [--pairs=5]

Both kinds take turns in one process, after one warm-up run of each. The time is that of the whole loop, from the first
step until the last checkpoint is on disk, including logging and evaluation. Prints one JSON line to standard output and
progress to standard error; use a quiet machine.
"""

import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

from absl import flags

from mnist_flax import cli
from mnist_flax.config import Config, replace

PAIRS = flags.DEFINE_integer("pairs", 5, "runs of each kind", lower_bound=1)


def seconds_of(config: Config) -> float:
    """Trains a run in a new folder, and returns the seconds of the loop until everything is saved."""
    from mnist_flax import train

    began, spans = list[float](), list[float]()
    compile_steps, train_all = train.compile_steps, train.train_all

    def timed_compile(*arguments: Any) -> Any:
        compiled = compile_steps(*arguments)
        began.append(time.perf_counter())
        return compiled

    def timed_loop(members: Sequence[Any], *arguments: Any) -> None:
        train_all(members, *arguments)
        members[0].store.wait()
        spans.append(time.perf_counter() - began[0])

    with (
        mock.patch.object(train, "compile_steps", timed_compile),
        mock.patch.object(train, "train_all", timed_loop),
        tempfile.TemporaryDirectory() as folder,
    ):
        train.fit(config, pathlib.Path(folder, "run"))
    return spans[0]


def main(argv: Sequence[str]) -> None:
    """Compares the two kinds, and prints the ratio of the medians."""
    del argv
    from mnist_flax.run.provenance import provenance

    config = replace(cli.config(), data__on_missing="error")
    kinds = {
        "with": replace(config, checkpoint__every_epochs=1),
        "without": replace(config, checkpoint__every_epochs=0),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for pair in range(PAIRS.value + 1):
        for kind in kinds if pair % 2 else reversed(kinds):  # each kind goes first every other time
            span = seconds_of(kinds[kind])
            print(f"{kind} checkpoints: {span:.2f} s{'' if pair else ' (warming up)'}", file=sys.stderr, flush=True)
            if pair:
                seconds[kind].append(span)
    medians = {kind: statistics.median(spans) for kind, spans in seconds.items()}
    result = {
        "claim": "checkpoint overhead",
        "ratio": round(medians["with"] / medians["without"], 4),
        "seconds": {kind: [round(span, 3) for span in spans] for kind, spans in seconds.items()},
        **cli.config_facts(),
        "epochs": config.train.epochs,
        "train_rows": config.num_train_rows,
        **provenance(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    cli.define_config()
    cli.run(main)
