"""Checkpoints: which are kept, which count as damaged, and which programs can read them."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open
from saved_runs import (
    FINGERPRINT,
    at,
    empty,
    flip,
    initial_state,
    record,
    restored,
    same,
    save,
    save_two,
    truncate,
    zero,
)
from small_run import SMALL, run, steps

from mnist_flax.config import Config, replace
from mnist_flax.errors import WorkdirError
from mnist_flax.run import checkpoint, checkpoint_files
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.checkpoint import load_run
from mnist_flax.run.store import open_store
from mnist_flax.run.weights import save_weights
from mnist_flax.step import eval_variables


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run with checkpoints at 3 and 6."""
    return save_two(tmp_path)


def test_checkpoint_restores_the_saved_state_bit_for_bit(tmp_path: pathlib.Path) -> None:
    with open_store(SMALL, FINGERPRINT, tmp_path) as store:
        assert store.restore_latest() == (None, [])
        assert not list(tmp_path.iterdir())  # looking for checkpoints creates no files
        saved = at(initial_state(), 5)
        keys = jax.tree.map(lambda leaf: leaf.copy(), saved)
        store.save(saved, record(5))
        jax.tree.map(lambda leaf: leaf.delete(), saved)  # as a donated buffer is
        store.wait()
        found, _ = store.restore_latest()
    assert found
    assert same(found.state, keys)
    assert found.record["window"] == record(5)["window"]
    assert found.record["schema"] == checkpoint.SCHEMA
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found.state))
    assert same(load_run(tmp_path).state, keys)
    assert load_run(tmp_path).config.to_dict() == SMALL.to_dict()


@pytest.mark.parametrize(
    ("keep", "accuracies", "kept"),
    [
        ((2, 1), [0.9, 0.1, 0.2, 0.3], [1, 3, 4]),  # the best is not among the newest
        ((1, 1), [0.1, 0.2, 0.9], [3]),
        ((1, 0), [0.9, 0.2, 0.1], [3]),
        ((1, 2), [0.5, 0.9, 0.7, 0.1], [2, 3, 4]),
        ((1, 1), [0.5, 0.5, 0.4], [2, 3]),  # of equally good ones the later is kept
        ((1, 1), [None, None, None], [3]),  # nothing held out
        ((1, 1), [0.5, None, None], [1, 3]),
    ],
)
def test_latest_and_the_best_are_kept(
    tmp_path: pathlib.Path, keep: tuple[int, int], accuracies: list[float | None], kept: list[int]
) -> None:
    config = replace(SMALL, checkpoint__keep_latest=keep[0], checkpoint__keep_best=keep[1])
    with open_store(config, FINGERPRINT, tmp_path / "at once") as store:
        (tmp_path / "at once").mkdir()
        for step, accuracy in enumerate(accuracies, start=1):
            save(store, initial_state(), step, accuracy)
    for step, accuracy in enumerate(accuracies, start=1):  # each by a new store, as after a restart
        (tmp_path / "apart").mkdir(exist_ok=True)
        with open_store(config, FINGERPRINT, tmp_path / "apart") as store:
            save(store, initial_state(), step, accuracy)
    assert steps(tmp_path / "at once") == steps(tmp_path / "apart") == kept


def test_best_latest_and_steps_can_be_loaded(tmp_path: pathlib.Path) -> None:
    with open_store(replace(SMALL, checkpoint__keep_latest=5), FINGERPRINT, tmp_path) as store:
        for step, accuracy in enumerate([0.1, 0.8, 0.3, None], start=1):
            save(store, initial_state(), step, accuracy)
    found = {which: int(load_run(tmp_path, which).state.step) for which in ("latest", "best", "3")}
    assert found == {"latest": 4, "best": 2, "3": 3}
    for which in ("7", "first", "-1", "²"):
        with pytest.raises(WorkdirError, match=rf"no checkpoint '{which}'; choose latest, best or a step: 1, 2, 3, 4"):
            load_run(tmp_path, which)
    with pytest.raises(WorkdirError, match="no such folder"):
        load_run(tmp_path / "elsewhere")


