"""Distillation: a student learns its teacher's probabilities, resumes exactly, and knows its teacher by a digest."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_population
from compiled import step_once
from report_page import made_up
from small_run import SMALL, lines, outcome, summary

from mnist_flax import metrics, preset, rng, train
from mnist_flax.analysis.evaluation import load_predictor, member_logits
from mnist_flax.config import Config, replace
from mnist_flax.data import load
from mnist_flax.data.augment import augment
from mnist_flax.data.batches import NO_LABEL
from mnist_flax.data.download import UnavailableError
from mnist_flax.data.load import load_splits
from mnist_flax.data.splits import Examples
from mnist_flax.distillation import LoadedTeacher, load_teacher, teacher_warnings
from mnist_flax.drivers import jit_forward, jit_init_state
from mnist_flax.errors import ConfigError, DataError, WorkdirError
from mnist_flax.exporting import card
from mnist_flax.members import check_origin
from mnist_flax.run.checkpoint import load_run
from mnist_flax.run.log import RunLog
from mnist_flax.run.provenance import versions
from mnist_flax.step import Teacher, TrainState, eval_variables
from mnist_flax.train import fit, fit_population

KEY = rng.root_key(0)
STUDENT = replace(
    SMALL,
    train__teacher_weight=0.7,
    train__label_smoothing=0.1,
    optimizer__name="sgd",
    optimizer__learning_rate=0.1,
)
# Training logits equal those of `forward`, and the first step moves a weight by the learning rate times the gradient.
PLAIN = replace(STUDENT, model__batch_norm=False, model__dropout=0.0, optimizer__ema_decay=0.0)


def student_of(folder: pathlib.Path, config: Config = STUDENT) -> Config:
    """The config of a student of the run or population in a folder."""
    return replace(config, train__teacher=str(folder))


def loaded(folder: pathlib.Path) -> LoadedTeacher:
    """The run or population in a folder, as a teacher."""
    teacher = load_teacher(student_of(folder))
    assert teacher is not None
    return teacher


@pytest.fixture(scope="module")
def seeds() -> pathlib.Path:
    """The teacher, a population of three; a test that changes something in it makes a copy first."""
    return small_population.seeds()


@pytest.fixture(scope="module")
def student(seeds: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished student; no test changes its folder."""
    workdir = tmp_path_factory.mktemp("student") / "run"
    fit(student_of(seeds), workdir)
    return workdir


def bias(state: TrainState) -> np.ndarray:
    """The bias of the last layer."""
    return np.asarray(state.params["Dense_1"]["bias"])


def test_the_target_mixes_label_and_mean_probabilities(seeds: pathlib.Path, examples: Examples) -> None:
    label = np.append(examples.label[:19], NO_LABEL)
    batch = Examples(jnp.asarray(examples.image[:20]), jnp.asarray(label))
    state = jit_init_state(PLAIN.program, KEY)
    teacher = loaded(seeds).arrays.replace(temperature=np.float32(1.7))
    new, sums = step_once(PLAIN.program, state, batch, KEY, teacher)

    images = np.asarray(augment(PLAIN.augment, batch.image, batch.label, rng.stream(KEY, "augment", 0)))
    assert (images != examples.image[:20]).any()
    predictor, _ = load_predictor(seeds)
    mean = np.mean(np.exp(metrics.log_probabilities(member_logits(predictor, images))), axis=0)
    of_teacher = mean ** (1 / 1.7)
    of_teacher /= of_teacher.sum(axis=-1, keepdims=True)
    target = (0.3 * (0.9 * np.eye(10)[label] + 0.01) + 0.7 * of_teacher)[:19]
    log_probs = metrics.log_probabilities(np.asarray(jit_forward(PLAIN.program, eval_variables(state), images))[:19])
    assert float(sums["loss"]) == pytest.approx(-np.sum(target * log_probs), rel=1e-5)
    assert int(sums["examples"]) == 19
    gradient = np.mean(np.exp(log_probs) - target, axis=0)  # with respect to the bias of the last layer
    np.testing.assert_allclose(bias(new) - bias(state), -0.1 * gradient, rtol=1e-3, atol=1e-7)


