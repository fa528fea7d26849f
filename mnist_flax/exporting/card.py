"""The model card of an export: training data, accuracy, limits, and how to load the files."""

import pathlib
from typing import Any

import jax

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import Predictor, RunInfo
from mnist_flax.analysis.population_file import POPULATION
from mnist_flax.analysis.report.write import REPORT_FOLDER
from mnist_flax.analysis.robustness import PUBLISHED, ROBUSTNESS
from mnist_flax.analysis.scores import result_file
from mnist_flax.config import Config, differences
from mnist_flax.run import console
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.schema import NUMBER, mismatches
from mnist_flax.templates import load_template

FILE = "MODEL_CARD.md"
_SCORES = {"examples": int, "accuracy": NUMBER, "loss": NUMBER}


def text(workdir: pathlib.Path, predictor: Predictor, info: RunInfo) -> str:
    """Returns the card as Markdown, with the results found in the workdir; unknown values are omitted."""
    config = info.config
    data = {
        "dataset": config.data.name,
        "fingerprint": f"`{info.fingerprint}`",
    }
    if info.kind == "folds":
        data["rows trained on"] = f"{config.num_rows:,}, each network without its fold"
    else:
        data |= {"rows trained on": f"{config.num_train_rows:,}", "rows held out": f"{config.num_holdout_rows:,}"}
    tables = {
        "Data": data,
        "Recipe": _recipe(predictor, info),
        "Accuracy and calibration": _scores(workdir, predictor, info),
        "Robustness": _robustness(workdir, predictor, info),
    }
    return load_template("exporting/card.md.jinja").render(
        dataset=config.data.name, tables=tables, classes=config.num_classes
    )


def _recipe(predictor: Predictor, info: RunInfo) -> dict[str, Any]:
    config, params = info.config, predictor.members[0]["params"]
    changed = {
        f"`config.{field}`": f"`{value!r}`"
        for field, (_, value) in sorted(differences(Config(model=type(config.model)()), config).items())
        if field not in ("seed", "train.batch_size", "train.epochs") and not field.startswith("data.")
    }
    origin = info.runs[0].record["origin"]
    if fork := origin.get("fork"):
        changed["started from"] = f"the weights of `{pathlib.PurePath(fork['workdir']).name}` at step {fork['step']:,}"
    if teacher := origin.get("teacher"):
        name = pathlib.PurePath(teacher["workdir"]).name
        changed["teacher"] = f"`{name}`, networks: {teacher['networks']}, digest: `{teacher['digest']}`"
    dtype = config.model.dtype
    return {
        "networks": f"{len(predictor.members)}, whose probabilities are averaged" if info.kind != "run" else 1,
        "family": config.to_dict()["model"]["name"],
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} in each network",
        "updates": f"{max(info.steps):,}, of {config.num_steps:,} in {config.train.epochs} epochs",
        "batch size": config.train.batch_size,
        "seed": ", ".join(str(run.config.seed) for run in info.runs),
        **changed,
        "precision of the exports": "float32" + f" (trained in {dtype})" * (dtype != "float32"),
    }


def _scores(workdir: pathlib.Path, predictor: Predictor, info: RunInfo) -> dict[str, str]:
    if info.kind == "run":
        result = _read(workdir / workdirs.SUMMARY, {f"test_{name}": kind for name, kind in _SCORES.items()})
        found = {name: result[f"test_{name}"] for name in _SCORES if result}
    else:
        found = _read(workdir / POPULATION, {"committee": _SCORES}).get("committee", {})
    rows = {}
    if info.is_final and found:
        accuracy, examples = found["accuracy"], found["examples"]
        low, high = metrics.wilson_interval(round(accuracy * examples), examples)
        rows["test accuracy"] = f"{accuracy:.2%} of {examples:,} images (95 % interval {low:.2%} to {high:.2%})"
        rows["test loss"] = f"{found['loss']:.4f}"
    calibration = _calibration(workdir, predictor, info)
    if "ece" in calibration:
        rows["expected calibration error on the test set"] = f"{calibration['ece']:.2%}"
        rows["Brier score on the test set"] = f"{calibration['brier']:.4f}"
    fitted = ", fitted on held-out rows" * (predictor.temperature != 1)
    return rows | {"temperature": f"{predictor.temperature:.3f}{fitted}"}


def _calibration(workdir: pathlib.Path, predictor: Predictor, info: RunInfo) -> dict[str, Any]:
    """Returns the test scores of these weights: from `evaluate` if it was run, else from the report, if any."""
    scores = {"ece": NUMBER, "brier": NUMBER}
    evaluation = _read(
        workdir / result_file({"split": "test", "dataset": info.config.data.name, "checkpoint": "latest"}), scores
    )
    if _is_of(evaluation, predictor, info):
        return evaluation
    report = _read(workdir / REPORT_FOLDER / "metrics.json", {"run": {"step": int}, "test": scores})
    step = report["run"]["step"] if report else None
    return report["test"] if _is_of(report | {"step": step, "members": 1}, predictor, info) else {}


def _robustness(workdir: pathlib.Path, predictor: Predictor, info: RunInfo) -> dict[str, str]:
    result = _read(workdir / ROBUSTNESS, {"mean_accuracy": NUMBER, "corruptions": {"*": {"accuracy": NUMBER}}})
    if not _is_of(result, predictor, info) or result.get("severity") != PUBLISHED:
        return {"under corruptions": f"not measured; run `{console.command('robustness')} --workdir=DIR`"}
    rows = {name: f"{row['accuracy']:.2%}" for name, row in result["corruptions"].items()}
    return {"mean accuracy under corruptions": f"{result['mean_accuracy']:.2%}", **rows}


def _read(path: pathlib.Path, schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if the file is missing or does not match the schema."""
    found = workdirs.read_json(path)
    return {} if any(mismatches(found, schema, "")) else found


def _is_of(result: dict[str, Any], predictor: Predictor, info: RunInfo) -> bool:
    """Returns whether a result was measured with these weights, on the test set of the training data."""
    wanted = {"dataset": info.config.data.name, "members": len(predictor.members), "step": max(info.steps)}
    return wanted.items() <= result.items()
