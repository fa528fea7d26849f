"""The log counts every example once, has every line once, and can be continued from what a checkpoint contains."""

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from small_run import SMALL, events, lines

from mnist_flax.config import replace
from mnist_flax.errors import NonFiniteLossError, WorkdirError
from mnist_flax.run import log as logs
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import RunLog, means, read_log
from mnist_flax.run.progress import Progress

NEW: dict[str, Any] = {"origin": {}}


def open_log(folder: pathlib.Path, saved: dict[str, Any] = NEW, config: Any = SMALL) -> RunLog:
    """A log whose learning rate is an eighth of the step."""
    return RunLog(config, folder, saved, learning_rate=lambda step: np.float32(step) / 8, writes=True)


def sums(first: int, last: int) -> dict[str, np.ndarray]:
    """Made-up sums for the steps from `first` to `last`, with 32 examples each, and 8 at the end of an epoch."""
    steps = np.arange(first, last + 1)
    examples = np.where(steps % 7, 32, 8)
    return {
        "loss": np.float32(1) / steps,
        "accuracy": steps % 5,
        "examples": examples,
        "grad_norm": np.float32(0.1) * steps * examples,
    }


def feed(log: RunLog, *cuts: int) -> None:
    """Logs the steps that follow the log's last one, up to each of the `cuts` in turn."""
    for cut in cuts:
        log.add_steps(sums(log.step + 1, cut), seconds=0.25)


def test_line_averages_its_window_which_ends_with_the_epoch(tmp_path: pathlib.Path) -> None:
    feed(open_log(tmp_path), 1, 5, 14)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [3, 6, 7, 9, 12, 14]
    assert [line["examples"] for line in found] == [96, 96, 8, 64, 96, 40]
    assert [line["epoch"] for line in found] == [3 / 7, 6 / 7, 1.0, 9 / 7, 12 / 7, 2.0]
    assert found[5]["loss"] == pytest.approx((1 / 13 + 1 / 14) / 40)
    assert found[5]["accuracy"] == pytest.approx((3 + 4) / 40)
    assert [line["learning_rate"] for line in found] == [2 / 8, 5 / 8, 6 / 8, 8 / 8, 11 / 8, 13 / 8]
    assert list(found[0]) == ["step", "epoch", "split", "loss", "accuracy", "examples", "grad_norm", "learning_rate"]
    assert found[5]["grad_norm"] == pytest.approx((1.3 * 32 + 1.4 * 8) / 40)


@pytest.mark.parametrize(("every", "steps"), [(0, [7, 14]), (1, list(range(1, 15))), (100, [7, 14])])
def test_log_every_steps_sets_the_steps_of_lines(tmp_path: pathlib.Path, every: int, steps: list[int]) -> None:
    feed(open_log(tmp_path, config=replace(SMALL, train__log_every_steps=every)), 14)
    assert [line["step"] for line in lines(tmp_path)] == steps


@pytest.mark.parametrize("saved_at", range(14))
@pytest.mark.parametrize("torn", [b"", b'{"step": 3, "ep', b"\0\0\0"])
def test_log_resumed_from_a_snapshot_equals_an_uninterrupted_one(
    tmp_path: pathlib.Path, saved_at: int, torn: bytes
) -> None:
    quiet, folder = tmp_path / "quiet", tmp_path / "folder"
    quiet.mkdir()
    folder.mkdir()
    feed(open_log(quiet), *range(1, 15))
    log = open_log(folder)
    feed(log, *range(1, saved_at + 1))
    saved = json.loads(json.dumps(log.snapshot()))
    feed(log, 14)  # more steps than were saved; below, a line that was half written
    workdirs.append_bytes(folder / workdirs.METRICS, torn)
    again = open_log(folder, saved)
    assert (again.step, again.seconds, again.restarts) == (saved_at, saved["seconds"], 1)
    feed(again, *range(saved_at + 1, 15))
    assert lines(folder) == lines(quiet)
    assert events(folder) == events(quiet)
    expected = {name: pytest.approx(column.sum()) for name, column in sums(8, 14).items()}
    assert again.snapshot()["epoch_sums"] == expected


def test_snapshot_does_not_change_with_its_log(tmp_path: pathlib.Path) -> None:
    log = open_log(tmp_path)
    feed(log, 4)
    saved = log.snapshot()
    before = json.dumps(saved)
    feed(log, 14)
    assert json.dumps(saved) == before


def test_tensorboard_shows_every_metric_of_metrics_jsonl(tmp_path: pathlib.Path) -> None:
    log = open_log(tmp_path)
    feed(log, 7)
    log.add_evaluation("holdout", loss=0.5, accuracy=0.75, examples=20, brier=0.2)
    shown = [
        (line["step"], f"{line['split']}/{name}", pytest.approx(value))
        for line in lines(tmp_path)
        for name, value in line.items()
        if name not in ("step", "epoch", "split", "examples")
    ]
    assert {tag for _, tag, _ in shown} > {"train/grad_norm", "train/learning_rate", "holdout/brier"}
    assert events(tmp_path) == shown
    assert len(list((tmp_path / workdirs.TENSORBOARD).iterdir())) == 1


