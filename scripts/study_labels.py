"""Measures how many wrong labels confident learning finds: flipped on purpose, or those known in MNIST's test set.

    python scripts/study_labels.py --config=configs/fast.py [--share=0.01] [--folds=4] [--workdir=runs/flipped]
    python scripts/study_labels.py --config=configs/fast.py --known --workdir=runs/known [--folds=10]

Prints one line of JSON: the share of flipped labels among the K most doubtful ones, where K is the number of flipped
labels (so precision and recall are equal), and the share of the flipped labels that confident learning suspects.
`--known` trains folds of the 10,000 test rows instead, and counts how many of the fifteen known errors are among the
most doubtful labels.
"""

import gzip
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from mnist_flax import cli
from mnist_flax.analysis import label_errors, statistics
from mnist_flax.config import replace
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS, IDX_FILES, Dataset
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.run.provenance import provenance
from mnist_flax.train import fit_population

FLAGS = flags.FLAGS
FLIPPED, KNOWN = "mnist_flipped", "mnist_test_rows"
DATASETS[FLIPPED] = Dataset(num_classes=10, num_train=60_000, num_test=10_000)
DATASETS[KNOWN] = Dataset(num_classes=10, num_train=10_000, num_test=10_000)
LISTED = (15, 30, 50, 100)  # known errors are counted among this many of the most doubtful labels


def flipped(label: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Flips a share of the labels; returns the labels, and which ones are wrong: `i32[N] -> i32[N], bool[N]`."""
    generator = np.random.default_rng(0)
    label, wrong = np.array(label), np.zeros(len(label), bool)
    wrong[generator.choice(len(label), round(share * len(label)), replace=False)] = True
    label[wrong] = (label[wrong] + generator.integers(1, 10, wrong.sum())) % 10
    return label, wrong


def known(splits: Splits) -> np.ndarray:
    """Returns which test labels are known to be wrong, `bool[N]`."""
    wrong = np.zeros(len(splits.test.label), bool)
    wrong[list(DATASETS["mnist"].doubtful_test_rows)] = True
    return wrong


def write_dataset(train: Examples, test: Examples, folder: pathlib.Path) -> None:
    """Writes a dataset as IDX files with MNIST's file names."""
    arrays = (train.image[..., 0], train.label, test.image[..., 0], test.label)
    folder.mkdir(parents=True, exist_ok=True)
    for file, array in zip(IDX_FILES, arrays, strict=True):
        header = np.array([8 << 8 | array.ndim, *array.shape], ">u4").tobytes()
        content = header + array.astype(np.uint8).tobytes()
        (folder / file.name).write_bytes(gzip.compress(content, 1))


def main(argv: Sequence[str]) -> None:
    """Trains the folds and prints the scores."""
    del argv
    config = cli.config()
    workdir = pathlib.Path(FLAGS.workdir or ("runs/known" if FLAGS.known else "runs/flipped"))
    splits = load_splits(replace(config, data__on_missing="error").data)
    train, name, wrong = splits.test, KNOWN, known(splits)
    if not FLAGS.known:
        label, wrong = flipped(splits.train.label, FLAGS.share)
        train, name = Examples(splits.train.image, label), FLIPPED
    write_dataset(train, splits.test, workdir / "data")
    config = replace(config, data__name=name, data__raw_dir=str(workdir / "data"), data__num_train=0, data__holdout=0)
    fit_population(config, workdir / "folds", folds=FLAGS.folds)
    arrays = statistics.load_arrays(workdir / "folds", "folds", FLAGS.folds)
    joint = label_errors.confident_joint(arrays["out_of_fold_probs"], arrays["out_of_fold_label"])
    wrong = wrong[arrays["rows"]]
    k, ranking = int(wrong.sum()), joint.ranking
    found = {f"of_first_{n}": int(wrong[ranking[:n]].sum()) for n in LISTED}
    precision = float(wrong[ranking[:k]].mean())
    result = {
        **cli.config_facts(),
        "seed": config.seed,
        "folds": FLAGS.folds,
        **(found if FLAGS.known else {"share": FLAGS.share, "precision_at_flipped": precision}),
        "wrong": k,
        "suspects": int(joint.suspect.sum()),
        "recall_of_suspects": float(wrong[joint.suspect].sum() / k),
        "estimated_wrong": max(0.0, float(1 - np.trace(joint.joint))),
    }
    print(json.dumps(result | provenance()))


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_float("share", 0.01, "the share of the training labels that are flipped", 1e-4, 1.0)
    flags.DEFINE_boolean("known", False, "train on folds of the test rows, and look for the labels known to be wrong")
    flags.DEFINE_integer("folds", 4, "parts of the rows, each predicted by the others", lower_bound=2)
    flags.DEFINE_string(
        "workdir", None, "where the data and the folds are written; default: runs/flipped, or runs/known"
    )
    cli.run(main)
