"""The curves of many runs in one plot: the mean as a line, the range as a band."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mnist_flax.analysis.report import plots

_MIN_ERROR = 1e-5  # replaces 0, which a logarithmic axis cannot show


def draw(curves: Mapping[str, Any]) -> dict[str, bytes]:
    """Draws loss and accuracy over the epochs; returns the SVG files by name.

    Args:
      curves: a list of points for each of `train`, `holdout` and `test`; a point has `epoch`, and `mean`, `min` and
        `max` of `loss` and `accuracy`.
    """
    return {f"curves_{field}": plots.as_file(_plot(curves, field)) for field in ("loss", "accuracy")}


def _plot(curves: Mapping[str, Any], field: str) -> str:
    """Draws loss or accuracy; accuracy on a log scale of the error rate, to resolve 99 to 100 %."""

    def heights(split: str, name: str) -> np.ndarray:
        values = np.array([point[field][name] for point in curves[split]])
        return values if field == "loss" else np.maximum(1 - values, _MIN_ERROR)

    with plots.new_figure(3.8) as figure:
        axes = figure.subplots()
        for split, name, color, dashes in (
            ("train", "train", plots.BLUE, "-"),
            ("holdout", "hold-out", plots.ORANGE, "--"),
        ):
            epochs = [point["epoch"] for point in curves[split]]
            if epochs:
                axes.fill_between(epochs, heights(split, "min"), heights(split, "max"), color=color, alpha=0.2, lw=0)
                axes.plot(epochs, heights(split, "mean"), dashes, color=color, label=name)
        if curves["test"]:
            mean = heights("test", "mean")
            ends = np.abs(np.array([heights("test", "min"), heights("test", "max")]) - mean)
            epochs = [point["epoch"] for point in curves["test"]]
            axes.errorbar(epochs, mean, yerr=ends, fmt="*", color=plots.GREEN, markersize=10, label="test, at the end")
        axes.set_yscale("log")
        plots.decimal_ticks(axes, field)
        if field == "accuracy":
            axes.invert_yaxis()
        axes.set_title("Loss (cross-entropy, nats)" if field == "loss" else "Accuracy", loc="left")
        axes.set_xlabel("Epoch (lines: mean of the members; bands: their range)")
        axes.legend()
        return plots.to_svg(figure)
