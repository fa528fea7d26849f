"""Robustness: accuracy, loss and calibration under each corruption of MNIST-C, and doubt about what is not a digit."""

import json
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mnist_flax.analysis import label_errors, novelty, statistics
from mnist_flax.analysis.comparison import mcnemar, p_value
from mnist_flax.analysis.corruptions import CORRUPTIONS, corrupt
from mnist_flax.analysis.evaluation import Facts, Predictor, RunInfo, load_predictor, predict_logits
from mnist_flax.analysis.run_data import DEFAULT_DATA, load_data
from mnist_flax.analysis.scores import accuracy_scores
from mnist_flax.data import batches
from mnist_flax.data.load import raw_folder
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.errors import DataError, WorkdirError
from mnist_flax.run import workdir as workdirs
from mnist_flax.sections import DataConfig

ROBUSTNESS = "robustness.json"
PUBLISHED = "published"  # in place of a severity: each corruption as strong as in MNIST-C
OFFICIAL = "mnist_c"  # the folder of the published arrays, inside the folder of official files


class Corrupted(NamedTuple):
    """A test set under every corruption."""

    images: Mapping[str, np.ndarray]  # `u8[N,28,28,1]` for each corruption
    label: np.ndarray  # `i32[N]`
    official: frozenset[str]  # the corruptions whose images are published arrays


def corrupt_all(test: Examples, severity: int = 0, folder: pathlib.Path | None = None) -> Corrupted:
    """Corrupts a test set; at severity 0 (that of MNIST-C), uses the published arrays that `folder` has.

    Raises:
      DataError: published arrays are damaged, or belong to another test set.
    """
    clean, label = np.asarray(test.image)[..., 0], np.asarray(test.label)
    index = np.arange(len(clean))
    found = {name: folder / name for name in CORRUPTIONS if folder and not severity and (folder / name).is_dir()}

    def images(name: str) -> np.ndarray:
        return read_official(found[name], label) if name in found else corrupt(name, clean, index, severity)[..., None]

    from scipy import ndimage, sparse, special, stats  # noqa: F401  # two threads must not be the first to import them

    with ThreadPoolExecutor(2) as pool:
        return Corrupted(dict(zip(CORRUPTIONS, pool.map(images, CORRUPTIONS), strict=True)), label, frozenset(found))


def read_official(folder: pathlib.Path, label: np.ndarray) -> np.ndarray:
    """Reads the published test images of one corruption, `u8[N,28,28,1]`.

    Raises:
      DataError: the files are missing or damaged, or belong to a test set with other labels.
    """
    try:
        images, labels = (_read_npy(folder / f"test_{kind}.npy") for kind in ("images", "labels"))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); restore it, or remove the folder") from error
    if images.shape != (len(label), 28, 28, 1) or images.dtype != np.uint8 or not np.array_equal(labels, label):
        raise DataError(f"{folder}: does not match the test set; restore it, or remove the folder")
    return np.asarray(images)


def _read_npy(path: pathlib.Path) -> np.ndarray:
    """Reads one array; `np.load` would also accept an archive of several."""
    with path.open("rb") as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def official_folder(data: DataConfig) -> pathlib.Path | None:
    """Returns the folder of the published arrays, or None if there is none."""
    folder = raw_folder(data)
    if folder is None or data.name != "mnist" or not (folder / OFFICIAL).is_dir():
        return None
    return folder / OFFICIAL


def predict_all(predictor: Predictor, test: Examples, corrupted: Corrupted) -> dict[str, np.ndarray]:
    """Returns the logits `f32[N,C]` for the clean test set (`clean`) and for each corruption."""
    images = {"clean": np.asarray(test.image), **corrupted.images}
    return {name: predict_logits(predictor, of_name) for name, of_name in images.items()}


