"""Statistics over the members of a population: `population.json`, `population.npz` and the learning curves."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis import calibration
from mnist_flax.analysis.evaluation import (
    POPULATION,
    Predictor,
    combine_members,
    make_predictor,
    member_logits,
    predict_logits,
    stored_fit,
)
from mnist_flax.analysis.report import bands
from mnist_flax.config import Config
from mnist_flax.data import batches
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.provenance import provenance
from mnist_flax.step import Variables

ARRAYS = "population.npz"
NUM_DOUBTFUL = 100  # doubtful labels to list

Facts = dict[str, Any]  # ready for JSON
Records = Sequence[Mapping[str, Any]]  # the lines of a run's log


class Spread(NamedTuple):
    """The mean and the spread of M numbers.

    Attributes:
      mean: the mean.
      sd: the standard deviation, with M - 1 in the denominator.
      interval: the 95 % interval of the mean (Student, 1908), assuming independent, approximately normal numbers.
    """

    mean: float
    sd: float
    interval: tuple[float, float]


def spread_of(values: Sequence[float]) -> Spread:
    """Computes the mean, the standard deviation and the interval of at least two numbers."""
    from scipy.stats import t

    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    return Spread(mean, sd, (mean - half, mean + half))


def spreads(rows: Sequence[Mapping[str, float]]) -> Facts:
    """Computes `mean`, `sd` and `interval` of accuracy and loss over the members."""
    by_name = {name: spread_of([row[name] for row in rows]) for name in ("accuracy", "loss")}
    return {
        "mean": {name: of_name.mean for name, of_name in by_name.items()},
        "sd": {name: of_name.sd for name, of_name in by_name.items()},
        "interval": {name: list(of_name.interval) for name, of_name in by_name.items()},
    }


def score(logits: np.ndarray, labels: np.ndarray) -> Facts:
    """Computes accuracy, loss, and the numbers of correct and of all examples, from `f32[N,C], i32[N]`."""
    right = logits.argmax(axis=-1) == labels
    return {
        "accuracy": float(np.mean(right)),
        "loss": float(np.mean(metrics.negative_log_likelihood(logits, labels))),
        "correct": int(np.sum(right)),
        "examples": len(labels),
    }


def agreement(logits: np.ndarray, labels: np.ndarray) -> Facts:
    """Counts the examples by how many members get them right, from `f32[M,N,C], i32[N]`.

    Returns:
      `examples_by_members_right`: entry m is the number of examples that exactly m members get right, m from 0 to M;
      and `none_right`: the examples that no member gets right.
    """
    num_right = np.sum(logits.argmax(axis=-1) == labels, axis=0)
    prediction = combine_members(logits).argmax(axis=-1)
    return {
        "examples_by_members_right": np.bincount(num_right, minlength=len(logits) + 1).tolist(),
        "none_right": [
            {"row": int(row), "label": int(labels[row]), "committee": int(prediction[row])}
            for row in np.flatnonzero(num_right == 0)
        ],
    }


def doubtful_labels(logits: np.ndarray, labels: np.ndarray, rows: np.ndarray, fold: np.ndarray) -> list[Facts]:
    """Lists the examples whose label is least probable to a network that was not trained on them.

    Args:
      logits: `f32[R,C]`, out of fold.
      labels: `i32[R]`, as given in the dataset.
      rows: `i32[R]`, their row numbers, in the order of the official files.
      fold: `i32[R]`, the fold that held out each row.
    """
    probs = np.exp(metrics.log_probabilities(logits))
    of_label = np.take_along_axis(probs, labels[:, None], axis=-1)[:, 0]
    prediction = logits.argmax(axis=-1)
    return [
        {
            "row": int(rows[i]),
            "label": int(labels[i]),
            "prediction": int(prediction[i]),
            "probability_of_label": float(of_label[i]),
            "probability_of_prediction": float(probs[i, prediction[i]]),
            "fold": int(fold[i]),
        }
        for i in np.argsort(of_label, kind="stable")[:NUM_DOUBTFUL]
    ]


def member_curves(logs: Sequence[Records]) -> Facts:
    """Computes mean, sd, minimum and maximum over the members, of loss and accuracy at each logged step.

    Steps that some members did not log are left out (a resumed run may have logged at other steps).
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


