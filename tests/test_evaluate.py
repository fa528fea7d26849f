"""Evaluating a run: rows, checkpoints, data, saved results and rejected input."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
from typing import Any

import forked
import jax
import numpy as np
import pytest
import tiny_run
from scipy.special import softmax
from sklearn.metrics import precision_recall_fscore_support

from mnist_flax import sharding
from mnist_flax.analysis import run_data
from mnist_flax.analysis import scores as scores_lib
from mnist_flax.analysis.evaluation import (
    Evaluation,
    Predictor,
    evaluate,
    load_predictor,
    make_predictor,
    member_logits,
    predict_logits,
)
from mnist_flax.analysis.run_data import load_data
from mnist_flax.analysis.scores import evaluate_workdir, scores_with_intervals
from mnist_flax.config import Config, replace
from mnist_flax.data import batches
from mnist_flax.data.embedded import embedded_digits
from mnist_flax.data.load import load_splits
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.drivers import jit_forward
from mnist_flax.errors import ConfigError, DataError, WorkdirError
from mnist_flax.metrics import negative_log_likelihood
from mnist_flax.run.checkpoint import load_run
from mnist_flax.sections import DataConfig
from mnist_flax.step import eval_variables


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(tiny_run.workdir(), tmp_path / "run")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run("-m", "mnist_flax.evaluate", *map(str, arguments))


@pytest.mark.parametrize("examples", [1, 6, 7, 8, 23])
def test_evaluate_counts_every_example_once(examples: int) -> None:
    """Numbers of examples below, at and above a batch size of 7, compared with evaluating each example alone."""
    test = load_splits(tiny_run.CONFIG.data).test
    run = load_run(tiny_run.workdir())
    several, alone = (
        make_predictor(replace(run.config, eval__batch_size=size), eval_variables(run.state)) for size in (7, 1)
    )
    image, label = test.image[:examples], test.label[:examples]
    logits = np.concatenate([predict_logits(alone, one[None]) for one in image])
    result = evaluate(several, Examples(image, label))
    np.testing.assert_allclose(result.logits, logits, atol=1e-5)  # sums in another order
    assert result.examples == examples
    assert result.accuracy == np.mean(logits.argmax(axis=-1) == label)
    assert result.loss == pytest.approx(np.mean(negative_log_likelihood(logits, label)), abs=1e-5)


def by_hand(predictor: Predictor, images: np.ndarray) -> np.ndarray:
    """The mean softmax over members and shifted views, computed directly with `forward`."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)][: predictor.views]
    probs = [
        np.asarray(jax.nn.softmax(jit_forward(predictor.program, variables, padded[:, i : i + 28, j : j + 28])))
        for variables in predictor.members
        for i, j in shifts
    ]
    return np.mean(probs, axis=0)


@pytest.mark.parametrize("views", [1, 5])
@pytest.mark.parametrize("members", [1, 3])
def test_predictor_averages_probabilities_over_members_and_views(members: int, views: int) -> None:
    images = load_splits(tiny_run.CONFIG.data).test.image[:11]
    run = load_run(tiny_run.workdir())
    variables = eval_variables(run.state)
    several = [jax.tree.map(lambda leaf, scale=scale: leaf * scale, variables) for scale in (1.0, 0.8, 1.3)]
    config = replace(run.config, eval__views=views, eval__batch_size=4)
    predictor = make_predictor(config, *several[:members])
    probs = softmax(predict_logits(predictor, images), axis=-1)
    np.testing.assert_allclose(probs, by_hand(predictor, images), atol=1e-5)
    assert member_logits(predictor, images).shape == (members, 11, 10)
    warm = make_predictor(config, *several[:members], temperature=2.0)
    np.testing.assert_allclose(2 * predict_logits(warm, images), predict_logits(predictor, images), rtol=1e-6)
    assert predict_logits(predictor, images[:0]).shape == (0, 10)


