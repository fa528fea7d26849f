"""Tests whether one result is better than another: over the members of each, or on the examples they share."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_flax.analysis import statistics
from mnist_flax.analysis.evaluation import Facts, load_predictor, mean_logits, member_logits
from mnist_flax.analysis.run_data import DEFAULT_DATA, check_own_dataset, load_own_data, select_examples
from mnist_flax.config import Config, result_fields
from mnist_flax.errors import ConfigError, WorkdirError

ROWS = ("seed", "data.holdout", "data.folds", "data.fold")  # fields that are not part of a recipe
SIGNIFICANCE = 0.05  # a difference is significant if its p-value is below this
_ROWS_OF = {"test": "test", "holdout": "hold-out"}
ROUNDING = 1e-12  # a smaller difference of two accuracies is a rounding error


class Result(NamedTuple):
    """The part of a run or population that a comparison needs."""

    name: str  # its folder
    kind: str  # `run`, `seeds` or `folds`
    recipe: dict[str, Any]  # the config fields that can change a result; empty if another version wrote them
    is_finished: bool
    dataset: str  # the name of the dataset
    fingerprint: str  # that of the dataset
    pairing: tuple[int, ...]  # the seed or the fold of each member; two populations are paired if these are equal
    split: str  # `test` or `holdout`: what the members were evaluated on; for folds always `holdout`
    accuracies: tuple[float, ...]  # of each member
    labels: np.ndarray  # `i32[N]`, the labels of the examples
    predictions: np.ndarray  # `i32[N]`, those of the run, of the committee (seeds), or out of fold (folds)


def load_result(workdir: pathlib.Path, overrides: Mapping[str, Any] = DEFAULT_DATA, split: str = "test") -> Result:
    """Reads a finished population, or evaluates the latest checkpoints of a run or a population.

    `overrides` say where the data are, as for `load_own_data`. `split` is `test` or `holdout`; folds are always
    compared on the rows that they hold out.

    Raises:
      UserError: the folder holds neither, no rows were held out, or the data cannot be loaded.
    """
    saved = statistics.load_population_result(workdir)
    if saved is None or (saved["kind"] == "seeds" and split == "holdout"):  # hold-out scores are not in the file
        return _evaluated(workdir, overrides, split)
    check_own_dataset(saved["dataset"], overrides)
    arrays = statistics.load_arrays(workdir, saved["kind"], len(saved["members"]))
    if is_folds := saved["kind"] == "folds":
        labels, probs = arrays["out_of_fold_label"], arrays["out_of_fold_probs"]
    else:
        labels, probs = arrays["test_label"], arrays["test_probs"].mean(axis=0)
    return Result(
        name=str(workdir),
        kind=saved["kind"],
        recipe=_recipe(saved["config"]),
        is_finished=True,
        dataset=saved["dataset"],
        fingerprint=saved["dataset_fingerprint"],
        pairing=tuple(member["fold" if is_folds else "seed"] for member in saved["members"]),
        split="holdout" if is_folds else "test",
        accuracies=tuple(of["accuracy"] for of in (saved["out_of_fold"]["folds"] if is_folds else saved["members"])),
        labels=labels,
        predictions=probs.argmax(axis=-1),
    )


def _recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        fields = result_fields(Config.from_dict(values))
    except ConfigError:
        return {}
    return {name: value for name, value in fields.items() if name not in ROWS}


def _evaluated(workdir: pathlib.Path, overrides: Mapping[str, Any], split: str) -> Result:
    predictor, info = load_predictor(workdir)
    splits = load_own_data(info.config, info.fingerprint, overrides)
    examples = select_examples(info.config.data, splits, split)
    logits = member_logits(predictor, examples.image)
    return Result(
        name=str(workdir),
        kind=info.kind,
        recipe=_recipe(info.config.to_dict()),
        is_finished=all(step == info.config.num_steps for step in info.steps),
        dataset=splits.name,
        fingerprint=splits.fingerprint,
        pairing=tuple(run.config.seed for run in info.runs),
        split=split,
        accuracies=tuple(float(np.mean(of_member.argmax(axis=-1) == examples.label)) for of_member in logits),
        labels=examples.label,
        predictions=mean_logits(logits).argmax(axis=-1),
    )


def compare_results(a: Result, b: Result) -> Facts:
    """Compares two results with McNemar's test and, if both have several members, with Student's or Welch's t-test.

    Returns:
      The scores of both, the tests, and a `verdict`: `a`, `b`, or None if the difference is not significant. If both
      have several members, the t-test decides: a committee may beat another just because it was lucky with its seeds.

    Raises:
      WorkdirError: they were not evaluated on the same examples.
    """
    check_same_examples(a, b)
    by_example = mcnemar(a.predictions == a.labels, b.predictions == b.labels)
    have_members = min(len(a.accuracies), len(b.accuracies)) > 1
    by_member = t_test(a.accuracies, b.accuracies, paired=a.pairing == b.pairing) if have_members else None
    decisive = by_member or by_example
    better = "b" if decisive["difference"] > 0 else "a"
    return {
        "a": _facts(a),
        "b": _facts(b),
        "dataset": a.dataset,
        "dataset_fingerprint": a.fingerprint,
        "split": a.split,
        "examples": len(a.labels),
        "recipe": _changes(a.recipe, b.recipe),
        "mcnemar": by_example,
        "t": by_member,
        "verdict": better if decisive["p"] < SIGNIFICANCE else None,
    }


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """Returns the values of A and B of each field that differs, or None if they are not known."""
    if not (a and b):
        return None
    return {name: [a.get(name), b.get(name)] for name in {**a, **b} if a.get(name) != b.get(name)}


def _facts(result: Result) -> Facts:
    return {
        "workdir": result.name,
        "kind": result.kind,
        "finished": result.is_finished,
        "members": len(result.accuracies),
        "accuracy_of_members": float(np.mean(result.accuracies)),
        "accuracy": float(np.mean(result.predictions == result.labels)),
    }


def check_same_examples(a: Result, b: Result) -> None:
    """Raises a WorkdirError if two results cannot be compared example by example."""
    if a.fingerprint != b.fingerprint:
        raise WorkdirError(
            f"--compare: {a.name} was evaluated on {a.dataset} (fingerprint {a.fingerprint[:12]}), {b.name} on"
            f" {b.dataset} ({b.fingerprint[:12]}); only results on the same data can be compared"
        )
    held_out = [(result.split, result.pairing if result.kind == "folds" else None) for result in (a, b)]
    if held_out[0] != held_out[1] or not np.array_equal(a.labels, b.labels):
        what_a, what_b = (
            f"{len(result.labels)} " + (f"training rows in {len(folds)} folds" if folds else f"{_ROWS_OF[split]} rows")
            for result, (split, folds) in zip((a, b), held_out, strict=True)
        )
        raise WorkdirError(
            f"--compare: {a.name} was evaluated on {what_a}, {b.name} on {what_b}; compare folds with as many folds of"
            " the same rows, and seeds or runs with each other, on the same rows"
        )


def mcnemar(a_right: np.ndarray, b_right: np.ndarray) -> Facts:
    """Tests whether two classifiers are wrong equally often, from the examples only one gets right (McNemar, 1947).

    Under the null hypothesis, A and B are equally likely to be the one that is right. The p-value is exact (binomial)
    and two-sided. `a_right` and `b_right`, `bool[N]`, say which examples each gets right.
    """
    from scipy.stats import binomtest

    only_a, only_b = int(np.sum(a_right & ~b_right)), int(np.sum(b_right & ~a_right))
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    difference = (only_b - only_a) / len(a_right)
    return {"only_a_right": only_a, "only_b_right": only_b, "difference": difference, "p": p}


def t_test(a: Sequence[float], b: Sequence[float], *, paired: bool) -> Facts:
    """Tests whether the means of two populations differ.

    `a` and `b` are the accuracies of their members, at least two each. If members at the same index share a seed or a
    fold, they are `paired`, and the test is Student's (1908), otherwise Welch's (1947), which allows unequal variances.
    The training sets of folds overlap, so p is a little too small. If there is no variance, as can happen by chance
    with few members, the exact permutation test is used instead.

    Returns:
      `kind`, `difference` (B - A), its 95 % `interval`, `t`, `df` and `p`; a permutation test has only the first two
      and `p`, and the others are None.
    """
    difference = float(np.mean(b) - np.mean(a))
    varying = [np.subtract(b, a)] if paired else [a, b]
    if max(np.ptp(values) for values in varying) < ROUNDING:
        # The observed difference is the largest possible. Only one other permutation matches its size: all signs
        # flipped if paired, otherwise the two populations exchanged, if they are equally large.
        num_permutations = 2 ** len(a) if paired else math.comb(len(a) + len(b), len(a))
        num_extreme = 2 if len(a) == len(b) else 1
        p = num_extreme / num_permutations if abs(difference) > ROUNDING else 1.0
        return {"kind": "permutation test", "difference": difference, "interval": None, "t": None, "df": None, "p": p}
    from scipy import stats

    test = stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)
    return {
        "kind": "paired t-test" if paired else "Welch's t-test",
        "difference": difference,
        "interval": [float(end) for end in test.confidence_interval(0.95)],
        "t": float(test.statistic),
        "df": float(test.df),
        "p": float(test.pvalue),
    }


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Formats a comparison as a text table that ends with the verdict."""
    a, b, examples, members = (comparison[name] for name in ("a", "b", "mcnemar", "t"))
    lines = [f"{comparison['dataset']}, {comparison['examples']} {_ROWS_OF[comparison['split']]} examples"]
    for letter, result in (("A", a), ("B", b)):
        what = {"run": "a run", "seeds": f"{result['members']} seeds", "folds": f"{result['members']} folds"}
        committee = f", committee {result['accuracy']:.2%}" if result["kind"] == "seeds" else ""
        accuracy = f"accuracy {result['accuracy_of_members']:.2%}"
        state = "" if result["finished"] else ", not finished"
        lines.append(f"{letter}  {result['workdir']} ({what[result['kind']]}{state}): {accuracy}{committee}")
    if (recipe := comparison["recipe"]) is not None:
        changed = [f"{name} {of_a!r} (A), {of_b!r} (B)" for name, (of_a, of_b) in recipe.items()]
        lines.append(f"recipe: {'; '.join(changed) or 'the same; only seeds, rows, versions or machines can differ'}")
    lines.append(
        f"examples ({predicted_by(a)} A, {predicted_by(b)} B): only B is right on {examples['only_b_right']}, only A on"
        f" {examples['only_a_right']} (exact McNemar test: {p_value(examples)})"
    )
    if members:
        interval = ""
        if members["interval"]:
            low, high = members["interval"]
            interval = f", 95 % interval {100 * low:+.3f} to {100 * high:+.3f}"
        lines.append(
            f"members: B - A = {100 * members['difference']:+.3f} points{interval}"
            f" ({members['kind']}: {p_value(members)})"
        )
    lines += ["", sentence(comparison)]
    return "\n".join(lines)


def predicted_by(result: Mapping[str, Any]) -> str:
    """Returns what classified the examples of a result, for the table."""
    return {"run": "network", "seeds": "committee", "folds": "out of fold"}[result["kind"]]


def p_value(test: Mapping[str, Any]) -> str:
    """Formats the p-value of a test; one that rounds to 0 is below the smallest number."""
    return f"p = {test['p']:.2g}" if test["p"] > 0 else "p < 1e-300"


def sentence(comparison: Mapping[str, Any]) -> str:
    """Formats the verdict as a sentence, with the numbers behind it."""
    decisive = comparison["t"] or comparison["mcnemar"]
    basis = "mean accuracy" if comparison["t"] else "accuracy on these examples"
    by = f"{100 * abs(decisive['difference']):.3f} points of {basis} ({p_value(decisive)})"
    if comparison["verdict"] is None:
        return f"No significant difference: {by}."
    better, worse = ("B", "A") if comparison["verdict"] == "b" else ("A", "B")
    return f"{better} is better than {worse} by {by}."
