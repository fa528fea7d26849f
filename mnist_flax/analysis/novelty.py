"""Out-of-distribution detection: how well a network's doubt tells digits from other pictures."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.calibration import FALSE_ALARM_RATE
from mnist_flax.analysis.corruptions import hashed_uniform
from mnist_flax.analysis.evaluation import Facts, Predictor, doubt, mean_logits, member_logits
from mnist_flax.data.framing import frame
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Examples
from mnist_flax.errors import DataError
from mnist_flax.sections import DataConfig

COUNT = 2_000  # pictures of each kind, at most
TURNABLE = (2, 3, 4, 5, 7)  # digits that are no longer digits when rotated by 90 degrees
LETTERS = "ACDEFHJKLMNPQRTUVWXYadehkmnprtuvwxy"  # the others look like digits: BGIOSZ, bcfgijloqsz
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono")


def doubt_scores(predictor: Predictor, images: np.ndarray) -> dict[str, np.ndarray]:
    """Computes several measures of doubt, `u8[N,28,28,1] -> f64[N]` each; a larger value means less like a digit.

    Returns:
      `doubt`: the measure that `predict` uses, from the probability and the ink (`evaluation.doubt`).
      `max_probability`: 1 minus the probability of the answer. `energy`: minus the log-sum-exp of the logits (Liu et
      al., 2020), without shifted views, averaged over the members. `disagreement`, only for a committee: the mutual
      information between the answer and the member, in nats (Smith and Gal, 2018).
    """
    logits = member_logits(predictor, images)
    # Averaging over views gives log probabilities, whose energy is always 0.
    one_view = logits if predictor.views == 1 else member_logits(dataclasses.replace(predictor, views=1), images)
    log_probs = metrics.log_probabilities(mean_logits(logits, predictor.temperature))
    scores = {
        "doubt": doubt(predictor, log_probs, images),
        "max_probability": -np.expm1(log_probs.max(axis=-1)),
        "energy": -np.mean(np.logaddexp.reduce(one_view.astype(np.float64), axis=-1), axis=0),
    }
    if len(logits) > 1:
        each, together = metrics.log_probabilities(logits), metrics.log_mean_probabilities(logits)
        scores["disagreement"] = _entropy(together) - np.mean(_entropy(each), axis=0)
    return scores


def _entropy(log_probs: np.ndarray) -> np.ndarray:
    return np.asarray(-np.sum(np.exp(log_probs) * log_probs, axis=-1))


def non_digits(test: Examples, data: DataConfig) -> dict[str, np.ndarray]:
    """Returns pictures that are not digits, `u8[P,28,28,1]`, by kind; the same ones every time.

    They include images of `test` cut in half and, for a dataset of digits, digits rotated by 90 degrees and letters.
    `data` is that of `test`, and says where to look for Fashion-MNIST; nothing is downloaded.
    """
    from scipy.ndimage import gaussian_filter

    images, label = np.asarray(test.image)[:COUNT], np.asarray(test.label)[:COUNT]
    noise = hashed_uniform("noise", np.arange(COUNT), 28, 28)
    smooth = gaussian_filter(noise, (0, 2, 2))
    low, high = (extreme(smooth, axis=(1, 2), keepdims=True) for extreme in (np.min, np.max))
    are_digits = DATASETS[data.name].class_names == tuple("0123456789")
    cut = images.copy()
    cut[:, :14] = 0
    found = {
        "fashion_mnist": _fashion(data),
        "uniform_noise": _grey(noise),
        "smooth_noise": _grey((smooth - low) / (high - low)),
        "rotated_digits": np.rot90(images[np.isin(label, TURNABLE)], axes=(1, 2)) if are_digits else None,
        "cut_digits": cut,
        "letters": letters() if are_digits else None,
    }
    return {name: pictures for name, pictures in found.items() if pictures is not None and len(pictures)}


def _grey(shares: np.ndarray) -> np.ndarray:
    return np.rint(255 * shares).astype(np.uint8)[..., None]


def _fashion(data: DataConfig) -> np.ndarray | None:
    """Returns test images of Fashion-MNIST; None if they are not on this machine or are the evaluated dataset."""
    if data.name == "fashion_mnist":
        return None
    for source in ("tfds", "raw"):
        with contextlib.suppress(DataError):
            fashion = load_splits(dataclasses.replace(data, name="fashion_mnist", source=source))
            return np.asarray(fashion.test.image)[:COUNT]
    return None


def letters() -> np.ndarray:
    """Draws letters in matplotlib's fonts at five angles, framed like MNIST digits, `u8[P,28,28,1]`."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
    drawn = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 64)
        for letter in LETTERS:
            canvas = Image.new("L", (128, 128))
            ImageDraw.Draw(canvas).text((64, 64), letter, fill=255, font=font, anchor="mm")
            for angle in (-10, -5, 0, 5, 10):
                drawn.append(frame(np.asarray(canvas.rotate(angle, Image.Resampling.BILINEAR))))
    return np.stack(drawn)[..., None]