def test_evaluate_refuses_no_examples_and_unknown_labels() -> None:
    test = load_splits(tiny_run.CONFIG.data).test
    predictor, _ = load_predictor(tiny_run.workdir())
    for label in (np.array([10], np.int32), np.array([-1], np.int32), np.array([], np.int32)):
        with pytest.raises(ValueError, match="labels from 0 to 9"):
            evaluate(predictor, Examples(test.image[: len(label)], label))


def test_evaluate_workdir_equals_the_summary_of_training(workdir: pathlib.Path) -> None:
    summary = json.loads((workdir / "summary.json").read_text())
    result = evaluate_workdir(workdir)
    assert (result["accuracy"], result["loss"]) == (summary["test_accuracy"], summary["test_loss"])
    assert result["examples"] == summary["test_examples"] == 360
    assert result["step"] == summary["steps"]
    assert result["dataset_fingerprint"] == summary["dataset_fingerprint"]


def test_scores_equal_scikit_learns(workdir: pathlib.Path) -> None:
    test = load_splits(tiny_run.CONFIG.data).test
    predictor, _ = load_predictor(workdir)
    predictions = predict_logits(predictor, test.image).argmax(axis=-1)
    result = evaluate_workdir(workdir)
    assert result["correct"] == np.sum(predictions == test.label)
    precision, recall, f1, examples = precision_recall_fscore_support(test.label, predictions, zero_division=np.nan)
    for k, row in enumerate(result["per_class"]):
        assert row["examples"] == examples[k]
        np.testing.assert_allclose([row["precision"], row["recall"], row["f1"]], [precision[k], recall[k], f1[k]])
        for field in ("precision", "recall", "f1"):
            low, high = row[f"{field}_interval"]
            assert low <= row[field] <= high
    low, high = result["accuracy_interval"]
    assert low < result["accuracy"] < high


@pytest.mark.parametrize(("split", "part"), [("train", 0), ("holdout", 1)])
def test_evaluated_splits_are_the_rows_of_the_run(workdir: pathlib.Path, split: str, part: int) -> None:
    train = load_splits(tiny_run.CONFIG.data).train
    rows = batches.rows_of(train.label, DataConfig(num_train=700, holdout=100))[part]
    predictor, _ = load_predictor(workdir)
    expected = evaluate(predictor, Examples(train.image[rows], train.label[rows]))
    result = evaluate_workdir(workdir, split=split)
    assert result["examples"] == len(rows) == (600, 100)[part]
    assert (result["accuracy"], result["loss"]) == (expected.accuracy, expected.loss)
    assert result["split"] == split
    if split == "holdout":  # what training logged at its last epoch
        records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        assert [r["accuracy"] for r in records if r["split"] == "holdout"][-1] == result["accuracy"]


def test_checkpoint_can_be_chosen(workdir: pathlib.Path) -> None:
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    assert len(steps) >= 2
    first = evaluate_workdir(workdir, checkpoint=str(steps[0]))
    last = evaluate_workdir(workdir, checkpoint="latest")
    assert (first["step"], last["step"]) == (steps[0], steps[-1])
    assert first["loss"] != last["loss"]
    assert evaluate_workdir(workdir, checkpoint="best")["checkpoint"] == "best"
    with pytest.raises(WorkdirError, match="has no checkpoint '12345'"):
        evaluate_workdir(workdir, checkpoint="12345")


def test_result_is_saved(workdir: pathlib.Path) -> None:
    result = evaluate_workdir(workdir, split="holdout")
    scores_lib.save_evaluation(result, workdir)
    assert json.loads((workdir / "evaluation-holdout-digits.json").read_text()) == result
    named = {"split": "test", "dataset": "emnist/letters", "checkpoint": "latest"}
    assert scores_lib.result_file(named) == "evaluation-test-emnist-letters.json"
    assert scores_lib.result_file({**named, "checkpoint": "58"}) == "evaluation-test-emnist-letters-58.json"


