"""Statistics over the members of a population: `population.json`, `population.npz` and the learning curves."""

import io
import itertools
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis import calibration, label_errors
from mnist_flax.analysis.evaluation import (
    Facts,
    evaluation_of,
    fit_of,
    make_predictor,
    mean_logits,
    member_logits,
    stored_fit,
)
from mnist_flax.analysis.population_file import POPULATION, is_population_result
from mnist_flax.analysis.report import plots
from mnist_flax.config import Config
from mnist_flax.data import batches
from mnist_flax.data.splits import Splits
from mnist_flax.errors import WorkdirError
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import read_log
from mnist_flax.run.provenance import provenance
from mnist_flax.step import Variables

ARRAYS = "population.npz"
ARRAY_NAMES = {
    "seeds": ("test_label", "test_probs"),
    "folds": ("test_label", "test_probs", "rows", "fold", "out_of_fold_label", "out_of_fold_probs"),
}

Records = Sequence[Mapping[str, Any]]  # the lines of a run's log


class TrainedMember(NamedTuple):
    """A finished member of a population."""

    config: Config
    variables: Variables
    test_logits: np.ndarray  # `f32[N,C]`, of the test images at temperature 1


def spread_of(values: Sequence[float] | np.ndarray) -> Facts:
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


def score(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Facts:
    """Computes accuracy, loss, and the numbers of correct and of all examples; see `evaluation_of`."""
    evaluation = evaluation_of(logits, labels, temperature)
    return {**evaluation.scores(), "correct": evaluation.correct}


def agreement(logits: np.ndarray, labels: np.ndarray) -> Facts:
    """Counts the examples by how many members get them right, from `f32[M,N,C], i32[N]`.

    Returns:
      `examples_by_members_right`: entry m is the number of examples that exactly m members get right, m from 0 to M;
      and `none_right`: the examples that no member gets right.
    """
    num_right = np.sum(logits.argmax(axis=-1) == labels, axis=0)
    prediction = mean_logits(logits).argmax(axis=-1)
    return {
        "examples_by_members_right": np.bincount(num_right, minlength=len(logits) + 1).tolist(),
        "none_right": [
            {"row": int(row), "label": int(labels[row]), "committee": int(prediction[row])}
            for row in np.flatnonzero(num_right == 0)
        ],
    }


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
    kind: str, members: Mapping[str, TrainedMember], splits: Splits, folder: pathlib.Path
) -> tuple[Facts, dict[str, np.ndarray]]:
    """Evaluates trained members on the test set, alone and as a committee; folds also on the rows that they hold out.

    Each member is scored at the temperature in its summary, and the committee at a temperature fitted on the rows that
    all members held out (1 for folds). The arrays hold probabilities at temperature 1.

    `kind` is one of `KINDS`. `folder` contains the folders of the members, which are named by the keys.

    Returns:
      The contents of `population.json`, and the arrays of `population.npz`: `test_probs` `f32[M,N,C]` and `test_label`
      `i32[N]`; for folds also `rows`, `fold` and `out_of_fold_label` `i32[R]`, and `out_of_fold_probs` `f32[R,C]`.
    """
    configs = [member.config for member in members.values()]
    is_folds = kind == "folds"
    label = splits.test.label
    logits = np.stack([member.test_logits for member in members.values()])
    summaries = [workdirs.read_json(folder / name / workdirs.SUMMARY) for name in members]
    rows = []
    for name, config, summary, of_member in zip(members, configs, summaries, logits, strict=True):
        temperature = stored_fit(summary).get("temperature", 1.0)
        fold = {"fold": config.data.fold} if is_folds else {}
        scores = score(of_member[None], label, temperature)
        rows.append({"name": name, "seed": config.seed, **fold, **scores, "temperature": temperature})
    fitted = make_predictor(configs[0], *(member.variables for member in members.values()))
    if not is_folds:  # all members hold out the same rows
        _, held_out = batches.rows_of(splits.train.label, configs[0].data)
        fitted = calibration.calibrate(fitted, splits.train.select(held_out))
    result: Facts = {
        "kind": kind,
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "config": configs[0].to_dict(),
        "steps": configs[0].num_steps,
        "members": rows,
        **spreads(rows),
        "committee": score(logits, label, fitted.temperature),
        **fit_of(fitted),
        "agreement": agreement(logits, label),
    }
    arrays = {"test_probs": metrics.probabilities(logits).astype(np.float32), "test_label": label}
    if is_folds:
        result["out_of_fold"], more = out_of_fold_result(list(members.values()), splits)
        arrays |= more
    result["curves"] = member_curves([read_log(folder / name) for name in members])
    result["train_seconds"] = sum(float(summary["train_seconds"]) for summary in summaries)
    return result | provenance(), arrays


