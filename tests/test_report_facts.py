"""The report's galleries, curves and calibration: made-up predictions, and values computed by hand."""

import dataclasses
import json
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import tiny_run
from report_page import Page, gallery_items, made_up

from mnist_flax import metrics
from mnist_flax.analysis.report import facts, pictures, plots
from mnist_flax.analysis.report.write import report_workdir
from mnist_flax.config import Config
from mnist_flax.data.registry import DATASETS


def test_report_written_by_training_claims_no_new_evaluation(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "run", "digits", examples=100)
    assert numbers["test"]["evaluated_by"] == "training" and 'class="notice"' in text
    assert "evaluated the test set" not in text
    assert "not MNIST" in text  # a notice on every report about the embedded digits


def test_doubtful_labels_are_marked_on_mnist_only(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "mnist", "mnist")
    assert [item["row"] for item in numbers["galleries"]["doubtful"]] == list(DATASETS["mnist"].doubtful_test_rows)
    for item in gallery_items(numbers):
        assert item["doubtful"] == (item["row"] in DATASETS["mnist"].doubtful_test_rows)
    marked = sum(item["doubtful"] for item in gallery_items(numbers))
    assert text.count("label doubtful") == text.count('<li class="doubtful">') == marked >= 15
    assert "Northcutt" in text
    other, text = made_up(tmp_path / "fashion", "fashion_mnist", examples=200)
    assert not any(item["doubtful"] for item in gallery_items(other)) and "Northcutt" not in text
    assert "Ankle boot" in text


def test_page_fits_many_classes(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "run", "emnist/byclass")
    parsed = Page(text)
    assert numbers["class_names"][10] == "A" and len(numbers["test"]["per_class"]) == 62
    assert len(text) < 1_000_000
    assert parsed.values("class").count("scroll wide") == 1  # too wide for a phone, so it scrolls in its own box


def test_summary_from_elsewhere_and_names_with_dollar_signs_are_shown(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")
    (workdir / "summary.json").write_text(json.dumps({"steps": 1}))
    names = ("$", "$\\q$", *"23456789")
    monkeypatch.setitem(DATASETS, "digits", dataclasses.replace(DATASETS["digits"], class_names=names))
    page = report_workdir(workdir).read_text()
    assert "$\\q$" in page
    assert json.loads((workdir / "report" / "metrics.json").read_text())["run"]["versions_of"] == "report"


def test_report_without_mistakes() -> None:
    label = np.arange(40, dtype=np.int32) % 10
    probs = np.full((40, 10), 0.001)
    probs[np.arange(40), label] = 0.991
    found = facts.galleries(probs, label, "digits")
    assert found["num_mistakes"] == 0 and not found["mistakes"] and len(found["correct"]) == 24
    assert facts.confused_pairs(np.diag([4] * 10), label, probs) == []
    text = plots.confusion(np.diag([4] * 10).tolist(), DATASETS["digits"].class_names)["confusion_counts"]
    assert text.count(">4</text>") >= 10


def test_galleries_are_sorted_and_pairs_counted() -> None:
    # Rows 0 to 4: confidently right, barely right, confidently wrong, barely wrong, another confused pair.
    label = np.array([0, 0, 0, 0, 1])
    probs = np.array([[0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.05, 0.95, 0.0], [0.4, 0.6, 0.0], [0.2, 0.1, 0.7]])
    found = facts.galleries(probs, label, "digits")
    assert [item["row"] for item in found["mistakes"]] == [2, 4, 3]
    assert [item["row"] for item in found["least_certain"]] == [1, 0]
    assert found["mistakes"][0] | {"top": []} == {
        "row": 2, "label": 0, "prediction": 1, "probability_of_label": 0.05, "top": [], "doubtful": False,
    }  # fmt: skip
    assert found["mistakes"][0]["top"] == [[1, 0.95], [0, 0.05], [2, 0.0]]
    pairs = facts.confused_pairs(metrics.confusion_matrix(label, probs.argmax(axis=-1), 3), label, probs)
    assert pairs[0] == {"label": 0, "prediction": 1, "count": 2, "share_of_label": 0.5, "rows": [2, 3]}
    assert [(pair["label"], pair["prediction"]) for pair in pairs] == [(0, 1), (1, 2)]


@pytest.mark.parametrize(("step", "finished"), [(3, False), (6, True)])
def test_run_is_finished_only_at_its_last_checkpoint(step: int, finished: bool) -> None:
    summary = {"steps": 6, "device": "a", "versions": {"python": "3"}, "git_commit": ""}
    nothing: Any = None
    run = facts.run_facts(facts.Reported(Config(), nothing, nothing, nothing, [], step, summary), [])
    assert run["finished"] is finished and run["versions_of"] == "training"


def test_smoothed_values_match_those_computed_by_hand() -> None:
    assert facts.smoothed([1.0, 2.0, 6.0, 4.0], 1) == [1.5, 3.0, 4.0, 5.0]
    assert facts.smoothed([1.0, 2.0], 0) == [1.0, 2.0]


def test_thinned_curves_keep_the_last_point() -> None:
    records = [{"step": i, "split": "train", "loss": float(i), "accuracy": 0.5, "examples": 9} for i in range(1, 4001)]
    curves = facts.log_curves(records)
    assert len(curves["train"]) == 1000 and curves["train"][-1]["step"] == 4000
    assert curves["smoothed_over"] == 401


def test_plots_are_deterministic_and_leave_matplotlib_unchanged() -> None:
    import matplotlib

    before = matplotlib.rcParams.copy()  # reading rcParams["backend"] would choose one
    first, second = (plots.confusion([[3, 1], [0, 4]], "01") for _ in range(2))
    assert first == second  # byte for byte
    assert dict.__eq__(matplotlib.rcParams, before)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(("low", "high"), [(0.0263, 0.047), (2e-4, 3e-4), (0.9, 2.4), (0.001, 3.0)])
def test_curves_have_labelled_ticks_however_narrow_their_range(low: float, high: float) -> None:
    with plots.new_figure(3, 3) as figure:
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        plots.log_axis(axes, "loss")
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert 2 <= len(labels) <= 8
        np.testing.assert_allclose([float(label) for label in labels], axes.get_yticks(), rtol=1e-5)
        assert low <= axes.get_yticks().min() and axes.get_yticks().max() <= high


def test_calibration_is_shown_with_and_without_temperature(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "run", "kmnist", examples=2000, temperature=1.8)
    assert numbers["test"]["temperature"] == 1.8
    assert numbers["test"]["uncalibrated"]["loss"] != numbers["test"]["loss"]
    assert numbers["calibration"]["uncalibrated_bins"] != numbers["calibration"]["bins"]
    assert "without temperature" in text and "temperature of 1.800" in text


def test_colors_and_sheets_match_those_computed_by_hand() -> None:
    painted = pictures.colors(np.array([1.0, -2.0, 0.0]), 2.0)
    assert painted.tolist() == [[*pictures.POSITIVE, 128], [*pictures.NEGATIVE, 255], [*pictures.POSITIVE, 0]]
    tiles = pictures.sheet(np.arange(1, 4)[:, None, None] * np.ones((1, 2, 2), int), 2)
    assert tiles.tolist() == [[1, 1, 0, 2, 2], [1, 1, 0, 2, 2], [0] * 5, [3, 3, 0, 0, 0], [3, 3, 0, 0, 0]]
