"""Statistics over the members of a population: `population.json`, `population.npz` and the learning curves."""

import io
import itertools
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis import calibration
from mnist_flax.analysis.evaluation import (
    POPULATION,
    Facts,
    combine_members,
    fit_of,
    is_population_result,
    make_predictor,
    member_logits,
    predict_logits,
    stored_fit,
)
from mnist_flax.analysis.report import plots
from mnist_flax.config import Config
from mnist_flax.data import batches
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.errors import WorkdirError
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import read_log
from mnist_flax.run.provenance import provenance
from mnist_flax.step import Variables

ARRAYS = "population.npz"
NUM_DOUBTFUL = 100  # doubtful labels to list

Records = Sequence[Mapping[str, Any]]  # the lines of a run's log


def spread_of(values: Sequence[float]) -> Facts:
    """Computes `mean`, `sd` (M - 1 in the denominator) and 95 % `interval` of the mean (Student, 1908).

    It assumes at least two numbers that are independent and approximately normal.
    """
    from scipy.stats import t

    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    return {"mean": mean, "sd": sd, "interval": [mean - half, mean + half]}


def spreads(rows: Sequence[Mapping[str, float]]) -> Facts:
    """Computes `mean`, `sd` and `interval` of accuracy and loss over the members."""
    of = {name: spread_of([row[name] for row in rows]) for name in ("accuracy", "loss")}
    return {part: {name: spread[part] for name, spread in of.items()} for part in ("mean", "sd", "interval")}


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


def label_entries(rows: np.ndarray, label: np.ndarray, probs: np.ndarray, **more: np.ndarray) -> list[Facts]:
    """Describes labels and predictions, ready for JSON; each array has an entry for each example."""
    columns = {
        "row": rows,
        "label": label,
        "prediction": probs.argmax(axis=-1),
        "probability_of_label": np.take_along_axis(probs, label[:, None], axis=-1)[:, 0],
        "probability_of_prediction": probs.max(axis=-1),
        **more,
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, of_example, strict=True)) for of_example in values]


def doubtful_labels(logits: np.ndarray, labels: np.ndarray, rows: np.ndarray, fold: np.ndarray) -> list[Facts]:
    """Lists the examples whose labels are the least probable according to a network that was not trained on them.

    `logits` are `f32[R,C]`. `labels`, `rows` (numbers in the official file) and `fold` (the one that held out each row)
    are `i32[R]`.
    """
    probs = np.exp(metrics.log_probabilities(logits))
    of_label = np.take_along_axis(probs, labels[:, None], axis=-1)[:, 0]
    worst = np.argsort(of_label, kind="stable")[:NUM_DOUBTFUL]
    return label_entries(rows[worst], labels[worst], probs[worst], fold=fold[worst])


def member_curves(logs: Sequence[Records]) -> Facts:
    """Computes mean, sd, minimum and maximum of loss and accuracy over the members, at each logged step.

    Steps that some members did not log are left out (a resumed run may have logged at other steps).
    """
    points: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for record in itertools.chain(*logs):
        points.setdefault((record["step"], record["split"]), []).append(record)
    curves: Facts = {"train": [], "holdout": [], "test": []}
    for (step, split), records in sorted(points.items()):
        if len(records) == len(logs):
            point: Facts = {"step": step, "epoch": records[0]["epoch"]}
            for name in ("loss", "accuracy"):
                values = [record[name] for record in records]
                sd = float(np.std(values, ddof=1))
                point[name] = {"mean": float(np.mean(values)), "sd": sd, "min": min(values), "max": max(values)}
            curves[split].append(point)
    return curves


def population_result(
    kind: str, members: Mapping[str, tuple[Config, Variables]], splits: Splits, folder: pathlib.Path
) -> tuple[Facts, dict[str, np.ndarray]]:
    """Evaluates trained members on the test set, alone and as a committee; folds also on the rows that they hold out.

    Each member is scored at the temperature in its summary, and the committee at a temperature fitted on the rows that
    all members held out (1 for folds). The arrays hold probabilities at temperature 1.

    `kind` is one of `KINDS`. `members` maps names to configs and final variables; `folder` contains the folders of
    these names.

    Returns:
      The contents of `population.json`, and the arrays of `population.npz`: `test_probs` `f32[M,N,C]` and `test_label`
      `i32[N]`; for folds also `rows`, `fold` and `out_of_fold_label` `i32[R]`, and `out_of_fold_probs` `f32[R,C]`.
    """
    configs = [config for config, _ in members.values()]
    is_folds = kind == "folds"
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
    fitted = committee
    if not is_folds:  # all members hold out the same rows
        _, held_out = batches.rows_of(splits.train.label, configs[0].data)
        fitted = calibration.calibrate(committee, Examples(splits.train.image[held_out], splits.train.label[held_out]))
    result: Facts = {
        "kind": kind,
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "config": configs[0].to_dict(),
        "steps": configs[0].num_steps,
        "members": rows,
        **spreads(rows),
        "committee": score(combine_members(logits, fitted.temperature), label),
        **fit_of(fitted),
        "agreement": agreement(logits, label),
    }
    arrays = {"test_probs": np.exp(metrics.log_probabilities(logits)).astype(np.float32), "test_label": label}
    if is_folds:
        result["out_of_fold"], more = out_of_fold_result(list(members.values()), splits)
        arrays |= more
    result["curves"] = member_curves([read_log(folder / name) for name in members])
    result["train_seconds"] = sum(float(summary["train_seconds"]) for summary in summaries)
    return result | provenance(), arrays


