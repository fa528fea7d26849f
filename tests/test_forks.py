"""Forks, and runs that diverge or cannot start: they give one message and write no bad file."""

import ast
import pathlib
import re
import shutil
from typing import Any

import forked
import jax
import numpy as np
import pytest
from small_run import ROOT, SMALL, config_file, steps, summary

from mnist_flax import drivers, members, train
from mnist_flax.analysis.evaluation import load_predictor
from mnist_flax.analysis.report.write import repeat_command
from mnist_flax.config import Config, replace
from mnist_flax.errors import NonFiniteLossError, UserError, WorkdirError
from mnist_flax.exporting import card
from mnist_flax.run import checkpoint, provenance
from mnist_flax.run import log as logs
from mnist_flax.run import workdir as workdirs
from mnist_flax.train import fit


def test_diverged_run_stops_and_its_checkpoint_stays_good(tmp_path: pathlib.Path) -> None:
    config = replace(SMALL, optimizer__name="sgd", optimizer__learning_rate=1e30, checkpoint__every_steps=1)
    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match=r"(the loss of|the largest weight after) step \d+ is") as error:
            fit(config, tmp_path)
        assert error.value.exit_status == 3
        if (tmp_path / workdirs.CHECKPOINTS).exists():
            state = checkpoint.load_run(tmp_path).state
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_non_finite_weights_are_not_saved(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = drivers.scan_steps

    def corrupting(*arguments: Any) -> drivers.Advance:
        advance = make(*arguments)

        def advance_and_corrupt(states: Any, num_steps: int) -> Any:
            states, metrics = advance(states, num_steps)
            if int(states.step[0]) == 10:
                params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.nan), states.params)
                states = states.replace(params=params)
            return states, metrics

        return advance_and_corrupt

    monkeypatch.setattr(drivers, "scan_steps", corrupting)
    monkeypatch.setattr(jax, "transfer_guard", lambda _: pytest.MonkeyPatch.context())
    config = replace(SMALL, checkpoint__every_steps=5)
    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match="the largest weight after step 10 is nan"):
            fit(config, tmp_path)
        assert steps(tmp_path)[-1] == 7


def test_fork_starts_with_the_weights_of_another_run(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    fit(SMALL, old)
    source = checkpoint.load_run(old).state
    config = replace(SMALL, seed=3)
    state, started_from = members.initial_state(config, old)
    for name, of_source in (("params", "ema"), ("batch_stats", "batch_stats"), ("ema", "ema")):
        there, here = (jax.tree.leaves(part) for part in (getattr(source, of_source), getattr(state, name)))
        assert there and all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))
    assert int(state.step) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert "batch norm's running averages need about 300 steps" in caplog.text
    caplog.clear()
    fit(config, new, fork=old)
    assert "running averages" not in caplog.text  # they begin with those of `old`
    assert summary(new)["fork"] == started_from == {"workdir": str(old), "step": 14}
    assert summary(old)["fork"] is None
    again = repeat_command(new / "report", new, summary(new)["fork"])  # outside the working directory
    assert again.endswith(f"--config={new}/report/config.py --workdir={new}-again --fork={old}")
    monkeypatch.chdir(tmp_path)
    assert repeat_command(new / "report", new, summary(new)["fork"]).endswith(" --workdir=new-again --fork=old")
    again = repeat_command(tmp_path / "a b", new, None)
    assert again == "python -m mnist_flax.main '--config=a b/config.py' --workdir=new-again"
    assert card._recipe(*load_predictor(new))["started from"] == "the weights of `old` at step 14"
    # Resuming does not need the source any more, and a run that is no fork cannot become one.
    shutil.rmtree(old)
    fit(replace(config, train__epochs=3), new, fork=old)
    assert summary(new)["fork"]["step"] == 14
    with caplog.at_level("WARNING"):
        fit(replace(config, train__epochs=3), new, fork=tmp_path / "other")
    assert f"--fork={tmp_path / 'other'} is not read: this run started from the weights of {old}" in caplog.text
    fit(SMALL, old)
    with pytest.raises(WorkdirError, match=r"--fork=.+ holds a run that began without it"):
        fit(SMALL, old, fork=new)


def test_fork_that_does_not_fit_writes_nothing(tmp_path: pathlib.Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with pytest.raises(WorkdirError, match=f"^--fork: {old}: no such folder"):
        fit(SMALL, new, fork=old)
    fit(SMALL, old)
    with pytest.raises(WorkdirError, match=r"Dense_1.+float32\(8, 10\) there, float32\(5, 10\) here"):
        fit(replace(SMALL, model__dense=(5,)), new, fork=old)
    assert not new.exists()


def test_workdir_that_is_a_file_gives_one_message(tmp_path: pathlib.Path) -> None:
    config = config_file(SMALL, tmp_path / "config.py")
    done = forked.run("-m", "mnist_flax.main", f"--config={config}", f"--workdir={config}")
    assert (done.returncode, done.stderr) == (2, f"error: --workdir={config}: is a file; name a folder\n")


def test_error_before_the_first_step_leaves_no_folder(tmp_path: pathlib.Path) -> None:
    for wrong in ({"data__source": "tfds", "data__name": "kmnist", "data__data_dir": str(tmp_path / "none")},):
        config = replace(Config(), data__on_missing="error", **wrong)
        with pytest.raises(UserError):
            fit(config, tmp_path / "run")
        assert not list(tmp_path.iterdir())


def test_nothing_is_pickled() -> None:
    """Opening a workdir from someone else executes no code."""
    for path in (ROOT / "mnist_flax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.literal_eval(node.value) is False, path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec") or path.name == "preset.py", path


def test_a_resumed_run_on_another_number_of_cores_warns(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    origin = {"fork": None, "versions": provenance.versions()}
    members.check_origin(origin, None, None, {}, tmp_path)
    assert not caplog.text
    monkeypatch.setattr(provenance, "num_cores", lambda: 1000)
    members.check_origin(origin, None, None, {}, tmp_path)
    assert re.search(r"its result may differ: cpu .+, \d+ cores -> .+, 1000 cores", caplog.text)


@pytest.mark.parametrize(
    ("name", "value"), [("XLA_FLAGS", "--xla_gpu_deterministic_ops=true"), ("JAX_ENABLE_X64", "1")]
)
def test_variables_that_change_rounding_belong_to_the_setup(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert name not in members.setup_of(SMALL, num_devices=1)
    monkeypatch.setenv(name, value)
    assert members.setup_of(SMALL, num_devices=1)[name] == value


def test_a_run_resumed_with_another_driver_warns(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(SMALL, tmp_path)
    assert "setup" not in caplog.text
    fit(replace(SMALL, train__epochs=SMALL.train.epochs + 1, train__driver="stream"), tmp_path)
    assert "this run began with another setup, so its result may differ: driver scan -> stream" in caplog.text


def test_a_run_on_two_versions_of_python_lists_both(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = provenance.versions()
    before = now | {"python": "3.10.0"}
    with monkeypatch.context() as patch:
        for module in (logs, members):
            patch.setattr(module, "versions", lambda: before)
        fit(replace(SMALL, train__epochs=1), tmp_path)
    fit(SMALL, tmp_path)
    assert (summary(tmp_path)["earlier_versions"], summary(tmp_path)["versions"]) == ([before], now)


def test_a_field_without_effect_is_announced_before_training(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train, "train_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(replace(SMALL, optimizer__nesterov=True), tmp_path)
    assert "config.optimizer.nesterov: changed, but not used by adam with the schedule constant" in caplog.text
