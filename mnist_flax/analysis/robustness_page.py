"""The page about robustness: one digit under every corruption with the network's answer, in one HTML file."""

from typing import Any

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.corruptions import CORRUPTIONS, corrupt
from mnist_flax.analysis.evaluation import Predictor, predict_logits
from mnist_flax.analysis.report.pictures import data_uri, png
from mnist_flax.analysis.robustness import Outcome
from mnist_flax.data.registry import DATASETS
from mnist_flax.templates import load_template

SEVERITIES = (1, 2, 3, 4, 5)
NUM_NON_DIGITS = 8  # pictures shown of each kind of non-digit
NUM_LABELS = 40  # doubtful labels shown

Cards = list[dict[str, Any]]


def draw_page(outcome: Outcome) -> str:
    """Returns the page."""
    facts, splits, names = outcome.facts, outcome.splits, DATASETS[outcome.splits.name].class_names
    digit, label = np.asarray(splits.test.image)[:1, :, :, 0], int(splits.test.label[0])
    corrupted = [corrupt(name, digit, np.zeros(1, int), severity) for name in CORRUPTIONS for severity in SEVERITIES]
    cards = _cards(outcome.predictor, np.stack(corrupted).transpose(0, 2, 3, 1), names, label)
    per_name = {name: cards[i * len(SEVERITIES) :][: len(SEVERITIES)] for i, name in enumerate(CORRUPTIONS)}
    others = {
        kind: _cards(outcome.predictor, pictures[:: max(1, len(pictures) // NUM_NON_DIGITS)][:NUM_NON_DIGITS], names)
        for kind, pictures in outcome.non_digits.items()
    }
    doubtful = [
        {**entry, "picture": data_uri(png(splits.train.image[entry["row"], :, :, 0]))}
        for entry in facts.get("labels", {}).get("listed", [])[:NUM_LABELS]
    ]
    return load_template("analysis/robustness.html.jinja").render(
        facts=facts,
        class_names=names,
        label=names[label],
        corrupted=per_name,
        published={name: kind.published for name, kind in CORRUPTIONS.items()},
        non_digits=others,
        doubtful=doubtful,
    )


def _cards(predictor: Predictor, images: np.ndarray, names: tuple[str, ...], label: int | None = None) -> Cards:
    """Returns each picture, `u8[N,28,28,1]`, with the network's answer, and `right` or `wrong` if there is a label."""
    probs = metrics.probabilities(predict_logits(predictor, images))
    return [
        {
            "picture": data_uri(png(image[:, :, 0])),
            "answer": names[int(of_image.argmax())],
            "probability": float(of_image.max()),
            "verdict": "" if label is None else "right" if int(of_image.argmax()) == label else "wrong",
        }
        for image, of_image in zip(images, probs, strict=True)
    ]
