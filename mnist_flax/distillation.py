"""Loads the teacher of a run: a finished run or population whose probabilities the run learns (`step.soft_targets`)."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from mnist_flax.analysis.evaluation import load_predictor
from mnist_flax.config import Config
from mnist_flax.data import batches
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Splits
from mnist_flax.errors import ConfigError, WorkdirError
from mnist_flax.run import checkpoint
from mnist_flax.sections import DataConfig
from mnist_flax.step import Teacher


class LoadedTeacher(NamedTuple):
    """A teacher in host memory, and where it comes from.

    Attributes:
      arrays: the teacher as a training step takes it.
      origin: stored with the student: the teacher's `workdir`, its number of `networks`, and the `digest` of their
        variables and temperature.
      data: the data config of each network, which determines its training rows.
      fingerprint: the fingerprint of the training data.
    """

    arrays: Teacher
    origin: dict[str, Any]
    data: tuple[DataConfig, ...]
    fingerprint: str


def load_teacher(config: Config, workdir: pathlib.Path | None = None) -> LoadedTeacher | None:
    """Loads the teacher that a config names, from its latest checkpoint; returns None if it names no teacher.

    Raises:
      ConfigError: the teacher's folder does not hold a finished run or population with the student's classes, or it
        lies inside `workdir`, the student's own folder.
    """
    if not config.train.teacher:
        return None
    field = f"config.train.teacher = {config.train.teacher!r}"
    folder = pathlib.Path(os.path.expanduser(config.train.teacher))
    if workdir and pathlib.Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(workdir)):
        raise ConfigError(f"{field}: lies in this run's folder, --workdir={workdir}; name another for one of them")
    if not os.path.isdir(folder):  # unlike `folder.is_dir`, it never raises an error
        raise ConfigError(f"{field}: there is no such folder; train the teacher first, or name where it is")
    try:
        predictor, info = load_predictor(folder)
    except WorkdirError as error:
        raise ConfigError(f"{field}: {error}") from error
    if not info.is_final:
        raise ConfigError(f"{field}: is not finished; repeat its training command to finish it")
    theirs, ours = (DATASETS[name].class_names for name in (info.config.data.name, config.data.name))
    if theirs != ours:
        raise ConfigError(
            f"{field}: knows the {len(theirs)} classes of {info.config.data.name}, not the {len(ours)} of"
            f" {config.data.name}; name a teacher of this dataset"
        )
    members = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(predictor.members))
    teacher = Teacher(members, np.float32(predictor.temperature), predictor.program)
    digest = checkpoint.digest(teacher)
    origin = {"workdir": str(folder.absolute()), "networks": len(predictor.members), "digest": digest}
    return LoadedTeacher(teacher, origin, tuple(run.config.data for run in info.runs), info.fingerprint)


def teacher_warnings(teacher: LoadedTeacher, config: Config, splits: Splits) -> Iterator[str]:
    """Yields a warning if the teacher was trained on other data, or on rows that the student holds out."""
    if teacher.fingerprint != splits.fingerprint:
        yield f"was trained on other data (fingerprint {teacher.fingerprint[:12]})"
        return
    _, held_out = batches.rows_of(splits.train.label, config.data)
    if any(np.isin(held_out, batches.rows_of(splits.train.label, data)[0]).any() for data in teacher.data):
        yield "was trained on rows that this run holds out, so its hold-out scores are too good"
