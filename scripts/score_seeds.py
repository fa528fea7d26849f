"""Scores finished runs of several seeds on all test images: each run, their mean, and committees of them.

    python scripts/score_seeds.py --runs='runs/accurate/seed-*' --committee=5 >> scripts/results/accurate.jsonl

Prints one JSON line. `committees` holds the committee of all runs and, with `--committee=N`, disjoint committees of N
runs each, in the order of their names; none is selected. If the runs are of several presets (repeat `--runs`), there is
no mean.
"""

import glob
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from mnist_flax import cli
from mnist_flax.analysis.evaluation import load_predictor, mean_logits, predict_logits
from mnist_flax.analysis.run_data import load_data
from mnist_flax.analysis.scores import accuracy_scores
from mnist_flax.analysis.statistics import spread_of
from mnist_flax.errors import UserError
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.provenance import provenance


def folders_of(patterns: Sequence[str]) -> list[pathlib.Path]:
    """Finds the folders of the runs; `seed-10` follows `seed-9`.

    Raises:
      UserError: a pattern matches nothing.
    """
    found = []
    for pattern in patterns:
        names = glob.glob(pattern)
        if not names:
            raise UserError(f"--runs={pattern}: matches no folder; give the folders of finished runs")
        found += sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    return [pathlib.Path(name) for name in found]


def main(_: Sequence[str]) -> None:
    """Scores the runs."""
    logits, rows, configs, fingerprints = [], [], [], set()
    for folder in tqdm(folders_of(flags.FLAGS.runs)):
        predictor, info = load_predictor(folder)
        if not info.is_final:
            raise UserError(f"{folder}: is not finished; run its training command again")
        fingerprints.add(info.fingerprint)
        if len(fingerprints) > 1:
            raise UserError(f"{folder}: was trained on other data than the runs before it; score it on its own")
        test = load_data(info.config, info.fingerprint, {})[1].test
        logits.append(predict_logits(predictor, test.image))
        scores = accuracy_scores(logits[-1], test.label)
        seconds = workdirs.read_json(folder / workdirs.SUMMARY)["train_seconds"]
        rows.append({"run": folder.name, "seed": info.config.seed, **scores, "train_seconds": seconds})
        configs.append(info.config)
    result: dict[str, Any] = {"dataset": configs[0].data.name, "n": len(rows)}
    if len({config.program for config in configs}) == 1:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(predictor.members[0]["params"]))
        result |= {"epochs": configs[0].train.epochs, "parameters": parameters}
        if len(rows) > 1:
            result |= {name: spread_of([row[name] for row in rows]) for name in ("accuracy", "loss", "brier", "ece")}
    size = flags.FLAGS.committee or len(rows)
    if size > len(rows):
        raise UserError(f"--committee={size}: there are only {len(rows)} runs; choose a smaller number")
    groups = {(0, len(rows)), *((start, start + size) for start in range(0, len(rows) - size + 1, size))}
    result["committees"] = [
        {
            "members": [row["run"] for row in rows[start:end]],
            **accuracy_scores(mean_logits(np.stack(logits[start:end])), test.label),
        }
        for start, end in sorted(groups, key=lambda group: (group[0], -group[1]))
        if end - start > 1
    ]
    wrong = sum((run.argmax(-1) != test.label).astype(int) for run in logits)
    result["examples_by_runs_wrong"] = np.bincount(wrong, minlength=len(rows) + 1).tolist()
    print(json.dumps({**result, "runs": rows, **provenance()}), flush=True)


if __name__ == "__main__":
    flags.DEFINE_multi_string("runs", None, "folders of finished runs, with wildcards; repeatable", required=True)
    flags.DEFINE_integer("committee", None, "also score disjoint committees of so many runs", lower_bound=2)
    cli.run(main)
