"""Prepared copies are valid TFDS folders."""

from pathlib import Path

import numpy as np
import pytest
from absl import logging
from idx_files import NAMES, Published

from mnist_flax.data import tfds_copy
from mnist_flax.data.idx import read_files
from mnist_flax.data.registry import DATASETS


@pytest.mark.parametrize("name", NAMES)
def test_builder_declares_what_tfds_declares(tmp_path: Path, name: str) -> None:
    import tensorflow_datasets as tfds

    stock = tfds.builder(name, data_dir=tmp_path)
    ours = tfds_copy._builder(name, tmp_path)
    assert ours.info.full_name == stock.info.full_name
    assert repr(ours.info.features) == repr(stock.info.features)
    assert ours.info.features["label"].names == stock.info.features["label"].names


@pytest.mark.parametrize("name", NAMES)
def test_copy_is_a_normal_tfds_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import tensorflow_datasets as tfds

    small = Published(tmp_path, monkeypatch, name)
    tfds_copy.write_copy(name, *read_files(DATASETS[name], small.raw_dir), small.data_dir)
    assert tfds_copy.find_flaw(name, small.data_dir) == ""
    for examples, (images, labels) in zip(
        tfds_copy.read_copy(name, small.data_dir), small.arrays.values(), strict=True
    ):
        assert examples.image.dtype == np.uint8
        assert examples.label.dtype == np.int32
        np.testing.assert_array_equal(examples.image[..., 0], images)  # not transposed, and in the original order
        np.testing.assert_array_equal(examples.label, labels)

    for split, source in tfds.builder(name, data_dir=small.data_dir).as_data_source().items():
        images, labels = small.arrays[split]
        assert len(source) == len(labels)
        np.testing.assert_array_equal(source[3]["image"][..., 0], images[3])
        assert source[3]["label"] == labels[3]


def test_copying_is_quiet_and_restores_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorflow_datasets.core.utils import tqdm_utils

    small = Published(tmp_path, monkeypatch)
    splits = read_files(DATASETS["mnist"], small.raw_dir)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        capfd.readouterr()
        tfds_copy.write_copy("mnist", *splits, small.data_dir)
        tfds_copy.read_copy("mnist", small.data_dir)
        assert capfd.readouterr() == ("", "")
        assert logging.get_verbosity() == logging.INFO
        assert tqdm_utils._active
    finally:
        logging.set_verbosity(verbosity)