def test_leftovers_of_killed_runs_are_removed(workdir: pathlib.Path) -> None:
    folder = workdir / workdirs.CHECKPOINTS
    for name in ("9.unfinished", "9.unfinished.orbax-checkpoint-tmp-1", "2.unfinished"):
        shutil.copytree(folder / "6", folder / name)
    assert restored(workdir) == (6, [])
    assert steps(workdir) == [3, 6]


HARMS = [pathlib.Path.unlink, truncate, empty, zero, flip]


# Each file is damaged in one way here, and in all five ways in the slow tests.
@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(HARMS)))])
def test_damage_to_any_file_is_noticed(
    workdir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, first: int
) -> None:
    newest = workdir / workdirs.CHECKPOINTS / "6"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) > 8
    for i, name in enumerate(files, first):
        copy = tmp_path_factory.mktemp("copy") / "run"
        shutil.copytree(workdir, copy)
        HARMS[i % len(HARMS)](copy / workdirs.CHECKPOINTS / "6" / name)
        with open_store(SMALL, FINGERPRINT, copy) as store:
            found, skipped = store.restore_latest()
            assert found and same(found.state, at(initial_state(), 3)), name
            assert len(skipped) == 1
            assert skipped[0].startswith("checkpoint 6 is damaged (")
            assert skipped[0].endswith(f"moved to {copy / workdirs.DAMAGED / '6'}")
            save(store, initial_state(), 6)  # the same step can be saved again
        assert restored(copy) == (6, [])
        assert steps(copy) == [3, 6]


def test_second_damaged_checkpoint_does_not_replace_the_first(workdir: pathlib.Path) -> None:
    for count in (1, 2):
        empty(workdir / workdirs.CHECKPOINTS / "6" / "record" / "metadata")
        with open_store(SMALL, FINGERPRINT, workdir) as store:
            assert len(store.restore_latest()[1]) == 1
            save(store, initial_state(), 6)
        assert len(list((workdir / workdirs.DAMAGED).iterdir())) == count
    assert restored(workdir) == (6, [])


def test_run_starts_anew_when_no_checkpoint_is_good(workdir: pathlib.Path) -> None:
    for name in ("3", "6"):
        shutil.rmtree(workdir / workdirs.CHECKPOINTS / name / "state")
    step, skipped = restored(workdir)
    assert step is None
    assert [line.split(" is damaged")[0] for line in skipped] == ["checkpoint 6", "checkpoint 3"]
    assert sorted(path.name for path in (workdir / workdirs.DAMAGED).iterdir()) == ["3", "6"]


def test_loading_a_damaged_checkpoint_is_refused_and_moves_nothing(workdir: pathlib.Path) -> None:
    zero(workdir / workdirs.CHECKPOINTS / "6" / "state" / "manifest.ocdbt")
    with pytest.raises(WorkdirError, match=r"checkpoint 6 is damaged \(.+\); the others are: 3"):
        load_run(workdir)
    empty(workdir / workdirs.CHECKPOINTS / "6" / "record" / "metadata")
    with pytest.raises(WorkdirError, match="checkpoint 6 is damaged"):
        load_run(workdir)
    assert int(load_run(workdir, "best").state.step) == 3
    assert steps(workdir) == [3, 6]  # loading moves nothing


# Portable -------------------------------------------------------------------------------------------------------------

SAVE = """
import json, pathlib, sys
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mnist_flax import rng
from mnist_flax.run.store import open_store
from mnist_flax.config import Config
from mnist_flax.drivers import jit_init_state
sys.path.insert(0, "tests")
from saved_runs import record
config = Config.from_dict(json.loads(sys.argv[2]))
state = jit_init_state(config.program, rng.root_key(0))
mesh = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec())
state = jax.device_put(state, mesh)
assert len(state.step.sharding.device_set) == jax.device_count() == int(sys.argv[3])
with open_store(config, "f" * 64, pathlib.Path(sys.argv[1])) as store:
    store.save(state, record(0))
"""

LOAD = """
import json, pathlib, sys
import jax
from mnist_flax.run.checkpoint import load_run
assert jax.device_count() == 1
for folder in sys.argv[1:]:
    print(sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(load_run(pathlib.Path(folder)).state.params)))
"""


