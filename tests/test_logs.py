"""The log: every example once, every line once, and all of it a function of what a checkpoint holds."""

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from small_run import SMALL, events, lines

from mnist_flax.config import Config, replace
from mnist_flax.errors import NonFiniteLossError, WorkdirError
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import RunLog
from mnist_flax.step import StepMetrics

NEW: dict[str, Any] = {"origin": {}}


def sums(first: int, last: int) -> StepMetrics:
    """Made-up sums of the steps from `first` to `last`, of 32 examples each, and 8 at an epoch's end."""
    steps = np.arange(first, last + 1)
    columns: Any = (np.float32(1) / steps, steps % 5, np.where(steps % 7, 32, 8))
    return StepMetrics(*columns)


def feed(log: RunLog, *cuts: int) -> None:
    """Gives the steps from the log's own to the last of `cuts`, in pieces."""
    for cut in cuts:
        log.steps(sums(log.step + 1, cut), seconds=0.25)


def test_a_line_sums_up_its_window_and_stops_at_the_epochs_end(tmp_path: pathlib.Path) -> None:
    feed(RunLog(SMALL, tmp_path, NEW), 1, 5, 14)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [3, 6, 7, 9, 12, 14]
    assert [line["examples"] for line in found] == [96, 96, 8, 64, 96, 40]
    assert [line["epoch"] for line in found] == [3 / 7, 6 / 7, 1.0, 9 / 7, 12 / 7, 2.0]
    assert found[5]["loss"] == pytest.approx((1 / 13 + 1 / 14) / 40)
    assert found[5]["accuracy"] == pytest.approx((3 + 4) / 40)
    assert found[0]["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize(("every", "steps"), [(0, [7, 14]), (1, list(range(1, 15))), (100, [7, 14])])
def test_the_cadence_of_lines(tmp_path: pathlib.Path, every: int, steps: list[int]) -> None:
    feed(RunLog(replace(SMALL, train__log_every_steps=every), tmp_path, NEW), 14)
    assert [line["step"] for line in lines(tmp_path)] == steps


@pytest.mark.parametrize("saved_at", range(14))
@pytest.mark.parametrize("torn", [b"", b'{"step": 3, "ep', b"\0\0\0"])
def test_a_log_from_a_snapshot_goes_on_as_if_nothing_had_been(
    tmp_path: pathlib.Path, saved_at: int, torn: bytes
) -> None:
    quiet, folder = tmp_path / "quiet", tmp_path / "folder"
    feed(RunLog(SMALL, quiet, NEW), *range(1, 15))
    log = RunLog(SMALL, folder, NEW)
    feed(log, *range(1, saved_at + 1))
    saved = json.loads(json.dumps(log.snapshot()))
    feed(log, 14)  # more than was saved, and something that was half written
    workdirs.append_bytes(folder / workdirs.METRICS, torn)
    again = RunLog(SMALL, folder, saved)
    assert (again.step, again.seconds, again.restarts) == (saved_at, saved["seconds"], 1)
    feed(again, *range(saved_at + 1, 15))
    assert lines(folder) == lines(quiet)
    assert events(folder) == events(quiet)
    assert again.snapshot()["epoch_sums"] == sum(np.stack(sums(8, 14), axis=1)).tolist()


def test_a_snapshot_does_not_change_any_more(tmp_path: pathlib.Path) -> None:
    log = RunLog(SMALL, tmp_path, NEW)
    feed(log, 4)
    saved = log.snapshot()
    before = json.dumps(saved)
    feed(log, 14)
    assert json.dumps(saved) == before


def test_tensorboard_shows_the_same_as_metrics_jsonl(tmp_path: pathlib.Path) -> None:
    log = RunLog(SMALL, tmp_path, NEW)
    feed(log, 7)
    log.evaluation("holdout", loss=0.5, accuracy=0.75, examples=20)
    names = ("loss", "accuracy", "learning_rate")
    shown = [
        (line["step"], f"{line['split']}/{name}", pytest.approx(line[name]))
        for line in lines(tmp_path)
        for name in names
        if name in line
    ]
    assert events(tmp_path) == shown
    assert len(list((tmp_path / workdirs.TENSORBOARD).iterdir())) == 1


def test_tensorboard_can_be_left_out(tmp_path: pathlib.Path) -> None:
    feed(RunLog(replace(SMALL, train__tensorboard=False), tmp_path, NEW), 14)
    assert not (tmp_path / workdirs.TENSORBOARD).exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_step(tmp_path: pathlib.Path, value: float) -> None:
    log = RunLog(SMALL, tmp_path, NEW)
    feed(log, 3)
    bad = sums(4, 6)
    np.asarray(bad.loss)[1] = value
    with pytest.raises(NonFiniteLossError, match=rf"the loss of step 5 is {value}: training stopped") as error:
        log.steps(bad, 0.1)
    assert error.value.exit_status == 3
    with pytest.raises(NonFiniteLossError, match="the loss on the test examples after step 4"):
        log.evaluation("test", loss=value, accuracy=0.5, examples=10)
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_a_full_disk_is_one_message(tmp_path: pathlib.Path) -> None:
    log = RunLog(SMALL, tmp_path, NEW)
    (tmp_path / workdirs.METRICS).unlink()
    (tmp_path / workdirs.METRICS).symlink_to("/dev/full")
    with pytest.raises(WorkdirError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        feed(log, 3)
    log.close()


def test_progress_outside_a_terminal_is_a_line_an_epoch(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mnist_flax")
    config: Config = SMALL
    log = RunLog(config, tmp_path, NEW)
    feed(log, 7)
    log.epoch_line()
    assert "epoch 1/2  loss " in caplog.text
    assert "images/s" in caplog.text