def out_of_fold_result(members: Sequence[TrainedMember], splits: Splits) -> tuple[Facts, dict[str, np.ndarray]]:
    """Evaluates every row with the member that was not trained on it; returns the scores and the arrays."""
    parts = []
    for member in members:
        data = member.config.data
        _, rows = batches.rows_of(splits.train.label, data)
        (logits,) = member_logits(make_predictor(member.config, member.variables), splits.train.image[rows])
        parts.append((rows, np.full(len(rows), data.fold, np.int32), logits))
    scores = [score(logits[None], splits.train.label[rows]) for rows, _, logits in parts]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[0])
    rows, fold, logits = (column[order] for column in columns)
    label = splits.train.label[rows]
    probs = metrics.probabilities(logits).astype(np.float32)
    arrays = {"rows": rows, "fold": fold, "out_of_fold_probs": probs, "out_of_fold_label": label}
    labels = label_errors.label_facts(arrays)
    return {"folds": scores, **spreads(scores), **score(logits[None], label), "labels": labels}, arrays


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


def check_population(workdir: pathlib.Path, kind: str, seeds: Sequence[int]) -> None:
    """Raises a WorkdirError if a folder holds the result of another population, which this one would overwrite."""
    saved = load_population_result(workdir)
    if saved is None:
        return
    missing = {member["seed"] for member in saved["members"]} - set(seeds)
    if saved["kind"] != kind or missing:
        names = ", ".join(member["name"] for member in saved["members"])
        more = ", with the same or a larger --seeds," if saved["kind"] == "seeds" else ""
        raise WorkdirError(
            f"--workdir={workdir}: holds a population with the members {names}, and this command would overwrite its"
            f" result; repeat the command that trained it{more} or name another folder"
        )


def load_arrays(workdir: pathlib.Path, kind: str, num_members: int) -> dict[str, np.ndarray]:
    """Reads the arrays of a population; `kind` is one of `KINDS`.

    Raises:
      WorkdirError: the file is missing or damaged, or is of another kind or number of members.
    """
    path = workdir / ARRAYS
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ARRAY_NAMES[kind]}
        if len(found["test_probs"]) != num_members:  # the process was killed between the two files
            raise ValueError(f"{len(found['test_probs'])} members instead of {num_members}")
        return found
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WorkdirError(
            f"{path}: cannot be read ({error}); remove {POPULATION}, and the command that trained this population"
            " writes both again"
        ) from error


def population_table(result: Mapping[str, Any]) -> str:
    """Formats a result as a text table."""
    members, committee, agreement = result["members"], result["committee"], result["agreement"]
    count = len(members)
    out_of_fold = result.get("out_of_fold")
    split, scores = ("out of fold", out_of_fold["folds"]) if out_of_fold else ("test set", members)
    lines = [f"{'member':<12}{'seed':>6}  {'accuracy':>10}  {'loss':>8}   ({split})"]
    lines += [
        f"{member['name']:<12}{member['seed']:>6}  {of['accuracy']:>10.2%}  {of['loss']:>8.4f}"
        for member, of in zip(members, scores, strict=True)
    ]
    lines.append("")
    if out_of_fold:  # what to choose a recipe by, so it comes first
        lines += [
            f"out of fold, {out_of_fold['correct']} of {out_of_fold['examples']} training rows right:",
            _spread_line(out_of_fold, count),
        ]
        if labels := out_of_fold.get("labels"):  # results of earlier versions have none
            lines.append(f"  {label_errors.label_table(labels)}")
    lines += [
        f"{result['dataset']}, test set of {committee['examples']}:",
        _spread_line(result, count),
        f"  committee     accuracy {committee['accuracy']:.2%}   loss {committee['loss']:.4f}"
        f"   (mean of the members' probabilities, temperature {result['temperature']:.2f}; members have their own)",
        f"  agreement     all {count} members are right on {agreement['examples_by_members_right'][count]}"
        f" examples, none on {len(agreement['none_right'])}",
    ]
    return "\n".join(lines)


def _spread_line(spreads: Mapping[str, Any], count: int) -> str:
    mean, sd = spreads["mean"], spreads["sd"]
    low, high = np.clip(spreads["interval"]["accuracy"], 0, 1)  # with two members, it may extend beyond
    return (
        f"  mean of {count:<5} accuracy {mean['accuracy']:.2%} (sd {sd['accuracy']:.2%}, 95 % interval of the mean"
        f" {low:.2%} to {high:.2%})   loss {mean['loss']:.4f} (sd {sd['loss']:.4f})"
    )