def test_a_student_that_equals_its_teacher_gets_no_gradient(examples: Examples) -> None:
    program = replace(PLAIN, train__teacher_weight=1.0).program
    state = jit_init_state(program, KEY)
    batch = Examples(jnp.asarray(examples.image[:20]), jnp.asarray(examples.label[:20]))
    itself = Teacher(jax.tree.map(lambda leaf: leaf[None], eval_variables(state)), np.float32(1), program)
    # If the labels had any weight, or a gradient flowed through the teacher, the weights would change.
    new, sums = step_once(program, state, batch, KEY, itself)
    assert float(sums["loss"]) / 20 > 1
    for one, other in zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)


def test_drivers_and_devices_agree(seeds: pathlib.Path, student: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fit(replace(student_of(seeds), train__driver="stream", train__num_devices=2), tmp_path)
    for one, other in zip(lines(student), lines(tmp_path), strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)  # two programs round differently


def test_students_of_a_population_equal_single_students(
    seeds: pathlib.Path, student: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    fit_population(student_of(seeds), tmp_path, seeds=2)
    assert outcome(tmp_path / "members" / "seed-0") == outcome(student)
    for seed in (0, 1):
        assert summary(tmp_path / "members" / f"seed-{seed}")["teacher"] == summary(student)["teacher"]


class Died(Exception):
    """Raised in the middle of a run."""


def test_a_run_resumes_exactly_after_its_teacher_has_moved(
    seeds: pathlib.Path, student: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, moved, run = tmp_path / "teacher", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(seeds, first)
    take_in = RunLog.add_steps

    def take_in_and_die(log: RunLog, *arguments: Any) -> None:
        take_in(log, *arguments)
        if log.step >= 9:
            raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(RunLog, "add_steps", take_in_and_die)
        fit(replace(student_of(first), checkpoint__every_steps=4), run)
    first.rename(moved)
    fit(student_of(moved), run)
    assert summary(run)["restarts"] == 1
    assert outcome(run) == outcome(student)


def test_another_teacher_is_refused_on_resume(
    seeds: pathlib.Path, student: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(seeds, tmp_path / "hotter")
    result = json.loads((seeds / "population.json").read_text())
    (tmp_path / "hotter" / "population.json").write_text(json.dumps(result | {"temperature": 2.0}))
    for folder in (tmp_path / "hotter", seeds / "members" / "seed-3"):  # one member is another teacher
        message = (
            rf"run with a different teacher: {seeds} \(digest \w+\) then, {folder} \(digest \w+\) now; to continue"
        )
        with pytest.raises(WorkdirError, match=message):
            fit(student_of(folder), student)
    with pytest.raises(WorkdirError, match=r"\(digest \w+\) then, none now"):
        fit(STUDENT, student)
    old = {"fork": None, "versions": versions()}  # without the key, as older versions wrote it
    check_origin(old, None, None, {}, student)
    with pytest.raises(WorkdirError, match=r"none then, .+ now"):
        check_origin(old, None, loaded(seeds), {}, student)


def test_an_unusable_teacher_is_refused_before_data_are_loaded(
    seeds: pathlib.Path, student: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_splits", None)
    empty, unfinished, killed = tmp_path / "empty", tmp_path / "unfinished", tmp_path / "killed"
    empty.mkdir()
    shutil.copytree(seeds, unfinished)
    (unfinished / "population.json").unlink()
    shutil.copytree(student, killed)
    (killed / "summary.json").unlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder, fields, message in (
        (tmp_path / "none", {}, "there is no such folder; train the teacher first"),
        (tmp_path / ("long" * 100), {}, "there is no such folder; train the teacher first"),
        (tmp_path / "loop", {}, "there is no such folder; train the teacher first"),
        (empty, {}, "holds no checkpoints/ of a run"),
        (unfinished, {}, "holds a population without a complete population.json; repeat the training command"),
        (killed, {}, "is not finished; repeat its training command to finish it"),
        (seeds, {"data__name": "kmnist"}, "knows the 10 classes of digits, not the 10 of kmnist; name a teacher of"),
        (seeds, {"data__name": "emnist/byclass"}, "knows the 10 classes of digits, not the 62 of emnist/byclass"),
        (tmp_path / "run" / "members" / "seed-0", {}, f"lies in this run's folder, --workdir={tmp_path / 'run'}; name"),
    ):
        config = replace(student_of(folder), data__holdout=0, **fields)
        with pytest.raises(ConfigError) as raised:
            fit(config, tmp_path / "run")
        assert str(raised.value).startswith(f"config.train.teacher = {str(folder)!r}: ")
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_student_never_trains_on_a_substitute_dataset(
    seeds: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(_: Any) -> Any:
        raise UnavailableError("no network")

    monkeypatch.delenv("MNIST_FLAX_RAW_DIR", raising=False)
    monkeypatch.setitem(load._LOADERS, "download", unavailable)
    config = student_of(seeds, replace(STUDENT, data__name="mnist", data__data_dir=str(tmp_path / "none")))
    with pytest.raises(DataError, match="mnist cannot be loaded"):
        fit(config, tmp_path / "run")


def test_a_teacher_trained_on_holdout_rows_or_other_data_is_announced(seeds: pathlib.Path) -> None:
    teacher, splits = loaded(seeds), load_splits(STUDENT.data)
    assert not list(teacher_warnings(teacher, STUDENT, splits))  # both hold out the same rows
    (doubt,) = teacher_warnings(teacher, replace(STUDENT, data__holdout=30), splits)
    assert doubt == "was trained on rows that this run holds out, so its hold-out scores are too good"
    assert not list(teacher_warnings(teacher, replace(STUDENT, data__holdout=0), splits))
    (doubt,) = teacher_warnings(teacher, STUDENT, splits._replace(fingerprint="f" * 64))
    assert doubt == f"was trained on other data (fingerprint {splits.fingerprint[:12]})"


def test_a_teacher_trained_on_the_rows_of_any_fold_is_announced(
    seeds: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = replace(STUDENT, data__holdout=0, data__folds=5, data__fold=0)
    held_out = loaded(seeds)._replace(data=(teacher.data,))  # clean for the first fold only
    monkeypatch.setattr(train, "load_teacher", lambda *_: held_out)
    monkeypatch.setattr(train, "train_all", lambda *_: 1 / 0)
    with caplog.at_level("INFO", "mnist_flax"), pytest.raises(ZeroDivisionError):
        fit_population(student_of(seeds), tmp_path / "folds", folds=5)
    assert caplog.text.count("was trained on rows that this run holds out") == 1


def test_summary_card_and_report_name_the_teacher(
    seeds: pathlib.Path, student: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    teacher = summary(student)["teacher"]
    assert teacher == {"workdir": str(seeds), "networks": 3, "digest": loaded(seeds).origin["digest"]}
    text = card.text(student, *load_predictor(student))
    assert f"| teacher | `seeds`, networks: 3, digest: `{teacher['digest']}` |" in text
    records = load_run(student).record["log"]
    facts, page = made_up(tmp_path / "run", "digits", examples=100, records=records, train__teacher="runs/ten")
    assert facts["config_changed"]["train.teacher"] == "runs/ten"
    assert "from the probabilities of <code>runs/ten</code>" in page
    assert "is against the teacher's probabilities" in page


def test_the_preset_has_the_network_of_its_teacher() -> None:
    student, teacher = (preset.load_config(name) for name in ("distilled", "accurate"))
    assert dataclasses.astuple(student.model) == dataclasses.astuple(teacher.model)
    assert student.train.teacher == "runs/accurate-seeds3"
    assert student.seed not in range(10)
