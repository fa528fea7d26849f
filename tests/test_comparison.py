"""Comparing two results: the statistical tests against hand calculation, the verdict, and invalid comparisons."""

import itertools
from typing import Any

import numpy as np
import pytest

from mnist_flax.analysis import comparison
from mnist_flax.analysis.comparison import Result
from mnist_flax.errors import WorkdirError


def test_mcnemar_by_hand() -> None:
    a = np.array([True] * 50 + [True] + [False] * 9 + [False] * 5)
    b = np.array([True] * 50 + [False] + [True] * 9 + [False] * 5)
    test = comparison.mcnemar(a, b)
    assert (test["only_a_right"], test["only_b_right"]) == (1, 9)
    assert test["p"] == pytest.approx(2 * (1 + 10) / 2**10)  # both tails of the binomial distribution
    assert test["difference"] == pytest.approx(8 / 65)
    assert comparison.mcnemar(a, a)["p"] == 1


def test_t_test_by_hand() -> None:
    paired = comparison.t_test([1.0, 1.0, 1.0], [2.0, 3.0, 4.0], paired=True)
    assert paired["t"] == pytest.approx(2 * 3**0.5)
    assert (paired["df"], paired["difference"]) == (2, 2)
    assert paired["p"] == pytest.approx(1 - 12**0.5 / (12 + 2) ** 0.5)  # Student's t with 2 df, in closed form
    assert paired["interval"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])
    welch = comparison.t_test([1.0, 2.0, 3.0], [4.0, 6.0], paired=False)
    assert welch["t"] == pytest.approx(3 / (1 / 3 + 2 / 2) ** 0.5)
    assert welch["df"] == pytest.approx((1 / 3 + 1) ** 2 / ((1 / 3) ** 2 / 2 + 1))


@pytest.mark.parametrize(
    ("a", "b", "paired", "p"),
    [
        ([0.9, 0.9], [0.9, 0.9], True, 1),
        ([0.9, 0.9], [0.9, 0.9, 0.9], False, 1),
        ([0.9970, 0.9972], [0.9971, 0.9973], True, 2 / 2**2),  # equal differences, up to rounding
        ([0.9] * 6, [0.8] * 6, True, 2 / 2**6),
        ([0.9] * 3, [0.8] * 3, False, 2 / 20),
        ([0.9] * 2, [0.8] * 3, False, 1 / 10),
    ],
)
def test_p_of_constant_differences_counts_the_permutations(
    a: list[float], b: list[float], paired: bool, p: float
) -> None:
    test = comparison.t_test(a, b, paired=paired)
    assert (test["p"], test["t"], test["interval"]) == (pytest.approx(p), None, None)
    both = np.array([*a, *b])
    sides = np.array(list(itertools.product([False, True], repeat=len(both))))  # whether each value is on B's side
    allowed = (sides[:, : len(a)] != sides[:, len(a) :]).all(axis=1) if paired else sides.sum(axis=1) == len(b)
    differences = [abs(both[side].mean() - both[~side].mean()) for side in sides[allowed]]
    assert np.mean(np.array(differences) >= abs(test["difference"]) - 1e-9) == pytest.approx(p)


def result_of(predictions: Any, accuracies: tuple[float, ...], **fields: Any) -> Result:
    labels = np.zeros(len(predictions), np.int32)
    values: dict[str, Any] = {
        "name": "x",
        "kind": "seeds" if len(accuracies) > 1 else "run",
        "recipe": {"train.epochs": 2},
        "is_finished": True,
        "dataset": "mnist",
        "fingerprint": "f" * 64,
        "pairing": tuple(range(len(accuracies))),
        "split": "test",
        "labels": labels,
    }
    return Result(**(values | {"predictions": np.asarray(predictions), "accuracies": accuracies} | fields))


def test_verdict_follows_the_members_if_there_are_any() -> None:
    good, bad = [0] * 20, [1] * 10 + [0] * 10
    runs = comparison.compare_results(result_of(bad, (0.5,)), result_of(good, (1.0,)))
    assert (runs["verdict"], runs["t"]) == ("b", None)
    assert "B is better than A" in comparison.comparison_table(runs)
    assert "50.000 points of accuracy on these examples (p = 0.002)" in comparison.sentence(runs)
    assert comparison.compare_results(result_of(good, (1.0,)), result_of(bad, (0.5,)))["verdict"] == "a"
    # For populations the members decide: here the committees differ, but the members do not.
    populations = comparison.compare_results(result_of(bad, (0.5, 0.9)), result_of(good, (0.9, 0.5)))
    assert populations["mcnemar"]["p"] < 0.05
    assert (populations["verdict"], populations["t"]["kind"]) == (None, "paired t-test")
    assert "No significant difference" in comparison.comparison_table(populations)
    constant = comparison.compare_results(result_of(bad, (0.5, 0.6)), result_of(good, (0.6, 0.7)))
    assert constant["verdict"] is None
    assert "members: B - A = +10.000 points (permutation test: p = 0.5)" in comparison.comparison_table(constant)
    welch = comparison.compare_results(
        result_of(bad, (0.5, 0.51, 0.52)), result_of(good, (0.9, 0.91), pairing=(7, 8), kind="seeds")
    )
    assert (welch["verdict"], welch["t"]["kind"]) == ("b", "Welch's t-test")


def test_the_table_says_what_differs_and_what_was_compared() -> None:
    one = result_of([0, 0], (1.0,))

    def table(**fields: Any) -> str:
        return comparison.comparison_table(comparison.compare_results(one, result_of([0, 0], (1.0,), **fields)))

    assert "recipe: the same; only seeds, rows, versions or machines can differ" in table()
    assert "recipe: train.epochs 2 (A), 3 (B); train.loss None (A), 'mine' (B)" in table(
        recipe={"train.epochs": 3, "train.loss": "mine"}
    )
    assert "recipe" not in table(recipe={})
    assert table().startswith("mnist, 2 test examples\n")
    assert "examples (network A, committee B): only B is right on 0" in table(kind="seeds")
    assert "B  x (a run, not finished): accuracy" in table(is_finished=False)
    certain = comparison.compare_results(result_of([1] * 2000, (0.0,)), result_of([0] * 2000, (1.0,)))
    assert comparison.comparison_table(certain).endswith(
        "B is better than A by 100.000 points of accuracy on these examples (p < 1e-300)."
    )


def test_results_on_different_examples_are_not_compared() -> None:
    one = result_of([0, 0], (1.0,))
    with pytest.raises(WorkdirError, match=r"was evaluated on mnist .* on kmnist .*only results on the same data"):
        comparison.compare_results(one, result_of([0, 0], (1.0,), fingerprint="0" * 64, dataset="kmnist"))
    with pytest.raises(WorkdirError, match="was evaluated on 2 test rows, x on 2 hold-out rows"):
        comparison.compare_results(one, result_of([0, 0], (1.0,), split="holdout"))
    of_folds = result_of([0, 0], (1.0, 1.0), kind="folds")
    with pytest.raises(WorkdirError, match="was evaluated on 2 test rows, x on 2 training rows in 2 folds"):
        comparison.compare_results(one, of_folds)
    with pytest.raises(WorkdirError, match="2 training rows in 3 folds"):
        comparison.compare_results(of_folds, result_of([0, 0], (1.0, 1.0, 1.0), kind="folds"))