def detection_scores(digits: np.ndarray, others: np.ndarray) -> Facts:
    """Computes how well a measure of doubt separates digits, `f64[N]`, from other pictures, `f64[P]`.

    Returns:
      `auroc`: the chance that a digit has less doubt than another picture. `fpr95`: the share of the other pictures
      that pass when 95 % of the digits pass.
    """
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([0, 1], [len(digits), len(others)])
    threshold = np.quantile(digits, 0.95, method="higher")
    auroc = float(roc_auc_score(truth, np.concatenate([digits, others])))
    return {"auroc": auroc, "fpr95": float(np.mean(others <= threshold))}


def novelty_facts(
    predictor: Predictor, test: Examples, held_out: Examples | None, others: Mapping[str, np.ndarray]
) -> Facts:
    """Computes how well each measure of doubt tells digits from each kind of other picture (see `non_digits`).

    The network was trained on neither `test` nor `held_out`. Thresholds are chosen on `held_out`.

    Returns:
      `scores`: for each measure, `detection_scores` for each kind of picture, the means over the kinds, the `threshold`
      that 1 % of the hold-out digits exceed, and the shares above it of test digits (`false_alarms`) and of each kind
      (`caught`). `pictures`: the number of pictures of each kind.
    """
    digits = doubt_scores(predictor, np.asarray(test.image))
    kinds = {name: doubt_scores(predictor, pictures) for name, pictures in others.items()}
    chosen_on = doubt_scores(predictor, np.asarray(held_out.image)) if held_out is not None else None
    scores: Facts = {}
    for measure, of_digits in digits.items():
        found = {kind: detection_scores(of_digits, of_kind[measure]) for kind, of_kind in kinds.items()}
        threshold = float(np.quantile(chosen_on[measure], 1 - FALSE_ALARM_RATE)) if chosen_on else None
        scores[measure] = {
            "kinds": found,
            "mean_auroc": float(np.mean([of_kind["auroc"] for of_kind in found.values()])),
            "mean_fpr95": float(np.mean([of_kind["fpr95"] for of_kind in found.values()])),
            "threshold": threshold,
            "false_alarms": None if threshold is None else float(np.mean(of_digits > threshold)),
        }
        if threshold is not None:
            for kind, of_kind in kinds.items():
                found[kind]["caught"] = float(np.mean(of_kind[measure] > threshold))
    return {"pictures": {kind: len(of_kind["doubt"]) for kind, of_kind in kinds.items()}, "scores": scores}


def novelty_table(facts: Mapping[str, Any]) -> str:
    """Formats the facts as a text table of AUROC and FPR95; see `detection_scores`."""
    measures = list(facts["scores"])
    lines = ["pictures that are not digits: AUROC, and the share that passes when 95 % of the digits pass"]
    lines.append(f"{'':<16}" + "".join(f"{measure:>20}" for measure in measures))
    for kind in facts["pictures"]:
        cells = [facts["scores"][measure]["kinds"][kind] for measure in measures]
        lines.append(f"{kind:<16}" + "".join(f"{cell['auroc']:>12.4f}{cell['fpr95']:>8.1%}" for cell in cells))
    for measure in measures:
        if (threshold := facts["scores"][measure]["threshold"]) is not None:
            lines.append(
                f"{measure}: the threshold {threshold:.4g} is exceeded by {FALSE_ALARM_RATE:.0%} of the hold-out digits"
                f" and {facts['scores'][measure]['false_alarms']:.2%} of the test digits"
            )
    return "\n".join(lines)
