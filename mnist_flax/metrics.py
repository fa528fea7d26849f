"""Logits and labels in, numbers out.

What a training step needs is on the device, in JAX; what is reported is on the host, in f64, and takes any N.
"""

import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
    """Returns the categorical cross-entropy against one-hot labels, in nats: `f32[B,C], i32[B] -> f32[B]`.

    A label outside 0..C-1 gives a one-hot row of zeros, and so, without smoothing, a loss of 0.

    Args:
      logits: before the softmax.
      labels: class numbers.
      label_smoothing: this share of each label is spread evenly over all classes (Szegedy et al., 2016).
    """
    num_classes = logits.shape[-1]
    targets = jax.nn.one_hot(labels, num_classes) * (1.0 - label_smoothing) + label_smoothing / num_classes
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def correct(logits: Array, labels: Array) -> Array:
    """Returns whether the likeliest class is the label: `f32[B,C], i32[B] -> bool[B]`."""
    return jnp.argmax(logits, axis=-1) == labels


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the logarithm of the softmax: `f32[N,C] -> f64[N,C]`."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_probs: np.ndarray = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return log_probs


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns what `cross_entropy` does without smoothing, on the host: `f32[N,C], i32[N] -> f64[N]`.

    For results that are reported: no rounding to speak of, and nothing to compile for each N.
    """
    picked: np.ndarray = -np.take_along_axis(log_probabilities(logits), labels[:, None], axis=-1)[:, 0]
    return picked


def brier_score(probs: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean squared distance of the probabilities from the one-hot labels: `f64[N,C], i32[N] -> 0..2`.

    Summed over the classes, as it was first defined (Brier, 1950).
    """
    of_label = np.take_along_axis(probs, labels[:, None], axis=-1)[:, 0]
    return float(np.mean(np.sum(probs**2, axis=-1) - 2 * of_label + 1))


class Bins(NamedTuple):
    """A reliability diagram: K bins of equal width in the confidence of the prediction.

    Attributes:
      edges: `f64[K+1]`, from 0 to 1; a bin holds its upper edge and not its lower one.
      examples: `i64[K]`, how many.
      confidence: `f64[K]`, their mean probability of the predicted class; NaN in an empty bin.
      accuracy: `f64[K]`, the share of them that is predicted right; NaN in an empty bin.
    """

    edges: np.ndarray
    examples: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(probs: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> Bins:
    """Compares how sure a network is with how often it is right, `f64[N,C], i32[N] -> Bins` (Guo et al., 2017)."""
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
    """Returns the mean distance between confidence and accuracy, each bin by its examples: 0..1 (Guo et al., 2017)."""
    gaps = np.nan_to_num(np.abs(bins.accuracy - bins.confidence))
    return float(np.sum(bins.examples * gaps) / np.sum(bins.examples))


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the examples by label (row) and prediction (column): `i32[N], i32[N] -> i64[C,C]`."""
    cells = labels.astype(np.int64) * num_classes + predictions
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


class PerClass(NamedTuple):
    """Scores of each class; `f64[C]` each, NaN where nothing defines them, and `f64[C,2]` their 95 % intervals.

    Attributes:
      precision: the share of the predictions of a class that are right.
      recall: the share of the examples of a class that are found.
      f1: the harmonic mean of both.
      precision_interval: Wilson's.
      recall_interval: Wilson's.
      f1_interval: Wilson's, indirectly: see `f1_interval`.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    precision_interval: np.ndarray
    recall_interval: np.ndarray
    f1_interval: np.ndarray


def per_class(confusion: np.ndarray) -> PerClass:
    """Judges each class by itself, `i64[C,C] -> PerClass`."""
    right, predicted, actual = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return PerClass(
            precision=right / predicted,
            recall=right / actual,
            f1=2 * right / (predicted + actual),
            precision_interval=wilson_interval(right, predicted),
            recall_interval=wilson_interval(right, actual),
            f1_interval=f1_interval(right, predicted + actual - right),
        )


def wilson_interval(successes: np.ndarray | int, trials: np.ndarray | int, level: float = 0.95) -> np.ndarray:
    """Returns the score interval of a proportion, `[...], [...] -> f64[...,2]` (Wilson, 1927).

    Unlike the textbook's plus or minus 1.96 standard errors it holds near 0 and 1, where good classifiers are.
    Without trials it is 0 to 1.
    """
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    middle = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(k * (n - k) / np.maximum(n, 1) + z**2 / 4)
    # At the ends the formula gives 0 and 1 exactly, but for rounding.
    low, high = np.where(k == 0, 0.0, middle - half), np.where(k == n, 1.0, middle + half)
    return np.stack([low, high], axis=-1)


def f1_interval(right: np.ndarray | int, involved: np.ndarray | int, level: float = 0.95) -> np.ndarray:
    """Returns the interval of an F1 score, `[...], [...] -> f64[...,2]` (Lam, Gopal and Qian, 2023: Wilson indirect).

    Of the examples that a class has to do with, by label or by prediction, J are both. J is a proportion, so Wilson's
    interval holds for it; and F1 = 2 J / (1 + J) grows with it, which carries the ends over.

    Args:
      right: examples of the class that are predicted to be of it.
      involved: examples that are of the class, or predicted to be, or both.
      level: share of such intervals that hold the true value.
    """
    ends = wilson_interval(right, involved, level)
    return 2 * ends / (1 + ends)
