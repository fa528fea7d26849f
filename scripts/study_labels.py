"""Flips labels of MNIST on purpose, and measures how many of them confident learning finds.

    python scripts/study_labels.py --config=configs/fast.py [--share=0.01] [--folds=4] [--workdir=runs/flipped]

Prints one line of JSON: the precision among the K most doubtful labels, where K is the number of flipped ones (their
recall is then the same), and the recall of those that confident learning suspects.
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
from mnist_flax.data.splits import Splits
from mnist_flax.train import fit_population

FLAGS = flags.FLAGS
NAME = "mnist_flipped"
DATASETS[NAME] = Dataset(num_classes=10, num_train=60_000, num_test=10_000)


def write_flipped(splits: Splits, share: float, folder: pathlib.Path) -> np.ndarray:
    """Writes a dataset whose training labels are wrong for a share of the rows; returns which, `bool[N]`."""
    generator = np.random.default_rng(0)
    label = np.array(splits.train.label)
    wrong = np.zeros(len(label), bool)
    wrong[generator.choice(len(label), round(share * len(label)), replace=False)] = True
    label[wrong] = (label[wrong] + generator.integers(1, 10, wrong.sum())) % 10
    arrays = (splits.train.image[..., 0], label, splits.test.image[..., 0], splits.test.label)
    folder.mkdir(parents=True, exist_ok=True)
    for file, array in zip(IDX_FILES, arrays, strict=True):
        header = np.array([8 << 8 | array.ndim, *array.shape], ">u4").tobytes()
        content = header + array.astype(np.uint8).tobytes()
        (folder / file.name).write_bytes(gzip.compress(content, 1))
    return wrong


def main(argv: Sequence[str]) -> None:
    """Trains the folds and prints the scores."""
    del argv
    config = cli.config()
    workdir = pathlib.Path(FLAGS.workdir)
    wrong = write_flipped(load_splits(config), FLAGS.share, workdir / "data")
    config = replace(config, data__name=NAME, data__raw_dir=str(workdir / "data"), data__num_train=0, data__holdout=0)
    fit_population(config, workdir / "folds", folds=FLAGS.folds)
    with np.load(workdir / "folds" / statistics.ARRAYS) as file:
        joint = label_errors.confident_joint(file["out_of_fold_probs"], file["out_of_fold_label"])
        wrong = wrong[file["rows"]]
    k = int(wrong.sum())
    result = {
        "config": pathlib.Path(cli.config_file()).stem,
        "share": FLAGS.share,
        "folds": FLAGS.folds,
        "flipped": k,
        "precision_at_flipped": label_errors.precision_recall(joint.ranking(), wrong, k)[0],
        "suspects": int(joint.suspect.sum()),
        "recall_of_suspects": float(wrong[joint.suspect].sum() / k),
        "estimated_wrong": float(1 - np.trace(joint.joint)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_float("share", 0.01, "the share of the training labels that are flipped", lower_bound=1e-4)
    flags.DEFINE_integer("folds", 4, "parts of the training rows, each predicted by the others", lower_bound=2)
    flags.DEFINE_string("workdir", "runs/flipped", "where the data and the folds are written")
    cli.run(main)
