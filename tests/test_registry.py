"""The registry of datasets."""

from pathlib import Path

import pytest
from idx_files import NAMES

from mnist_flax.data import tfds_copy
from mnist_flax.data.embedded import embedded_digits
from mnist_flax.data.registry import DATASETS, IDX_FILES, Dataset
from mnist_flax.data.splits import make_splits
from mnist_flax.errors import DataError

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", NAMES)
def test_registry_agrees_with_tfds(tmp_path: Path, name: str) -> None:
    import tensorflow_datasets as tfds

    stock, dataset = tfds.builder(name, data_dir=tmp_path), DATASETS[name]
    assert tfds_copy.copy_dir(name, tmp_path) == Path(stock.data_dir)
    assert stock.info.features["label"].num_classes == dataset.num_classes
    if name.startswith("emnist/"):
        counts = stock.builder_config.train_examples, stock.builder_config.test_examples
        assert counts == (dataset.num_train, dataset.num_test)
    registered = tfds.core.download.checksums.get_all_url_infos()
    assert len(dataset.files) == (1 if name.startswith("emnist/") else 4)
    for file in dataset.files:
        assert (file.size, file.sha256) == (registered[file.url].size, registered[file.url].checksum)
        assert file.name == registered[file.url].filename
    assert not list(tmp_path.iterdir())


def test_registry_knows_the_fingerprint_of_the_embedded_digits() -> None:
    # If this value changes, everybody's images have changed.
    assert make_splits("digits", *embedded_digits(), "embedded").fingerprint == DATASETS["digits"].fingerprint


def test_every_class_has_a_name_of_its_own() -> None:
    for dataset in DATASETS.values():
        assert len(set(dataset.class_names)) == len(dataset.class_names) == dataset.num_classes
    assert DATASETS["emnist/balanced"].class_names[-11:] == tuple("abdefghnqrt")
    assert DATASETS["emnist/letters"].class_names[1::25] == ("A", "Z")
    assert DATASETS["mnist"].class_names == DATASETS["emnist/digits"].class_names == tuple("0123456789")


def test_doubtful_rows_are_known_for_the_test_images_of_mnist_alone() -> None:
    rows = DATASETS["mnist"].doubtful_test_rows
    assert len(rows) == len(set(rows)) == 15
    assert max(rows) < DATASETS["mnist"].num_test
    assert [name for name, dataset in DATASETS.items() if dataset.doubtful_test_rows] == ["mnist"]


def test_entry_of_an_own_dataset_needs_three_numbers() -> None:
    dataset = Dataset(num_classes=3, num_train=5, num_test=2)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.files == IDX_FILES
    assert dataset.split_sizes == {"train": 5, "test": 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_classes": 0}, "1 to 256 classes"),
        ({"num_classes": 257}, "1 to 256 classes"),
        ({"num_test": 0}, "at least one training row and one test row"),
        ({"class_names": ("a", "b")}, "a dataset of 3 classes needs 3 class_names, not 2"),
        ({"files": IDX_FILES[:2]}, "a dataset needs four files"),
        ({"doubtful_test_rows": (1, 2)}, "rows of the test split, from 0 to 1"),
    ],
)
def test_entry_that_cannot_be_right_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Dataset(**{"num_classes": 3, "num_train": 5, "num_test": 2, **wrong})  # type: ignore[arg-type]