def population_result(
    members: Mapping[str, tuple[Config, Variables]], splits: Splits, folder: pathlib.Path
) -> tuple[Facts, dict[str, np.ndarray]]:
    """Evaluates trained members on the test set, alone and as a committee, and folds also on their held-out rows.

    Each member is scored at its own temperature, as in its summary, and the committee at a temperature fitted on the
    rows that all members held out (1 for folds). The arrays hold probabilities at temperature 1.

    Args:
      members: the config and the final variables of each member, by name.
      splits: the data.
      folder: contains a folder for each member, by name.

    Returns:
      The contents of `population.json`, and the arrays of `population.npz`: `test_probs` `f32[M,N,C]` and `test_label`
      `i32[N]`; for folds also `rows`, `fold` and `out_of_fold_label` `i32[R]`, and `out_of_fold_probs` `f32[R,C]`.
    """
    configs = [config for config, _ in members.values()]
    is_folds = configs[0].data.fold != configs[-1].data.fold
    label = splits.test.label
    committee = make_predictor(configs[0], *(variables for _, variables in members.values()))
    logits = member_logits(committee, splits.test.image)
    summaries = [workdirs.read_json(folder / name / workdirs.SUMMARY) for name in members]
    rows = []
    for name, config, summary, of_member in zip(members, configs, summaries, logits, strict=True):
        temperature = stored_fit(summary)["temperature"]
        fold = {"fold": config.data.fold} if is_folds else {}
        scores = score(combine_members(of_member[None], temperature), label)
        rows.append({"name": name, "seed": config.seed, **fold, **scores, "temperature": temperature})
    fitted = committee if is_folds else calibrated_committee(committee, configs[0], splits)
    result: Facts = {
        "kind": "folds" if is_folds else "seeds",
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "config": configs[0].to_dict(),
        "steps": configs[0].num_steps,
        "members": rows,
        **spreads(rows),
        "committee": score(combine_members(logits, fitted.temperature), label),
        "temperature": fitted.temperature,
        "doubtful_below": fitted.doubtful_below,
        "agreement": agreement(logits, label),
    }
    arrays = {"test_probs": np.exp(metrics.log_probabilities(logits)).astype(np.float32), "test_label": label}
    if is_folds:
        result["out_of_fold"], more = out_of_fold_result(list(members.values()), splits)
        arrays |= more
    result["curves"] = member_curves([read_log(folder / name) for name in members])
    result["train_seconds"] = sum(float(summary["train_seconds"]) for summary in summaries)
    return result | provenance(), arrays


def calibrated_committee(committee: Predictor, config: Config, splits: Splits) -> Predictor:
    """Calibrates a committee on the rows that all its members held out."""
    _, rows = batches.rows_of(splits.train.label, config.data)
    return calibration.calibrate(committee, Examples(splits.train.image[rows], splits.train.label[rows]))


def out_of_fold_result(
    members: Sequence[tuple[Config, Variables]], splits: Splits
) -> tuple[Facts, dict[str, np.ndarray]]:
    """Evaluates every row with the member that was not trained on it; returns the scores and the arrays."""
    parts, scores = [], []
    for config, variables in members:
        _, rows = batches.rows_of(splits.train.label, config.data)
        logits = predict_logits(make_predictor(config, variables), splits.train.image[rows])
        scores.append(score(logits, splits.train.label[rows]))
        parts.append((rows, np.full(len(rows), config.data.fold, np.int32), logits))
    rows, fold, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    in_order = np.argsort(rows)
    rows, fold, logits = rows[in_order], fold[in_order], logits[in_order]
    label = splits.train.label[rows]
    facts = {
        "folds": scores,
        **spreads(scores),
        **score(logits, label),
        "doubtful_labels": doubtful_labels(logits, label, rows, fold),
    }
    probs = np.exp(metrics.log_probabilities(logits)).astype(np.float32)
    return facts, {"rows": rows, "fold": fold, "out_of_fold_probs": probs, "out_of_fold_label": label}


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a finished run's log."""
    return [json.loads(line) for line in (folder / workdirs.METRICS).read_text(encoding="utf-8").splitlines()]


def save_population_result(result: Facts, arrays: Mapping[str, np.ndarray], workdir: pathlib.Path) -> None:
    """Writes the arrays, the curves and finally the result into the population's folder.

    Raises:
      WorkdirError: a file cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    workdirs.write_bytes(workdir / ARRAYS, buffer.getvalue())
    for name, svg in bands.draw(result["curves"]).items():
        workdirs.write_bytes(workdir / f"{name}.svg", svg)
    workdirs.write_text(workdir / POPULATION, json.dumps(result, indent=1, allow_nan=False) + "\n")


def load_population_result(workdir: pathlib.Path) -> Facts | None:
    """Returns the contents of `population.json`, or None if it is missing or damaged."""
    result = workdirs.read_json(workdir / POPULATION)
    return result if isinstance(result, dict) and "members" in result else None


def population_table(result: Mapping[str, Any]) -> str:
    """Formats a result as a text table."""
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
        f"  agreement     all {count} members are right on {result['agreement']['examples_by_members_right'][count]}"
        f" examples, none is on {none_right}",
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
    """Formats the mean and sd of accuracy and loss, and the interval of the accuracy, as one line."""
    mean, sd, interval = spreads["mean"], spreads["sd"], spreads["interval"]
    low, high = interval["accuracy"]
    return (
        f"mean of {count:<5} accuracy {mean['accuracy']:.2%} (sd {sd['accuracy']:.2%}, 95 % interval of the mean"
        f" {low:.2%} to {high:.2%})   loss {mean['loss']:.4f} (sd {sd['loss']:.4f})"
    )
