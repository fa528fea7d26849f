"""Many runs in one program: each equals the same run alone, and their statistics are correct."""

import json
import logging
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Sequence
from typing import Any

import forked
import jax
import numpy as np
import pytest
import small_population
from small_population import CONFIG

from mnist_flax import drivers, members, train
from mnist_flax.analysis import statistics as results
from mnist_flax.analysis.evaluation import load_predictor
from mnist_flax.config import replace
from mnist_flax.data import load
from mnist_flax.data.download import UnavailableError
from mnist_flax.errors import ConfigError, DataError, NonFiniteLossError, WorkdirError
from mnist_flax.members import Member, member_configs
from mnist_flax.run import checkpoint
from mnist_flax.run.checkpoint import load_run
from mnist_flax.run.log import RunLog, read_log
from mnist_flax.run.signals import Interrupted, StopRequest
from mnist_flax.train import fit, fit_population


@pytest.fixture(scope="module")
def seeds() -> pathlib.Path:
    return small_population.seeds()


@pytest.fixture(scope="module")
def folds() -> pathlib.Path:
    return small_population.folds()


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Checks that two runs end with the same bits and have the same log, except for the seconds."""
    run, other_run = checkpoint.load_run(one), checkpoint.load_run(other)
    assert int(run.state.step) == run.config.num_steps
    assert run.config.to_dict() == other_run.config.to_dict()
    leaves, others = jax.tree.leaves(run.state), jax.tree.leaves(other_run.state)
    assert len(leaves) == len(others) > 0
    for leaf, other_leaf in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, other_leaf)
    assert log_of(one) == log_of(other) != []


def log_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in read_log(folder)]


def test_a_member_equals_a_single_run_with_its_seed(seeds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fit(replace(CONFIG, seed=4), tmp_path / "run")
    assert_same_run(seeds / "members" / "seed-4", tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "weights.safetensors", "checkpoints"} <= files
    assert files <= {path.name for path in (seeds / "members" / "seed-4").iterdir()}


def test_a_fold_equals_a_single_run_that_holds_it_out(folds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = replace(CONFIG, seed=5, data__holdout=0, data__folds=3, data__fold=2)
    fit(config, tmp_path / "run")
    assert_same_run(folds / "members" / "fold-2", tmp_path / "run")


def test_members_trained_together_and_in_turns_agree(
    seeds: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "runs_take_turns", lambda: False)
    monkeypatch.setattr(drivers, "_jit_scan", drivers._jit_scan.__wrapped__)  # not the loop that another test compiled
    fit_population(CONFIG, tmp_path, seeds=3)
    for name in ("seed-3", "seed-4", "seed-5"):
        run, other = (checkpoint.load_run(folder / "members" / name) for folder in (seeds, tmp_path))
        for one, another in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(other.state.params), strict=True):
            # Another program rounds differently. Adam's first steps divide by the size of the gradient, which carries
            # the difference into the weights; it stays a small part of a step, whose size is the learning rate.
            np.testing.assert_allclose(one, another, rtol=1e-3, atol=0.1 * CONFIG.optimizer.learning_rate)


def test_other_seeds_and_folds_have_the_same_program() -> None:
    programs = {config.program for config in member_configs(CONFIG, seeds=3).values()}
    assert programs == {replace(CONFIG, seed=40).program}
    assert len({config.program for config in member_configs(CONFIG, folds=3).values()}) == 1


def test_folds_of_different_lengths_train_in_groups(tmp_path: pathlib.Path) -> None:
    # 220 rows in 3 folds leave 146 or 147 to train on: 2 or 3 steps per epoch.
    result = fit_population(replace(CONFIG, train__batch_size=73, train__epochs=1), tmp_path, folds=3)
    steps = [checkpoint.load_run(tmp_path / "members" / f"fold-{k}").record["step"] for k in range(3)]
    assert steps == [2, 3, 3]
    assert len(result["members"]) == 3
    _, info = load_predictor(tmp_path)
    assert info.steps == (2, 3, 3) and info.is_final
    summary = tmp_path / "members" / "fold-2" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"steps": 1}))  # from before it trained further
    assert not load_predictor(tmp_path)[1].is_final


def stop_after_first_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Sends SIGTERM to this process when the first member is evaluated: at the end of the first epoch."""
    evaluate_holdout = members.evaluate_holdout

    def evaluate_and_stop(member: Member) -> dict[str, Any] | None:
        patch.setattr(train, "evaluate_holdout", evaluate_holdout)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_holdout(member)

    patch.setattr(train, "evaluate_holdout", evaluate_and_stop)


