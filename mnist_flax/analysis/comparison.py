"""Whether one result is better than another: on the same examples, and over the members of each."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis import statistics as results
from mnist_flax.analysis.evaluation import load_data, predict_logits
from mnist_flax.errors import WorkdirError
from mnist_flax.run import checkpoint
from mnist_flax.step import eval_variables

SIGNIFICANCE = 0.05  # a difference counts as shown when chance alone makes such a one less often than this

Facts = dict[str, Any]  # ready for JSON


class Result(NamedTuple):
    """What is compared of a run or a population.

    Attributes:
      name: of its folder.
      kind: `run`, `seeds` or `folds`.
      dataset: its name.
      fingerprint: of the dataset.
      pairing: of each member what another member must share to be paired with it: its seed, or its fold.
      accuracies: of each member: of folds on the rows that it holds out, else on the test set.
      labels: `i32[N]`, of the examples.
      predictions: `i32[N]`: a run's own, the committee's of seeds, out of fold of folds.
    """

    name: str
    kind: str
    dataset: str
    fingerprint: str
    pairing: tuple[int, ...]
    accuracies: tuple[float, ...]
    labels: np.ndarray
    predictions: np.ndarray


def load_result(workdir: pathlib.Path) -> Result:
    """Reads a finished population, or judges a run's latest checkpoint on the test set.

    Raises:
      UserError: it holds neither, or its data cannot be had.
    """
    saved = results.load(workdir)
    if saved is None:
        return _result_of_run(workdir)
    try:
        with np.load(workdir / results.ARRAYS) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{workdir / results.ARRAYS}: cannot be read ({error}); remove {results.RESULT}, and the command that"
            " trained this population writes both again"
        ) from error
    of_members = saved["members"]
    if saved["kind"] == "folds":
        labels, probs = arrays["out_of_fold_label"], arrays["out_of_fold_probs"]
        pairing, scores = [member["fold"] for member in of_members], saved["out_of_fold"]["folds"]
    else:
        labels, probs = arrays["test_label"], arrays["test_probs"].mean(axis=0)
        pairing, scores = [member["seed"] for member in of_members], of_members
    return Result(
        name=str(workdir),
        kind=saved["kind"],
        dataset=saved["dataset"],
        fingerprint=saved["dataset_fingerprint"],
        pairing=tuple(pairing),
        accuracies=tuple(of_member["accuracy"] for of_member in scores),
        labels=labels,
        predictions=probs.argmax(axis=-1),
    )


def _result_of_run(workdir: pathlib.Path) -> Result:
    run = checkpoint.load_run(workdir)
    config, splits = load_data(run.config, run.record["fingerprint"], {})
    logits = predict_logits(config, eval_variables(run.state), splits.test.image)
    scores = results.score(metrics.log_probabilities(logits), splits.test.label)
    return Result(
        name=str(workdir),
        kind="run",
        dataset=splits.name,
        fingerprint=splits.fingerprint,
        pairing=(config.seed,),
        accuracies=(scores["accuracy"],),
        labels=splits.test.label,
        predictions=logits.argmax(axis=-1),
    )


def compare(a: pathlib.Path, b: pathlib.Path) -> Facts:
    """Compares two results.

    Raises:
      UserError: one cannot be read, or they are not about the same examples.
    """
    return compare_results(load_result(a), load_result(b))


def compare_results(a: Result, b: Result) -> Facts:
    """Compares two results, by McNemar's test and, where both have several members, by Student's or Welch's.

    Returns:
      Both results' numbers, the tests, and a `verdict`: `a`, `b`, or None if no difference is shown. Where there are
      members, they decide: a committee of one config may be better by the luck of its seeds.

    Raises:
      WorkdirError: they are not about the same examples.
    """
    refuse_other_examples(a, b)
    examples = mcnemar(a.predictions == a.labels, b.predictions == b.labels)
    over_members = None
    if len(a.accuracies) > 1 and len(b.accuracies) > 1:
        over_members = t_test(a.accuracies, b.accuracies, paired=a.pairing == b.pairing)
    decisive = over_members or examples
    better = None
    if decisive["p"] < SIGNIFICANCE:
        better = "b" if decisive["difference"] > 0 else "a"
    return {
        "a": _facts(a),
        "b": _facts(b),
        "dataset": a.dataset,
        "dataset_fingerprint": a.fingerprint,
        "examples": len(a.labels),
        "mcnemar": examples,
        "t": over_members,
        "verdict": better,
    }


def _facts(result: Result) -> Facts:
    return {
        "workdir": result.name,
        "kind": result.kind,
        "members": len(result.accuracies),
        "accuracy_of_members": float(np.mean(result.accuracies)),
        "accuracy": float(np.mean(result.predictions == result.labels)),
    }


def refuse_other_examples(a: Result, b: Result) -> None:
    """Stops when two results cannot be compared example by example.

    Raises:
      WorkdirError: says what differs.
    """
    if a.fingerprint != b.fingerprint:
        raise WorkdirError(
            f"--compare: {a.name} is about {a.dataset} (fingerprint {a.fingerprint[:12]}), {b.name} about"
            f" {b.dataset} ({b.fingerprint[:12]}); only results on the same data can be compared"
        )
    kinds = {"folds" if result.kind == "folds" else "test" for result in (a, b)}
    is_same = len(kinds) == 1 and np.array_equal(a.labels, b.labels)
    if not is_same or (a.kind == "folds" and a.pairing != b.pairing):
        raise WorkdirError(
            f"--compare: {a.name} judges {_judged(a)}, {b.name} {_judged(b)}; compare folds with as many folds of the"
            " same rows, and seeds or runs with each other"
        )


def _judged(result: Result) -> str:
    if result.kind == "folds":
        return f"{len(result.labels)} training rows in {len(result.pairing)} folds"
    return f"{len(result.labels)} test rows"


def mcnemar(a_right: np.ndarray, b_right: np.ndarray) -> Facts:
    """Tests whether two classifiers err equally often, by the examples that only one gets right (McNemar, 1947).

    Of these, each would be for A or for B with equal chances; the p-value is the exact binomial one, two-sided.

    Args:
      a_right: `bool[N]`, which examples A gets right.
      b_right: the same of B.
    """
    from scipy.stats import binomtest

    only_a, only_b = int(np.sum(a_right & ~b_right)), int(np.sum(b_right & ~a_right))
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    difference = (only_b - only_a) / len(a_right)
    return {"only_a_right": only_a, "only_b_right": only_b, "difference": difference, "p": p}


def t_test(a: Sequence[float], b: Sequence[float], *, paired: bool) -> Facts:
    """Tests whether the means of two populations differ.

    Args:
      a: of each member its accuracy, at least two.
      b: the same of B.
      paired: members at the same place share a seed or a fold: Student's test of the differences (1908). Else Welch's
        (1947), which allows for unequal spread. Training sets of folds overlap, so their p is somewhat too small.

    Returns:
      `difference` (B - A), its 95 % `interval`, `t`, `df` and `p`.
    """
    from scipy import stats

    kind = "paired" if paired else "Welch"
    difference = float(np.mean(b) - np.mean(a))
    steady = np.ptp(np.subtract(b, a)) == 0 if paired else np.ptp(a) == np.ptp(b) == 0
    if steady:  # no spread to measure the difference by
        p = 1.0 if difference == 0 else 0.0
        return {"kind": kind, "difference": difference, "interval": [difference] * 2, "t": None, "df": None, "p": p}
    test = stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)
    return {
        "kind": kind,
        "difference": difference,
        "interval": [float(end) for end in test.confidence_interval(0.95)],
        "t": float(test.statistic),
        "df": float(test.df),
        "p": float(test.pvalue),
    }


def table(comparison: Mapping[str, Any]) -> str:
    """Returns a comparison as text to read, with the verdict as its last sentence."""
    a, b, examples, members = (comparison[name] for name in ("a", "b", "mcnemar", "t"))
    lines = [f"{comparison['dataset']}, {comparison['examples']} examples"]
    for letter, result in (("A", a), ("B", b)):
        what = {"run": "a run", "seeds": f"{result['members']} seeds", "folds": f"{result['members']} folds"}
        together = {"run": "", "seeds": f", committee {result['accuracy']:.2%}", "folds": ""}
        kind = result["kind"]
        lines.append(
            f"{letter}  {result['workdir']} ({what[kind]}): accuracy {result['accuracy_of_members']:.2%}"
            + together[kind]
        )
    lines.append(
        f"examples: {examples['only_b_right']} only B gets right, {examples['only_a_right']} only A"
        f" (McNemar, exact: p = {examples['p']:.2g})"
    )
    if members:
        low, high = members["interval"]
        lines.append(
            f"members: B - A = {100 * members['difference']:+.3f} points, 95 % interval {100 * low:+.3f} to"
            f" {100 * high:+.3f} (t-test, {members['kind']}: p = {members['p']:.2g})"
        )
    lines += ["", sentence(comparison)]
    return "\n".join(lines)


def sentence(comparison: Mapping[str, Any]) -> str:
    """Returns the verdict with the numbers that it rests on."""
    decisive = comparison["t"] or comparison["mcnemar"]
    by = f"{100 * abs(decisive['difference']):.3f} points of accuracy, p = {decisive['p']:.2g}"
    if comparison["verdict"] is None:
        return f"No difference is shown: {by}, which chance alone makes often enough."
    better, worse = ("B", "A") if comparison["verdict"] == "b" else ("A", "B")
    basis = "over the members" if comparison["t"] else "on these examples, for these two networks"
    return f"{better} is better than {worse}, {basis}: by {by}."
