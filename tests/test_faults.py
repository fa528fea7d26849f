"""Whatever happens to a run, the same command continues it, or explains in one message why it cannot."""

import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from typing import Any

import forked
import pytest
from killed_run import MOMENTS
from small_run import SMALL, config_file, environment, outcome, run, start, steps, summary

from mnist_flax import members, train
from mnist_flax.config import Config, replace
from mnist_flax.errors import WorkdirError
from mnist_flax.run import checkpoint
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.store import Store
from mnist_flax.train import fit

CONFIG = replace(SMALL, checkpoint__every_steps=4, checkpoint__keep_latest=1)


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("quiet")
    fit(CONFIG, workdir)
    return outcome(workdir)


# One moment while each kind of file is written, and one while none is; tests of the other moments are slow.
FAST_MOMENTS = ["while Orbax writes", "while a line is written", "before its summary"]


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=[] if moment in FAST_MOMENTS else [pytest.mark.slow]) for moment in MOMENTS]
)
def test_killed_run_is_continued(quiet: dict[str, Any], tmp_path: pathlib.Path, moment: str) -> None:
    config, workdir = tmp_path / "config.json", tmp_path / "run"
    config.write_text(CONFIG.to_json())
    killed = forked.run("tests/killed_run.py", str(config), str(workdir), moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    fit(CONFIG, workdir)
    assert outcome(workdir) == quiet
    assert steps(workdir)[-1] == 14
    assert not list(workdir.glob(".*.tmp"))
    assert not (workdir / workdirs.DAMAGED).exists()


@pytest.mark.parametrize("moment", ["before its report", pytest.param("after its report", marks=pytest.mark.slow)])
def test_run_killed_at_its_report_writes_it_on_resume(tmp_path: pathlib.Path, moment: str) -> None:
    config, workdir = tmp_path / "config.json", tmp_path / "run"
    config.write_text(replace(CONFIG, train__report=True).to_json())
    killed = forked.run("tests/killed_run.py", str(config), str(workdir), moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (workdir / workdirs.SUMMARY).exists()  # so the run does not count as finished
    fit(Config.from_dict(json.loads(config.read_text())), workdir)
    assert summary(workdir)["steps"] == 14
    assert (workdir / "report" / "index.html").read_text().rstrip().endswith("</html>")
    assert not list(workdir.rglob(".*.tmp"))


@pytest.mark.parametrize("name", ["index.html", "demo.html"])
def test_run_whose_last_page_finds_the_disk_full_writes_it_on_resume(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    replace_file = pathlib.Path.replace

    def full(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace_file(path, target)

    config = replace(CONFIG, train__report=name == "index.html", train__demo=name == "demo.html")
    message = rf"{name}: cannot be written \(No space left on device\); fix that, and the same command continues"
    with monkeypatch.context() as patch, pytest.raises(WorkdirError, match=message):
        patch.setattr(pathlib.Path, "replace", full)
        fit(config, tmp_path)
    assert not (tmp_path / workdirs.SUMMARY).exists()  # so the run does not count as finished
    fit(config, tmp_path)
    assert summary(tmp_path)["steps"] == 14
    (page,) = tmp_path.rglob(name)
    assert page.read_text().rstrip().endswith("</html>")
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_run_that_is_stopped_while_it_writes_its_results_finishes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = members.finish

    def finish_and_stop(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finish(*arguments)

    monkeypatch.setattr(train, "finish", finish_and_stop)
    fit(CONFIG, tmp_path)
    assert summary(tmp_path)["steps"] == 14


def test_damaged_checkpoint_is_reported_and_skipped(
    quiet: dict[str, Any], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("anything")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="anything"):
        patch.setattr(train, "finish", fail)
        fit(replace(CONFIG, checkpoint__keep_latest=2), tmp_path)
    assert steps(tmp_path)[-2:] == [12, 14]
    shutil.rmtree(tmp_path / workdirs.CHECKPOINTS / "14" / "state" / "d")
    fit(CONFIG, tmp_path)
    assert "checkpoint 14 is damaged (" in caplog.text
    assert f"moved to {tmp_path / workdirs.DAMAGED / '14'}" in caplog.text
    assert outcome(tmp_path) == quiet
    assert summary(tmp_path)["restarts"] == 1


def test_run_without_its_last_checkpoint_is_not_finished(
    quiet: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Store._write

    def full(self: Store, arrays: Any, record: dict[str, Any]) -> None:
        if record["step"] == 14:
            raise WorkdirError("the disk is full")
        write(self, arrays, record)

    with monkeypatch.context() as patch, pytest.raises(WorkdirError, match="the disk is full"):
        patch.setattr(Store, "_write", full)
        fit(CONFIG, tmp_path)
    assert not (tmp_path / workdirs.SUMMARY).exists()
    fit(CONFIG, tmp_path)
    assert outcome(tmp_path) == quiet


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "wait", "message"),
    [
        (signal.SIGTERM, "images/s", "stopped at step "),
        # While it compiles.
        pytest.param(signal.SIGINT, "rows to train on", "stopped at step ", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "images/s", "stopped at step ", marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_says_how_to_continue(tmp_path: pathlib.Path, signum: int, wait: str, message: str) -> None:
    config = config_file(replace(SMALL, train__epochs=10_000, checkpoint__every_epochs=0), tmp_path / "config.py")
    command = ("-m", "mnist_flax.main", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    for _ in range(2):
        with start(*command) as process:
            assert process.stderr
            said = ""
            while wait not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            process.send_signal(signum)
            _, rest = process.communicate(timeout=100)
        last = rest.strip().splitlines()[-1]
        assert process.returncode == 128 + signum, rest
        assert last.startswith(message)
        assert last.endswith("nothing is lost: the same command continues from here")
        assert "Traceback" not in rest
        step = int(last.split()[3])
        if step:
            assert steps(tmp_path / "run")[-1] == step


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_while_data_are_loaded_ends_with_nothing_written(
    tmp_path: pathlib.Path, signum: int, status: int
) -> None:
    config = config_file(SMALL, tmp_path / "config.py")
    script = (
        "import runpy, signal, sys, time; from mnist_flax import train;"
        # In a shell's background job, SIGINT is ignored, and child processes inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "train.load_splits = lambda *_: (print('loading', flush=True), [time.sleep(0.1) for _ in range(1000)]);"
        f"sys.argv = ['main', '--config={config}', '--workdir={tmp_path / 'run'}'];"
        "runpy.run_module('mnist_flax.main', run_name='__main__', alter_sys=True)"
    )
    with start("-c", script) as process:
        assert process.stdout
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (status, "stopped\n")
    assert not (tmp_path / "run").exists()


def test_signal_while_a_preset_runs_is_not_reported_as_its_error(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("import time\nprint('reading', flush=True)\nfor _ in range(1000):\n    time.sleep(0.1)\n")
    with start("-m", "mnist_flax.main", f"--config={config}") as process:
        assert process.stdout
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, "stopped\n")


# A console that goes away ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "redirection",
    [
        "2>&1 | head -1 >&2",
        *(pytest.param(text, marks=pytest.mark.slow) for text in (">&- 2>&- <&-", "2>&-", "2>/dev/full")),
    ],
)
def test_run_continues_without_a_console(tmp_path: pathlib.Path, redirection: str) -> None:
    config = config_file(SMALL, tmp_path / "config.py")
    script = f"set -o pipefail; {sys.executable} -m mnist_flax.main --config={config} --workdir={tmp_path / 'run'}"
    command = ["bash", "-c", f"{script} {redirection}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["steps"] == 14


def test_run_continues_when_its_terminal_is_closed(tmp_path: pathlib.Path) -> None:
    config = config_file(replace(SMALL, train__epochs=40, checkpoint__every_epochs=0), tmp_path / "config.py")
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a progress bar needs a width
    command = [sys.executable, "-m", "mnist_flax.main", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, env=environment(), stdin=its_end, stdout=its_end, stderr=its_end)
    os.close(its_end)
    said = b""
    while not re.search(rb"accuracy [0-9.]+%  \d\d:\d\d left +\d+%\|", said):
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(timeout=200) == 0
    assert summary(tmp_path / "run")["steps"] == 280


# A stranger's folder --------------------------------------------------------------------------------------------------

WRITTEN = ["config.json", "metrics.jsonl", "summary.json", "weights.safetensors", "report", "tensorboard"]
WRITTEN += ["checkpoints_damaged", ".mnist_flax.owner.json", ".summary.json.tmp"]


@pytest.mark.parametrize("name", WRITTEN)
def test_no_link_in_a_run_is_written_through(
    tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, name: str, half_way: pathlib.Path
) -> None:
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(half_way, workdir)
    outside.mkdir()
    (outside / "file").write_text("precious")
    workdirs.remove(workdir / name)
    is_folder = name in ("report", "tensorboard", "checkpoints_damaged")
    (workdir / name).symlink_to(outside if is_folder else outside / "file")
    if name == "checkpoints_damaged":
        newest = max(checkpoint.steps_in(workdir / "checkpoints"))
        (workdir / "checkpoints" / str(newest) / "files.sha256").unlink()
    try:
        fit(replace(CONFIG, train__report=name == "report"), workdir)
    except WorkdirError as error:
        assert "symbolic link" in str(error)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "precious"


@pytest.fixture(scope="session")
def half_way(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run with a checkpoint at step 7 of 14."""
    workdir = tmp_path_factory.mktemp("half way") / "run"
    fit(replace(CONFIG, train__epochs=1), workdir)
    return workdir


# Torture --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["kill", "term", "hangup", "damage", "end", "console", "disk"])
@pytest.mark.slow
def test_tortured_runs_finish_like_undisturbed_ones(mode: str) -> None:
    done = run("scripts/torture.py", f"--mode={mode}", "--runs=5", "--minutes=4")
    result = json.loads(done.stdout)
    assert (result["mode"], result["differing"], result["needing_help"]) == (mode, 0, 0), done.stderr
    assert result["runs"] >= 1
    assert sum(result["happened"].values()) >= 1