def stop_early(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains a population until a signal stops it, at about the end of the first epoch."""
    with monkeypatch.context() as patch:
        stop_after_first_evaluation(patch)
        with pytest.raises(Interrupted, match="nothing is lost") as caught:
            fit_population(CONFIG, workdir, seeds=3)
    assert caught.value.exit_status == 128 + signal.SIGTERM
    assert not (workdir / "population.json").exists()


def test_a_stopped_population_resumes_exactly(
    seeds: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_early(tmp_path, monkeypatch)
    # As if the process had been killed while saving: the newest checkpoint of one member is missing.
    newest = max((tmp_path / "members" / "seed-4" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert 0 < int(newest.name) < CONFIG.num_steps
    shutil.rmtree(newest)
    # Stopped again before the next step of all three: the member that has caught up is saved.
    train_group = train.train_group

    def stop_all(group: Sequence[Member], *arguments: Any, request: StopRequest, **more: Any) -> None:
        if len(group) == 3:
            request.receive(signal.SIGTERM)
        train_group(group, *arguments, request=request, **more)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="nothing is lost"):
        patch.setattr(train, "train_group", stop_all)
        fit_population(replace(CONFIG, checkpoint__every_epochs=0), tmp_path, seeds=3)
    assert checkpoint.load_run(newest.parent.parent).record["step"] == int(newest.name)
    shutil.rmtree(newest)

    trained = []

    def record(group: Sequence[Member], *arguments: Any, until: int, **more: Any) -> None:
        trained.append(([member.workdir.name for member in group], group[0].step, until))
        train_group(group, *arguments, until=until, **more)

    monkeypatch.setattr(train, "train_group", record)
    result = fit_population(CONFIG, tmp_path, seeds=3)
    saved = int(newest.name)
    assert trained == [(["seed-4"], 0, saved), (["seed-3", "seed-4", "seed-5"], saved, CONFIG.num_steps)]
    for name in ("seed-3", "seed-4", "seed-5"):
        assert_same_run(tmp_path / "members" / name, seeds / "members" / name)
    undisturbed = results.load_population_result(seeds)
    assert undisturbed
    for field in ("members", "committee", "agreement", "mean", "sd", "interval", "curves"):
        assert result[field] == undisturbed[field], field


def test_a_signal_while_members_are_evaluated_stops_before_the_next_member(
    seeds: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = shutil.copytree(seeds, tmp_path / "copy")
    for path in (*workdir.glob("members/*/summary.json"), workdir / "population.json"):
        path.unlink()
    finish = members.finish

    def finish_and_stop(*arguments: Any) -> None:
        monkeypatch.setattr(train, "finish", finish)
        finish(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # another thread receives the signal

    monkeypatch.setattr(train, "finish", finish_and_stop)
    with pytest.raises(Interrupted, match=f"stopped at step {CONFIG.num_steps} of {CONFIG.num_steps}; nothing is lost"):
        fit_population(CONFIG, workdir, seeds=3)
    assert [path.parent.name for path in workdir.glob("members/*/summary.json")] == ["seed-3"]
    result, undisturbed = fit_population(CONFIG, workdir, seeds=3), results.load_population_result(seeds)
    assert undisturbed
    assert result["members"] == undisturbed["members"]


def test_a_finished_population_is_not_trained_again_but_can_get_more_members(
    seeds: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = shutil.copytree(seeds, tmp_path / "copy")
    with caplog.at_level(logging.INFO, "mnist_flax"), monkeypatch.context() as patch:
        patch.setattr(train, "train_group", None)
        patch.setattr(train, "finish", None)
        result, undisturbed = fit_population(CONFIG, workdir, seeds=3), results.load_population_result(seeds)
    assert undisturbed
    assert result["members"] == undisturbed["members"]
    assert "is finished; to train further, raise --config.train.epochs or raise --seeds" in caplog.text
    summary = (workdir / "members" / "seed-4" / "summary.json").read_bytes()
    with monkeypatch.context() as patch:  # the new member trains alone, but with the driver of a group
        patch.setattr(drivers, "stream_steps", None)
        result = fit_population(replace(CONFIG, train__driver="stream"), workdir, seeds=4)
    assert [member["name"] for member in result["members"]] == ["seed-3", "seed-4", "seed-5", "seed-6"]
    assert result["members"][:3] == json.loads((seeds / "population.json").read_text())["members"]
    assert (workdir / "members" / "seed-4" / "summary.json").read_bytes() == summary
    stale = json.dumps(result | {"steps": 1})  # a result from before its members trained further
    (workdir / "population.json").write_text(stale)
    assert load_run(workdir / "members" / "seed-6").config.train.driver == "scan"  # what it was trained with
    assert fit_population(CONFIG, workdir, seeds=4)["steps"] == result["steps"]


def test_members_have_consecutive_seeds_from_the_configs_on() -> None:
    assert [config.seed for config in member_configs(CONFIG, seeds=3).values()] == [3, 4, 5]
    of_folds = member_configs(CONFIG, folds=2)
    assert [(name, config.seed, config.data.fold) for name, config in of_folds.items()] == [
        ("fold-0", 3, 0),
        ("fold-1", 4, 1),
    ]
    with pytest.raises(ConfigError, match=r"config.seed = 4294967296"):
        member_configs(replace(CONFIG, seed=2**32 - 1), seeds=2)


def test_a_folder_with_something_else_is_refused(seeds: pathlib.Path, folds: pathlib.Path) -> None:
    with pytest.raises(WorkdirError, match="holds a run, not a population"):
        fit_population(CONFIG, seeds / "members" / "seed-3", seeds=2)
    with pytest.raises(WorkdirError, match=r"config.optimizer.learning_rate: 0.02 there, 0.01 now"):
        fit_population(replace(CONFIG, optimizer__learning_rate=0.01), seeds, seeds=3)
    with pytest.raises(WorkdirError, match="holds a population"):
        fit(CONFIG, seeds)
    for other, sizes in (
        (CONFIG, {"seeds": 2}),
        (CONFIG, {"folds": 3}),
        (replace(CONFIG, seed=100), {"seeds": 3}),
    ):
        with pytest.raises(WorkdirError, match=r"seed-3, seed-4, seed-5, and this command .* or a larger --seeds, or"):
            fit_population(other, seeds, **sizes)
    with pytest.raises(WorkdirError, match=r"fold-0, fold-1, fold-2, and this command .* trained it or name another"):
        fit_population(CONFIG, folds, folds=2)
    assert [path.name for path in sorted((seeds / "members").iterdir())] == ["seed-3", "seed-4", "seed-5"]


def test_seeds_that_hold_out_one_fold_are_a_population_of_seeds(tmp_path: pathlib.Path) -> None:
    config = replace(CONFIG, data__holdout=0, data__folds=11, data__fold=1)  # as many rows as CONFIG
    first = fit_population(config, tmp_path, seeds=3)
    assert (first["kind"], "out_of_fold" in first) == ("seeds", False)
    assert fit_population(config, tmp_path, seeds=3)["members"] == first["members"]
    assert len(fit_population(config, tmp_path, seeds=4)["members"]) == 4


def test_a_population_never_trains_on_a_substitute_dataset(tmp_path: pathlib.Path) -> None:
    config = replace(CONFIG, data__name="mnist", data__source="auto", data__data_dir=str(tmp_path / "none"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MNIST_FLAX_RAW_DIR", raising=False)
        patch.setitem(load._LOADERS, "download", unavailable)
        with pytest.raises(DataError, match="mnist cannot be loaded"):
            fit_population(config, tmp_path / "population", seeds=2)
    assert not (tmp_path / "population").exists()


def test_folds_that_a_rare_class_does_not_allow_leave_nothing(tmp_path: pathlib.Path) -> None:
    config = replace(CONFIG, data__num_train=150, data__holdout=0)
    with pytest.raises(ConfigError, match=r"config.data.folds = 15: class \d has only 14 of the 150 rows"):
        fit_population(config, tmp_path / "population", folds=15)
    assert not (tmp_path / "population").exists()


def test_a_population_needs_seeds_or_folds(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="give either --seeds=M or --folds=K"):
        fit_population(CONFIG, tmp_path / "population")
    with pytest.raises(ConfigError, match="give only one of --seeds=M or --folds=K"):
        fit_population(CONFIG, tmp_path / "population", seeds=2, folds=2)


def test_a_member_continued_as_a_single_run_has_the_same_setup(
    seeds: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    member = shutil.copytree(seeds / "members" / "seed-3", tmp_path / "member")
    with caplog.at_level(logging.INFO):
        fit(load_run(member).config, member)
    assert "is finished" in caplog.text
    assert "setup" not in caplog.text


def unavailable(_: Any) -> Any:
    raise UnavailableError("no network")


def test_a_loss_that_is_not_finite_names_its_member(tmp_path: pathlib.Path) -> None:
    log = RunLog(CONFIG, tmp_path / "seed-4", {"origin": {}}, learning_rate=lambda step: 0.1, writes=False)
    metrics = {"loss": np.array([np.nan]), "accuracy": np.ones(1), "examples": np.full(1, 25)}
    with pytest.raises(NonFiniteLossError, match=r"seed-4: the loss of step 1 is nan"):
        log.add_steps(metrics, 1.0)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "--seeds"),
        (["--config=configs/tiny.py"], 2, "give either --seeds=M or --folds=K"),
        (["--config=configs/tiny.py", "--seeds=2", "--folds=2"], 2, "give only one of --seeds=M or --folds=K"),
        (["--config=configs/tiny.py", "--seeds=1"], 2, "--seeds=1"),
        (["--config=configs/tiny.py", "--seeds=2", "--split=test"], 2, "--split: is used only with --compare"),
        (["--compare=runs/a"], 2, "--compare=runs/a: name two folders"),
        (["--compare=runs/a,"], 2, "--compare=runs/a,: name two folders"),
        (["--compare=runs/a,runs/b", "--seeds=3"], 2, "--seeds: cannot be combined with --compare"),
        (["--compare=runs/a,runs/b", "--config.train.epochs=9"], 2, "config.train.epochs = '9': cannot be changed"),
        (["--compare=runs/a,runs/b", "--config.data.raw_dir"], 2, "--config.data.raw_dir: needs a value"),
    ],
)
def test_command_line_gives_a_status_and_a_message(arguments: list[str], status: int, message: str) -> None:
    done = forked.run("-m", "mnist_flax.population", *arguments)
    assert done.returncode == status
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_command_compares_seeds_on_their_hold_out_rows(seeds: pathlib.Path) -> None:
    member = seeds / "members" / "seed-4"
    done = forked.run("-m", "mnist_flax.population", f"--compare={seeds},{member}", "--split=holdout")
    assert done.stdout.startswith("digits, 20 hold-out examples\n"), done.stderr
