"""What the members say together: `population.json`, `population.npz` (the numbers of each example), and curves."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import predict_logits
from mnist_flax.analysis.report import bands
from mnist_flax.config import Config
from mnist_flax.data import batches
from mnist_flax.data.splits import Splits
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.provenance import provenance
from mnist_flax.step import TrainState, eval_variables

RESULT = "population.json"
ARRAYS = "population.npz"
DOUBTFUL_LABELS = 100  # that are listed

Facts = dict[str, Any]  # ready for JSON
Records = Sequence[Mapping[str, Any]]  # the lines of a run's log


class Spread(NamedTuple):
    """What M numbers say of the one behind them.

    Attributes:
      mean: of the numbers.
      sd: standard deviation of one of them (divided by M - 1).
      interval: 95 % interval of the mean (Student, 1908): it holds if the numbers are independent and about normal.
    """

    mean: float
    sd: float
    interval: tuple[float, float]


def spread(values: Sequence[float]) -> Spread:
    """Returns mean, standard deviation and interval of at least two numbers."""
    from scipy.stats import t

    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    return Spread(mean, sd, (mean - half, mean + half))


def spreads(rows: Sequence[Mapping[str, float]]) -> Facts:
    """Returns `mean`, `sd` and `interval` of accuracy and loss over the members."""
    by_name = {name: spread([row[name] for row in rows]) for name in ("accuracy", "loss")}
    return {
        "mean": {name: of_name.mean for name, of_name in by_name.items()},
        "sd": {name: of_name.sd for name, of_name in by_name.items()},
        "interval": {name: list(of_name.interval) for name, of_name in by_name.items()},
    }


def score(log_probs: np.ndarray, labels: np.ndarray) -> Facts:
    """Returns accuracy, loss and number of some examples, `f64[N,C], i32[N]`."""
    right = log_probs.argmax(axis=-1) == labels
    losses = -np.take_along_axis(log_probs, labels[:, None], axis=-1)
    return {
        "accuracy": float(np.mean(right)),
        "loss": float(np.mean(losses)),
        "correct": int(np.sum(right)),
        "examples": len(labels),
    }


def committee(log_probs: np.ndarray) -> np.ndarray:
    """Returns the logarithm of the members' mean probabilities, `f64[M,N,C] -> f64[N,C]`."""
    mean: np.ndarray = np.logaddexp.reduce(log_probs, axis=0) - np.log(len(log_probs))
    return mean


def agreement(log_probs: np.ndarray, labels: np.ndarray) -> Facts:
    """Says how many members are right on how many examples, `f64[M,N,C], i32[N]`.

    Returns:
      `examples_by_members_right`: at place m the number of examples that m members get right, m from 0 to M; and
      `none_right`: the examples that no member gets right.
    """
    right = np.sum(log_probs.argmax(axis=-1) == labels, axis=0)
    prediction = committee(log_probs).argmax(axis=-1)
    return {
        "examples_by_members_right": np.bincount(right, minlength=len(log_probs) + 1).tolist(),
        "none_right": [
            {"row": int(row), "label": int(labels[row]), "committee": int(prediction[row])}
            for row in np.flatnonzero(right == 0)
        ],
    }


def doubtful_labels(log_probs: np.ndarray, labels: np.ndarray, rows: np.ndarray, fold: np.ndarray) -> list[Facts]:
    """Lists the examples whose label a network that has not seen them finds least likely.

    Args:
      log_probs: `f64[R,C]`, out of fold.
      labels: `i32[R]`, as they are in the dataset.
      rows: `i32[R]`, their row numbers, in the original file order.
      fold: `i32[R]`, that they are in.
    """
    of_label = np.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    prediction = log_probs.argmax(axis=-1)
    return [
        {
            "row": int(rows[i]),
            "label": int(labels[i]),
            "prediction": int(prediction[i]),
            "probability_of_label": float(np.exp(of_label[i])),
            "probability_of_prediction": float(np.exp(log_probs[i, prediction[i]])),
            "fold": int(fold[i]),
        }
        for i in np.argsort(of_label, kind="stable")[:DOUBTFUL_LABELS]
    ]


def curves(logs: Sequence[Records]) -> Facts:
    """Returns loss and accuracy over the epochs, with bands: mean, sd, least and greatest of the members.

    Points that not all members have (a resumed run may have logged at other steps) are left out.
    """
    points: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for records in logs:
        for record in records:
            points.setdefault((record["split"], record["step"]), []).append(record)
    bands_of: Facts = {"train": [], "holdout": [], "test": []}
    for (split, step), records in sorted(points.items(), key=lambda item: item[0][1]):
        if len(records) == len(logs):
            point: Facts = {"step": step, "epoch": records[0]["epoch"]}
            for name in ("loss", "accuracy"):
                values = [record[name] for record in records]
                sd = float(np.std(values, ddof=1))
                point[name] = {"mean": float(np.mean(values)), "sd": sd, "min": min(values), "max": max(values)}
            bands_of[split].append(point)
    return bands_of


