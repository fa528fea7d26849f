"""Many runs in one program: each is what it would be alone, and together they say what statistics says they do."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from mnist_flax import drivers, train
from mnist_flax.analysis import comparison as compare
from mnist_flax.analysis import statistics as results
from mnist_flax.analysis.comparison import Result
from mnist_flax.analysis.evaluation import combine_members, evaluate, make_predictor
from mnist_flax.config import Config, replace
from mnist_flax.data import batches
from mnist_flax.data.datasets import Examples
from mnist_flax.data.load import load_splits
from mnist_flax.errors import ConfigError, NonFiniteLossError, WorkdirError
from mnist_flax.members import Member
from mnist_flax.run import checkpoint
from mnist_flax.run.log import RunLog
from mnist_flax.run.signals import Interrupted
from mnist_flax.step import eval_variables
from mnist_flax.train import fit, fit_population, member_configs

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = replace(
    Config(),
    seed=3,
    data__name="digits",
    data__num_train=220,
    data__holdout=20,
    model__widths=(4,),
    model__pools=(4,),
    model__dense=(8,),
    model__dropout=0.2,
    augment__shift=1,
    optimizer__learning_rate=0.02,
    optimizer__ema_decay=0.9,
    train__batch_size=25,
    train__epochs=2,
    eval__batch_size=120,
    train__log_every_steps=3,
    train__tensorboard=False,
    train__report=False,
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished population of the seeds 3, 4 and 5; who changes something in it makes a copy first."""
    workdir = tmp_path_factory.mktemp("population") / "seeds"
    fit_population(CONFIG, workdir, seeds=3)
    return workdir


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished population of three folds of 220 rows, so of unequal size."""
    workdir = tmp_path_factory.mktemp("population") / "folds"
    fit_population(CONFIG, workdir, folds=3)
    return workdir


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Two runs end with the same bits and have written the same log, but for the seconds."""
    run, other_run = checkpoint.load_run(one), checkpoint.load_run(other)
    assert int(run.state.step) == run.config.num_steps
    assert run.config.to_dict() == other_run.config.to_dict()
    leaves, others = jax.tree.leaves(run.state), jax.tree.leaves(other_run.state)
    assert len(leaves) == len(others) > 0
    for leaf, other_leaf in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, other_leaf)
    assert log_of(one) == log_of(other) != []