def test_dataset_with_other_classes_is_refused(workdir: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"'emnist/letters': has 37 classes.*trained on the 10 of digits.*fit: mnist"):
        evaluate_workdir(workdir, overrides={"data.name": "emnist/letters"})
    with pytest.raises(ConfigError, match=r"config.data.name = 'kmnits': did you mean 'kmnist'"):
        evaluate_workdir(workdir, overrides={"data.name": "kmnits"})
    assert not list(workdir.glob("evaluation-*"))


def test_overrides_are_limited_to_the_data(workdir: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"config.data.holdout = 3: cannot be changed .*config.data.name"):
        evaluate_workdir(workdir, overrides={"data.holdout": 3})


def test_other_dataset_has_all_rows_and_no_holdout(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = embedded_digits()
    asked: list[DataConfig] = []

    def load(data: DataConfig) -> Splits:
        asked.append(data)
        return Splits(data.name, train, test, "other", "tfds")

    monkeypatch.setattr(run_data, "load_splits", load)
    result = evaluate_workdir(workdir, split="train", overrides={"data.name": "kmnist"})
    assert result["examples"] == len(train.label) and result["trained_on"] == "digits"
    assert [row["name"] for row in result["per_class"]][:3] == ["o", "ki", "su"]
    assert asked[0].on_missing == "error"  # so the embedded digits never replace the dataset
    with pytest.raises(ConfigError, match="--split=holdout: the run held out no rows of kmnist"):
        evaluate_workdir(workdir, split="holdout", overrides={"data.name": "kmnist"})


@pytest.mark.parametrize(
    ("fields", "name"), [({"augment__pens": 0.3}, "kmnist"), ({"train__batch_size": 2048}, "digits")]
)
def test_other_dataset_need_not_fit_the_training(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], name: str
) -> None:
    examples = embedded_digits()
    monkeypatch.setattr(run_data, "load_splits", lambda data: Splits(data.name, *examples, "other", "tfds"))
    data, splits = load_data(replace(Config(), data__holdout=5000, **fields), "0123", {"data.name": name})
    assert (data.name, data.holdout, splits.name) == (name, 0, name)
    with pytest.raises(ConfigError, match=r"config.data.source = 'web'"):
        load_data(Config(), "0123", {"data.name": name, "data.source": "web"})


def test_data_with_another_fingerprint_are_refused() -> None:
    with pytest.raises(DataError, match=r"digits: its fingerprint is .* but the run was trained on 0123"):
        load_data(tiny_run.CONFIG, "0123", {})


def test_data_paths_stored_in_a_run_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[DataConfig] = []
    split = Examples(np.zeros((5, 28, 28, 1), np.uint8), np.zeros(5, np.int32))

    def load(data: DataConfig) -> Splits:
        asked.append(data)
        return Splits("digits", split, split, "f", "tfds")

    monkeypatch.setattr(run_data, "load_splits", load)
    stranger = replace(tiny_run.CONFIG, data__data_dir="/elsewhere", data__raw_dir="/there", data__source="download")
    load_data(stranger, "f", {})
    load_data(stranger, "f", {"data.raw_dir": "/mine"})
    assert [(data.source, data.data_dir, data.raw_dir) for data in asked] == [("auto", "", ""), ("auto", "", "/mine")]


def test_images_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Examples(np.zeros((5, 32, 32, 3), np.uint8), np.zeros(5, np.int32))
    monkeypatch.setattr(run_data, "load_splits", lambda data: Splits("mnist", split, split, "other", "tfds"))
    with pytest.raises(DataError, match=r"mnist: has images of shape \(32, 32, 3\); the network needs 28x28"):
        load_data(tiny_run.CONFIG, "0123", {"data.name": "mnist"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"holds no checkpoints/ of a run; name a run's folder"),
        ("none", r"none: no such folder; name a run's folder"),
        ("early", r"early: holds no checkpoints/ of a run; its run stopped before the first checkpoint, so repeat"),
        ("file", r"file: is a file; name a folder"),
        ("long" * 100, r"long: cannot be read \(File name too long\); name another folder"),
    ],
)
def test_folder_without_a_run_is_refused(tmp_path: pathlib.Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "config.json").touch()
    with pytest.raises(WorkdirError, match=message):
        evaluate_workdir(tmp_path / name)