def robustness_facts(logits: Mapping[str, np.ndarray], corrupted: Corrupted) -> Facts:
    """Computes scores with 95 % intervals from the logits that `predict_all` returns."""
    right = {name: of_name.argmax(axis=-1) == corrupted.label for name, of_name in logits.items()}
    scores = {name: accuracy_scores(of_name, corrupted.label) for name, of_name in logits.items()}
    rows = {
        name: {**scores[name], "affine": kind.affine, "source": "official" if name in corrupted.official else "own"}
        for name, kind in CORRUPTIONS.items()
    }

    def mean_over(names: list[str]) -> Facts:
        over_images = statistics.spread_of(np.mean([right[name] for name in names], axis=0))
        means = {f"mean_{field}": float(np.mean([rows[name][field] for name in names])) for field in ("loss", "ece")}
        interval = np.clip(over_images["interval"], 0, 1).tolist()  # with few images, it may extend beyond
        return {"mean_accuracy": over_images["mean"], "mean_accuracy_interval": interval, **means}

    affine = [name for name, kind in CORRUPTIONS.items() if kind.affine]
    others = [name for name in CORRUPTIONS if name not in affine]
    return {
        **mean_over(list(CORRUPTIONS)),
        "examples": len(corrupted.label),
        "clean": scores["clean"],
        "affine": {**mean_over(affine), "names": affine},
        "others": {**mean_over(others), "names": others},
        "corruptions": rows,
    }


def compare_robustness(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], label: np.ndarray) -> Facts:
    """Compares two networks on the same corrupted images: by McNemar's test for each corruption, and by mean accuracy.

    Returns:
      The test for each corruption, with p-values that are not corrected for multiple testing; the difference in
      mean accuracy (B - A) with its interval; and a `verdict`: `a`, `b`, or None if the interval contains 0.
    """
    right_a, right_b = ({name: logits.argmax(axis=-1) == label for name, logits in of.items()} for of in (a, b))
    per_image = [np.mean([right[name] for name in CORRUPTIONS], axis=0) for right in (right_a, right_b)]
    over_images = statistics.spread_of(per_image[1] - per_image[0])
    interval = over_images["interval"]
    return {
        "difference": over_images["mean"],
        "interval": interval,
        "verdict": "b" if interval[0] > 0 else "a" if interval[1] < 0 else None,
        "corruptions": {name: mcnemar(right_a[name], right_b[name]) for name in CORRUPTIONS},
    }


class Outcome(NamedTuple):
    """The result for a network: the contents of `robustness.json`, and what the page needs to draw its pictures."""

    facts: Facts
    predictor: Predictor
    splits: Splits
    non_digits: Mapping[str, np.ndarray]


def robustness_of_workdir(
    workdir: pathlib.Path,
    *,
    checkpoint: str = "latest",
    severity: int = 0,
    compare: pathlib.Path | None = None,
    overrides: Mapping[str, Any] = DEFAULT_DATA,
) -> Outcome:
    """Evaluates a run, or a population as a committee, on corrupted digits and on pictures that are not digits.

    `compare` names another run or population to compare with on the same images. Its latest checkpoint is used, or its
    best one if `checkpoint` is `best`. Severity 0 is that published with MNIST-C. See `load_predictor` for the
    checkpoints and `load_data` for the overrides.

    Raises:
      UserError: a run, a checkpoint or the data cannot be loaded, or do not match.
    """
    predictor, info = load_predictor(workdir, checkpoint)
    # If `checkpoint` is a step, the other run may have no checkpoint at that step.
    other = load_predictor(compare, "best" if checkpoint == "best" else "latest") if compare else None
    data, splits = load_data(info.config, info.fingerprint, overrides)
    if other and other[1].fingerprint != info.fingerprint:
        raise WorkdirError(f"--compare={compare}: was not trained on the same data as {workdir}; name a run that was")
    if len(splits.test.label) < 2:
        raise DataError(f"{splits.name}: has a single test image; an interval needs at least two")
    corrupted = corrupt_all(splits.test, severity, official_folder(data))
    logits = predict_all(predictor, splits.test, corrupted)
    non_digits = novelty.non_digits(splits.test, data)
    facts = {
        "workdir": workdirs.shown(workdir),
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "trained_on": info.config.data.name,
        "augment": info.config.augment.to_dict(),
        "members": len(predictor.members),
        "checkpoint": checkpoint,
        "step": max(info.steps),
        "temperature": predictor.temperature,
        "severity": severity or PUBLISHED,
        **robustness_facts(logits, corrupted),
        "no_digit": novelty.novelty_facts(predictor, splits.test, _held_out(data, info, splits), non_digits),
    }
    if info.kind == "folds" and splits.name == info.config.data.name:
        facts["labels"] = label_errors.label_facts(statistics.load_arrays(workdir, info.kind, len(info.runs)))
    if compare and other:
        theirs = predict_all(other[0], splits.test, corrupted)
        facts["compare"] = {"with": workdirs.shown(compare), **compare_robustness(logits, theirs, corrupted.label)}
    return Outcome(facts, predictor, splits, non_digits)


