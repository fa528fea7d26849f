"""The curves of many runs in one plot: their mean as a line, and from the least to the greatest as a band."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mnist_flax.analysis.report import plots

_LEAST_ERROR = 1e-5  # a share of errors of 0 has no place on a logarithmic axis


def draw(curves: Mapping[str, Any]) -> dict[str, bytes]:
    """Draws loss and accuracy over the epochs, as SVG files by their names.

    Args:
      curves: for each of `train`, `holdout` and `test` points with `epoch` and, for loss and accuracy, `mean`, `min`
        and `max`.
    """
    return {f"curves_{field}": plots.as_file(_plot(curves, field)) for field in ("loss", "accuracy")}


def _plot(curves: Mapping[str, Any], field: str) -> str:
    """Draws one quantity; accuracy by the share of errors, for what matters lies between 99 and 100 %."""

    def heights(split: str, name: str) -> np.ndarray:
        values = np.array([point[field][name] for point in curves[split]])
        return values if field == "loss" else np.maximum(1 - values, _LEAST_ERROR)

    with plots._figure(3.8) as figure:
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
        plots._decimal_ticks(axes, field)
        if field == "accuracy":
            axes.invert_yaxis()
        axes.set_title("Loss (cross-entropy, nats)" if field == "loss" else "Accuracy", loc="left")
        axes.set_xlabel("Epoch (lines: mean of the members; bands: their range)")
        axes.legend()
        return plots._svg(figure)
