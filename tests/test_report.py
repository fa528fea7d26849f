"""The report of a run: complete, self-contained, with the same numbers in the page and in metrics.json."""

import itertools
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import forked
import numpy as np
import pytest
import tiny_run
from PIL import Image
from report_page import Page, gallery_items
from small_run import steps

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import evaluate, load_predictor
from mnist_flax.analysis.report import facts, page, plots, write
from mnist_flax.analysis.report.write import report_workdir
from mnist_flax.config import Config
from mnist_flax.data.load import load_splits
from mnist_flax.errors import ConfigError, WorkdirError
from mnist_flax.exporting.demo import write_demo
from mnist_flax.templates import percent

FILES = {
    *(f"{name}.svg" for name in ("loss", "accuracy", "confusion_counts", "confusion_rates", "classes", "reliability")),
    *(f"{name}.png" for name in ("filters", "mistakes", "correct", "least_certain")),
    *("config.py", "metrics.json", "index.html"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The report of the tiny run."""
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path_factory.mktemp("report") / "run")
    shutil.rmtree(workdir / "report", ignore_errors=True)
    return report_workdir(workdir).parent


@pytest.fixture(scope="module")
def numbers(report: pathlib.Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((report / "metrics.json").read_text())
    return loaded


def test_report_has_every_file(report: pathlib.Path) -> None:
    assert {path.name for path in report.iterdir()} == FILES


def test_page_needs_no_other_file(report: pathlib.Path) -> None:
    text = (report / "index.html").read_text()
    parsed = Page(text)
    assert "http:" not in text and "https:" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert all(source.startswith("data:image/png;base64,") for source in parsed.values("src"))
    ids = parsed.values("id")
    assert len(set(ids)) == len(ids)
    links = parsed.values("href") + parsed.values("xlink:href")
    links += ["#" + target for target in re.findall(r"url\(#([^)]*)\)", text)]
    assert links and set(links) <= {f"#{name}" for name in ids}
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert "@import" not in text


def test_page_is_accessible(report: pathlib.Path) -> None:
    text = (report / "index.html").read_text()
    parsed = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    attributes = dict(parsed.tags[0][1])
    assert parsed.tags[0][0] == "html" and attributes["lang"] == "en"
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert all(attrs.get("alt") for tag, attrs in parsed.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in parsed.tags if tag == "svg")
    headings = [tag for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1
    assert all(int(after[1]) - int(before[1]) <= 1 for before, after in itertools.pairwise(headings))


def test_page_links_every_section(report: pathlib.Path) -> None:
    parsed = Page((report / "index.html").read_text())
    sections = [attrs["id"] for tag, attrs in parsed.tags if tag == "section"]
    assert len(sections) == 13 and {"curves", "filters"} < set(sections)
    assert not {"doubtful", "trained-on"} & set(sections)  # no label is doubtful, and no image is augmented
    assert [href[1:] for href in parsed.values("href")] == sections[1:]


def test_page_shows_the_contents_of_metrics_json(report: pathlib.Path, numbers: dict[str, Any]) -> None:
    text = "".join(Page((report / "index.html").read_text()).text)
    test = numbers["test"]
    assert percent(test["accuracy"]) in text
    low, high = test["accuracy_interval"]
    assert f"{100 * low:.2f} – {100 * high:.2f}" in text  # noqa: RUF001
    assert f"{test['loss']:.4f}" in text and f"{test['brier']:.4f}" in text and percent(test["ece"]) in text
    assert numbers["dataset_fingerprint"] in text and numbers["command"] in text
    assert all(version in text for version in numbers["run"]["versions"].values())
    assert all(f"image {item['row']}" in text for item in gallery_items(numbers))
    assert all(f"{100 * row['f1']:.2f}" in text for row in test["per_class"])


def test_page_takes_every_number_from_metrics_json(
    report: pathlib.Path, numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: dict[str, Any] = {}
    render = page.render_page

    def listen(given: Any, given_pictures: Any) -> str:
        pictures.update(given_pictures)
        return render(given, given_pictures)

    monkeypatch.setattr(page, "render_page", listen)
    path = report_workdir(report.parent)
    assert render(numbers, pictures) == path.read_text()
    assert {type(value) for name, value in pictures.items() if name != "title"} <= {dict, list, str}


def test_numbers_match_the_summary_and_the_log(report: pathlib.Path, numbers: dict[str, Any]) -> None:
    summary = json.loads((report.parent / "summary.json").read_text())
    assert numbers["test"]["accuracy"] == summary["test_accuracy"]
    assert numbers["test"]["loss"] == summary["test_loss"]
    run = numbers["run"]
    assert run["finished"] and run["versions_of"] == "training" and numbers["test"]["evaluated_by"] == "report"
    assert run["parameters"] == summary["parameters"] and run["step"] == summary["steps"]
    assert run["versions"] == summary["versions"]
    assert np.sum(numbers["confusion"]) == 360 and np.trace(numbers["confusion"]) == numbers["test"]["correct"]
    assert sum(row["examples"] for row in numbers["calibration"]["bins"]) == 360
    assert sum(layer["parameters"] for layer in numbers["network"]) == summary["parameters"]
    records = [json.loads(line) for line in (report.parent / "metrics.jsonl").read_text().splitlines()]
    curves = numbers["curves"]
    assert [r["loss"] for r in curves["train"]] == [r["loss"] for r in records if r["split"] == "train"]
    assert len(curves["holdout"]) == 3 and len(curves["test"]) == 1


def test_config_file_reproduces_the_config(report: pathlib.Path, numbers: dict[str, Any]) -> None:
    names: dict[str, Any] = {}
    exec((report / "config.py").read_text(), names)
    again = Config.from_dict(names["get_config"]().to_dict())
    assert again.to_dict() == tiny_run.CONFIG.to_dict()
    assert numbers["config_file"] == (report / "config.py").read_text()
    assert f"--config={report}/config.py --workdir={report.parent}-again" in numbers["command"]


def test_unfinished_run_can_be_reported(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")
    (workdir / "summary.json").unlink()
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    path = report_workdir(workdir, str(steps[0]))
    numbers = json.loads(path.with_name("metrics.json").read_text())
    assert not numbers["run"]["finished"] and numbers["run"]["versions_of"] == "report"
    assert numbers["run"]["step"] == steps[0]
    assert not numbers["curves"]["test"]
    assert max(record["step"] for record in numbers["curves"]["train"]) <= steps[0]
    assert "not the results of a finished run" in path.read_text()
    (workdir / "metrics.jsonl").unlink()  # now the records come from the checkpoint
    given: list[facts.Reported] = []
    monkeypatch.setattr(write, "write_report", lambda run, workdir, folder: given.append(run))
    report_workdir(workdir, str(steps[0]))
    assert facts.log_curves(given[0].records) == numbers["curves"]


def test_page_says_that_embedded_digits_are_not_mnist(report: pathlib.Path) -> None:
    assert "scikit-learn, not MNIST" in (report / "index.html").read_text()


def test_plots_take_their_colors_from_the_page(report: pathlib.Path) -> None:
    text = (report / "index.html").read_text()
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 6
    for svg in svgs:
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode does not know"
        assert "$" not in svg, "mathematics, which is not typeset"
        places = re.findall(r'<text [^>]* x="([^"]+)"', svg)
        assert places and all(float(x) > 0 for x in places), "a label outside the figure"
        assert set(re.findall(r"var\(--([a-z-]+)\)", svg)) <= set(plots.ROLES.values())
    for role in plots.ROLES.values():
        assert len(re.findall(rf"--{role}: #", text)) == 2  # in light and in dark
    assert "prefers-color-scheme: dark" in text


def test_plots_beside_the_page_are_valid_files(report: pathlib.Path) -> None:
    import xml.etree.ElementTree as ElementTree

    for path in report.glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.tag.endswith("svg") and "var(" not in path.read_text()
    for path in report.glob("*.png"):
        with Image.open(path) as image:
            image.load()


@pytest.mark.parametrize("write_page", [report_workdir, write_demo])
def test_page_about_another_dataset_is_refused(write_page: Callable[..., pathlib.Path]) -> None:
    with pytest.raises(ConfigError, match=r"config.data.name = 'mnist': .* trained on digits; .*mnist_flax.evaluate"):
        write_page(tiny_run.workdir(), overrides={"data.name": "mnist"})


def test_unwritable_folder_is_named_in_the_error(tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")
    shutil.rmtree(workdir / "report", ignore_errors=True)
    (workdir / "report").write_text("a file where the folder should be")
    with pytest.raises(WorkdirError, match=r"report: cannot be written \(File exists\); .*--output"):
        report_workdir(workdir)


def test_command_writes_into_the_run_or_the_output_folder(tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return forked.run("-m", "mnist_flax.report", *arguments)

    done = command(f"--workdir={workdir}", "--checkpoint=best")
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip()) == workdir / "report-best" / "index.html"
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    done = command(f"--workdir={workdir}", f"--output={tmp_path / 'there'}")
    assert pathlib.Path(done.stdout.strip()) == tmp_path / "there" / "index.html"
    assert {path.name for path in (tmp_path / "there").iterdir()} == FILES
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    (workdir / "demo.html").touch()
    for which, is_shown in (("latest", True), (str(steps(workdir)[0]), False)):  # the page shows the last network
        done = command(f"--workdir={workdir}", f"--checkpoint={which}")
        assert ("../demo.html" in pathlib.Path(done.stdout.strip()).read_text()) == is_shown
    for arguments, message in (
        (["--workdir=nowhere"], "nowhere: no such folder"),
        ([f"--workdir={workdir}", "--checkpoint=7"], "has no checkpoint '7'"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_report_covers_the_whole_test_set(numbers: dict[str, Any]) -> None:
    test = load_splits(tiny_run.CONFIG.data).test
    predictor, _ = load_predictor(tiny_run.workdir())
    evaluation = evaluate(predictor, test)
    expected = metrics.confusion_matrix(test.label, evaluation.logits.argmax(axis=-1), 10)
    np.testing.assert_array_equal(numbers["confusion"], expected)
    for item in gallery_items(numbers):  # rows count in the order of the test file
        assert item["label"] == test.label[item["row"]]
        assert item["prediction"] == evaluation.logits[item["row"]].argmax()
