"""A run in, its report out: the page, and the pieces beside it."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnist_flax.analysis.evaluation import Evaluation, evaluate, load_data
from mnist_flax.analysis.report import facts as facts_lib
from mnist_flax.analysis.report import layers, page, pixels, plots
from mnist_flax.config import Config
from mnist_flax.data.load import Splits
from mnist_flax.run import workdir as workdirs
from mnist_flax.step import Variables, eval_variables

FOLDER = "report"
CHANNELS = 32  # of a layer that are shown
LOOKED_INTO = 4  # digits whose activations are shown


def write_report(
    config: Config,
    variables: Variables,
    *,
    records: Sequence[Mapping[str, Any]],
    splits: Splits,
    evaluation: Evaluation,
    step: int,
    summary: Mapping[str, Any] | None,
    workdir: pathlib.Path,
    evaluated_by: str = "training",
) -> pathlib.Path:
    """Writes the report of a run into its folder.

    Args:
      config: of the run.
      variables: the weights that were evaluated.
      records: the lines of its log.
      splits: its data.
      evaluation: of the test set, which is not read again.
      step: finished updates.
      summary: of the run, if it has one.
      workdir: the run's folder.
      evaluated_by: `training`, at its end, or `report`.

    Returns:
      The page.

    Raises:
      WorkdirError: the folder cannot be written.
    """
    facts = facts_lib.gather(
        config,
        layers=layers.layers(config, variables),
        records=records,
        splits=splits,
        evaluation=evaluation,
        step=step,
        summary=summary,
        evaluated_by=evaluated_by,
    )
    folder = workdir / FOLDER
    names = facts["class_names"]
    facts["command"] = (
        f"python -m mnist_flax.main --config={shown(workdir)}/{FOLDER}/config.py --workdir={shown(workdir)}-again"
    )
    facts["config_file"] = facts_lib.config_source(config, splits.name)
    svgs = {
        **(plots.learning_curves(facts["curves"]) if facts["curves"]["train"] else {}),
        **plots.confusion(facts["confusion"], names),
        "classes": plots.classes(facts["test"]["per_class"]),
        "reliability": plots.reliability(facts["calibration"]["bins"], facts_lib.NUM_BINS),
    }
    filters = layers.first_filters(variables)[:CHANNELS]
    filter_sheet = pixels.png(pixels.sheet(pixels.colors(filters, float(np.abs(filters).max())), 8), 12)
    activations = layer_pictures(config, variables, facts, splits.test.image)
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    shown_pictures = {
        "plots": {name: plots.inline(svg, name, PLOT_TITLES[name]) for name, svg in svgs.items()},
        "thumbnails": thumbnails(facts, splits.test.image),
        "filters": pixels.data_uri(filter_sheet),
        "activation_pictures": activations,
        "title": shown(workdir),
    }
    pieces = {
        **{f"{name}.svg": plots.as_file(svg) for name, svg in svgs.items()},
        **{f"{name}.png": gallery for name, gallery in gallery_pictures(facts, splits.test.image).items()},
        "filters.png": filter_sheet,
        "config.py": facts["config_file"].encode(),
        "metrics.json": text.encode(),
        "index.html": page.render(json.loads(text), shown_pictures).encode(),  # so no number is missing in the file
    }
    workdirs.subfolder(workdir, FOLDER)
    for name, content in pieces.items():
        workdirs.write_bytes(folder / name, content)
    return folder / "index.html"


PLOT_TITLES = {
    "loss": "Loss over the epochs, with the learning rate below",
    "accuracy": "Accuracy over the epochs, with the learning rate below",
    "confusion_counts": "Confusion matrix: number of examples by label and prediction",
    "confusion_rates": "Confusion matrix: percentage of each label by prediction",
    "classes": "Precision, recall and F1 of each class with 95 % intervals",
    "reliability": "Reliability diagram: accuracy by confidence, with the number of examples below",
}


def report_run(workdir: pathlib.Path, checkpoint: str = "latest") -> pathlib.Path:
    """Writes the report of a run as it was at one of its checkpoints, finished or not.

    Args:
      workdir: of the run.
      checkpoint: `latest`, `best` (on hold-out rows) or a step.

    Returns:
      The page.

    Raises:
      UserError: the run, the checkpoint or the data cannot be had, or the folder cannot be written.
    """
    from mnist_flax.run.checkpoint import load_run  # only here: who has a run in memory needs no Orbax

    run = load_run(workdir, checkpoint)
    config, splits = load_data(run.config, run.record["fingerprint"], {})
    variables = eval_variables(run.state)
    step = int(run.state.step)
    return write_report(
        run.config,
        variables,
        records=logged(workdir, step) or run.record["log"],
        splits=splits,
        evaluation=evaluate(config, variables, splits.test),
        step=step,
        summary=workdirs.read_json(workdir / workdirs.SUMMARY),
        workdir=workdir,
        evaluated_by="report",
    )


def logged(workdir: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Returns the lines of a run's log up to a step; none if the file is missing or damaged."""
    try:
        lines = (workdir / workdirs.METRICS).read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def shown(path: pathlib.Path) -> str:
    """Returns a folder as the page names it: from the working directory if it is inside, else only its last part."""
    absolute = path.absolute()
    if absolute.is_relative_to(pathlib.Path.cwd()):
        return absolute.relative_to(pathlib.Path.cwd()).as_posix()
    return absolute.name


