"""Which labels may be wrong: confident learning (Northcutt, Jiang and Chuang, 2021) on out-of-fold predictions.

The cleanlab package does the same and more, but it is licensed under the AGPL and depends on pandas, and this project
needs only a small part of it. `tests/test_label_errors.py` says how the two were compared.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import Facts

NUM_LISTED = 100


class ConfidentJoint(NamedTuple):
    """What confident learning finds, for N examples of C classes."""

    counts: np.ndarray  # `i64[C,C]`, examples by given label (row) and by the class they confidently belong to (column)
    joint: np.ndarray  # `f64[C,C]`, the estimated share of all examples by given and true label
    noise: np.ndarray  # `f64[C,C]`, the estimated probability of a given label (row) for each true label (column)
    suspect: np.ndarray  # `bool[N]`, the examples that confidently belong to a class other than their label
    ranking: np.ndarray  # `i64[N]`, all examples, most doubtful first: suspects, then the rest, each by margin


def confident_joint(probs: np.ndarray, label: np.ndarray) -> ConfidentJoint:
    """Counts which examples confidently belong to which class, and ranks them by doubt.

    The threshold of a class is its mean probability over the examples with that label. An example confidently belongs
    to the most probable of the classes whose threshold it reaches, if any. Its margin is the probability of its label
    minus that of the most probable other class. `probs`, `f32[N,C]`, are predicted by networks that were not trained on
    the example.
    """
    count, num_classes = probs.shape
    each, probs = np.arange(count), probs.astype(np.float64)
    sizes = np.bincount(label, minlength=num_classes)
    of_label = np.bincount(label, probs[each, label], num_classes)
    thresholds = np.where(sizes > 0, of_label / np.maximum(sizes, 1), np.inf)
    confident = np.where(probs >= thresholds, probs, -1.0)
    belongs = confident.argmax(axis=1)
    is_counted = confident.max(axis=1) >= 0
    counts = metrics.confusion_matrix(label[is_counted], belongs[is_counted], num_classes)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    joint = shares * sizes[:, None] / count
    others = probs.copy()
    others[each, label] = -1.0
    suspect, margin = is_counted & (belongs != label), probs[each, label] - others.max(axis=1)
    return ConfidentJoint(
        counts=counts,
        joint=joint,
        noise=joint / np.maximum(joint.sum(axis=0, keepdims=True), 1e-300),
        suspect=suspect,
        ranking=np.lexsort((margin, ~suspect)),
    )


def label_facts(arrays: Mapping[str, np.ndarray]) -> Facts:
    """Finds labels that may be wrong in the out-of-fold predictions of a population (`population.npz`).

    Returns:
      The numbers of `examples` and `suspects`; `estimated_wrong`, the share of wrong labels; `noise`, the noise matrix;
      and `listed`, the most doubtful labels that differ from the prediction, ready for JSON.
    """
    probs, label = arrays["out_of_fold_probs"], arrays["out_of_fold_label"]
    found = confident_joint(probs, label)
    ranking = found.ranking[:NUM_LISTED]
    listed = ranking[probs.argmax(axis=-1)[ranking] != label[ranking]]
    columns = {
        "row": arrays["rows"],
        "fold": arrays["fold"],
        "label": label,
        "prediction": probs.argmax(axis=-1),
        "probability_of_label": np.take_along_axis(probs, label[:, None], axis=-1)[:, 0],
        "probability_of_prediction": probs.max(axis=-1),
        "suspect": found.suspect,
    }
    values = zip(*(column[listed].tolist() for column in columns.values()), strict=True)
    return {
        "examples": len(label),
        "suspects": int(found.suspect.sum()),
        "estimated_wrong": max(0.0, float(1 - np.trace(found.joint))),  # rounding can make it negative
        "noise": found.noise.tolist(),
        "listed": [dict(zip(columns, of_example, strict=True)) for of_example in values],
    }


def label_table(facts: Mapping[str, Any]) -> str:
    """Formats the facts as text."""
    wrong = f"estimated share of wrong ones {facts['estimated_wrong']:.2%}"
    text = f"suspect labels: {facts['suspects']} of {facts['examples']}, {wrong}"
    worst = ", ".join(f"{entry['row']} ({entry['label']}? {entry['prediction']})" for entry in facts["listed"][:8])
    return text + (f"; most doubtful, as row (label? prediction): {worst}" if worst else "")