def test_tensorboard_can_be_left_out(tmp_path: pathlib.Path) -> None:
    feed(open_log(tmp_path, config=replace(SMALL, train__tensorboard=False)), 14)
    assert not (tmp_path / workdirs.TENSORBOARD).exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_stops_the_run_and_names_its_step(tmp_path: pathlib.Path, value: float) -> None:
    log = open_log(tmp_path)
    feed(log, 3)
    bad = sums(4, 6)
    bad["loss"][1] = value
    with pytest.raises(NonFiniteLossError, match=rf"the loss of step 5 is {value}; start again in another") as error:
        log.add_steps(bad, 0.1)
    assert error.value.exit_status == 3
    with pytest.raises(NonFiniteLossError, match="the loss on the test examples after step 4"):
        log.add_evaluation("test", loss=value, accuracy=0.5, examples=10)
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_metric_that_is_not_finite_is_null(tmp_path: pathlib.Path) -> None:
    log = open_log(tmp_path)
    odd = sums(1, 3)
    odd["grad_norm"][1] = math.inf
    log.add_steps(odd, 0.1)
    assert json.loads((tmp_path / workdirs.METRICS).read_text())["grad_norm"] is None
    assert "train/grad_norm" not in {tag for _, tag, _ in events(tmp_path)}


def test_means_count_every_example_once_and_allow_a_new_metric() -> None:
    steps: list[dict[str, float]] = [
        {"loss": 2.0, "accuracy": 1, "examples": 4},
        {"loss": 1.0, "accuracy": 2, "examples": 2, "new": 3.0},
    ]
    assert means(steps) == {"loss": 0.5, "accuracy": 0.5, "examples": 6, "new": 1.5}


def test_versions_are_listed_once_for_each_change(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = NEW
    for python in ("3.11.7", "3.11.7", "3.13.1", "3.11.7"):
        monkeypatch.setattr(logs, "versions", lambda python=python: {"python": python})
        saved = open_log(tmp_path, saved).snapshot()
    assert [entry["python"] for entry in saved["versions"]] == ["3.11.7", "3.13.1", "3.11.7"]


LINE = '{"step": 1, "split": "test", "epoch": 1.0, "seconds": 2, "loss": 0.5, "accuracy": 0.9, "examples": 3}'


@pytest.mark.parametrize(
    "damaged",
    [
        '{"step": 1}',
        "[]",
        "[" * 100_000,
        "{",
        LINE.replace("1,", '"1",', 1),
        LINE.replace("test", "valid"),
        LINE.replace("loss", "lost"),
        LINE.replace("0.9", '"0.9"'),
        LINE.replace("0.5", "null"),
        LINE.replace("examples", "rows"),
        LINE.replace("test", "train"),  # without a learning rate
    ],
)
def test_a_log_with_a_damaged_line_is_not_read(tmp_path: pathlib.Path, damaged: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINE + "\n")
    assert len(read_log(tmp_path)) == 1
    path.write_text(f"{LINE}\n{damaged}\n")
    assert read_log(tmp_path) == []


def test_full_disk_gives_one_message(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    monkeypatch.setattr(log, "_path", pathlib.Path("/dev/full"))
    with pytest.raises(WorkdirError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        feed(log, 3)


# Progress -------------------------------------------------------------------------------------------------------------


def test_progress_outside_a_terminal_prints_a_line_per_epoch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mnist_flax")
    progress = Progress(SMALL, 0)
    epoch = {"loss": 1.5, "accuracy": 0.5}
    progress.update(4, 0.5, [epoch])
    progress.update(7, 0.5, [epoch])
    assert not caplog.text
    progress.epoch_line(7, [epoch], [{"accuracy": 0.75}])
    assert "epoch 1/2  loss 1.5000  accuracy 50.00%  hold-out 75.00%  200 images/s  00:01 left" in caplog.text
    progress.close()


def test_progress_of_members_shows_their_range(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mnist_flax")
    progress = Progress(SMALL, 7, num_runs=2)
    epochs = [{"loss": 1.5, "accuracy": 0.5}, {"loss": 0.5, "accuracy": 0.75}]
    progress.update(14, 2.0, epochs)
    progress.epoch_line(14, epochs, [{"accuracy": 0.25}, {"accuracy": 0.75}])
    assert "epoch 2/2 of 2 members  hold-out 50.00% (25.00% to 75.00%)  200 images/s  00:00 left" in caplog.text


def test_progress_prints_within_a_long_epoch(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO", "mnist_flax")
    monkeypatch.setattr("mnist_flax.run.progress.PLAIN_LINE_SECONDS", 0.0)
    Progress(SMALL, 0).update(1, 0.5, [{"loss": 1.5, "accuracy": 0.5}])
    assert "epoch 0.1429/2  loss 1.5000" in caplog.text
    Progress(SMALL, 0, quiet=True).update(1, 0.5, [{"loss": 1.5, "accuracy": 0.5}])
    assert len(caplog.records) == 1
