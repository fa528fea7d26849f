"""The registry of datasets: one entry of metadata for each."""

import dataclasses
import string
from pathlib import Path
from typing import Any, NamedTuple

from mnist_flax.errors import DataError

IMAGE_SIZE = 28  # every dataset here has greyscale images of 28x28 pixels
# The config fields that say which dataset to use and where it is; evaluation may change them.
DATA_FIELDS = ("data.name", "data.source", "data.data_dir", "data.raw_dir")


class DataFile(NamedTuple):
    """A file of a dataset; its size in bytes and its SHA-256 (hexadecimal) are checked only if they are given."""

    name: str
    url: str = ""
    size: int = 0
    sha256: str = ""

    def path_in(self, folder: Path) -> Path:
        """Returns where the file is: if no checksum is known, it may be there unpacked, without `.gz`."""
        path, unpacked = folder / self.name, folder / self.name.removesuffix(".gz")
        return unpacked if not self.sha256 and not path.is_file() and unpacked.is_file() else path


# Training images, training labels, test images, test labels: MNIST's names, which its successors also use.
IDX_FILES = (
    DataFile("train-images-idx3-ubyte.gz"),
    DataFile("train-labels-idx1-ubyte.gz"),
    DataFile("t10k-images-idx3-ubyte.gz"),
    DataFile("t10k-labels-idx1-ubyte.gz"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The metadata of a dataset. The defaults suit your own dataset in IDX files.

    Attributes:
      num_classes: labels are 0 to `num_classes - 1`.
      num_train, num_test: the number of rows in each split.
      class_names: a short name for each class; by default its number.
      doubtful_test_rows: test rows whose labels are known to be doubtful, counted from 0 in the original order.
      fingerprint: SHA-256 of the decoded dataset, as `splits.fingerprint` computes it; not checked if empty.
      files: training images, training labels, test images and test labels; or one zip archive that contains them; or
        empty for the digits dataset that ships with scikit-learn.
      archive_members: the four files inside the archive, in the same order, if `files` is an archive.
      transposed: the files store each image with rows and columns swapped.
      tfds_version: the version of the TFDS dataset of the same name. If empty, the dataset is read directly from its
        files, without a prepared copy.
    """

    num_classes: int
    num_train: int
    num_test: int
    class_names: tuple[str, ...] = ()
    doubtful_test_rows: tuple[int, ...] = ()
    fingerprint: str = ""
    files: tuple[DataFile, ...] = IDX_FILES
    archive_members: tuple[str, ...] = ()
    transposed: bool = False
    tfds_version: str = ""

    def __post_init__(self) -> None:
        if min(self.num_classes, self.num_train, self.num_test) < 1 or self.num_classes > 256:
            raise DataError("a dataset needs 1 to 256 classes, and at least one training row and one test row")
        if len(self.archive_members or self.files) not in (0, 4):
            raise DataError("a dataset needs four files: training images and labels, test images and labels")
        if not set(self.doubtful_test_rows) <= set(range(self.num_test)):
            raise DataError(f"doubtful_test_rows must be rows of the test split, from 0 to {self.num_test - 1}")
        names = self.class_names or tuple(map(str, range(self.num_classes)))
        if len(names) != self.num_classes:
            raise DataError(
                f"a dataset of {self.num_classes} classes needs {self.num_classes} class_names, not {len(names)}"
            )
        object.__setattr__(self, "class_names", names)
        # Tools print SHA-256 in either case; hashlib in lower case.
        object.__setattr__(self, "fingerprint", self.fingerprint.lower())
        object.__setattr__(self, "files", tuple(file._replace(sha256=file.sha256.lower()) for file in self.files))

    @property
    def split_sizes(self) -> dict[str, int]:
        """The number of rows of each split."""
        return {"train": self.num_train, "test": self.num_test}


def _like_mnist(url: str, *sizes_and_sums: tuple[int, str], **fields: Any) -> Dataset:
    """Returns an entry with MNIST's number of classes, split sizes and file names; `url` is the folder of the files."""
    pairs = zip(IDX_FILES, sizes_and_sums, strict=True)
    files = tuple(DataFile(file.name, url + file.name, size, sha256) for file, (size, sha256) in pairs)
    return Dataset(num_classes=10, num_train=60_000, num_test=10_000, files=files, tfds_version="3.0.1", **fields)


def _emnist(config: str, num_classes: int, num_train: int, num_test: int, class_names: tuple[str, ...] = ()) -> Dataset:
    """Returns the entry of one of the six datasets in EMNIST's archive."""
    url = "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"
    sha256 = "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e"
    kinds = ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")
    return Dataset(
        num_classes=num_classes,
        num_train=num_train,
        num_test=num_test,
        class_names=class_names,
        files=(DataFile("gzip.zip", url, 561_753_746, sha256),),
        archive_members=tuple(f"gzip/emnist-{config}-{kind}-ubyte.gz" for kind in kinds),
        transposed=True,
        tfds_version="3.1.0",
    )


_UPPER = tuple(string.ascii_uppercase)
# Includes only the lower-case letters that do not look like their capitals; EMNIST merges the other fifteen with their
# capitals (Cohen et al., 2017).
_MERGED = (*string.digits, *_UPPER, *"abdefghnqrt")

_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip

# Row counts, URLs, sizes and checksums are taken from TFDS.
DATASETS: dict[str, Dataset] = {
    "mnist": _like_mnist(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        # Fewer than 3 of 5 people agree with these labels (Northcutt, Athalye and Mueller, "Pervasive Label Errors in
        # Test Sets Destabilize Machine Learning Benchmarks", 2021).
        doubtful_test_rows=(947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729),
        fingerprint="ceda791d3e53beaf95f8e213c414aa4d975006504eff93f785d685ecea3e892c",
    ),
    "fashion_mnist": _like_mnist(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        class_names=_CLOTHES,
        fingerprint="5f06bd0df99ad3dc904134efe2e620e96a51dc83af7575151eb993b975560d7a",
    ),
    "kmnist": _like_mnist(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        (18_165_135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
        (29_497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
        (3_041_136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
        (5_120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
    "emnist/byclass": _emnist("byclass", 62, 697_932, 116_323, (*string.digits, *_UPPER, *string.ascii_lowercase)),
    "emnist/bymerge": _emnist("bymerge", 47, 697_932, 116_323, _MERGED),
    "emnist/balanced": _emnist("balanced", 47, 112_800, 18_800, _MERGED),
    # Labels are 1 to 26; each class contains both cases of a letter. TFDS declares 37 classes; the rest never occur.
    "emnist/letters": _emnist(
        "letters", 37, 88_800, 14_800, ("unused 0", *_UPPER, *(f"unused {number}" for number in range(27, 37)))
    ),
    "emnist/digits": _emnist("digits", 10, 240_000, 40_000),
    "emnist/mnist": _emnist("mnist", 10, 60_000, 10_000),
    "digits": Dataset(
        num_classes=10,
        num_train=1_437,
        num_test=360,
        fingerprint="c50ecdda4fca28a5f4a71d44fdc21990196fe4c1f3733bc3297dc578118a7ab5",
        files=(),
    ),
}
