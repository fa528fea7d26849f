"""Folds: parts of the training rows, with equal shares of each class."""

import pathlib
from typing import Any

import numpy as np
import pytest
from small_population import CONFIG

from mnist_flax import train
from mnist_flax.config import replace
from mnist_flax.data import batches
from mnist_flax.data.load import load_splits
from mnist_flax.errors import ConfigError
from mnist_flax.sections import DataConfig


@pytest.mark.parametrize(("num_train", "folds"), [(220, 3), (221, 4), (1437, 5), (0, 5)])
def test_folds_divide_the_rows_with_equal_shares_of_each_class(num_train: int, folds: int) -> None:
    label = load_splits(CONFIG.data).train.label
    configs = [
        replace(CONFIG, data__num_train=num_train, data__holdout=0, data__folds=folds, data__fold=k)
        for k in range(folds)
    ]
    used, _ = batches.rows_of(label, DataConfig(num_train=num_train))
    held_out = []
    for config in configs:
        rows, of_fold = batches.rows_of(label, config.data)
        assert (len(rows), len(of_fold)) == (config.num_train_rows, config.num_holdout_rows)
        np.testing.assert_array_equal(np.sort(np.concatenate([rows, of_fold])), used)
        held_out.append(of_fold)
    np.testing.assert_array_equal(np.sort(np.concatenate(held_out)), used)
    counts = np.array([np.bincount(label[of_fold], minlength=10) for of_fold in held_out])
    assert np.ptp(counts, axis=0).max() <= 1
    assert len({config.steps_per_epoch for config in configs}) == 1
    assert len({config.program for config in configs}) == 1
    assert held_out[0].tolist() != used[: len(held_out[0])].tolist()  # shuffled
    assert np.array_equal(held_out[0], batches.rows_of(label, replace(configs[0], seed=9).data)[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__folds": 1}, r"config.data.folds = 1: must be at least 2 and at most 22"),
        ({"data__folds": 23}, r"config.data.folds = 23: must be at least 2 and at most 22"),
        ({"data__folds": 3, "data__fold": 3}, r"config.data.fold = 3: must be at least 0 and below 3"),
        ({"data__fold": 1}, r"config.data.fold = 1: is used only with config.data.folds; set that"),
        ({"data__folds": 3, "data__holdout": 20}, r"config.data.holdout = 20: must be 0 with config.data.folds"),
    ],
)
def test_wrong_folds_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **({"data__holdout": 0} | fields))


def test_a_class_with_too_few_rows_cannot_be_divided() -> None:
    labels = np.array([0] * 30 + [1] * 2, np.int32)
    with pytest.raises(ConfigError, match=r"config.data.folds = 3: class 1 has only 2 of the 32 rows; use at most 2"):
        batches.fold_rows(labels, np.arange(32), 3)
    with pytest.raises(ConfigError, match=r"class 1 has only 1 of the 31 rows; use more rows"):
        batches.fold_rows(labels[:31], np.arange(31), 2)


def test_fields_that_folds_replace_are_named(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "fit_all", lambda *_, **__: 1 / 0)  # the messages come before training
    caplog.set_level("INFO", "mnist_flax")
    config = replace(CONFIG, data__holdout=0, data__folds=5, data__fold=3)
    with pytest.raises(ZeroDivisionError):
        train.fit_population(config, tmp_path, folds=2)
    assert "config.data.folds = 5 is not used" in caplog.text
    assert "config.data.fold = 3 is not used" in caplog.text
    assert "holdout" not in caplog.text
