"""The results of a population: the scores of members, committee and folds, and reading them back."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import small_population
from matplotlib.axes import Axes
from small_population import CONFIG

from mnist_flax.analysis import comparison, evaluation, statistics
from mnist_flax.analysis.evaluation import (
    evaluate,
    load_predictor,
    make_predictor,
    mean_logits,
)
from mnist_flax.analysis.population_file import is_population_result
from mnist_flax.analysis.report import plots
from mnist_flax.analysis.scores import evaluate_workdir
from mnist_flax.config import replace
from mnist_flax.data import batches
from mnist_flax.data.load import load_splits
from mnist_flax.data.splits import Examples
from mnist_flax.errors import ConfigError, WorkdirError
from mnist_flax.run import checkpoint
from mnist_flax.run.log import read_log
from mnist_flax.sections import DataConfig
from mnist_flax.step import eval_variables


@pytest.fixture(scope="module")
def seeds() -> pathlib.Path:
    return small_population.seeds()


@pytest.fixture(scope="module")
def folds() -> pathlib.Path:
    return small_population.folds()


def test_result_agrees_with_the_saved_probabilities_and_logs(seeds: pathlib.Path) -> None:
    result = statistics.load_population_result(seeds)
    assert result
    with np.load(seeds / "population.npz") as file:
        probs, label = file["test_probs"], file["test_label"]
    splits = load_splits(CONFIG.data)
    np.testing.assert_array_equal(label, splits.test.label)
    assert (probs.shape, probs.dtype) == ((3, 360, 10), np.float32)
    np.testing.assert_allclose(probs.sum(axis=-1), 1, rtol=1e-5)
    right = probs.argmax(axis=-1) == label
    assert [member["accuracy"] for member in result["members"]] == right.mean(axis=-1).tolist()
    assert [member["seed"] for member in result["members"]] == [3, 4, 5]
    names = ["seed-3", "seed-4", "seed-5"]
    for name in names:
        test = read_log(seeds / "members" / name)[-1]
        member = next(member for member in result["members"] if member["name"] == name)
        assert (test["split"], test["accuracy"], test["loss"]) == ("test", member["accuracy"], member["loss"])
    assert result["mean"]["accuracy"] == pytest.approx(right.mean())
    summaries = [json.loads((seeds / "members" / name / "summary.json").read_text()) for name in names]
    assert [member["temperature"] for member in result["members"]] == [summary["temperature"] for summary in summaries]
    assert result["temperature"] > 0
    assert result["committee"]["accuracy"] == np.mean(probs.mean(axis=0).argmax(axis=-1) == label)
    assert result["agreement"]["examples_by_members_right"] == np.bincount(right.sum(axis=0), minlength=4).tolist()
    assert {"config", "dataset", "dataset_fingerprint", "device", "versions", "train_seconds"} <= result.keys()
    holdout = result["curves"]["holdout"]
    assert [point["epoch"] for point in holdout] == [1, 2]
    assert [point["step"] for point in result["curves"]["train"]] == [3, 6, 8, 9, 12, 15, 16]
    assert all(point["loss"]["min"] < point["loss"]["mean"] < point["loss"]["max"] for point in holdout)
    for name in ("curves_loss.svg", "curves_accuracy.svg"):
        assert (seeds / name).read_text().count("<svg") == 1
    table = statistics.population_table(result)
    assert f"{result['committee']['accuracy']:.2%}" in table
    assert table.count("seed-") == 3


def test_out_of_fold_evaluates_every_row_with_the_member_not_trained_on_it(folds: pathlib.Path) -> None:
    result = statistics.load_population_result(folds)
    assert result
    out_of_fold = result["out_of_fold"]
    with np.load(folds / "population.npz") as file:
        rows, fold, probs, label = (file[name] for name in ("rows", "fold", "out_of_fold_probs", "out_of_fold_label"))
    splits = load_splits(CONFIG.data)
    used, _ = batches.rows_of(splits.train.label, DataConfig(num_train=220))
    np.testing.assert_array_equal(rows, used)
    np.testing.assert_array_equal(label, splits.train.label[used])
    for k in range(3):
        config, state, _ = checkpoint.load_run(folds / "members" / f"fold-{k}")
        trained_on, held_out = batches.rows_of(splits.train.label, config.data)
        np.testing.assert_array_equal(rows[fold == k], held_out)
        assert not set(rows[fold == k]) & set(trained_on)
        image, of_held_out = splits.train.image[held_out], splits.train.label[held_out]
        evaluation = evaluate(make_predictor(config, eval_variables(state)), Examples(image, of_held_out))
        np.testing.assert_allclose(probs[fold == k], jax.nn.softmax(evaluation.logits), atol=1e-6)
        assert out_of_fold["folds"][k]["accuracy"] == evaluation.accuracy
        holdout = [line for line in read_log(folds / "members" / f"fold-{k}") if line["split"] == "holdout"]
        assert holdout[-1]["accuracy"] == evaluation.accuracy
        assert (result["members"][k]["seed"], result["members"][k]["fold"]) == (3 + k, k)
    right = probs.argmax(axis=-1) == label
    assert (out_of_fold["correct"], out_of_fold["examples"]) == (right.sum(), 220)
    assert out_of_fold["mean"]["accuracy"] == pytest.approx(np.mean([right[fold == k].mean() for k in range(3)]))
    for example in out_of_fold["labels"]["listed"]:
        (place,) = np.flatnonzero(rows == example["row"])
        assert (example["label"], example["fold"]) == (label[place], fold[place])
        assert example["prediction"] == probs[place].argmax()
        assert example["probability_of_label"] == pytest.approx(probs[place, label[place]])
    table = statistics.population_table(result)
    assert "suspect labels" in table
    assert f"{out_of_fold['folds'][2]['accuracy']:.2%}" in table.splitlines()[3]
    assert table.index("out of fold") < table.index("test set of")  # what a recipe is chosen by comes first
    del out_of_fold["labels"]  # as written by an earlier version
    without = [line for line in table.splitlines() if "suspect labels" not in line]
    assert statistics.population_table(result).splitlines() == without


def test_spread_equals_values_of_a_table_and_scipy() -> None:
    from scipy import stats

    spread = statistics.spread_of([1.0, 2.0, 3.0])
    assert (spread["mean"], spread["sd"]) == (2, 1)
    half = 4.302653 / 3**0.5  # t(0.975, 2) from a table
    assert spread["interval"] == pytest.approx([2 - half, 2 + half])
    values = [0.991, 0.9924, 0.9907, 0.9931]
    assert tuple(statistics.spread_of(values)["interval"]) == pytest.approx(
        stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    )


def test_committee_averages_probabilities() -> None:
    # Two members lean towards class 1, one is sure of class 0: the mean probability is higher for class 0.
    probs = np.array([[[0.45, 0.55]], [[0.45, 0.55]], [[0.9, 0.1]]])
    together = mean_logits(np.log(probs).astype(np.float32))
    np.testing.assert_allclose(np.exp(together), [[0.6, 0.4]], rtol=1e-6)
    assert statistics.score(together[None], np.array([0])) == {
        "accuracy": 1.0,
        "loss": pytest.approx(-np.log(0.6)),
        "correct": 1,
        "examples": 1,
    }
    assert np.isfinite(mean_logits(np.array([[[0.0, -2000.0]], [[0.0, -2000.0]]]))).all()


def test_agreement_counts_members_that_are_right() -> None:
    predictions = np.array([[0, 1, 2, 2], [0, 1, 0, 2], [0, 2, 0, 2]])
    log_probs = np.log(np.eye(3)[predictions] * 0.9 + 0.1 / 3)
    agreement = statistics.agreement(log_probs, np.array([0, 1, 2, 1]))
    assert agreement["examples_by_members_right"] == [1, 1, 1, 1]
    assert agreement["none_right"] == [{"row": 3, "label": 1, "committee": 2}]


def test_curves_hold_the_points_that_all_members_have() -> None:
    def line(split: str, step: int, loss: float) -> dict[str, Any]:
        return {"split": split, "step": step, "epoch": step / 10, "loss": loss, "accuracy": 0.5}

    logs = [[line("train", 10, 1.0), line("test", 10, 4.0)], [line("train", 5, 9.0), line("train", 10, 3.0)]]
    curves = statistics.member_curves(logs)
    assert (curves["holdout"], curves["test"]) == ([], [])
    (point,) = curves["train"]
    assert (point["step"], point["epoch"]) == (10, 1)
    assert point["loss"] == {"mean": 2.0, "sd": pytest.approx(2**0.5), "min": 1.0, "max": 3.0}


def test_curves_show_the_range_of_the_error_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    errorbar = Axes.errorbar

    def record(axes: Axes, x: Any, y: Any, **more: Any) -> Any:
        drawn.append((y, more["yerr"]))
        return errorbar(axes, x, y, **more)

    monkeypatch.setattr(Axes, "errorbar", record)
    accuracy = {"mean": 0.99, "sd": 0.01, "min": 0.97, "max": 0.995}
    point = {"step": 10, "epoch": 1, "loss": accuracy, "accuracy": accuracy}
    plots.population_curves({"train": [point], "holdout": [], "test": [point]})
    (_, of_loss), (error, of_error) = drawn
    np.testing.assert_allclose(of_loss, [[0.02], [0.005]])
    np.testing.assert_allclose(error, [0.01])
    np.testing.assert_allclose(of_error, [[0.005], [0.02]])  # the largest accuracy is the smallest error rate


def test_population_is_evaluated_as_one_network(seeds: pathlib.Path) -> None:
    saved = statistics.load_population_result(seeds)
    assert saved
    predictor, info = load_predictor(seeds)
    assert (len(predictor.members), info.kind, predictor.temperature) == (3, "seeds", saved["temperature"])
    result = evaluate_workdir(seeds)
    for name in ("accuracy", "loss", "correct", "examples"):
        assert result[name] == saved["committee"][name], name
    assert result["members"] == 3
    holdout = evaluate_workdir(seeds, split="holdout")
    assert holdout["examples"] == 20
    assert holdout["loss"] <= holdout.get("uncalibrated", holdout)["loss"]  # the temperature was fitted on these rows


def test_folds_are_evaluated_on_the_test_set_only(folds: pathlib.Path) -> None:
    saved = statistics.load_population_result(folds)
    assert saved
    assert evaluate_workdir(folds)["loss"] == saved["committee"]["loss"]
    for split in ("train", "holdout"):
        with pytest.raises(ConfigError, match=f"--split={split}: other folds were trained on these rows"):
            evaluate_workdir(folds, split=split)


def test_members_of_different_populations_are_refused(
    seeds: pathlib.Path, folds: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = shutil.copytree(seeds, tmp_path / "copy")
    shutil.rmtree(workdir / "members" / "seed-4")
    shutil.copytree(folds / "members" / "fold-1", workdir / "members" / "seed-4")
    with pytest.raises(WorkdirError, match=r"seed-4: its config or data differ from those of .*seed-3"):
        load_predictor(workdir)


def test_member_that_was_trained_further_is_refused(seeds: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_run = checkpoint.load_run

    def load_longer(folder: pathlib.Path, which: str) -> checkpoint.Run:
        run = load_run(folder, which)
        epochs = run.config.train.epochs + (folder.name == "seed-4")
        return run._replace(config=replace(run.config, train__epochs=epochs))

    monkeypatch.setattr(evaluation, "load_run", load_longer)
    with pytest.raises(WorkdirError, match=r"seed-4: its config or data differ"):
        load_predictor(seeds)


@pytest.mark.parametrize("name", ["../seed-3", "..", "", 3, None])
def test_member_name_that_leads_elsewhere_is_refused(seeds: pathlib.Path, tmp_path: pathlib.Path, name: Any) -> None:
    (tmp_path / "members").mkdir()
    saved = statistics.load_population_result(seeds)
    assert saved
    saved["members"][1]["name"] = name
    (tmp_path / "population.json").write_text(json.dumps(saved))
    with pytest.raises(WorkdirError, match=r"holds a population without a complete population.json"):
        load_predictor(tmp_path)


def test_unfinished_population_is_refused(seeds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(seeds, tmp_path / "copy")
    (workdir / "population.json").unlink()
    (workdir / "members" / ".DS_Store").touch()
    with pytest.raises(WorkdirError, match=r"repeat the training command.*such as .*members/seed-3$"):
        load_predictor(workdir)


def test_load_result_reads_runs_and_populations_alike(seeds: pathlib.Path, folds: pathlib.Path) -> None:
    population, run = comparison.load_result(seeds), comparison.load_result(seeds / "members" / "seed-4")
    assert run.accuracies == population.accuracies[1:2]
    assert (population.pairing, run.pairing, run.kind) == ((3, 4, 5), (4,), "run")
    compared = comparison.compare_results(run, population)
    assert compared["examples"] == 360
    assert json.loads(json.dumps(compared)) == compared
    with pytest.raises(ConfigError, match=r"config.data.name = 'kmnist': this network was trained on digits"):
        comparison.load_result(seeds, {"data.name": "kmnist"})
    held_out = comparison.load_result(seeds, split="holdout")
    runs = [checkpoint.load_run(seeds / "members" / f"seed-{seed}") for seed in (3, 4, 5)]
    assert held_out.accuracies == tuple(run.record["holdout"]["accuracy"] for run in runs)
    assert (len(held_out.labels), held_out.pairing, held_out.kind) == (20, (3, 4, 5), "seeds")
    assert "digits, 20 hold-out examples" in comparison.comparison_table(
        comparison.compare_results(held_out, comparison.load_result(seeds / "members" / "seed-4", split="holdout"))
    )
    result = statistics.load_population_result(folds)
    assert result
    assert comparison.load_result(folds, split="holdout").split == "holdout"
    of_folds = comparison.load_result(folds)
    assert of_folds.accuracies == tuple(fold["accuracy"] for fold in result["out_of_fold"]["folds"])
    assert np.mean(of_folds.predictions == of_folds.labels) == pytest.approx(result["out_of_fold"]["accuracy"])
    with pytest.raises(WorkdirError, match="holds no checkpoints/ of a run"):
        comparison.load_result(seeds / "members")
    with pytest.raises(ConfigError, match=r"config.train.epochs = '9': cannot be changed after training"):
        comparison.load_result(seeds / "members" / "seed-4", {"train.epochs": "9"})


FOLD = {"name": "fold-0", "seed": 3, "fold": 0, "accuracy": 0.9, "loss": 0.1}


@pytest.mark.parametrize(
    "damage",
    [
        {"members": []},
        {"members": [{"name": "seed-3"}]},
        {"members": [{"name": "../seed-3", "seed": 3, "accuracy": 0.9}]},
        {"members": [{"name": "seed-3", "seed": "3", "accuracy": 0.9}]},
        {"kind": "other"},
        {"kind": "folds"},
        {"committee": {}},
        {"mean": {"accuracy": 0.9}},
        {"interval": {"accuracy": None}},
        {"agreement": {"examples_by_members_right": [1], "none_right": []}},
        *({name: ...} for name in ("config", "mean", "sd", "interval", "committee", "agreement")),
        {"kind": "folds", "members": [FOLD]},  # no out_of_fold
        {"kind": "folds", "members": [FOLD], "out_of_fold": {}},
        {"kind": "folds", "members": [FOLD], "out_of_fold": {"folds": [{"loss": 0.1}]}},
    ],
)
def test_an_incomplete_result_is_as_good_as_none(
    damage: dict[str, Any], seeds: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert statistics.load_population_result(seeds)
    damaged = json.loads((seeds / "population.json").read_text()) | damage
    damaged = {name: value for name, value in damaged.items() if value is not ...}
    (tmp_path / "population.json").write_text(json.dumps(damaged))
    assert statistics.load_population_result(tmp_path) is None


def test_a_complete_result_of_folds_is_recognised(folds: pathlib.Path) -> None:
    result = json.loads((folds / "population.json").read_text())
    assert is_population_result(result)
    assert not is_population_result(result | {"members": [FOLD | {"fold": None}] * 3})


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_damaged_arrays_are_named(size: int, seeds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copy(seeds / "population.json", tmp_path)
    (tmp_path / "population.npz").write_bytes((seeds / "population.npz").read_bytes()[:size])
    with pytest.raises(WorkdirError, match=r"population.npz: cannot be read .*remove population.json"):
        comparison.load_result(tmp_path)


def test_arrays_of_seeds_have_no_folds(seeds: pathlib.Path) -> None:
    with pytest.raises(WorkdirError, match=r"population.npz: cannot be read .*rows"):
        statistics.load_arrays(seeds, "folds", 3)


def test_arrays_of_another_number_of_members_are_refused(seeds: pathlib.Path) -> None:
    with pytest.raises(WorkdirError, match=r"population.npz: cannot be read \(3 members instead of 2\); remove"):
        statistics.load_arrays(seeds, "seeds", 2)


def test_printed_interval_of_two_members_stays_between_0_and_100_percent() -> None:
    spreads = statistics.spreads([{"accuracy": 0.9, "loss": 0.1}, {"accuracy": 0.5, "loss": 0.2}])
    assert spreads["interval"]["accuracy"][1] > 1
    assert "95 % interval of the mean 0.00% to 100.00%" in statistics._spread_line(spreads, 2)