def test_checkpoint_loads_on_any_number_of_devices(tmp_path: pathlib.Path, workdir: pathlib.Path) -> None:
    assert jax.device_count() == 8
    many = tmp_path / "many"
    many.mkdir()
    saved = run("-c", SAVE, str(many), SMALL.to_json(), "8", devices=8)
    assert saved.returncode == 0, saved.stderr
    assert same(load_run(many).state, initial_state())
    folders = (many, workdir)  # both were saved by processes with eight devices
    loaded = run("-c", LOAD, *map(str, folders), devices=1)
    expected = [sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(load_run(f).state.params)) for f in folders]
    assert list(map(float, loaded.stdout.split())) == expected, loaded.stderr
    assert min(expected) > 0


def test_checksums_can_be_checked_with_sha256sum(workdir: pathlib.Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    command = ["sha256sum", "--check", "--strict", "--quiet", "files.sha256"]
    subprocess.run(command, cwd=workdir / workdirs.CHECKPOINTS / "6", check=True)


def test_orbax_alone_reads_a_checkpoint(workdir: pathlib.Path) -> None:
    import orbax.checkpoint as ocp

    folder = workdir / workdirs.CHECKPOINTS
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder / "6" / "state")["params"]
    assert same(params, jax.device_get(at(initial_state(), 6).params))
    with ocp.CheckpointManager(folder) as manager:
        assert list(manager.all_steps()) == [3, 6]
        items = manager.restore(6, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        assert items["record"]["fingerprint"] == FINGERPRINT


def test_weights_need_no_framework(tmp_path: pathlib.Path) -> None:
    variables = eval_variables(initial_state())
    save_weights(SMALL, tmp_path, variables)
    with safe_open(tmp_path / workdirs.WEIGHTS, framework="numpy") as file:
        assert Config.from_dict(json.loads(file.metadata()["config"])).to_dict() == SMALL.to_dict()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    assert np.array_equal(arrays["params/Conv_0/kernel"], variables["params"]["Conv_0"]["kernel"])
    assert np.array_equal(arrays["batch_stats/BatchNorm_0/var"], variables["batch_stats"]["BatchNorm_0"]["var"])
    assert len(arrays) == len(jax.tree.leaves(variables))


def test_weights_may_be_in_lists_and_scalars(tmp_path: pathlib.Path) -> None:
    save_weights(SMALL, tmp_path, {"params": {"mixed": [np.ones(2, np.float32), np.float32(3)]}})
    with safe_open(tmp_path / workdirs.WEIGHTS, framework="numpy") as file:
        assert file.get_tensor("params/mixed/0").shape == (2,)
        assert file.get_tensor("params/mixed/1").shape == ()


def test_a_checkpoint_that_cannot_be_read_now_is_neither_set_aside_nor_pruned(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the file system says nothing about the content of the files, which may be intact."""
    restore = checkpoint_files.restore

    def refuse(folder: pathlib.Path, *item: Any) -> Any:
        if folder.name == "6":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return restore(folder, *item)

    monkeypatch.setattr(checkpoint_files, "restore", refuse)
    with open_store(SMALL, FINGERPRINT, workdir) as store:
        with pytest.raises(WorkdirError, match=r"checkpoint 6 cannot be read \(Permission denied\); fix that"):
            store.restore_latest()
        for step in (7, 8, 9):
            save(store, initial_state(), step)
    assert {6, 8, 9} <= set(steps(workdir))
    assert not (workdir / workdirs.DAMAGED).exists()
    with pytest.raises(WorkdirError, match=r"checkpoint 6 cannot be read \(Permission denied\)"):
        load_run(workdir, "6")


def test_a_damaged_best_checkpoint_is_named(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(replace(SMALL, checkpoint__keep_latest=5), FINGERPRINT, tmp_path) as store:
        for step, accuracy in enumerate([0.1, 0.8, 0.3], start=1):
            save(store, initial_state(), step, accuracy)
    truncate(next((tmp_path / workdirs.CHECKPOINTS / "2" / "record").iterdir()))
    assert int(load_run(tmp_path, "best").state.step) == 3
    assert "checkpoints/2 is not compared with the others: is damaged (" in caplog.text
    assert checkpoint.flaw(WorkdirError("2: is intact")) == "cannot be used (2: is intact)"
