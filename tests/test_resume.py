"""Exact resume: however often and wherever a run is stopped, its result equals an uninterrupted run's, bit for bit."""

import json
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from small_run import SMALL, lines, outcome, steps, summary

from mnist_flax import train
from mnist_flax.config import Config, replace
from mnist_flax.errors import WorkdirError
from mnist_flax.run.checkpoint import load_run
from mnist_flax.run.log import RunLog
from mnist_flax.run.progress import Progress
from mnist_flax.run.signals import Interrupted, StopRequest
from mnist_flax.train import fit


class Died(Exception):
    """Raised in the middle of a run."""


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The outcome of an uninterrupted run, by driver."""
    left = {}
    for driver in ("scan", "stream"):
        workdir = tmp_path_factory.mktemp(f"quiet-{driver}")
        fit(replace(SMALL, train__driver=driver), workdir)
        left[driver] = outcome(workdir)
    return left


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps at which the next runs die, in order; each run dies before it saves that step."""
    deaths: list[int] = []
    take_in = RunLog.add_steps

    def steps_and_die(self: RunLog, *args: Any) -> None:
        take_in(self, *args)
        if deaths and self.step >= deaths[0]:
            deaths.pop(0)
            raise Died

    monkeypatch.setattr(RunLog, "add_steps", steps_and_die)
    yield deaths
    assert not deaths


def fit_until_finished(config: Config, workdir: pathlib.Path) -> int:
    """Repeats a run until it finishes; returns the number of failures."""
    for failures in range(20):
        try:
            fit(config, workdir)
        except (Died, Interrupted):
            continue
        return failures
    raise AssertionError("no end")


@pytest.mark.parametrize(
    ("driver", "cadence", "deaths"),
    [
        ("scan", {"every_epochs": 1}, [3, 9]),  # before the first save, and after the save at the end of an epoch
        ("scan", {"every_epochs": 0, "every_steps": 2}, [5, 9]),  # from the middle of an epoch and of a log line
        ("stream", {"every_epochs": 0, "every_steps": 2}, [5, 9]),
        ("scan", {"every_epochs": 0, "every_seconds": 1e-9}, [6]),  # from a save that the clock triggered
        pytest.param("stream", {"every_epochs": 1}, [3, 9, 13], marks=pytest.mark.slow),
        pytest.param("stream", {"every_epochs": 0, "every_seconds": 1e-9}, [4, 6, 13], marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    quiet: dict[str, dict[str, Any]],
    die_at: list[int],
    tmp_path: pathlib.Path,
    driver: str,
    cadence: dict[str, Any],
    deaths: list[int],
) -> None:
    config = replace(SMALL, train__driver=driver, **{f"checkpoint__{name}": value for name, value in cadence.items()})
    die_at += deaths
    assert fit_until_finished(config, tmp_path) == len(deaths)
    assert outcome(tmp_path) == quiet[driver]


@pytest.mark.smoke
def test_saving_more_often_changes_no_result(quiet: dict[str, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    fit(replace(SMALL, checkpoint__every_steps=1), tmp_path)
    assert outcome(tmp_path) == quiet["scan"]


def test_a_signal_changes_no_result(
    quiet: dict[str, dict[str, Any]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_to_stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # another thread receives the signal

    monkeypatch.setattr(Progress, "epoch_line", ask_to_stop)
    with pytest.raises(Interrupted, match=r"stopped at step 7 of 14; nothing is lost: the same command") as stopped:
        fit(SMALL, tmp_path)
    assert stopped.value.exit_status == 143
    assert steps(tmp_path) == [7]
    with pytest.raises(Interrupted, match=r"stopped at step 14 of 14"):
        fit(SMALL, tmp_path)
    fit(SMALL, tmp_path)
    assert outcome(tmp_path) == quiet["scan"]


def test_a_signal_before_the_first_step_stops_at_step_0(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = StopRequest.__init__

    def started_with_a_wish(self: StopRequest) -> None:
        started(self)
        self.signum = signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__init__", started_with_a_wish)
        with pytest.raises(Interrupted, match="stopped at step 0 of 14; nothing is lost") as stopped:
            fit(SMALL, tmp_path)
    assert stopped.value.exit_status == 130
    fit(SMALL, tmp_path)


def test_the_driver_may_change_on_resume(die_at: list[int], tmp_path: pathlib.Path) -> None:
    die_at += [9]
    with pytest.raises(Died):
        fit(replace(SMALL, train__driver="scan"), tmp_path)
    fit(replace(SMALL, train__driver="stream", eval__batch_size=7, train__tensorboard=False), tmp_path)
    assert [line["step"] for line in lines(tmp_path) if line["split"] == "train"] == [3, 6, 7, 9, 12, 14]


def test_the_summary_counts_restarts_and_the_seconds_of_all_processes(
    die_at: list[int], tmp_path: pathlib.Path
) -> None:
    die_at += [8, 11]
    config = replace(SMALL, checkpoint__every_steps=2)
    assert fit_until_finished(config, tmp_path) == 2
    left = summary(tmp_path)
    assert left["restarts"] == 2
    assert left["steps"] == 14
    record = load_run(tmp_path).record
    assert left["train_seconds"] == record["seconds"] > 0
    seconds = [line["seconds"] for line in record["log"]]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_short_run_with_batch_norm_gets_a_warning(
    batch_norm: bool, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_all", lambda *_: 1 / 0)  # the warning comes before training
    with pytest.raises(ZeroDivisionError):
        fit(replace(SMALL, model__batch_norm=batch_norm, train__epochs=1), tmp_path)
    assert ("running averages need about 300 steps; after 7," in caplog.text) == batch_norm


def test_a_finished_run_stays_as_it_is(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.name.startswith(".")}

    fit(SMALL, tmp_path)
    before = files()
    caplog.set_level("INFO", "mnist_flax")
    fit(replace(SMALL, checkpoint__keep_latest=1), tmp_path)
    assert "is finished" in caplog.text
    assert files() == before


@pytest.mark.parametrize("field", ["steps", "epochs", "test_accuracy", "train_seconds"])
def test_a_summary_without_a_field_is_written_again(field: str, tmp_path: pathlib.Path) -> None:
    fit(SMALL, tmp_path)
    written = summary(tmp_path)
    damaged = {name: value for name, value in written.items() if name != field}
    (tmp_path / "summary.json").write_text(json.dumps(damaged))
    fit(SMALL, tmp_path)
    assert summary(tmp_path)[field] == written[field]


def test_a_new_run_does_not_take_over_the_summary_of_one_whose_checkpoints_were_deleted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(SMALL, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    other = replace(SMALL, seed=SMALL.seed + 1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(other, tmp_path)
    fit(other, tmp_path)
    assert (
        summary(tmp_path)["config"] == json.loads(other.to_json()) == json.loads((tmp_path / "config.json").read_text())
    )


def test_more_epochs_continue_a_run_if_its_schedule_does_not_depend_on_them(tmp_path: pathlib.Path) -> None:
    longer = replace(SMALL, train__epochs=3)
    fit(longer, tmp_path / "at once")
    fit(SMALL, tmp_path / "in two")
    assert summary(tmp_path / "in two")["epochs"] == 2
    fit(longer, tmp_path / "in two")
    assert summary(tmp_path / "in two")["epochs"] == 3
    assert outcome(tmp_path / "in two") == outcome(tmp_path / "at once")
    with pytest.raises(WorkdirError, match=r"already at step 21, past the end of this one, which has 14"):
        fit(SMALL, tmp_path / "in two")
