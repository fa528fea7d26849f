"""Writes the demo page: one HTML file in which a trained network reads what you draw, and shows how it does so."""

import base64
import contextlib
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.corruptions import corrupt
from mnist_flax.analysis.evaluation import Evaluation, Predictor, evaluate, load_predictor
from mnist_flax.analysis.report import facts
from mnist_flax.analysis.run_data import DEFAULT_DATA, load_own_data
from mnist_flax.config import Config
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Splits
from mnist_flax.errors import WorkdirError
from mnist_flax.exporting.inference import graph_of
from mnist_flax.exporting.textbook import textbook_order
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.checkpoint import steps_in
from mnist_flax.templates import load_template

FILE = "demo.html"
PAGE = pathlib.Path(__file__).with_name("page")
SCRIPTS = ("framing", "network", "inspect", "draw", "views", "inspector", "app")  # in dependency order

EXAMPLES = 12  # at most this many correct images, and as many mistakes
CORRUPTED = ("impulse_noise", "motion_blur", "translate", "brightness", "stripe", "fog", "dotted_line", "zigzag")

# Names as the datasets' authors write them; other datasets are shown under their config names.
DATASET_TITLES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "kmnist": "KMNIST",
    "digits": "scikit-learn's digits",
}


def write_demo(
    workdir: pathlib.Path,
    checkpoint: str = "latest",
    *,
    output: pathlib.Path | None = None,
    overrides: Mapping[str, Any] = DEFAULT_DATA,
) -> pathlib.Path:
    """Writes the demo page of a run, or of a population (as a committee).

    The default file is `demo.html` in the workdir, or `demo-<checkpoint>.html` if the checkpoint is not the latest.
    `checkpoint` is as in `load_predictor`, and `overrides` as in `load_own_data`.

    Raises:
      UserError: the run or its data cannot be read, its network cannot be exported, or the page cannot be written.
    """
    predictor, info = load_predictor(workdir, checkpoint)
    splits = load_own_data(info.config, info.fingerprint, overrides)
    evaluation = evaluate(predictor, splits.test)
    remedy = "name another file with --output=FILE"
    path = output or workdir / (FILE if checkpoint == "latest" else f"demo-{checkpoint}.html")
    return write_page(info.config, predictor, evaluation, splits, max(info.steps), workdir, path, remedy=remedy)


def checkpoint_of(predictor: Predictor, step: int, config: Config) -> dict[str, Any]:
    """Returns a predictor as the page reads it; answers below the probability `doubtful_below` are called guesses."""
    graph = textbook_order(graph_of(predictor))
    return {
        "title": f"step {step:,}" + (" (end)" if step == config.num_steps else ""),
        "doubtful_below": predictor.doubtful_below,
        "graph": json.loads(graph.to_json()),
        "weights": _base64(graph.weights()),
    }


def earlier_checkpoint(workdir: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Returns a run's earliest intact checkpoint before `step`, to compare with; an empty list if there is none."""
    for earlier in steps_in(workdir / workdirs.CHECKPOINTS):
        if earlier < step:
            with contextlib.suppress(WorkdirError):  # skips a damaged checkpoint
                predictor, info = load_predictor(workdir, str(earlier))
                return [checkpoint_of(predictor, earlier, info.config)]
    return []


def write_page(
    config: Config,
    predictor: Predictor,
    evaluation: Evaluation,
    splits: Splits,
    step: int,
    workdir: pathlib.Path,
    output: pathlib.Path | None = None,
    *,
    remedy: str = workdirs.REMEDY_RESUME,
) -> pathlib.Path:
    """Writes the demo page of a predictor at a step, by default `demo.html` in the workdir, and returns its path.

    If a run also has an earlier checkpoint, the page compares the two.

    Raises:
      ExportError: the network contains an operation that the page does not know.
      WorkdirError: the file cannot be written.
    """
    path = output or workdir / FILE
    checkpoints = [checkpoint_of(predictor, step, config), *earlier_checkpoint(workdir, step)]
    classes = DATASETS[splits.name].class_names
    probs = metrics.probabilities(evaluation.logits)
    data = {
        "classes": list(classes),
        "checkpoints": checkpoints,
        "examples": choose_examples(splits, probs),
    }
    page = load_template("exporting/page/page.html.jinja").render(
        title=workdir.absolute().name,
        dataset=DATASET_TITLES.get(splits.name, splits.name),
        num_members=len(predictor.members),
        num_weights=sum(leaf.size for leaf in jax.tree.leaves([member["params"] for member in predictor.members])),
        num_right=evaluation.correct,
        num_examples=evaluation.examples,
        temperature=predictor.temperature,
        views=predictor.views,
        classes=classes,
        checkpoints=checkpoints,
        css=_source("page.css"),
        script="\n".join(_source(f"{name}.js") for name in SCRIPTS),
        data=json.dumps(data).replace("<", "\\u003c"),  # so that no text in the data can close the script element
    )
    workdirs.write_text(path, page, remedy=remedy)
    return path


def _source(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def choose_examples(splits: Splits, probs: np.ndarray) -> list[dict[str, Any]]:
    """Picks test images to step through: a correct one of each class, the worst mistakes, and corrupted ones.

    Args:
      splits: the data.
      probs: `f32[N,C]`, the network's probabilities for the test images.
    """
    images, labels = splits.test.image[..., 0], splits.test.label
    right = np.flatnonzero(probs.argmax(axis=-1) == labels)
    rows = right[np.unique(labels[right], return_index=True)[1]].tolist()  # the first one of each class
    chosen = [("right", row, "", images[row]) for row in rows[:EXAMPLES]]
    mistakes = [example["row"] for example in facts.galleries(probs, labels, splits.name)["mistakes"][:EXAMPLES]]
    chosen += [("mistake", row, "", images[row]) for row in mistakes]
    chosen += [
        ("corrupted", row, f", {name.replace('_', ' ')}", corrupt(name, images[[row]], np.array([row]))[0])
        for name, row in zip(CORRUPTED, itertools.cycle(rows[1:] or rows), strict=False)
    ]
    return [
        {"kind": kind, "title": f"Test image {row}{how}", "label": int(labels[row]), "image": _base64(image.tobytes())}
        for kind, row, how, image in chosen
    ]
