"""The metrics: cases computed by hand, and agreement with scikit-learn and SciPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from mnist_flax import metrics
from mnist_flax.losses import cross_entropy

pytestmark = pytest.mark.smoke


def made_up(num_examples: int = 500, num_classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are often right, and labels; the last class never occurs, and the one before it is rare."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_classes - 2, num_examples).astype(np.int32)
    labels[:3] = num_classes - 2
    logits = generator.normal(0, 1, (num_examples, num_classes)).astype(np.float32)
    logits[np.arange(num_examples), labels] += 1.5
    return logits, labels


def test_confusion_matrix_equals_scikit_learns() -> None:
    logits, labels = made_up()
    predictions = logits.argmax(axis=-1)
    expected = sklearn_metrics.confusion_matrix(labels, predictions, labels=range(7))
    np.testing.assert_array_equal(metrics.confusion_matrix(labels, predictions, 7), expected)
    assert not np.array_equal(expected, expected.T)


def test_per_class_equals_scikit_learns() -> None:
    logits, labels = made_up()
    predictions = logits.argmax(axis=-1)
    predictions[predictions == 6] = 0  # so the last class is neither a label nor a prediction
    scores = metrics.per_class(metrics.confusion_matrix(labels, predictions, 7))
    expected = sklearn_metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(7), zero_division=np.nan
    )
    for name, theirs in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        np.testing.assert_allclose(scores[name], theirs, rtol=1e-12)
    assert np.isnan(scores["f1"][6]) and not np.isnan(scores["f1"][:6]).any()


def test_loss_and_brier_equal_scikit_learns() -> None:
    logits, labels = made_up()
    probs = np.exp(metrics.log_probabilities(logits))
    np.testing.assert_allclose(probs.sum(axis=-1), 1.0, rtol=1e-12)
    loss = np.mean(metrics.negative_log_likelihood(logits, labels))
    assert loss == pytest.approx(sklearn_metrics.log_loss(labels, probs, labels=range(7)), rel=1e-12)
    of_classes = [sklearn_metrics.brier_score_loss(labels == k, probs[:, k], pos_label=True) for k in range(7)]
    assert metrics.brier_score(probs, labels) == pytest.approx(sum(of_classes), rel=1e-12)


def test_negative_log_likelihood_equals_the_device_loss() -> None:
    logits, labels = made_up()
    ours, theirs = (
        metrics.negative_log_likelihood(logits, labels),
        cross_entropy(*map(jnp.array, (logits, labels))),
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # one is f64, the other f32


def test_brier_by_hand() -> None:
    probs = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.4]])
    assert metrics.brier_score(probs, np.array([0, 0, 0])) == pytest.approx((0 + 2 + (0.16 + 0.16)) / 3)


def test_log_probabilities_do_not_overflow() -> None:
    log_probs = metrics.log_probabilities(np.array([[1e4, 0.0, -1e4]], np.float32))
    np.testing.assert_allclose(log_probs, [[0.0, -1e4, -2e4]])


def two_classes(confidences: list[float], right: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    probs = np.array([[p, 1 - p] for p in confidences])
    return probs, np.where(right, 0, 1)


def test_calibration_by_hand() -> None:
    # Bins of width 0.1: two examples around 0.65, one of them right, and two at 0.95, both right.
    bins = metrics.reliability(*two_classes([0.62, 0.68, 0.95, 0.95], [True, False, True, True]), num_bins=10)
    assert bins.examples.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert bins.accuracy[[6, 9]].tolist() == [0.5, 1.0]
    np.testing.assert_allclose(bins.confidence[[6, 9]], [0.65, 0.95])
    assert np.isnan(bins.accuracy[0])
    assert metrics.expected_calibration_error(bins) == pytest.approx((2 * 0.15 + 2 * 0.05) / 4)


def test_reliability_bin_includes_its_upper_edge() -> None:
    bins = metrics.reliability(*two_classes([0.75, 0.7500001, 1.0], [True] * 3), num_bins=4)
    assert bins.examples.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(("confidence", "expected"), [(1.0, 0.0), (0.75, 0.25)])
def test_calibration_error_of_a_perfect_network(confidence: float, expected: float) -> None:
    bins = metrics.reliability(*two_classes([confidence] * 8, [True] * 8), num_bins=15)
    assert metrics.expected_calibration_error(bins) == pytest.approx(expected)


@pytest.mark.parametrize(("successes", "trials"), [(8, 10), (0, 10), (10, 10), (9952, 10_000), (1, 1), (1, 3)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_wilson_interval_equals_scipys(successes: int, trials: int, level: float) -> None:
    expected = binomtest(successes, trials).proportion_ci(level, method="wilson")
    np.testing.assert_allclose(metrics.wilson_interval(successes, trials, level), expected, rtol=1e-9, atol=1e-15)


def test_wilson_interval_by_hand() -> None:
    # 8 of 10 with z = 1.96: (0.8 + 0.19208 -+ 1.96 sqrt(0.016 + 0.009604)) / 1.38416
    np.testing.assert_allclose(metrics.wilson_interval(8, 10), [0.4902, 0.9433], atol=1e-4)
    np.testing.assert_array_equal(metrics.wilson_interval(0, 0), [0.0, 1.0])
    assert metrics.wilson_interval(np.array([1, 2]), np.array([3, 3])).shape == (2, 2)


def test_f1_interval_has_the_stated_coverage() -> None:
    # As shares of all examples: true positives, false positives, false negatives, true negatives.
    shares = np.array([0.08, 0.01, 0.02, 0.89])
    truth = 2 * shares[0] / (2 * shares[0] + shares[1] + shares[2])
    right, false_positives, false_negatives, _ = np.random.default_rng(0).multinomial(1000, shares, 20_000).T
    low, high = metrics.f1_interval(right, right + false_positives + false_negatives).T
    # With 20,000 draws the standard error is 0.0015; counts are whole, so the coverage itself is off by up to 0.01.
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.95, abs=0.012)
    f1 = 2 * right / (2 * right + false_positives + false_negatives)
    assert np.all((low < f1) & (f1 < high))


def test_intervals_without_mistakes_end_at_one() -> None:
    scores = metrics.per_class(np.diag([5, 7]))
    assert scores["f1"].tolist() == [1.0, 1.0]
    for name in ("precision", "recall", "f1"):
        intervals = scores[f"{name}_interval"]
        assert np.all(intervals[:, 1] == 1.0) and np.all(intervals[:, 0] < 1.0)
    assert scores["f1_interval"][0, 0] < scores["f1_interval"][1, 0]  # fewer examples, wider