def rows_of(facts: Mapping[str, Any]) -> list[int]:
    """Returns the test rows whose image is on the page."""
    galleries = [gallery for gallery in facts["galleries"].values() if isinstance(gallery, list)]
    rows = {example["row"] for gallery in galleries for example in gallery}
    return sorted(rows.union(*(pair["rows"] for pair in facts["confused_pairs"])))


def thumbnails(facts: Mapping[str, Any], images: np.ndarray) -> dict[int, str]:
    """Returns the images that are on the page, by test row."""
    return {row: pixels.data_uri(pixels.png(images[row, :, :, 0])) for row in rows_of(facts)}


def gallery_pictures(facts: Mapping[str, Any], images: np.ndarray) -> dict[str, bytes]:
    """Returns each gallery as one picture, in the order of `metrics.json`, for use elsewhere."""
    galleries = {name: gallery for name, gallery in facts["galleries"].items() if isinstance(gallery, list) and gallery}
    return {
        name: pixels.png(pixels.sheet(images[[example["row"] for example in gallery], :, :, 0], 8, gap=2), 3)
        for name, gallery in galleries.items()
    }


def layer_pictures(config: Config, variables: Variables, facts: dict[str, Any], images: np.ndarray) -> list[list[str]]:
    """Paints what each stage makes of a few digits: some that are right, and the worst mistake.

    Args:
      config: of the run.
      variables: its weights.
      facts: gets `activations`: the examples, and of each stage the name, the shape and how many channels are painted.
      images: of the test set.

    Returns:
      For each stage a picture for each example; within a stage the same strength has the same colour.
    """
    mistakes = facts["galleries"]["mistakes"][:1]
    correct = facts["galleries"]["correct"]
    wanted = min(LOOKED_INTO - len(mistakes), len(correct))  # spread over the classes, as the gallery is in their order
    examples = [correct[i] for i in np.linspace(0, len(correct) - 1, wanted).astype(int)] + mistakes
    found = layers.activations(config, variables, images[[example["row"] for example in examples]])
    facts["activations"] = {"examples": examples, "stages": []}
    painted = []
    for name, values in found:
        if values.ndim == 4:
            tiles, columns = np.moveaxis(values, -1, 1)[:, :CHANNELS], 8
        else:  # a dense layer: each value is a tile of one pixel
            tiles, columns = values[:, :, None, None], 10 if name == "logits" else 16
        colored = pixels.colors(tiles, float(np.abs(tiles).max()))
        sheets = [pixels.sheet(example, columns, gap=1 if values.ndim == 4 else 0) for example in colored]
        painted.append([pixels.data_uri(pixels.png(sheet, 2)) for sheet in sheets])
        stage = {"name": name, "shape": values.shape[1:], "channels": tiles.shape[1]}
        facts["activations"]["stages"].append(stage)
    return painted
