"""Calibration: how far predicted probabilities can be trusted, temperature scaling, and which answers are doubtful."""

import dataclasses
from typing import Any

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import Predictor, default_fit, mean_grey, predict_logits
from mnist_flax.data.splits import Examples

LIMIT = 20.0  # temperatures are searched from 1 / LIMIT to LIMIT
FALSE_ALARM_RATE = 0.01  # the fraction of the hold-out digits that are called doubtful
INK_MARGIN = 1.2  # an image is doubtful if its ink exceeds this many times the largest of the hold-out digits
NUM_BINS = 15  # bins of the reliability diagram (as in Guo et al., 2017)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Finds the temperature that minimises the cross-entropy of `logits / temperature` (Guo et al., 2017).

    A temperature changes the probabilities but never the most probable class. The result is 1 if there are no examples,
    or if all are classified correctly, because the minimum would then be at 0. Use examples that were not trained on.
    """
    if np.all(logits.argmax(axis=-1) == labels):
        return 1.0
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(np.mean(metrics.negative_log_likelihood(logits / np.exp(log_temperature), labels)))

    found = minimize_scalar(loss, bounds=(-np.log(LIMIT), np.log(LIMIT)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def calibrate(predictor: Predictor, holdout: Examples) -> Predictor:
    """Returns the predictor with temperature and doubt fitted on hold-out rows; with none, they are the defaults."""
    default = default_fit(predictor.program)
    raw: Predictor = dataclasses.replace(predictor, **default)  # type: ignore[arg-type]  # they are floats
    if not len(holdout.label):
        return raw
    logits = predict_logits(raw, holdout.image)
    temperature = fit_temperature(logits, holdout.label)
    below = fit_doubt(logits / temperature) or default["doubtful_below"]
    most_ink = INK_MARGIN * float(mean_grey(holdout.image).max())
    return dataclasses.replace(raw, temperature=temperature, doubtful_below=below, most_ink=most_ink)


def fit_doubt(logits: np.ndarray) -> float | None:
    """Finds the probability below which the fraction `FALSE_ALARM_RATE` of the answers lies.

    It is at least one half, because an answer with a smaller probability is more likely wrong than right.

    Args:
      logits: `f32[N,C]`, of digits that were not trained on, divided by the temperature.

    Returns:
      The probability; None if there are too few examples for a single false alarm.
    """
    if len(logits) * FALSE_ALARM_RATE < 1:
        return None
    return max(0.5, float(np.quantile(metrics.probabilities(logits).max(axis=-1), FALSE_ALARM_RATE)))


def calibration_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the loss, the Brier score and the expected calibration error of logits, `f32[N,C], i32[N]`."""
    probs = metrics.probabilities(logits)
    return {
        "loss": float(np.mean(metrics.negative_log_likelihood(logits, labels))),
        "brier": metrics.brier_score(probs, labels),
        "ece": metrics.expected_calibration_error(metrics.reliability(probs, labels, NUM_BINS)),
    }


def reliability_rows(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Returns the bins of the reliability diagram that hold examples, ready for JSON."""
    bins = metrics.reliability(metrics.probabilities(logits), labels, NUM_BINS)
    right = np.rint(np.nan_to_num(bins.accuracy * bins.examples))
    intervals = metrics.wilson_interval(right, bins.examples)
    return [
        {
            "from": float(bins.edges[i]),
            "to": float(bins.edges[i + 1]),
            "examples": int(bins.examples[i]),
            "confidence": float(bins.confidence[i]),
            "accuracy": float(bins.accuracy[i]),
            "accuracy_interval": intervals[i].tolist(),
        }
        for i in np.flatnonzero(bins.examples)
    ]