def log_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    records = results.read_log(folder)
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_member_is_what_a_single_run_with_its_seed_is(seeds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fit(replace(CONFIG, seed=4), tmp_path / "run")
    assert_same_run(seeds / "members" / "seed-4", tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "weights.safetensors", "checkpoints"} <= files
    assert files <= {path.name for path in (seeds / "members" / "seed-4").iterdir()}


def test_a_fold_is_what_a_single_run_that_holds_it_out_is(folds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = replace(CONFIG, seed=5, data__holdout=0, data__folds=3, data__fold=2)
    fit(config, tmp_path / "run")
    assert_same_run(folds / "members" / "fold-2", tmp_path / "run")


def test_all_at_once_and_one_after_the_other_agree(
    seeds: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "runs_take_turns", lambda: False)
    fit_population(CONFIG, tmp_path, seeds=3)
    for name in ("seed-3", "seed-4", "seed-5"):
        run, other = (checkpoint.load_run(folder / "members" / name) for folder in (seeds, tmp_path))
        for one, another in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(other.state.params), strict=True):
            # Another program: other fusions, other rounding, which Adam's first steps, dividing by the gradient's own
            # size, carry into the weights: by a small part of a step, which is the learning rate.
            np.testing.assert_allclose(one, another, rtol=1e-3, atol=0.1 * CONFIG.optimizer.learning_rate)


def test_other_seeds_and_folds_have_the_same_program() -> None:
    programs = {config.program for config in member_configs(CONFIG, seeds=3).values()}
    assert programs == {replace(CONFIG, seed=40).program}
    assert len({config.program for config in member_configs(CONFIG, folds=3).values()}) == 1


def test_folds_of_other_lengths_train_in_groups(tmp_path: pathlib.Path) -> None:
    # 220 rows in 3 folds: 146 or 147 to train on, so 2 or 3 steps an epoch.
    result = fit_population(replace(CONFIG, train__batch_size=73, train__epochs=1), tmp_path, folds=3)
    steps = [checkpoint.load_run(tmp_path / "members" / f"fold-{k}").record["step"] for k in range(3)]
    assert steps == [2, 3, 3]
    assert len(result["members"]) == 3


def stop_after_first_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Sends SIGTERM to this process when the first member is evaluated: at the end of the first epoch."""
    evaluate_holdout = train.evaluate_holdout

    def evaluate_and_stop(member: Member) -> dict[str, Any] | None:
        patch.setattr(train, "evaluate_holdout", evaluate_holdout)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_holdout(member)

    patch.setattr(train, "evaluate_holdout", evaluate_and_stop)


def stop_early(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains a population until a signal stops it, in the first epoch or at its end."""
    with monkeypatch.context() as patch:
        stop_after_first_evaluation(patch)
        with pytest.raises(Interrupted, match="nothing is lost") as caught:
            fit_population(CONFIG, workdir, seeds=3)
    assert caught.value.exit_status == 128 + signal.SIGTERM
    assert not (workdir / "population.json").exists()


def test_a_stopped_population_goes_on_as_if_nothing_had_happened(
    seeds: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_early(tmp_path, monkeypatch)
    # As if the process had been killed while it saved: one member's newest checkpoint is missing.
    newest = max((tmp_path / "members" / "seed-4" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert 0 < int(newest.name) < CONFIG.num_steps
    shutil.rmtree(newest)
    trained, train_group = [], train.train_group

    def record(group: Sequence[Member], *arguments: Any, until: int, **more: Any) -> None:
        trained.append(([member.workdir.name for member in group], group[0].step, until))
        train_group(group, *arguments, until=until, **more)

    monkeypatch.setattr(train, "train_group", record)
    result = fit_population(CONFIG, tmp_path, seeds=3)
    saved = int(newest.name)
    assert trained == [(["seed-4"], 0, saved), (["seed-3", "seed-4", "seed-5"], saved, CONFIG.num_steps)]
    for name in ("seed-3", "seed-4", "seed-5"):
        assert_same_run(tmp_path / "members" / name, seeds / "members" / name)
    undisturbed = results.load(seeds)
    assert undisturbed
    for field in ("members", "committee", "agreement", "mean", "sd", "interval", "curves"):
        assert result[field] == undisturbed[field], field


def test_a_finished_population_says_so_and_a_larger_one_adds_to_it(
    seeds: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = shutil.copytree(seeds, tmp_path / "copy")
    with caplog.at_level(logging.INFO, "mnist_flax"), monkeypatch.context() as patch:
        patch.setattr(train, "train_group", None)
        patch.setattr(train, "finish", None)
        assert fit_population(CONFIG, workdir, seeds=3) == results.load(seeds)
    assert "is finished" in caplog.text
    summary = (workdir / "members" / "seed-4" / "summary.json").read_bytes()
    result = fit_population(CONFIG, workdir, seeds=4)
    assert [member["name"] for member in result["members"]] == ["seed-3", "seed-4", "seed-5", "seed-6"]
    assert result["members"][:3] == json.loads((seeds / "population.json").read_text())["members"]
    assert (workdir / "members" / "seed-4" / "summary.json").read_bytes() == summary


def test_the_result_holds_what_it_promises(seeds: pathlib.Path) -> None:
    result = results.load(seeds)
    assert result
    with np.load(seeds / "population.npz") as file:
        probs, label = file["test_probs"], file["test_label"]
    splits = load_splits(CONFIG)
    np.testing.assert_array_equal(label, splits.test.label)
    assert (probs.shape, probs.dtype) == ((3, 360, 10), np.float32)
    np.testing.assert_allclose(probs.sum(axis=-1), 1, rtol=1e-5)
    right = probs.argmax(axis=-1) == label
    assert [member["accuracy"] for member in result["members"]] == right.mean(axis=-1).tolist()
    assert [member["seed"] for member in result["members"]] == [3, 4, 5]
    for name in ("seed-3", "seed-4", "seed-5"):
        test = results.read_log(seeds / "members" / name)[-1]
        member = next(member for member in result["members"] if member["name"] == name)
        assert (test["split"], test["accuracy"], test["loss"]) == ("test", member["accuracy"], member["loss"])
    assert result["mean"]["accuracy"] == pytest.approx(right.mean())
    assert result["committee"]["accuracy"] == np.mean(probs.mean(axis=0).argmax(axis=-1) == label)
    assert result["agreement"]["examples_by_members_right"] == np.bincount(right.sum(axis=0), minlength=4).tolist()
    assert {"config", "dataset", "dataset_fingerprint", "device", "versions", "train_seconds"} <= result.keys()
    holdout = result["curves"]["holdout"]
    assert [point["epoch"] for point in holdout] == [1, 2]
    assert [point["step"] for point in result["curves"]["train"]] == [3, 6, 8, 9, 12, 15, 16]
    assert all(point["loss"]["min"] < point["loss"]["mean"] < point["loss"]["max"] for point in holdout)
    for name in ("curves_loss.svg", "curves_accuracy.svg"):
        assert (seeds / name).read_text().count("<svg") == 1
    table = results.table(result)
    assert f"{result['committee']['accuracy']:.2%}" in table
    assert table.count("seed-") == 3


def test_every_row_is_judged_by_the_member_that_has_not_seen_it(folds: pathlib.Path) -> None:
    result = results.load(folds)
    assert result
    out_of_fold = result["out_of_fold"]
    with np.load(folds / "population.npz") as file:
        rows, fold, probs, label = (file[name] for name in ("rows", "fold", "out_of_fold_probs", "out_of_fold_label"))
    splits = load_splits(CONFIG)
    used, _ = batches.split_rows(splits.train.label, 220, 0)
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
        holdout = [line for line in results.read_log(folds / "members" / f"fold-{k}") if line["split"] == "holdout"]
        assert holdout[-1]["accuracy"] == evaluation.accuracy
        assert (result["members"][k]["seed"], result["members"][k]["fold"]) == (3 + k, k)
    right = probs.argmax(axis=-1) == label
    assert (out_of_fold["correct"], out_of_fold["examples"]) == (right.sum(), 220)
    assert out_of_fold["mean"]["accuracy"] == pytest.approx(np.mean([right[fold == k].mean() for k in range(3)]))
    doubtful = out_of_fold["doubtful_labels"]
    of_label = probs[np.arange(220), label]
    np.testing.assert_allclose([example["probability_of_label"] for example in doubtful], np.sort(of_label)[:100], 1e-5)
    for example in doubtful:
        (place,) = np.flatnonzero(rows == example["row"])
        assert (example["label"], example["fold"]) == (label[place], fold[place])
        assert example["prediction"] == probs[place].argmax()
    assert "out of fold" in results.table(result)


@pytest.mark.parametrize(("num_train", "folds"), [(220, 3), (221, 4), (1437, 5), (0, 5)])
def test_folds_divide_the_rows_with_equal_shares_of_each_class(num_train: int, folds: int) -> None:
    label = load_splits(CONFIG).train.label
    configs = [
        replace(CONFIG, data__num_train=num_train, data__holdout=0, data__folds=folds, data__fold=k)
        for k in range(folds)
    ]
    used, _ = batches.split_rows(label, num_train, 0)
    held_out = []
    for config in configs:
        rows, of_fold = batches.rows_of(label, config.data)
        assert (len(rows), len(of_fold)) == (config.num_train, config.num_holdout)
        np.testing.assert_array_equal(np.sort(np.concatenate([rows, of_fold])), used)
        held_out.append(of_fold)
    np.testing.assert_array_equal(np.sort(np.concatenate(held_out)), used)
    counts = np.array([np.bincount(label[of_fold], minlength=10) for of_fold in held_out])
    assert np.ptp(counts, axis=0).max() <= 1
    assert len({config.steps_per_epoch for config in configs}) == 1
    assert len({config.program for config in configs}) == 1
    assert held_out[0].tolist() != used[: len(held_out[0])].tolist()  # shuffled
    assert np.array_equal(held_out[0], batches.rows_of(label, replace(configs[0], seed=9).data)[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__folds": 1}, r"config.data.folds = 1: must be at least 2 and at most 22"),
        ({"data__folds": 23}, r"config.data.folds = 23: must be at least 2 and at most 22"),
        ({"data__folds": 3, "data__fold": 3}, r"config.data.fold = 3: must be at least 0 and below 3"),
        ({"data__fold": 1}, r"config.data.fold = 1: must be at least 0 and below 1"),
        ({"data__folds": 3, "data__holdout": 20}, r"config.data.holdout = 20: must be 0 with config.data.folds"),
    ],
)
def test_wrong_folds_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **({"data__holdout": 0} | fields))


def test_a_class_with_too_few_rows_cannot_be_divided() -> None:
    labels = np.array([0] * 30 + [1] * 2, np.int32)
    with pytest.raises(ConfigError, match=r"config.data.folds = 3: class 1 has only 2 of the 32 rows; use at most 2"):
        batches.fold_rows(labels, np.arange(32), 3)


def test_members_have_the_seeds_that_follow_the_configs() -> None:
    assert [config.seed for config in member_configs(CONFIG, seeds=3).values()] == [3, 4, 5]
    of_folds = member_configs(CONFIG, folds=2)
    assert [(name, config.seed, config.data.fold) for name, config in of_folds.items()] == [
        ("fold-0", 3, 0),
        ("fold-1", 4, 1),
    ]
    with pytest.raises(ConfigError, match=r"config.seed = 4294967296"):
        member_configs(replace(CONFIG, seed=2**32 - 1), seeds=2)


def test_a_folder_with_something_else_is_refused(seeds: pathlib.Path) -> None:
    with pytest.raises(WorkdirError, match="holds a run, not a population"):
        fit_population(CONFIG, seeds / "members" / "seed-3", seeds=2)
    with pytest.raises(WorkdirError, match=r"config.optimizer.learning_rate: 0.02 there, 0.01 now"):
        fit_population(replace(CONFIG, optimizer__learning_rate=0.01), seeds, seeds=3)
    with pytest.raises(WorkdirError, match="holds a population"):
        fit(CONFIG, seeds)


def test_a_loss_that_is_not_finite_names_its_member(tmp_path: pathlib.Path) -> None:
    nothing: Any = None
    opened = []
    for name in ("seed-3", "seed-4"):
        log = RunLog(CONFIG, None, {"origin": {}}, learning_rate=lambda step: 0.1)
        opened.append(Member(CONFIG, tmp_path / name, np.arange(0), nothing, nothing, nothing, log, False))
    metrics = {"loss": np.array([[1.0], [np.nan]]), "accuracy": np.ones((2, 1)), "examples": np.full((2, 1), 25)}
    with pytest.raises(NonFiniteLossError, match=r"seed-4: the loss of step 1 is nan"):
        train.log_steps(opened, metrics, 1.0)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_spread() -> None:
    from scipy import stats

    mean, sd, interval = results.spread([1.0, 2.0, 3.0])
    assert (mean, sd) == (2, 1)
    assert interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))  # t(0.975, 2) from a table
    values = [0.991, 0.9924, 0.9907, 0.9931]
    assert results.spread(values).interval == pytest.approx(
        stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    )


def test_the_committee_averages_probabilities() -> None:
    # Two are undecided for class 1, one is sure of class 0: the mean of probabilities is for class 0.
    probs = np.array([[[0.45, 0.55]], [[0.45, 0.55]], [[0.9, 0.1]]])
    together = combine_members(np.log(probs).astype(np.float32))
    np.testing.assert_allclose(np.exp(together), [[0.6, 0.4]], rtol=1e-6)
    assert results.score(together, np.array([0])) == {
        "accuracy": 1.0,
        "loss": pytest.approx(-np.log(0.6)),
        "correct": 1,
        "examples": 1,
    }
    assert np.isfinite(combine_members(np.array([[[0.0, -2000.0]], [[0.0, -2000.0]]]))).all()


def test_agreement_counts_the_members_that_are_right() -> None:
    predictions = np.array([[0, 1, 2, 2], [0, 1, 0, 2], [0, 2, 0, 2]])
    log_probs = np.log(np.eye(3)[predictions] * 0.9 + 0.1 / 3)
    agreement = results.agreement(log_probs, np.array([0, 1, 2, 1]))
    assert agreement["examples_by_members_right"] == [1, 1, 1, 1]
    assert agreement["none_right"] == [{"row": 3, "label": 1, "committee": 2}]


def test_the_most_doubtful_labels_come_first() -> None:
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    doubtful = results.doubtful_labels(np.log(probs), np.array([0, 0, 1]), np.array([7, 8, 9]), np.array([0, 1, 1]))
    assert [example["row"] for example in doubtful] == [8, 9, 7]
    assert doubtful[0] == {
        "row": 8,
        "label": 0,
        "prediction": 1,
        "probability_of_label": pytest.approx(0.2),
        "probability_of_prediction": pytest.approx(0.8),
        "fold": 1,
    }


def test_curves_hold_the_points_that_all_members_have() -> None:
    def line(split: str, step: int, loss: float) -> dict[str, Any]:
        return {"split": split, "step": step, "epoch": step / 10, "loss": loss, "accuracy": 0.5}

    logs = [[line("train", 10, 1.0), line("test", 10, 4.0)], [line("train", 5, 9.0), line("train", 10, 3.0)]]
    curves = results.curves(logs)
    assert (curves["holdout"], curves["test"]) == ([], [])
    (point,) = curves["train"]
    assert (point["step"], point["epoch"]) == (10, 1)
    assert point["loss"] == {"mean": 2.0, "sd": pytest.approx(2**0.5), "min": 1.0, "max": 3.0}


# Comparisons ---------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    a = np.array([True] * 50 + [True] + [False] * 9 + [False] * 5)
    b = np.array([True] * 50 + [False] + [True] * 9 + [False] * 5)
    test = compare.mcnemar(a, b)
    assert (test["only_a_right"], test["only_b_right"]) == (1, 9)
    assert test["p"] == pytest.approx(2 * (1 + 10) / 2**10)  # both tails of the binomial distribution
    assert test["difference"] == pytest.approx(8 / 65)
    assert compare.mcnemar(a, a)["p"] == 1


def test_t_by_hand() -> None:
    paired = compare.t_test([1.0, 1.0, 1.0], [2.0, 3.0, 4.0], paired=True)
    assert paired["t"] == pytest.approx(2 * 3**0.5)
    assert (paired["df"], paired["difference"]) == (2, 2)
    assert paired["p"] == pytest.approx(1 - 12**0.5 / (12 + 2) ** 0.5)  # Student's distribution with 2 df, closed form
    assert paired["interval"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])
    welch = compare.t_test([1.0, 2.0, 3.0], [4.0, 6.0], paired=False)
    assert welch["t"] == pytest.approx(3 / (1 / 3 + 2 / 2) ** 0.5)
    assert welch["df"] == pytest.approx((1 / 3 + 1) ** 2 / ((1 / 3) ** 2 / 2 + 1))
    same = compare.t_test([0.9, 0.9], [0.9, 0.9], paired=True)
    assert (same["p"], same["t"]) == (1, None)
    assert compare.t_test([0.9, 0.9], [0.8, 0.8], paired=False)["p"] == 0


def result_of(predictions: Any, accuracies: tuple[float, ...], **fields: Any) -> Result:
    labels = np.zeros(len(predictions), np.int32)
    values: dict[str, Any] = {
        "name": "x",
        "kind": "seeds" if len(accuracies) > 1 else "run",
        "dataset": "mnist",
        "fingerprint": "f" * 64,
        "pairing": tuple(range(len(accuracies))),
        "labels": labels,
    }
    return Result(**(values | {"predictions": np.asarray(predictions), "accuracies": accuracies} | fields))


def test_the_verdict() -> None:
    good, bad = [0] * 20, [1] * 10 + [0] * 10
    runs = compare.compare_results(result_of(bad, (0.5,)), result_of(good, (1.0,)))
    assert (runs["verdict"], runs["t"]) == ("b", None)
    assert "B is better than A" in compare.table(runs)
    assert "50.000 points of accuracy, p = 0.002" in compare.sentence(runs)
    assert compare.compare_results(result_of(good, (1.0,)), result_of(bad, (0.5,)))["verdict"] == "a"
    # The members decide where there are some: here the committees differ, and the members do not.
    populations = compare.compare_results(result_of(bad, (0.5, 0.9)), result_of(good, (0.9, 0.5)))
    assert populations["mcnemar"]["p"] < 0.05
    assert (populations["verdict"], populations["t"]["kind"]) == (None, "paired")
    assert "No significant difference" in compare.table(populations)
    welch = compare.compare_results(
        result_of(bad, (0.5, 0.51, 0.52)), result_of(good, (0.9, 0.91), pairing=(7, 8), kind="seeds")
    )
    assert (welch["verdict"], welch["t"]["kind"]) == ("b", "Welch")


def test_only_the_same_examples_are_compared() -> None:
    one = result_of([0, 0], (1.0,))
    with pytest.raises(WorkdirError, match=r"is about mnist .* about kmnist .*only results on the same data"):
        compare.compare_results(one, result_of([0, 0], (1.0,), fingerprint="0" * 64, dataset="kmnist"))
    of_folds = result_of([0, 0], (1.0, 1.0), kind="folds")
    with pytest.raises(WorkdirError, match="was evaluated on 2 test rows, x on 2 training rows in 2 folds"):
        compare.compare_results(one, of_folds)
    with pytest.raises(WorkdirError, match="2 training rows in 3 folds"):
        compare.compare_results(of_folds, result_of([0, 0], (1.0, 1.0, 1.0), kind="folds"))


def test_runs_and_populations_are_read_alike(seeds: pathlib.Path, folds: pathlib.Path) -> None:
    population, run = compare.load_result(seeds), compare.load_result(seeds / "members" / "seed-4")
    assert run.accuracies == population.accuracies[1:2]
    assert (population.pairing, run.pairing, run.kind) == ((3, 4, 5), (4,), "run")
    comparison = compare.compare(seeds / "members" / "seed-4", seeds)
    assert comparison["examples"] == 360
    assert json.loads(json.dumps(comparison)) == comparison
    result = results.load(folds)
    assert result
    of_folds = compare.load_result(folds)
    assert of_folds.accuracies == tuple(fold["accuracy"] for fold in result["out_of_fold"]["folds"])
    assert np.mean(of_folds.predictions == of_folds.labels) == pytest.approx(result["out_of_fold"]["accuracy"])
    with pytest.raises(WorkdirError, match="holds no checkpoints/ of a run"):
        compare.load_result(seeds / "members")


def test_damaged_arrays_are_named(seeds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copy(seeds / "population.json", tmp_path)
    (tmp_path / "population.npz").write_bytes(b"nothing")
    with pytest.raises(WorkdirError, match=r"population.npz: cannot be read .*remove population.json"):
        compare.load_result(tmp_path)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "--seeds"),
        (["--config=configs/tiny.py"], 2, "give one of --seeds=M and --folds=K"),
        (["--config=configs/tiny.py", "--seeds=2", "--folds=2"], 2, "give one of --seeds=M and --folds=K"),
        (["--config=configs/tiny.py", "--seeds=1"], 2, "--seeds=1"),
        (["--compare=runs/a"], 2, "--compare=runs/a: name two folders"),
        (["--compare=runs/a,runs/b", "--seeds=3"], 2, "--seeds: has no meaning with --compare"),
    ],
)
def test_the_command_line(arguments: list[str], status: int, message: str) -> None:
    command = [sys.executable, "-m", "mnist_flax.population", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
