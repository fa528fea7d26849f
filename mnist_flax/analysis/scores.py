"""The scores of a network on a split, with 95 % intervals, as JSON and as a table."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.calibration import calibration_scores
from mnist_flax.analysis.evaluation import Evaluation, evaluate, load_predictor
from mnist_flax.analysis.population_file import POPULATION
from mnist_flax.analysis.run_data import DEFAULT_DATA, load_data, select_examples
from mnist_flax.data.registry import DATASETS
from mnist_flax.errors import ConfigError
from mnist_flax.run import workdir as workdirs


def scores_with_intervals(evaluation: Evaluation, label: np.ndarray, dataset: str) -> dict[str, Any]:
    """Computes the scores of an evaluation, with 95 % intervals; `dataset` provides the class names."""
    logits = evaluation.logits
    confusion = metrics.confusion_matrix(label, logits.argmax(axis=-1), logits.shape[-1])
    result = {
        "examples": evaluation.examples,
        **accuracy_scores(logits, label),
        "temperature": evaluation.temperature,
        "per_class": class_rows(confusion, dataset),
    }
    if evaluation.temperature != 1.0:
        result["uncalibrated"] = calibration_scores(logits * evaluation.temperature, label)
    return result


def accuracy_scores(logits: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """Computes the accuracy, its 95 % interval and the calibration scores of logits `f32[N,C]` for labels `i32[N]`."""
    correct, count = int((logits.argmax(axis=-1) == label).sum()), len(label)
    interval = metrics.wilson_interval(correct, count).tolist()
    accuracy = {"correct": correct, "accuracy": correct / count, "accuracy_interval": interval}
    return accuracy | calibration_scores(logits, label)


def class_rows(confusion: np.ndarray, dataset: str) -> list[dict[str, Any]]:
    """Returns the scores of each class; None where a score is undefined (0 / 0)."""
    columns = metrics.per_class(confusion)
    return [
        {
            "class": number,
            "name": name,
            "examples": int(confusion[number].sum()),
            "predictions": int(confusion[:, number].sum()),
            "correct": int(confusion[number, number]),
            **{
                field: None if np.isnan(column[number]).any() else column[number].tolist()
                for field, column in columns.items()
            },
        }
        for number, name in enumerate(DATASETS[dataset].class_names)
    ]


def evaluate_workdir(
    workdir: workdirs.Folder,
    *,
    checkpoint: str = "latest",
    split: str = "test",
    overrides: Mapping[str, Any] = DEFAULT_DATA,
) -> dict[str, Any]:
    """Evaluates a run, or a population as a committee, on the split `train`, `holdout` or `test`.

    See `load_predictor` for the checkpoints and `load_data` for the overrides.

    Raises:
      UserError: the run, the checkpoint or the data cannot be loaded, or do not match.
    """
    predictor, info = load_predictor(workdir, checkpoint)
    data, splits = load_data(info.config, info.fingerprint, overrides)
    if info.kind == "folds" and split != "test" and splits.name == info.config.data.name:
        raise ConfigError(
            f"--split={split}: other folds were trained on these rows; choose test, or see out_of_fold in"
            f" {pathlib.Path(workdir, POPULATION)}"
        )
    examples = select_examples(data, splits, split)
    return {
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "split": split,
        "trained_on": info.config.data.name,
        "members": len(predictor.members),
        "checkpoint": checkpoint,
        "step": max(info.steps),
        **scores_with_intervals(evaluate(predictor, examples), examples.label, splits.name),
    }


def result_file(result: Mapping[str, Any]) -> str:
    """Returns the name of the file that a result of `evaluate_workdir` is saved in."""
    checkpoint = "" if result["checkpoint"] == "latest" else f"-{result['checkpoint']}"
    return f"evaluation-{result['split']}-{result['dataset'].replace('/', '-')}{checkpoint}.json"


def save_evaluation(result: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes a result of `evaluate_workdir` into a folder.

    Raises:
      WorkdirError: the file cannot be written.
    """
    workdirs.write_text(
        folder / result_file(result), json.dumps(result, indent=2) + "\n", remedy=workdirs.REMEDY_OUTPUT
    )


def evaluation_table(result: Mapping[str, Any]) -> str:
    """Formats a result of `evaluate_workdir` as a text table."""
    low, high = result["accuracy_interval"]
    who = f", a committee of {result['members']}" if result["members"] > 1 else ""
    lines = [
        f"{result['dataset']}, {result['split']}: {result['correct']} of {result['examples']} right at step"
        f" {result['step']} ({result['checkpoint']}){who}",
        f"accuracy {result['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})   " + _calibration(result),
    ]
    if "uncalibrated" in result:
        lines.append(
            f"before scaling with the temperature {result['temperature']:.3f}: " + _calibration(result["uncalibrated"])
        )
        if result["split"] == "holdout" and result["dataset"] == result["trained_on"]:
            lines.append("The temperature was fitted on these rows, so loss, Brier score and ECE are a little too low.")
    lines += ["", f"{'class':<12}{'examples':>9}  {'precision':<24}{'recall':<24}{'F1':<24}".rstrip()]
    for row in result["per_class"]:
        if row["examples"] or row["predictions"]:
            cells = "".join(f"{_with_interval(row, field):<24}" for field in ("precision", "recall", "f1"))
            lines.append(f"{row['name']:<12}{row['examples']:>9}  {cells}".rstrip())
    return "\n".join(lines)


def _calibration(values: Mapping[str, float]) -> str:
    return f"loss {values['loss']:.4f}   Brier {values['brier']:.4f}   ECE {values['ece']:.4f}"


def _with_interval(row: Mapping[str, Any], field: str) -> str:
    if row[field] is None:
        return "-"
    low, high = row[f"{field}_interval"]
    return f"{row[field]:7.2%} [{low:.2%}, {high:.2%}]".replace("%", "")
