"""Computes metrics from logits or probabilities and labels: on the host, in f64, for any number of examples."""

import statistics
from typing import NamedTuple

import numpy as np


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Computes the log-softmax, `f32[...,C] -> f64[...,C]`.

    SciPy has the same function, but importing `scipy.special` takes 0.17 s, too much at the end of a short run.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Computes the softmax, `f32[...,C] -> f64[...,C]`."""
    return np.asarray(np.exp(log_probabilities(logits)))


def log_mean_probabilities(logits: np.ndarray) -> np.ndarray:
    """Computes the log of the mean softmax of M networks or views: `f32[M,...,C] -> f64[...,C]`."""
    return np.logaddexp.reduce(log_probabilities(logits), axis=0) - np.log(len(logits))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Computes the cross-entropy of each example in nats: `f32[N,C], i32[N] -> f64[N]`."""
    return -np.take_along_axis(log_probabilities(logits), labels[:, None], axis=-1)[:, 0]


def brier_score(probs: np.ndarray, labels: np.ndarray) -> float:
    """Computes the mean squared distance between probabilities and one-hot labels: `f64[N,C], i32[N] -> 0..2`.

    It is summed over the classes, as Brier (1950) defined it.
    """
    of_label = np.take_along_axis(probs, labels[:, None], axis=-1)[:, 0]
    return float(np.mean(np.sum(probs**2, axis=-1) - 2 * of_label + 1))


class Bins(NamedTuple):
    """A reliability diagram: K bins of equal width over the probability of the predicted class.

    Attributes:
      edges: `f64[K+1]`, from 0 to 1; a bin includes its upper edge but not its lower one.
      examples: `i64[K]`, the number of examples in each bin.
      confidence: `f64[K]`, the mean probability of the predicted class; NaN in an empty bin.
      accuracy: `f64[K]`, the share of correct predictions; NaN in an empty bin.
    """

    edges: np.ndarray
    examples: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(probs: np.ndarray, labels: np.ndarray, num_bins: int) -> Bins:
    """Compares confidence with accuracy, `f64[N,C], i32[N] -> Bins` (Guo et al., 2017)."""
    confidence = probs.max(axis=-1)
    is_right = probs.argmax(axis=-1) == labels
    edges = np.arange(num_bins + 1) / num_bins
    bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        return Bins(
            edges=edges,
            examples=count,
            confidence=np.bincount(bins, confidence, num_bins) / count,
            accuracy=np.bincount(bins, is_right, num_bins) / count,
        )


def expected_calibration_error(bins: Bins) -> float:
    """Computes the gap between confidence and accuracy, averaged over examples: 0..1 (Guo et al., 2017)."""
    gaps = np.nan_to_num(np.abs(bins.accuracy - bins.confidence))
    return float(np.sum(bins.examples * gaps) / np.sum(bins.examples))


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts examples by label (row) and prediction (column): `i32[N], i32[N] -> i64[C,C]`."""
    cells = labels.astype(np.int64) * num_classes + predictions
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Computes precision, recall and F1 of each class, NaN where undefined, and 95 % intervals, from `i64[C,C]`.

    Each metric is `f64[C]` and each interval `f64[C,2]`. The intervals are Wilson's; for F1, see `f1_interval`.
    """
    right, predicted, actual = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return {
            "precision": right / predicted,
            "recall": right / actual,
            "f1": 2 * right / (predicted + actual),
            "precision_interval": wilson_interval(right, predicted),
            "recall_interval": wilson_interval(right, actual),
            "f1_interval": f1_interval(right, predicted + actual - right),
        }


def wilson_interval(successes: np.ndarray | int, trials: np.ndarray | int, level: float = 0.95) -> np.ndarray:
    """Computes the score interval of a proportion, `[...], [...] -> f64[...,2]` (Wilson, 1927).

    Unlike plus or minus 1.96 standard errors, it is valid near 0 and 1, where the scores of good classifiers lie. With
    no trials it is [0, 1]. SciPy's `binomtest(...).proportion_ci` takes only one proportion at a time.
    """
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    middle = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(k * (n - k) / np.maximum(n, 1) + z**2 / 4)
    # In exact arithmetic, the formula gives low = 0 for k = 0, and high = 1 for k = n.
    low, high = np.where(k == 0, 0.0, middle - half), np.where(k == n, 1.0, middle + half)
    return np.stack([low, high], axis=-1)


def f1_interval(right: np.ndarray | int, involved: np.ndarray | int, level: float = 0.95) -> np.ndarray:
    """Computes the interval of an F1 score, `[...], [...] -> f64[...,2]` ("Wilson indirect"; Lam et al., 2023).

    The `involved` examples have the class as label or prediction; a share J of them has it as both (`right`). J is a
    proportion, so it has a Wilson interval. F1 = 2 J / (1 + J) increases with J, so it maps the ends of that interval
    to those of the F1 interval.
    """
    ends = wilson_interval(right, involved, level)
    return 2 * ends / (1 + ends)
