"""Writes the report of a run: the page, and the files next to it."""

import json
import logging
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from mnist_flax.analysis.evaluation import evaluate, load_predictor
from mnist_flax.analysis.population_file import example_member
from mnist_flax.analysis.report import facts as facts_lib
from mnist_flax.analysis.report import layers, page, pictures, plots
from mnist_flax.analysis.report.facts import Reported
from mnist_flax.analysis.run_data import DEFAULT_DATA, load_own_data
from mnist_flax.errors import WorkdirError
from mnist_flax.run import console
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import read_log

logger = logging.getLogger(__name__)

REPORT_FOLDER = "report"


def write_report(run: Reported, workdir: pathlib.Path, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the report of a run at a step into a folder, by default `report` in the workdir; returns the page's path.

    Raises:
      WorkdirError: the folder cannot be written.
    """
    remedy = workdirs.REMEDY_RESUME if run.evaluated_by == "training" else workdirs.REMEDY_OUTPUT
    folder = folder or workdirs.subfolder(workdir, REPORT_FOLDER, remedy=remedy)
    facts = facts_lib.report_facts(run, layers.layers(run.predictor.program, run.predictor.members[0]))
    # demo.html shows the network of the last step.
    has_page = folder.parent == workdir and (workdir / "demo.html").is_file() and run.step == run.summary.get("steps")
    facts["draw"] = "../demo.html" if has_page else ""
    facts["command"] = repeat_command(folder, workdir, run.fork)
    for name, content in _pieces(run, facts, title=workdirs.shown(workdir)).items():
        workdirs.write_bytes(folder / name, content, remedy=remedy)
    return folder / "index.html"


def repeat_command(folder: pathlib.Path, workdir: pathlib.Path, fork: Mapping[str, Any] | None) -> str:
    """Returns the command that trains the run again, with the config in the report's folder."""
    arguments = [f"--config={workdirs.from_here(folder)}/config.py", f"--workdir={workdirs.from_here(workdir)}-again"]
    if fork:
        arguments.append(f"--fork={workdirs.from_here(pathlib.Path(fork['workdir']))}")
    return f"{console.command('main')} {shlex.join(arguments)}"


def _pieces(run: Reported, facts: dict[str, Any], *, title: str) -> dict[str, bytes]:
    """Returns the files of a report by name."""
    program, variables, images = run.predictor.program, run.predictor.members[0], run.splits.test.image
    galleries = facts["galleries"]
    activations, activation_pictures = pictures.draw_layer_inputs(program, variables, galleries, images)
    rows, augmented_images = pictures.augmented(run.config, run.splits)
    facts = facts | {"augmented": rows.tolist(), "activations": activations}
    files = pictures.sheets(program, variables, galleries, augmented_images, images)
    svgs = plots.draw_all(facts)
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    shown_pictures = {
        "plots": {name: plots.inline_svg(svg, name, plots.TITLES[name]) for name, svg in svgs.items()},
        "thumbnails": pictures.thumbnails(facts, images),
        "sheets": {name: pictures.data_uri(png) for name, png in files.items() if name in pictures.ON_PAGE},
        "activation_pictures": activation_pictures,
        "title": title,
    }
    html = page.render_page(json.loads(text), shown_pictures)  # so that metrics.json has every number on the page
    return {
        **{f"{name}.svg": plots.as_file(svg) for name, svg in svgs.items()},
        **{f"{name}.png": png for name, png in files.items()},
        "config.py": facts["config_file"].encode(),
        "metrics.json": text.encode(),
        "index.html": html.encode(),
    }


def report_workdir(
    workdir: pathlib.Path,
    checkpoint: str = "latest",
    *,
    folder: pathlib.Path | None = None,
    overrides: Mapping[str, Any] = DEFAULT_DATA,
) -> pathlib.Path:
    """Writes the report of a finished or unfinished run at one of its checkpoints; returns the page's path.

    The default folder is `report` in the workdir, or `report-<checkpoint>` if the checkpoint is not the latest.
    See `load_predictor` for the checkpoints and `load_own_data` for the overrides.

    Raises:
      UserError: the run, the checkpoint or the data cannot be loaded, or the folder cannot be written.
    """
    if workdirs.MEMBERS in workdirs.names_in(workdir):
        raise WorkdirError(
            f"--workdir={workdir}: holds a population; name one of its runs, such as"
            f" {example_member(workdir)}, or evaluate it as one network with {console.command('evaluate')}"
        )
    predictor, info = load_predictor(workdir, checkpoint)
    splits = load_own_data(info.config, info.fingerprint, overrides)
    (step,) = info.steps
    records = read_log(workdir, step) or info.runs[0].record["log"]
    evaluation, summary = evaluate(predictor, splits.test), workdirs.read_json(workdir / workdirs.SUMMARY)
    logger.info("%s: test %s, at step %d", splits.name, evaluation.line(), step)
    fork = info.runs[0].record["origin"]["fork"]
    run = Reported(info.config, predictor, splits, evaluation, records, step, summary, fork, evaluated_by="report")
    return write_report(run, workdir, folder or workdirs.results_folder(workdir, REPORT_FOLDER, checkpoint))
