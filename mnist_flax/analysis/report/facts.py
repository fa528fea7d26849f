"""Every number in a report: the contents of `metrics.json`, which the page displays."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.calibration import NUM_BINS, reliability_rows
from mnist_flax.analysis.evaluation import Evaluation, Facts, Predictor
from mnist_flax.analysis.report.layers import Layer
from mnist_flax.analysis.scores import scores_with_intervals
from mnist_flax.config import Config, dotted
from mnist_flax.data import batches
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Splits
from mnist_flax.run.provenance import provenance
from mnist_flax.run.schema import SPLITS

GALLERY = 24  # examples in each gallery
PAIRS = 12  # pairs of confused classes
PAIR_EXAMPLES = 6  # examples for each pair
TOP = 3  # most probable classes listed for each example
CURVE_POINTS = 1000  # a longer training log is thinned to at most this many points


class Reported(NamedTuple):
    """A run at a step: what a report is about."""

    config: Config
    predictor: Predictor
    splits: Splits
    evaluation: Evaluation  # on the test set
    records: Sequence[Mapping[str, Any]]  # the lines of the log
    step: int
    summary: Mapping[str, Any]  # empty for an unfinished run
    fork: Mapping[str, Any] | None = None  # `workdir` and `step` of the run whose weights it started with
    evaluated_by: str = "training"  # or `report`


def report_facts(run: Reported, layers: Sequence[Layer]) -> Facts:
    """Computes all numbers of a report."""
    config, splits, evaluation = run.config, run.splits, run.evaluation
    probs = metrics.probabilities(evaluation.logits)
    label, raw = splits.test.label, evaluation.logits * evaluation.temperature
    confusion = metrics.confusion_matrix(label, probs.argmax(axis=-1), config.num_classes)
    return {
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "class_names": list(DATASETS[splits.name].class_names),
        "run": run_facts(run, layers),
        "test": {"evaluated_by": run.evaluated_by, **scores_with_intervals(evaluation, label, splits.name)},
        "calibration": {
            "num_bins": NUM_BINS,
            "bins": reliability_rows(evaluation.logits, label),
            "uncalibrated_bins": reliability_rows(raw, label) if evaluation.temperature != 1.0 else [],
        },
        "confusion": confusion.tolist(),
        "confused_pairs": confused_pairs(confusion, label, probs),
        "galleries": galleries(probs, label, splits.name),
        "curves": log_curves(run.records),
        "network": [layer._asdict() for layer in layers],
        "config": config.to_dict(),
        "config_changed": changed_fields(config),
        "config_file": config_source(config),
    }


def run_facts(run: Reported, layers: Sequence[Layer]) -> Facts:
    """Summarises the run: its size, progress and training time, and the device, versions and commit."""
    config, step, summary = run.config, run.step, run.summary
    made_with = summary if {"device", "versions", "git_commit"} <= summary.keys() else provenance()
    seconds = max((record["seconds"] for record in run.records), default=0.0)
    return {
        "finished": summary.get("steps") == step,
        "seed": config.seed,
        "step": step,
        "num_steps": config.num_steps,
        "epoch": step / config.steps_per_epoch,
        "epochs": config.train.epochs,
        "num_train": config.num_train_rows,
        "holdout": config.num_holdout_rows,
        "parameters": sum(layer.parameters for layer in layers),
        "multiply_adds": sum(layer.multiply_adds for layer in layers),
        "train_seconds": seconds,
        "versions_of": "training" if made_with is summary else "report",
        **{name: made_with[name] for name in ("device", "versions", "git_commit")},
    }


def confused_pairs(confusion: np.ndarray, label: np.ndarray, probs: np.ndarray) -> list[Facts]:
    """Lists the most frequent pairs of label and wrong prediction, each with its most confident examples."""
    prediction = probs.argmax(axis=-1)
    errors = confusion - np.diag(np.diag(confusion))
    cells = np.argsort(-errors, axis=None, kind="stable")[:PAIRS]
    pairs = []
    for actual, predicted in zip(*np.unravel_index(cells, errors.shape), strict=True):
        rows = np.flatnonzero((label == actual) & (prediction == predicted))
        most_confident = rows[np.argsort(-probs[rows, predicted], kind="stable")][:PAIR_EXAMPLES]
        pair = {"label": int(actual), "prediction": int(predicted), "count": int(errors[actual, predicted])}
        share = float(errors[actual, predicted] / max(confusion[actual].sum(), 1))
        pairs.append(pair | {"share_of_label": share, "rows": most_confident.tolist()})
    return [pair for pair in pairs if pair["count"]]


def galleries(probs: np.ndarray, label: np.ndarray, dataset: str) -> Facts:
    """Selects the test images to show, as row numbers in the official file.

    Returns:
      `mistakes` (highest loss first), `correct` (spread evenly over the classes and the file, sorted by class),
      `least_certain` (correct, lowest probability first), `doubtful` (labels known to be doubtful), and `num_mistakes`.
    """
    prediction = probs.argmax(axis=-1)
    of_label = np.take_along_axis(probs, label[:, None], axis=-1)[:, 0]
    doubtful = set(DATASETS[dataset].doubtful_test_rows)

    def describe(rows: np.ndarray | Sequence[int]) -> list[Facts]:
        return [
            {
                "row": int(row),
                "label": int(label[row]),
                "prediction": int(prediction[row]),
                "probability_of_label": float(of_label[row]),
                "top": [[int(k), float(probs[row, k])] for k in np.argsort(-probs[row], kind="stable")[:TOP]],
                "doubtful": int(row) in doubtful,
            }
            for row in rows
        ]

    wrong, right = np.flatnonzero(prediction != label), np.flatnonzero(prediction == label)
    spread = batches.spread_rows(label, right, min(GALLERY, len(right)))
    return {
        "num_mistakes": len(wrong),
        "mistakes": describe(wrong[np.argsort(of_label[wrong], kind="stable")][:GALLERY]),
        "correct": describe(spread[np.argsort(label[spread], kind="stable")]),
        "least_certain": describe(right[np.argsort(of_label[right], kind="stable")][:GALLERY]),
        "doubtful": describe(sorted(doubtful)),
    }


def log_curves(records: Sequence[Mapping[str, Any]]) -> Facts:
    """Groups the log records by split and adds smoothed values to those of `train`."""
    by_split: Facts = {split: [dict(r) for r in records if r["split"] == split] for split in SPLITS}
    train = by_split["train"]
    reach = len(train) // 20
    for field in ("loss", "accuracy"):
        smooth = smoothed([record[field] for record in train], reach)
        for record, value in zip(train, smooth, strict=True):
            record[f"smoothed_{field}"] = value
    stride = -(-len(train) // CURVE_POINTS)
    if stride > 1:  # backwards, to keep the last point
        by_split["train"] = train[::-stride][::-1]
    return {**by_split, "smoothed_over": 2 * reach + 1}


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Computes the centred moving average over up to `reach` values on either side, which does not lag behind."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    places = np.arange(len(values))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return ((sums[last] - sums[first]) / (last - first)).tolist()


def changed_fields(config: Config) -> Facts:
    """Returns the fields that differ from the defaults of the model family, as dotted names with their values."""
    defaults = dotted(Config(model=type(config.model)()))
    return {name: value for name, value in dotted(config).items() if value != defaults[name]}


def config_source(config: Config) -> str:
    """Returns the source of a config file that reproduces the run, even if the presets change."""
    family = config.to_dict()["model"]["name"]
    lines = "".join(f"    config.{name} = {value!r}\n" for name, value in changed_fields(config).items())
    return f'''"""The config of a run on {config.data.name}, written by its report."""

from ml_collections import ConfigDict

from mnist_flax.config import default_config_dict


def get_config() -> ConfigDict:
    """Returns what differs from the defaults."""
    config = default_config_dict({family!r})
{lines}    return config
'''
