"""Checkpoints that do not fit, are malformed or lie behind links are refused, and none is moved as damaged."""

import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from saved_runs import (
    FINGERPRINT,
    initial_state,
    record,
    restored,
    save,
    save_two,
    truncate,
)
from small_run import SMALL, steps

from mnist_flax.config import replace
from mnist_flax.errors import ConfigError, WorkdirError
from mnist_flax.run import checkpoint, checkpoint_files
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.checkpoint import load_run
from mnist_flax.run.store import open_store


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run with checkpoints at 3 and 6."""
    return save_two(tmp_path)


def test_another_config_or_other_data_are_refused_field_by_field(workdir: pathlib.Path) -> None:
    config = replace(SMALL, seed=1, optimizer__learning_rate=0.5, model__dense=(9, 9), train__epochs=3)
    with (
        pytest.raises(WorkdirError, match="holds a run that differs from this one") as error,
        open_store(config, "e" * 64, workdir) as store,
    ):
        store.restore_latest()
    for line in (
        "  config.seed: 0 there, 1 now",
        "  config.optimizer.learning_rate: 0.001 there, 0.5 now",
        "  config.model.dense: (8,) there, (9, 9) now",
        f"  fingerprint of the data: {'f' * 64} there, {'e' * 64} now",
        "To start a new one, name another --workdir.",
    ):
        assert line in str(error.value)
    assert "epochs" not in str(error.value)  # a constant learning rate does not depend on the number of epochs
    assert steps(workdir) == [3, 6]


def test_a_run_with_the_same_network_can_be_forked(workdir: pathlib.Path) -> None:
    fork = rf"name another --workdir; with --fork={workdir} it starts from that run's weights"
    with pytest.raises(WorkdirError, match=fork):
        restored(workdir, replace(SMALL, seed=1))


def test_a_mistake_in_a_network_is_not_damage(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise ConfigError("config.model: the network of My fails")

    with pytest.raises(ConfigError, match="the network of My fails"), monkeypatch.context() as patch:
        patch.setattr(checkpoint, "state_shapes", fail)
        restored(workdir)
    assert restored(workdir) == (6, [])


def test_an_intact_checkpoint_that_does_not_fit_in_memory_is_not_damage(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = checkpoint_files.restore

    def fail(folder: pathlib.Path, item: str, *target: Any) -> Any:
        if item == "state":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return restore(folder, item, *target)

    message = r"6: is intact, but cannot be used \(RuntimeError: RESOURCE_EXHAUSTED.*repeat the command"
    for read in (restored, load_run):
        with pytest.raises(WorkdirError, match=message), monkeypatch.context() as patch:
            patch.setattr(checkpoint_files, "restore", fail)
            read(workdir)
    assert restored(workdir) == (6, [])


def test_epochs_may_not_change_under_a_schedule_that_depends_on_them(tmp_path: pathlib.Path) -> None:
    config = replace(SMALL, optimizer__schedule="cosine")
    with open_store(config, FINGERPRINT, tmp_path) as store:
        save(store, initial_state(), 3)
    with pytest.raises(WorkdirError, match=r"config.train.epochs: 2 there, 3 now"):
        restored(tmp_path, replace(config, train__epochs=3))


def test_fields_that_change_no_result_may_differ(workdir: pathlib.Path) -> None:
    config = replace(
        SMALL, train__driver="stream", train__log_every_steps=1, checkpoint__every_steps=5, data__source="tfds"
    )
    assert restored(workdir, config) == (6, [])


@pytest.fixture
def rewrite(workdir: pathlib.Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Changes the record of the newest checkpoint, as another version of the program would have written it."""
    newest = workdir / workdirs.CHECKPOINTS / "6"
    path = newest / "record" / "metadata"

    def change(fields: dict[str, Any]) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        (newest / "files.sha256").write_text(checkpoint_files.checksums(newest))

    yield change


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 1}, r"was written by an older version .+ \(schema 1 there, 2 now\); use that version to continue"),
        ({"schema": 3, "config": "?"}, r"was written by a newer version of this program \(schema 3 there, 2 now\)"),
        (
            {"config": {"model": {"depth": 3}}},
            r"another version of this program, .* \(config.model.depth: no such field",
        ),
        ({"config": {"model": {"name": "mine"}}}, r"use that version or script, or name"),
        ({"arrays": {".step": "int64()"}}, r"or of your own network \(.step: int64\(\) there, int32\(\) now\)"),
    ],
)
def test_another_version_is_refused_and_nothing_moved(
    workdir: pathlib.Path, rewrite: Callable[[dict[str, Any]], None], fields: dict[str, Any], message: str
) -> None:
    rewrite(fields)
    with pytest.raises(WorkdirError, match=message):
        load_run(workdir)
    with pytest.raises(WorkdirError, match=message):
        restored(workdir)
    assert steps(workdir) == [3, 6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": "2"}, "record.schema = '2': must be int"),
        ({"schema": True}, "record.schema = True: must be int"),
        ({"config": [1]}, "record.config = [1]: must be an object"),
        ({"holdout": 3}, "record.holdout = 3: must be an object"),
        ({"holdout": {"loss": 1.0}}, "record.holdout.accuracy is missing"),
        ({"step": 7}, "record.step = 7: must be 6"),
        ({"seconds": "x"}, "record.seconds = 'x': must be int or float"),
        ({"restarts": None}, "record.restarts = None: must be int"),
        ({"origin": {"versions": {}}}, "record.origin.fork is missing"),
        ({"origin": {"fork": None, "versions": {"jax": 1}}}, "record.origin.versions.jax = 1: must be str"),
        ({"origin": {"fork": None, "versions": {}, "setup": 3}}, "record.origin.setup = 3: must be an object"),
        (
            {"origin": {"fork": None, "versions": {}, "teacher": {"workdir": "a", "networks": "b", "digest": "c"}}},
            "record.origin.teacher.networks = 'b': must be int",
        ),
        ({"versions": {}}, "record.versions = {}: must be an array"),
        ({"log": [3]}, "record.log[0] = 3: must be an object"),
        ({"log": [record(6)["log"][0] | {"step": 2**70}]}, "record.log[0].step = 1180591620717411303424: is too large"),
        ({"log": [record(6)["log"][0] | {"loss": "x"}]}, "record.log[0].loss = 'x': must be int or float or None"),
        ({"window": [[1.0, 2, 3]]}, "record.window[0] = [1.0, 2, 3]: must be an object"),
        ({"window": [{}]}, "record.window[0].loss is missing"),
        ({"epoch_sums": {"loss": None}}, "record.epoch_sums.loss = None: must be int or float"),
        ({"arrays": {".step": 3}}, "record.arrays..step = 3: must be str"),
    ],
)
def test_record_with_wrong_types_gives_one_message(
    workdir: pathlib.Path, rewrite: Callable[[dict[str, Any]], None], fields: dict[str, Any], message: str
) -> None:
    rewrite(fields)
    for read in (load_run, restored):
        with pytest.raises(WorkdirError, match="6: contains something that this program does not write") as error:
            read(workdir)
        assert message in str(error.value)
    assert int(load_run(workdir, "best").state.step) == 3
    assert steps(workdir) == [3, 6]