def _held_out(data: DataConfig, info: RunInfo, splits: Splits) -> Examples | None:
    """Returns the hold-out rows, which no member was trained on, or None if there are none."""
    if info.kind == "folds":
        return None
    _, held_out = batches.rows_of(splits.train.label, data)
    return splits.train.select(held_out) if len(held_out) else None


def save_robustness(outcome: Outcome, page: str, folder: pathlib.Path) -> None:
    """Writes `robustness.json` and `robustness.html` into a folder.

    Results that differ from those of the model card in severity, checkpoint or dataset have these in their names.

    Raises:
      WorkdirError: a file cannot be written.
    """
    facts, path = outcome.facts, folder / ROBUSTNESS
    other = [f"severity{facts['severity']}"] if facts["severity"] != PUBLISHED else []
    other += [str(facts["checkpoint"])] if facts["checkpoint"] != "latest" else []
    other += [facts["dataset"].replace("/", "-")] if facts["dataset"] != facts["trained_on"] else []
    path = path.with_stem("-".join([path.stem, *other]))
    workdirs.write_text(path.with_suffix(".html"), page, remedy=workdirs.REMEDY_OUTPUT)
    workdirs.write_text(path, json.dumps(facts, indent=1, allow_nan=False) + "\n", remedy=workdirs.REMEDY_OUTPUT)


def robustness_table(facts: Mapping[str, Any]) -> str:
    """Formats the facts as a text table."""
    against = facts.get("compare")
    lines = [
        f"{facts['dataset']}, {facts['examples']} test images under each corruption, severity: {facts['severity']}",
        f"{'':<16}{'accuracy':>9}  {'95 % interval':<18}{'loss':>8}{'ECE':>8}" + "   B right - A right" * bool(against),
        _row("clean", facts["clean"]),
    ]
    for name, row in facts["corruptions"].items():
        line = _row(name, row, "affine" if row["affine"] else "")
        if against:
            of_name = against["corruptions"][name]
            line += f"  {of_name['only_b_right'] - of_name['only_a_right']:+6d}  {p_value(of_name)}"
        lines.append(line)
    lines.append("")
    for title, part in (
        (f"mean of {len(CORRUPTIONS)}", facts),
        ("affine", facts["affine"]),
        ("the others", facts["others"]),
    ):
        names = ("accuracy", "accuracy_interval", "loss", "ece")
        lines.append(_row(title, {name: part[f"mean_{name}"] for name in names}))
    if against:
        low, high = (100 * end for end in against["interval"])
        verdict = {"a": "A is better", "b": "B is better", None: "no significant difference"}[against["verdict"]]
        lines.append(
            f"B = {against['with']}: mean {100 * against['difference']:+.2f} points, 95 % interval"
            f" {low:+.2f} to {high:+.2f}: {verdict}"
        )
    lines += ["", novelty.novelty_table(facts["no_digit"])]
    if "labels" in facts:
        lines += ["", label_errors.label_table(facts["labels"])]
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, row: Mapping[str, Any], note: str = "") -> str:
    low, high = row["accuracy_interval"]
    interval = f"{100 * low:.2f} to {100 * high:.2f}"
    return f"{name:<16}{row['accuracy']:>9.2%}  {interval:<18}{row['loss']:>8.4f}{row['ece']:>8.4f}  {note:<6}"