def out_of_fold_result(
    members: Sequence[tuple[Config, Variables]], splits: Splits
) -> tuple[Facts, dict[str, np.ndarray]]:
    """Evaluates every row with the member that was not trained on it; returns the scores and the arrays."""
    parts = []
    for config, variables in members:
        _, rows = batches.rows_of(splits.train.label, config.data)
        logits = predict_logits(make_predictor(config, variables), splits.train.image[rows])
        parts.append((rows, np.full(len(rows), config.data.fold, np.int32), logits))
    scores = [score(logits, splits.train.label[rows]) for rows, _, logits in parts]
    rows, fold, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows, fold, logits = (column[np.argsort(rows)] for column in (rows, fold, logits))
    label = splits.train.label[rows]
    facts = {
        "folds": scores,
        **spreads(scores),
        **score(logits, label),
        "doubtful_labels": doubtful_labels(logits, label, rows, fold),
    }
    probs = np.exp(metrics.log_probabilities(logits)).astype(np.float32)
    return facts, {"rows": rows, "fold": fold, "out_of_fold_probs": probs, "out_of_fold_label": label}


def save_population_result(result: Facts, arrays: Mapping[str, np.ndarray], workdir: pathlib.Path) -> None:
    """Writes the arrays, the curves and finally the result into the population's folder.

    Raises:
      WorkdirError: a file cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    workdirs.write_bytes(workdir / ARRAYS, buffer.getvalue())
    for name, svg in plots.population_curves(result["curves"]).items():
        workdirs.write_bytes(workdir / f"{name}.svg", svg)
    workdirs.write_text(workdir / POPULATION, json.dumps(result, indent=1, allow_nan=False) + "\n")


def load_population_result(workdir: pathlib.Path) -> Facts | None:
    """Returns the contents of `population.json`, or None if it is missing or damaged."""
    result = workdirs.read_json(workdir / POPULATION)
    return result if is_population_result(result) else None


def load_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a population.

    Raises:
      WorkdirError: the file is missing or damaged.
    """
    path = workdir / ARRAYS
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise WorkdirError(
            f"{path}: cannot be read ({error}); remove {POPULATION}, and the command that trained this population"
            " writes both again"
        ) from error


def population_table(result: Mapping[str, Any]) -> str:
    """Formats a result as a text table."""
    members, committee, agreement = result["members"], result["committee"], result["agreement"]
    count = len(members)
    lines = [f"{'member':<12}{'seed':>6}  {'test accuracy':>13}  {'loss':>8}"]
    lines += [
        f"{member['name']:<12}{member['seed']:>6}  {member['accuracy']:>13.2%}  {member['loss']:>8.4f}"
        for member in members
    ]
    lines += [
        "",
        f"{result['dataset']}, test set of {committee['examples']}:",
        _spread_line(result, count),
        f"  committee     accuracy {committee['accuracy']:.2%}   loss {committee['loss']:.4f}"
        "   (mean of the members' probabilities)",
        f"  agreement     all {count} members are right on {agreement['examples_by_members_right'][count]}"
        f" examples, none on {len(agreement['none_right'])}",
    ]
    if out_of_fold := result.get("out_of_fold"):
        lines += [
            f"out of fold, {out_of_fold['correct']} of {out_of_fold['examples']} training rows right:",
            _spread_line(out_of_fold, count),
            f"  most doubtful labels, as {worst_labels(out_of_fold['doubtful_labels'])}",
        ]
    return "\n".join(lines)


def worst_labels(entries: Sequence[Mapping[str, Any]]) -> str:
    """Formats the first few entries of `label_entries`."""
    worst = ", ".join(f"{entry['row']} ({entry['label']}? {entry['prediction']})" for entry in entries[:8])
    return f"row (label? prediction): {worst}"


def _spread_line(spreads: Mapping[str, Any], count: int) -> str:
    mean, sd, (low, high) = spreads["mean"], spreads["sd"], spreads["interval"]["accuracy"]
    return (
        f"  mean of {count:<5} accuracy {mean['accuracy']:.2%} (sd {sd['accuracy']:.2%}, 95 % interval of the mean"
        f" {low:.2%} to {high:.2%})   loss {mean['loss']:.4f} (sd {sd['loss']:.4f})"
    )
