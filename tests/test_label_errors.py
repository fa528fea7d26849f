"""Doubtful labels: confident learning on made-up predictions.

`counts` and `suspect` were equal to those of cleanlab 2.9 (`compute_confident_joint` without calibration, and
`find_label_issues(filter_by="confident_learning")`) on 60,000 out-of-fold predictions with 600 flipped labels.
"""

import numpy as np
import small_population

from mnist_flax.analysis.label_errors import confident_joint, label_facts, label_table
from mnist_flax.analysis.statistics import load_arrays, load_population_result


def predictions(count: int = 3000, share: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Good probabilities for four classes, labels with a share flipped to the next class, and which are flipped."""
    generator = np.random.default_rng(0)
    true = generator.integers(0, 4, count)
    logits = generator.normal(size=(count, 4)) + 5 * np.eye(4)[true]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wrong = generator.random(count) < share
    return probs, np.where(wrong, (true + 1) % 4, true), wrong


def test_flipped_labels_come_first() -> None:
    probs, label, wrong = predictions()
    ranking = confident_joint(probs, label).ranking
    assert sorted(ranking) == list(range(len(label)))
    assert wrong[ranking[: wrong.sum()]].mean() > 0.95


def test_the_estimated_noise_is_near_the_true_noise() -> None:
    probs, label, _ = predictions(20_000)
    found = confident_joint(probs, label)
    expected = 0.95 * np.eye(4) + 0.05 * np.roll(np.eye(4), 1, axis=0)  # given label (row), true label (column)
    np.testing.assert_allclose(found.noise, expected, atol=0.01)
    np.testing.assert_allclose(found.joint.sum(axis=1), np.bincount(label) / len(label))


def test_the_definition_on_a_hand_made_case() -> None:
    probs = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.95, 0.05]])
    found = confident_joint(probs, np.array([0, 0, 1, 1, 1]))  # thresholds: 0.8 and 0.48
    np.testing.assert_array_equal(found.counts, [[1, 0], [1, 2]])  # row 1 reaches neither threshold
    np.testing.assert_array_equal(found.suspect, [False, False, False, False, True])
    assert list(found.ranking[:2]) == [4, 3]


def test_a_class_without_examples_gives_finite_results() -> None:
    probs, label, _ = predictions()
    found = confident_joint(probs[label != 2], label[label != 2])
    assert np.isfinite(found.noise).all()
    assert found.counts[2].sum() == found.counts[:, 2].sum() == 0


def test_the_facts_of_a_population_list_suspects_first() -> None:
    facts = label_facts(load_arrays(small_population.folds(), "folds", 3))
    assert facts["examples"] == 220
    assert 0 < len(facts["listed"]) <= 100
    assert all(entry["prediction"] != entry["label"] for entry in facts["listed"])
    suspects = [entry["suspect"] for entry in facts["listed"]]
    assert suspects == sorted(suspects, reverse=True)
    assert str(facts["suspects"]) in label_table(facts)
    result = load_population_result(small_population.folds())
    assert result
    assert result["out_of_fold"]["labels"] == facts


def test_rows_that_are_predicted_right_are_not_listed() -> None:
    label = np.arange(300, dtype=np.int32) % 10
    probs = np.full((300, 10), 0.01, np.float32) + 0.9 * np.eye(10, dtype=np.float32)[label]
    rows = np.arange(300)
    arrays = {"out_of_fold_probs": probs, "out_of_fold_label": label, "rows": rows, "fold": rows % 3}
    facts = label_facts(arrays)
    assert (facts["suspects"], facts["listed"]) == (0, [])
    assert label_table(facts) == "suspect labels: 0 of 300, estimated share of wrong ones 0.00%"
