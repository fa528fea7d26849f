"""Whatever happens to a run, the next one with the same command goes on, or says in one message why it cannot."""

import ast
import json
import pathlib
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
from killed_run import MOMENTS
from small_run import ROOT, SMALL, config_file, outcome, run, start, steps, summary

from mnist_flax import train
from mnist_flax.config import Config, replace
from mnist_flax.errors import NonFiniteLossError, UserError, WorkdirError
from mnist_flax.run import checkpoint
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.store import Store
from mnist_flax.train import fit

CONFIG = replace(SMALL, checkpoint__every_steps=4, checkpoint__keep_latest=1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the processes of these tests keep their compiled programs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run leaves."""
    workdir = tmp_path_factory.mktemp("quiet")
    fit(CONFIG, workdir)
    return outcome(workdir)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_is_taken_up(
    quiet: dict[str, Any], tmp_path: pathlib.Path, cache: pathlib.Path, moment: str
) -> None:
    config, workdir = tmp_path / "config.json", tmp_path / "run"
    config.write_text(CONFIG.to_json())
    killed = run("tests/killed_run.py", str(config), str(workdir), moment, cache=cache, devices=8)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    fit(CONFIG, workdir)
    assert outcome(workdir) == quiet
    assert steps(workdir)[-1] == 14
    assert not list(workdir.glob(".*.tmp"))
    assert not (workdir / workdirs.DAMAGED).exists()


def test_a_damaged_checkpoint_is_told_of_and_passed_over(
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


def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_finished(
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
        (signal.SIGINT, "rows to train on", "stopped at step "),  # while it compiles
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: pathlib.Path, cache: pathlib.Path, signum: int, wait: str, message: str
) -> None:
    config = config_file(replace(SMALL, train__epochs=10_000), tmp_path / "config.py")
    command = ("-m", "mnist_flax.main", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    for _ in range(2):
        with start(*command, cache=cache) as process:
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
        assert last.endswith("nothing is lost: the same command goes on from here")
        assert "Traceback" not in rest
        step = int(last.split()[3])
        if step:
            assert steps(tmp_path / "run")[-1] == step


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_data_are_loaded_leaves_with_nothing_written(
    tmp_path: pathlib.Path, signum: int, status: int
) -> None:
    config = config_file(SMALL, tmp_path / "config.py")
    script = (
        "import runpy, signal, sys, time; from mnist_flax import data;"
        # A shell's background job, as these tests may be, hands down an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "data.load_splits = lambda *_: (print('loading', flush=True), [time.sleep(0.1) for _ in range(1000)]);"
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


def test_a_signal_while_the_config_file_is_read_is_not_its_fault(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("import time\nprint('reading', flush=True)\nfor _ in range(1000):\n    time.sleep(0.1)\n")
    with start("-m", "mnist_flax.main", f"--config={config}") as process:
        assert process.stdout
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, "stopped\n")


# Numbers that are none ------------------------------------------------------------------------------------------------


def test_a_diverged_run_stops_and_its_checkpoint_stays_good(tmp_path: pathlib.Path) -> None:
    config = replace(SMALL, optimizer__name="sgd", optimizer__learning_rate=1e30, checkpoint__every_steps=1)
    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match=r"(the loss of|the largest weight after) step \d+ is") as error:
            fit(config, tmp_path)
        assert error.value.exit_status == 3
        if (tmp_path / workdirs.CHECKPOINTS).exists():
            state = checkpoint.load_run(tmp_path).state
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_spoilt_weights_are_not_saved_though_the_loss_was_finite(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = train.DRIVERS["scan"]

    def spoil(*arguments: Any) -> train.Advance:
        advance = scan(*arguments)

        def advance_and_spoil(state: Any, step: int, num_steps: int) -> Any:
            state, fetch = advance(state, step, num_steps)
            if step + num_steps == 10:
                state = state.replace(
                    params=jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.nan), state.params)
                )
            return state, fetch

        return advance_and_spoil

    monkeypatch.setitem(train.DRIVERS, "scan", spoil)
    monkeypatch.setattr(jax, "transfer_guard", lambda _: pytest.MonkeyPatch.context())
    config = replace(SMALL, checkpoint__every_steps=5)
    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match="the largest weight after step 10 is nan"):
            fit(config, tmp_path)
        assert steps(tmp_path)[-1] == 7


# Forks ----------------------------------------------------------------------------------------------------------------


def test_a_fork_starts_with_the_weights_of_another_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    fit(SMALL, old)
    source = checkpoint.load_run(old).state
    config = replace(SMALL, optimizer__learning_rate=1e-4, seed=3)
    state, origin = train.begin(config, old)
    for name in ("params", "batch_stats", "ema"):
        there, here = (jax.tree.leaves(jax.device_get(getattr(s, name))) for s in (source, state))
        assert there and all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))
    assert int(state.step) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    fit(config, new, fork=old)
    assert summary(new)["fork"] == origin["fork"] == {"workdir": str(old), "step": 14}
    assert summary(old)["fork"] is None
    # On resume the source is not needed any more, and another run cannot become a fork.
    shutil.rmtree(old)
    fit(replace(config, train__epochs=3), new, fork=old)
    assert summary(new)["fork"]["step"] == 14
    fit(SMALL, old)
    with pytest.raises(WorkdirError, match=r"--fork=.+ holds a run that began without it"):
        fit(SMALL, old, fork=new)


def test_a_fork_that_does_not_fit_writes_nothing(tmp_path: pathlib.Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with pytest.raises(WorkdirError, match="holds no checkpoints/"):
        fit(SMALL, new, fork=old)
    fit(SMALL, old)
    with pytest.raises(WorkdirError, match=r"Dense_1.+float32\(8, 10\) there, float32\(5, 10\) here"):
        fit(replace(SMALL, model__dense=(5,)), new, fork=old)
    assert not new.exists()


# Bad input ------------------------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "raises": "def get_config():\n    raise RuntimeError('no luck')\n",
    "is no Python": "this is: no python(",
    "returns None": "def get_config():\n    return None\n",
    "returns rubbish": "def get_config():\n    return 7\n",
    "returns a list": "def get_config():\n    return [1, 2]\n",
    "has no get_config": "x = 1\n",
    "exits": "import sys\nsys.exit(0)\n",
    "has a number that is none": (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'optimizer': {'learning_rate': float('nan')}})\n"
    ),
    "has no rows": (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'data': {'num_train': 100, 'holdout': 100}})\n"
    ),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_config_file_that_is_none_is_one_message(tmp_path: pathlib.Path, kind: str) -> None:
    config = tmp_path / "config.py"
    config.write_text(BAD_CONFIGS[kind])
    done = run("-m", "mnist_flax.main", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode not in (0, -signal.SIGKILL), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_one_message(tmp_path: pathlib.Path) -> None:
    config = config_file(SMALL, tmp_path / "config.py")
    done = run("-m", "mnist_flax.main", f"--config={config}", f"--workdir={config}")
    assert (done.returncode, done.stderr) == (2, f"error: --workdir={config}: is a file; name a folder\n")


def test_an_error_before_the_first_step_leaves_no_folder(tmp_path: pathlib.Path) -> None:
    for wrong in ({"data__source": "tfds", "data__name": "kmnist", "data__data_dir": str(tmp_path / "none")},):
        config = replace(Config(), data__on_missing="error", **wrong)
        with pytest.raises(UserError):
            fit(config, tmp_path / "run")
        assert not list(tmp_path.iterdir())


def test_nothing_is_pickled() -> None:
    """Opening a stranger's workdir executes nothing."""
    for path in (ROOT / "mnist_flax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.literal_eval(node.value) is False, path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path


# Torture --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["kill", "term", "damage"])
@pytest.mark.slow
def test_torture_of_every_kind(mode: str) -> None:
    done = run("scripts/torture.py", f"--mode={mode}", "--runs=5", "--minutes=4")
    check_torture(done.stdout, mode)


@pytest.mark.timeout(900)  # half a dozen processes, each of which compiles
def test_a_little_torture() -> None:
    done = run("scripts/torture.py", "--mode=damage", "--runs=1", "--minutes=14")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == 1
    assert json.loads(done.stdout)["differing"] == json.loads(done.stdout)["needing_help"] == 0


def check_torture(line: str, mode: str) -> None:
    result = json.loads(line)
    assert (result["mode"], result["differing"], result["needing_help"]) == (mode, 0, 0)
    assert result["runs"] >= 1
    assert result["happened"]["hits"] >= 1