@pytest.mark.parametrize("hidden", ["", "checkpoints"])
def test_unreadable_folder_gives_one_message(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    listdir = os.listdir

    def denied(path: Any) -> list[str]:
        if pathlib.Path(path) == workdir / hidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(WorkdirError, match=rf"{hidden}: cannot be read \(Permission denied\); name another folder"):
        evaluate_workdir(workdir)


def test_command_prints_the_saved_json(workdir: pathlib.Path) -> None:
    done = command(f"--workdir={workdir}", "--split=holdout", "--checkpoint=best", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((workdir / "evaluation-holdout-digits-best.json").read_text())


def test_command_prints_a_table(workdir: pathlib.Path) -> None:
    done = command(f"--workdir={workdir}", "--config.data.name=digits")
    assert done.returncode == 0, done.stderr
    result = json.loads((workdir / "evaluation-test-digits.json").read_text())
    assert f"{result['correct']} of 360 right" in done.stdout
    assert f"accuracy {result['accuracy']:.2%}" in done.stdout
    assert len(done.stdout.splitlines()) == 5 + 10  # one of the 5 shows the scores without the temperature
    held_out = scores_lib.evaluation_table(evaluate_workdir(workdir, split="holdout"))
    assert "The temperature was fitted on these rows" in held_out and "fitted on these" not in done.stdout


def test_command_writes_to_output_only(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    done = command(f"--workdir={workdir}", f"--output={tmp_path / 'there'}")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["evaluation-test-digits.json"]
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.name=emnist/letters"], "has 37 classes"),
        (["--config.data.nam=kmnist"], "this command takes only the fields of the data; did you mean 'data.name'?"),
        (["--split=tset"], "train|holdout|test"),
        (["here"], "'here': is not a flag"),
        (
            ["--config.data.fold=1"],
            "it is fixed by the run; this command takes only data.name, data.source, data.data_dir",
        ),
        (["--workdir="], "--workdir: is empty"),
    ],
)
def test_command_refuses_with_one_line(workdir: pathlib.Path, arguments: list[str], message: str) -> None:
    done = command(f"--workdir={workdir}", *arguments)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_class_that_never_occurs_has_no_scores() -> None:
    logits = np.eye(10, dtype=np.float32)[[0, 1]]
    evaluation = Evaluation(loss=0.0, accuracy=1.0, examples=2, logits=logits)
    rows: list[dict[str, Any]] = scores_with_intervals(evaluation, np.array([0, 1], np.int32), "mnist")["per_class"]
    assert rows[0]["recall"] == 1.0 and rows[5]["recall"] is None and rows[5]["f1"] is None
    assert rows[5]["examples"] == rows[5]["predictions"] == 0
    json.dumps(rows, allow_nan=False)


def test_weights_are_placed_once_and_never_those_of_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = load_predictor(tiny_run.workdir())
    other = dataclasses.replace(first, members=jax.tree.map(lambda leaf: 2 * leaf, first.members))
    placed: list[Any] = []
    place = sharding.place

    def record(tree: Any, where: Any) -> Any:
        placed.append(tree)
        return place(tree, where)

    monkeypatch.setattr(sharding, "place", record)
    images = load_splits(tiny_run.CONFIG.data).test.image[:3]
    logits = [predict_logits(predictor, images) for predictor in (first, first, other, first)]
    assert sum(tree is first.members for tree in placed) == 1
    assert sum(tree is other.members for tree in placed) == 1
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[3])
    assert not np.allclose(logits[0], logits[2])
