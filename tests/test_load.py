"""All sources of a dataset, the order in which they are tried, and how they fail."""

import dataclasses
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from idx_files import (
    NAMES,
    Published,
    closed_url,
    real_folder,
    tree,
    write_files,
)

from mnist_flax import config
from mnist_flax.config import Config
from mnist_flax.data import tfds_copy
from mnist_flax.data.batches import rows_of
from mnist_flax.data.load import adapt_to_dataset, load_splits
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Splits
from mnist_flax.errors import ConfigError, DataError
from mnist_flax.sections import DataConfig
from mnist_flax.train import fit

# Sources --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_raw_files_are_prepared_once_and_then_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_messages: list[str], name: str
) -> None:
    small = Published(tmp_path, monkeypatch, name)
    first = small.load(raw_dir=str(small.raw_dir))
    small.check(first, "raw")
    assert [message for message in data_messages if "preparing" in message] == data_messages
    monkeypatch.setattr(tfds_copy, "read_copy", None)  # from here on, decoding would fail
    again = small.load()
    small.check(again, "tfds")
    assert again.fingerprint == first.fingerprint
    for source in ("tfds", "raw", "download"):
        small.check(small.load(source=source, raw_dir=str(small.raw_dir)), "tfds")


def test_raw_dir_comes_from_the_environment(small: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_FLAX_RAW_DIR", str(small.raw_dir))
    monkeypatch.setenv("TFDS_DATA_DIR", str(small.data_dir))
    small.check(small.load(data_dir=""), "raw")
    assert (small.copy / "dataset_info.json").is_file()


def test_raw_dir_with_subfolders_serves_several_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_dir = tmp_path / "all"
    for seed, (name, subfolder) in enumerate(
        (("mnist", "mnist"), ("fashion_mnist", "fashion_mnist"), ("emnist/letters", "emnist"))
    ):
        small = Published(tmp_path / subfolder, monkeypatch, name, seed=seed)
        shutil.copytree(small.raw_dir, raw_dir / subfolder)
        monkeypatch.setenv("MNIST_FLAX_RAW_DIR", str(raw_dir))
        small.check(small.load(), "raw")


@pytest.mark.parametrize("of_environment", [True, False])
def test_raw_dir_of_another_dataset_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_environment: bool
) -> None:
    mnist = Published(tmp_path / "mnist", monkeypatch)
    fashion = Published(tmp_path / "fashion", monkeypatch, "fashion_mnist", seed=1)
    fashion.arrays["train"] = fashion.arrays["train"][0] // 16, fashion.arrays["train"][1]  # files of another size
    fashion.publish()
    monkeypatch.setenv("MNIST_FLAX_RAW_DIR", str(mnist.raw_dir))
    with pytest.raises(DataError) as raised:
        fashion.load(raw_dir="" if of_environment else str(mnist.raw_dir))
    field = "$MNIST_FLAX_RAW_DIR" if of_environment else "config.data.raw_dir"
    assert str(raised.value).startswith(f"{field} = '{mnist.raw_dir}' does not hold fashion_mnist: {mnist.raw_dir}/")
    assert "the size of mnist's train-images-idx3-ubyte.gz" in str(raised.value)
    assert "put the files into it or its subfolder 'fashion_mnist'" in str(raised.value)
    assert not fashion.data_dir.exists()


def test_unreachable_host_falls_back_to_digits_loudly(small: Published, data_messages: list[str]) -> None:
    splits = small.load()
    assert (splits.name, splits.source) == ("digits", "embedded")
    assert len(splits.train.label) == 1437
    (warning,) = (message for message in data_messages if message.startswith("WARNING"))
    for part in ("NOT mnist", "no prepared copy in", "$MNIST_FLAX_RAW_DIR", "127.0.0.1", "on_missing=error"):
        assert part in warning
    assert warning.count("\n") >= 8
    assert not small.data_dir.exists()