def test_checkpoint_that_became_a_link_is_pruned_and_its_target_kept(
    workdir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = tmp_path_factory.mktemp("elsewhere") / "3"
    path = workdir / workdirs.CHECKPOINTS / "3"
    shutil.move(path, moved)
    path.symlink_to(moved)
    with open_store(replace(SMALL, checkpoint__keep_best=0), FINGERPRINT, workdir) as store:
        save(store, initial_state(), 9)
    assert steps(workdir) == [6, 9]
    assert (moved / "state").is_dir()


@pytest.mark.parametrize("name", [workdirs.CHECKPOINTS, workdirs.DAMAGED])
def test_no_checkpoint_is_written_through_a_link(
    workdir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "folder"
    if name == workdirs.CHECKPOINTS:
        shutil.move(workdir / name, outside)
    else:
        outside.mkdir()
        truncate(workdir / workdirs.CHECKPOINTS / "6" / "record" / "metadata")
    (workdir / name).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with (
        pytest.raises(WorkdirError, match="symbolic link"),
        open_store(SMALL, FINGERPRINT, workdir) as store,
    ):
        store.restore_latest()
        save(store, initial_state(), 9)
    assert sorted(outside.rglob("*")) == before


def test_checkpoint_deleted_while_it_is_read_is_not_damage(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = checkpoint_files.restore
    saved: list[pathlib.Path] = []

    def live_run(folder: pathlib.Path, item: str, *target: Any) -> Any:
        if item == "state" and not saved:  # meanwhile a run saves two more and deletes the one that is being read
            saved.append(folder)
            with open_store(replace(SMALL, checkpoint__keep_best=0), FINGERPRINT, workdir) as store:
                for step in (9, 12):
                    save(store, initial_state(), step)
        return restore(folder, item, *target)

    monkeypatch.setattr(checkpoint_files, "restore", live_run)
    assert int(load_run(workdir).state.step) == 12
    saved.clear()
    gone = workdir / workdirs.CHECKPOINTS / "9"

    def prune_and_fail(folder: pathlib.Path, item: str, *target: Any) -> Any:
        if item == "record":
            return restore(folder, item)
        shutil.rmtree(gone)
        raise OSError("gone")

    monkeypatch.setattr(checkpoint_files, "restore", prune_and_fail)
    with pytest.raises(WorkdirError, match="has no checkpoint '9'; choose latest, best or a step: 12"):
        load_run(workdir, "9")


def test_without_holdout_rows_there_is_no_best_checkpoint(tmp_path: pathlib.Path) -> None:
    with open_store(SMALL, FINGERPRINT, tmp_path) as store:
        save(store, initial_state(), 3)
    with pytest.raises(WorkdirError, match="has no best checkpoint, because none was evaluated on hold-out rows"):
        load_run(tmp_path, "best")


def test_failed_read_restores_the_log_level_of_absl(workdir: pathlib.Path) -> None:
    newest = workdir / workdirs.CHECKPOINTS / "6"
    (newest / "record" / "metadata").write_text("{")
    (newest / "files.sha256").write_text(checkpoint_files.checksums(newest))
    level = logging.getLogger("absl").level
    with pytest.raises(WorkdirError, match=r"6: is intact, but cannot be used \(JSONDecodeError"):
        load_run(workdir)
    assert logging.getLogger("absl").level == level != logging.CRITICAL


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_an_augmentation_of_another_script_matters_only_if_it_is_on(
    workdir: pathlib.Path, rewrite: Callable[[dict[str, Any]], None], strength: float
) -> None:
    values = SMALL.to_dict()
    rewrite({"config": values | {"augment": values["augment"] | {"speckle": strength}}})
    if strength:
        with pytest.raises(WorkdirError, match=r"config.augment.speckle: no such field"):
            load_run(workdir)
    else:
        assert load_run(workdir).config == SMALL