def gather(
    members: Mapping[str, tuple[Config, TrainState]], splits: Splits, folder: pathlib.Path
) -> tuple[Facts, dict[str, np.ndarray]]:
    """Judges the trained members on the test set, and folds on the rows that they hold out.

    Args:
      members: of each its config and its last state, by name.
      splits: the data.
      folder: where each has a folder of its name.

    Returns:
      What belongs into `population.json`, and the arrays beside it: `test_probs` `f32[M,N,C]`, `test_label` `i32[N]`;
      for folds also `rows`, `fold` and `out_of_fold_label` `i32[R]`, and `out_of_fold_probs` `f32[R,C]`.
    """
    configs = [config for config, _ in members.values()]
    folds = configs[0].data.folds if configs[0].data.fold != configs[-1].data.fold else 0
    label = splits.test.label
    log_probs = np.stack([log_probabilities(config, state, splits.test.image) for config, state in members.values()])
    of_members = [score(of_member, label) for of_member in log_probs]
    result: Facts = {
        "kind": "folds" if folds else "seeds",
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "config": configs[0].to_dict(),
        "members": [
            {"name": name, "seed": config.seed, **({"fold": config.data.fold} if folds else {}), **of_member}
            for (name, config), of_member in zip(zip(members, configs, strict=True), of_members, strict=True)
        ],
        **spreads(of_members),
        "committee": score(committee(log_probs), label),
        "agreement": agreement(log_probs, label),
    }
    arrays = {"test_probs": np.exp(log_probs).astype(np.float32), "test_label": label}
    if folds:
        out_of_fold, more = gather_out_of_fold(list(members.values()), splits)
        result["out_of_fold"] = out_of_fold
        arrays |= more
    result["curves"] = curves([read_log(folder / name) for name in members])
    result["train_seconds"] = sum(seconds_of(folder / name) for name in members)
    return result | provenance(), arrays


def gather_out_of_fold(
    members: Sequence[tuple[Config, TrainState]], splits: Splits
) -> tuple[Facts, dict[str, np.ndarray]]:
    """Judges every row by the member that has not seen it; what it returns is part of what `gather` does."""
    parts, scores = [], []
    for config, state in members:
        _, rows = batches.rows_of(splits.train.label, config.data)
        log_probs = log_probabilities(config, state, splits.train.image[rows])
        scores.append(score(log_probs, splits.train.label[rows]))
        parts.append((rows, np.full(len(rows), config.data.fold, np.int32), log_probs))
    rows, fold, log_probs = (np.concatenate(column) for column in zip(*parts, strict=True))
    in_order = np.argsort(rows)
    rows, fold, log_probs = rows[in_order], fold[in_order], log_probs[in_order]
    label = splits.train.label[rows]
    facts = {
        "folds": scores,
        **spreads(scores),
        **score(log_probs, label),
        "doubtful_labels": doubtful_labels(log_probs, label, rows, fold),
    }
    probs = np.exp(log_probs).astype(np.float32)
    return facts, {"rows": rows, "fold": fold, "out_of_fold_probs": probs, "out_of_fold_label": label}


def log_probabilities(config: Config, state: TrainState, images: np.ndarray) -> np.ndarray:
    """Returns what a member says of some images, `u8[N,28,28,1] -> f64[N,C]`."""
    return metrics.log_probabilities(predict_logits(config, eval_variables(jax.device_put(state)), images))


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a finished run's log."""
    return [json.loads(line) for line in (folder / workdirs.METRICS).read_text(encoding="utf-8").splitlines()]


def seconds_of(folder: pathlib.Path) -> float:
    """Returns the share of the training time that a finished run had."""
    return float(workdirs.read_json(folder / workdirs.SUMMARY)["train_seconds"])


def save(result: Facts, arrays: Mapping[str, np.ndarray], workdir: pathlib.Path) -> None:
    """Writes the arrays, the curves and, last, the result into the population's folder.

    Raises:
      WorkdirError: they cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    workdirs.write_bytes(workdir / ARRAYS, buffer.getvalue())
    for name, svg in bands.draw(result["curves"]).items():
        workdirs.write_bytes(workdir / f"{name}.svg", svg)
    workdirs.write_text(workdir / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")


def load(workdir: pathlib.Path) -> Facts | None:
    """Returns what `population.json` holds, None if there is none or it is damaged."""
    result = workdirs.read_json(workdir / RESULT)
    return result if isinstance(result, dict) and "members" in result else None


def table(result: Mapping[str, Any]) -> str:
    """Returns a result as text to read."""
    members, count = result["members"], len(result["members"])
    lines = [f"{'member':<12}{'seed':>6}  {'test accuracy':>13}  {'loss':>8}"]
    lines += [
        f"{member['name']:<12}{member['seed']:>6}  {member['accuracy']:>13.2%}  {member['loss']:>8.4f}"
        for member in members
    ]
    committee, none_right = result["committee"], len(result["agreement"]["none_right"])
    lines += [
        "",
        f"{result['dataset']}, test set of {committee['examples']}:",
        "  " + spread_line(result, count),
        f"  committee     accuracy {committee['accuracy']:.2%}   loss {committee['loss']:.4f}"
        "   (mean of the members' probabilities)",
        f"  agreement     {result['agreement']['examples_by_members_right'][count]} examples all {count} get right,"
        f" {none_right} none gets right",
    ]
    if "out_of_fold" in result:
        out_of_fold = result["out_of_fold"]
        worst = ", ".join(
            f"{example['row']} ({example['label']}? {example['prediction']})"
            for example in out_of_fold["doubtful_labels"][:8]
        )
        lines += [
            f"out of fold, {out_of_fold['correct']} of {out_of_fold['examples']} training rows right:",
            "  " + spread_line(out_of_fold, count),
            f"  most doubtful labels, as row (label? prediction): {worst}",
        ]
    return "\n".join(lines)


def spread_line(spreads: Mapping[str, Any], count: int) -> str:
    """Returns mean, spread and interval of accuracy and loss as text."""
    mean, sd, interval = spreads["mean"], spreads["sd"], spreads["interval"]
    low, high = interval["accuracy"]
    return (
        f"mean of {count:<5} accuracy {mean['accuracy']:.2%} (sd {sd['accuracy']:.2%}, 95 % interval of the mean"
        f" {low:.2%} to {high:.2%})   loss {mean['loss']:.4f} (sd {sd['loss']:.4f})"
    )