def test_a_run_that_began_never_goes_on_with_a_substitute(small: Published, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(small.config().to_json())
    with pytest.raises(DataError, match="mnist cannot be loaded"):
        fit(small.config(), run)
    damaged = json.dumps({name: 3 for name in small.config().to_dict()})
    (run / "config.json").write_text(damaged)
    with pytest.raises(DataError, match=r"(?s)mnist cannot be loaded.* Then set --config.data.source=auto"):
        fit(small.config(source="raw"), run)
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_a_substitute_whose_smaller_batch_cannot_be_split_leaves_nothing(small: Published, tmp_path: Path) -> None:
    assert DATASETS["digits"].num_train == 1437
    DATASETS["mnist"] = dataclasses.replace(DATASETS["mnist"], num_train=60_000)
    wanted = config.replace(small.config(), train__batch_size=2_000, train__num_devices=2)
    with pytest.raises(ConfigError, match=r"batch_size = 1437: cannot be split evenly over 2 devices"):
        fit(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_on_missing_error_says_what_was_tried(small: Published) -> None:
    with pytest.raises(DataError) as raised:
        small.load(on_missing="error")
    for part in (f"no prepared copy in {small.data_dir}", "neither config.data.raw_dir nor", "127.0.0.1", "Connect"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [("tfds", "no prepared copy in"), ("raw", "neither config.data.raw_dir nor"), ("download", "cannot be downloaded")],
)
def test_explicit_source_never_falls_back(small: Published, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        small.load(source=source)
    assert f"config.data.source = '{source}'" in str(raised.value)
    assert not small.data_dir.exists()


def test_digits_need_no_folder(small: Published) -> None:
    splits = small.load(name="digits", data_dir="/dev/null")
    assert (splits.name, splits.source) == ("digits", "embedded")
    assert splits.train.image.shape == (1437, 28, 28, 1)
    assert splits.fingerprint == small.load(name="digits").fingerprint


def test_digits_are_split_the_same_everywhere() -> None:
    from sklearn.datasets import load_digits

    splits = load_splits(DataConfig(name="digits"))
    assert splits.test.image.shape == (360, 28, 28, 1)
    assert {part.image.dtype for part in (splits.train, splits.test)} == {np.dtype(np.uint8)}
    assert {part.label.dtype for part in (splits.train, splits.test)} == {np.dtype(np.int32)}
    share = np.bincount(splits.test.label) / np.bincount(load_digits().target)
    assert np.all(abs(share - 0.2) < 0.006)  # each class gives a fifth of its rows, to the nearest row
    np.testing.assert_array_equal(splits.train.label[:9], [0, 1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(splits.test.label[:9], [2, 4, 7, 0, 6, 8, 9, 5, 1])
    # If this value changes, everybody's test set has changed.
    labels = splits.train.label.tobytes() + splits.test.label.tobytes()
    assert hashlib.sha256(labels).hexdigest()[:16] == "048b2a8a935f3934"


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit", "swapped", "no folder"])
@pytest.mark.parametrize("source", ["auto", "raw"])
def test_damaged_raw_files_are_named(small: Published, damage: str, source: str) -> None:
    path = small.raw_dir / "t10k-labels-idx1-ubyte.gz"
    raw_dir, content = str(small.raw_dir), bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        message = "no such file; fetch it from http"
    elif damage == "truncated":
        path.write_bytes(content[:-3])
        message = f"{len(content) - 3} bytes instead of {len(content)}; fetch it from http"
    elif damage == "one bit":
        content[20] ^= 4
        path.write_bytes(content)
        message = f"SHA-256 is {hashlib.sha256(content).hexdigest()} instead of "
    elif damage == "swapped":
        shutil.copy(small.raw_dir / "train-images-idx3-ubyte.gz", path)
        message = "the size of mnist's train-images-idx3-ubyte.gz"
    else:
        raw_dir += "x"
        message = "no such file; fetch it from http"
    with pytest.raises(DataError) as raised:
        small.load(source=source, raw_dir=raw_dir)
    assert str(raised.value).startswith(f"config.data.raw_dir = {raw_dir!r} does not hold mnist: {raw_dir}/t")
    assert message in str(raised.value)
    assert "config.data.source=download" in str(raised.value)
    assert not small.data_dir.exists()


def test_official_files_with_wrong_content_leave_nothing(small: Published) -> None:
    images, labels = small.arrays["train"]
    write_files(small.raw_dir, small.name, {"train": (images, labels + 9), "test": small.arrays["test"]})
    small.at(closed_url())
    with pytest.raises(DataError, match="contains label 18, but there are 10 classes"):
        small.load_raw()
    assert not small.data_dir.exists()


# The config of the dataset that was loaded ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_splits(DataConfig(name="digits"))


def test_adapt_keeps_the_config_of_the_dataset_asked_for(digits: Splits) -> None:
    same = config.replace(Config(), data__name="digits", data__holdout=100)
    assert adapt_to_dataset(same, digits) is same


def test_adapt_keeps_num_train_and_scales_the_hold_out_rows(digits: Splits) -> None:
    wanted = config.replace(Config(), seed=3, data__num_train=30_000, data__holdout=6_000, train__batch_size=64)
    got = adapt_to_dataset(wanted, digits)
    assert (got.data.name, got.data.num_train, got.data.holdout, got.train.batch_size) == ("digits", 1437, 287, 64)
    assert config.replace(got, data=wanted.to_dict()["data"]) == wanted
    assert got.seed == 3
    assert adapt_to_dataset(Config(), digits).num_train_rows == 1437


@pytest.mark.parametrize("name", NAMES)
def test_adapt_always_gives_a_valid_config(digits: Splits, name: str) -> None:
    info, most = DATASETS[name], 10**9
    for num_train, holdout, batch_size in itertools.product(
        (0, 5, 11, 63, 200, most), (0, 62, 199, most), (1, 64, most)
    ):
        num_train = min(num_train, info.num_train)
        rows = num_train or info.num_train
        holdout = min(holdout, rows - 1)
        if 0 < holdout < info.num_classes:
            holdout = 0
        batch_size = min(batch_size, rows - holdout)
        wanted = config.replace(
            Config(), data__name=name, data__num_train=num_train, data__holdout=holdout, train__batch_size=batch_size
        )
        got = adapt_to_dataset(wanted, digits)
        assert got.data.name == "digits"
        assert got.data.num_train <= num_train
        assert got.data.holdout <= holdout
        assert (got.data.holdout == 0) == (holdout == 0)
        assert got.train.batch_size <= batch_size


@pytest.mark.parametrize(
    ("num_train", "folds", "batch_size"), [(0, 5, 1200), (1000, 5, 800), (60_000, 139, 64), (5000, 100, 64)]
)
def test_adapt_keeps_the_folds(digits: Splits, num_train: int, folds: int, batch_size: int) -> None:
    for fold in (0, folds - 1):
        wanted = config.replace(
            Config(), data__num_train=num_train, data__folds=folds, data__fold=fold, train__batch_size=batch_size
        )
        got = adapt_to_dataset(wanted, digits)
        assert (got.data.folds, got.data.fold) == (folds, fold)
        training, held_out = rows_of(digits.train.label, got.data)
        assert (len(training), len(held_out)) == (got.num_train_rows, got.num_holdout_rows)
        assert got.train.batch_size == adapt_to_dataset(config.replace(wanted, data__fold=0), digits).train.batch_size


# The real files -------------------------------------------------------------------------------------------------------

COUNTS = {
    "mnist": (
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    ),
    "fashion_mnist": ([6000] * 10, [1000] * 10),
}


@pytest.mark.parametrize("name", ["mnist", pytest.param("fashion_mnist", marks=pytest.mark.slow)])
def test_real_files_have_the_known_counts_and_fingerprint(tmp_path: Path, name: str) -> None:
    import gzip

    folder = real_folder(name)
    wanted = config.replace(
        Config(), data__name=name, data__raw_dir=str(folder), data__data_dir=str(tmp_path), data__on_missing="error"
    )
    splits = load_splits(wanted.data)
    assert (splits.name, splits.source, splits.fingerprint) == (name, "raw", DATASETS[name].fingerprint)
    for split, prefix, counts in zip((splits.train, splits.test), ("train", "t10k"), COUNTS[name], strict=True):
        images = gzip.decompress(Path(folder, f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress(Path(folder, f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        assert split.image.shape == (sum(counts), 28, 28, 1)
        assert split.image.tobytes() == images
        assert split.label.astype(np.uint8).tobytes() == labels
        np.testing.assert_array_equal(np.bincount(split.label), counts)
    again = load_splits(wanted.data)
    assert again._replace(train=splits.train, test=splits.test) == splits._replace(source="tfds")
    assert sorted(tree(tmp_path))[:2] == ["mnist_flax", "mnist_flax/decoded"]


def test_user_without_a_home_gets_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without $HOME and a passwd entry
    with pytest.raises(DataError, match=r"~/tensorflow_datasets: there is no such home folder; .*data_dir"):
        load_splits(DataConfig())
