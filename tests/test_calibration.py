"""Temperature and doubt: fitted on hold-out rows, stored with a run, and used when it is loaded."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_run
from scipy.optimize import minimize

from mnist_flax.analysis import calibration
from mnist_flax.analysis.calibration import calibrate, calibration_scores, fit_temperature
from mnist_flax.analysis.evaluation import (
    answer,
    default_fit,
    evaluate,
    load_predictor,
    make_predictor,
    predict_logits,
    stored_fit,
)
from mnist_flax.analysis.run_data import load_data, select_examples
from mnist_flax.analysis.scores import evaluate_workdir, evaluation_table
from mnist_flax.config import Config, replace
from mnist_flax.data.splits import Examples
from mnist_flax.metrics import log_probabilities, negative_log_likelihood


def draws(temperature: float, num_examples: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Random logits, and labels drawn from their softmax at a temperature."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (num_examples, 5)).astype(np.float32)
    labels = np.argmax(logits / temperature + generator.gumbel(size=logits.shape), axis=-1)
    return logits, labels.astype(np.int32)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_temperature_recovers_the_one_that_labels_were_drawn_with(temperature: float) -> None:
    logits, labels = draws(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.04)
    after = calibration_scores(logits / fit_temperature(logits, labels), labels)
    before = calibration_scores(logits, labels)
    assert after["loss"] <= before["loss"] and after["ece"] < 0.01


def test_temperature_equals_the_minimum_that_another_optimiser_finds() -> None:
    logits, labels = draws(1.7, 300)
    found = minimize(lambda t: np.mean(negative_log_likelihood(logits / t[0], labels)), [1.0], method="Nelder-Mead")
    assert fit_temperature(logits, labels) == pytest.approx(found.x[0], rel=1e-3)


def test_temperature_without_mistakes_is_one() -> None:
    logits = np.eye(4, dtype=np.float32)
    assert fit_temperature(logits, np.arange(4)) == 1.0
    assert fit_temperature(logits[:0], np.arange(0)) == 1.0


def test_temperature_of_useless_logits_is_bounded() -> None:
    logits, labels = draws(1.0, 200)
    assert fit_temperature(logits, (labels + 1) % 5) == pytest.approx(calibration.LIMIT, rel=1e-3)


def test_calibrated_predictor_predicts_the_same_classes() -> None:
    predictor, info = load_predictor(tiny_run.workdir())
    config, splits = load_data(info.config, info.fingerprint, {})
    holdout = select_examples(config, splits, "holdout")
    fitted = calibrate(dataclasses.replace(predictor, temperature=7.0), holdout)
    raw = dataclasses.replace(predictor, temperature=1.0)
    assert fitted.temperature == pytest.approx(fit_temperature(predict_logits(raw, holdout.image), holdout.label))
    assert fitted.temperature != 1.0
    before, after = evaluate(raw, splits.test), evaluate(fitted, splits.test)
    assert before.accuracy == after.accuracy
    np.testing.assert_allclose(after.logits * fitted.temperature, before.logits, rtol=1e-5)
    assert calibrate(fitted, Examples(holdout.image[:0], holdout.label[:0])).temperature == 1.0


def test_temperature_is_stored_with_a_run_and_used_for_its_last_step(tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")
    summary = json.loads((workdir / "summary.json").read_text())
    summary["temperature"] = 2.5
    (workdir / "summary.json").write_text(json.dumps(summary))
    assert load_predictor(workdir)[0].temperature == 2.5
    first = min(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    assert load_predictor(workdir, str(first))[0].temperature == 1.0  # other weights
    result = evaluate_workdir(workdir)
    assert result["temperature"] == 2.5
    assert "before scaling with the temperature 2.500" in evaluation_table(result)
    (workdir / "summary.json").unlink()
    assert result["uncalibrated"]["loss"] == pytest.approx(evaluate_workdir(workdir)["loss"], rel=1e-5)


@pytest.mark.parametrize("value", ["2.5", 0, -1, float("nan"), float("inf"), None, True, [1.5]])
def test_temperature_that_makes_no_sense_is_ignored(tmp_path: pathlib.Path, value: object) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")
    summary = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").write_text(json.dumps(summary | {"temperature": value}))
    assert load_predictor(workdir)[0].temperature == 1.0


def test_one_percent_of_the_hold_out_rows_are_doubted() -> None:
    logits, _ = draws(1.0, 1000)
    logits *= 20  # the network is sure
    below = calibration.fit_doubt(logits)
    assert np.sum(np.exp(log_probabilities(logits)).max(axis=-1) < below) == 10
    assert calibration.fit_doubt(logits[:99]) is None
    assert calibration.fit_doubt(logits / 1000) == 0.5  # a network that knows nothing


def test_doubt_without_hold_out_rows_allows_for_label_smoothing() -> None:
    config = Config()
    assert make_predictor(config).doubtful_below == 0.95
    assert make_predictor(replace(config, train__label_smoothing=0.1)).doubtful_below == 0.5
    assert make_predictor(config, doubtful_below=0.7).doubtful_below == 0.7


def test_doubt_is_stored_with_the_run_and_loaded(tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")
    summary = json.loads((workdir / "summary.json").read_text())
    predictor, info = load_predictor(workdir)
    config, splits = load_data(info.config, info.fingerprint, {})
    fitted = calibrate(predictor, select_examples(config, splits, "holdout"))
    assert predictor.doubtful_below == summary["doubtful_below"] == pytest.approx(fitted.doubtful_below)
    assert predictor.most_ink == summary["most_ink"] == fitted.most_ink < 0.5
    del summary["doubtful_below"], summary["most_ink"]  # as in a run of a version that did not store them
    (workdir / "summary.json").write_text(json.dumps(summary))
    old, _ = load_predictor(workdir)
    assert (old.doubtful_below, old.most_ink) == (default_fit(info.config.program)["doubtful_below"], 1.0)


@pytest.mark.parametrize("value", [None, "1", True, 0, -1.0, float("inf"), float("nan"), 10**400])
def test_a_stored_value_that_makes_no_sense_is_ignored(value: object) -> None:
    assert stored_fit({"temperature": value}) == {}
    assert stored_fit({"temperature": 2}) == {"temperature": 2.0}


def test_more_ink_than_any_digit_is_doubtful_whatever_the_answer() -> None:
    predictor, _ = load_predictor(tiny_run.workdir())
    digits = np.stack([np.full((28, 28, 1), grey, np.uint8) for grey in (0, 80, 255)])
    sure = dataclasses.replace(predictor, doubtful_below=0.01, most_ink=80 / 255)
    assert answer(sure, digits)[1].tolist() == [False, False, True]
    assert not answer(dataclasses.replace(sure, most_ink=1.0), digits)[1].any()
