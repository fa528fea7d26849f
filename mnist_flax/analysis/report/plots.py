"""The plots, drawn by matplotlib as SVG: as separate files, and inline in the page, which has a dark mode."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Colours by role, for light mode; the page's style sheet replaces them in dark mode. The three that carry meaning are
# from Okabe and Ito (2008), chosen for colour-blind readers; marker shapes differ as well. ON_FILL, the text on a dark
# cell, differs from INK by one so that the page can replace it separately.
INK, MUTED, GRID, ON_FILL = "#1c2127", "#5a6472", "#d8dde4", "#1c2128"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
ROLES = {INK: "ink", MUTED: "muted", GRID: "grid", ON_FILL: "on-fill", BLUE: "blue", ORANGE: "orange", GREEN: "green"}

WIDTH = 5.2  # inches (of 72 SVG units); about as wide as a phone, so that the text is not scaled down there
MAX_CLASSES_WITH_TEXT = 12  # with more, the cells of the confusion matrix show no numbers

_AXIS_TITLES = {"loss": "Loss (hold-out and test: cross-entropy in nats)", "accuracy": "Accuracy"}
TITLES = {
    "loss": "Loss over the epochs, with the learning rate below",
    "accuracy": "Accuracy over the epochs, with the learning rate below",
    "confusion_counts": "Confusion matrix: number of examples by label and prediction",
    "confusion_rates": "Confusion matrix: percentage of each label by prediction",
    "classes": "Precision, recall and F1 of each class with 95 % intervals",
    "reliability": "Reliability diagram: accuracy by confidence, with the number of examples below",
}

_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.axisbelow", "axes.grid"), True),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    "axes.titlesize": 11.5,
    "font.size": 10.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.parse_math": False,  # the names of classes may contain dollar signs
    "svg.hashsalt": "mnist_flax",
}


@contextlib.contextmanager
def new_figure(height: float, width: float = WIDTH, *, left: float = 0.75, bottom: float = 0.55) -> Iterator[Any]:
    """Yields an empty figure in our style and leaves matplotlib's settings unchanged; all sizes are in inches.

    The margins are fixed, because matplotlib's automatic layouts draw everything twice, which takes 0.4 s per report.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(
            left=left / width, right=1 - 0.15 / width, bottom=bottom / height, top=1 - 0.35 / height, hspace=0.3
        )
        yield figure


def _width_of(names: Sequence[str]) -> float:
    """Estimates the width of the longest name, in inches."""
    return 0.1 + 0.085 * max(map(len, names))


def to_svg(figure: Any) -> str:
    """Renders a figure as SVG text, which is identical for identical figures."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", buffer.getvalue())
    return re.sub(r" transform=\"rotate\(-0 [^\"]*\"", "", text)


def as_file(svg: str) -> bytes:
    """Returns a plot as a standalone SVG file with a white background."""
    start = '<g id="figure_1">'
    return svg.replace(start, f'<rect width="100%" height="100%" fill="#ffffff"/>{start}', 1).encode()


def inline_svg(svg: str, name: str, title: str) -> str:
    """Returns a plot as an SVG element with the page's colours, unique ids and a title for screen readers."""
    body = svg[svg.index("<svg") :]
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", body))

    def rename(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    body = re.sub(r" id=\"([^\"]*)\"", rename, body)
    body = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", body)
    body = re.sub(r" xmlns(?::xlink)?=\"[^\"]*\"", "", body)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"\s*\n\s*", " ", body)
    for color, role in ROLES.items():
        body = re.sub(color, f"var(--{role})", body, flags=re.IGNORECASE)
    size = re.search(r"viewBox=\"0 0 ([\d.]+) ([\d.]+)\"", body)
    assert size
    head = f'<svg viewBox="{size[0][9:-1]}" width="{size[1]}" height="{size[2]}" role="img" aria-label="{title}">'
    return re.sub(r"<svg[^>]*>", head, body, count=1).strip()


def draw_all(facts: Mapping[str, Any]) -> dict[str, str]:
    """Draws the plots of a report and returns them by name; learning curves only if there is a log."""
    return {
        **(learning_curves(facts["curves"]) if facts["curves"]["train"] else {}),
        **confusion(facts["confusion"], facts["class_names"]),
        "classes": classes(facts["test"]["per_class"]),
        "reliability": reliability_diagram(facts["calibration"]),
    }


def learning_curves(curves: Mapping[str, Any]) -> dict[str, str]:
    """Draws loss and accuracy over the epochs, with the learning rate below."""
    plots = {}
    for field, title in _AXIS_TITLES.items():
        with new_figure(4.4) as figure:
            top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
            _curve(top, curves, field)
            top.set_title(title, loc="left")
            top.legend(loc="upper right" if field == "loss" else "lower right")
            top.set_xlim(left=0)
            top.locator_params(axis="x", integer=True)
            epochs, rates = ([record[name] for record in curves["train"]] for name in ("epoch", "learning_rate"))
            below.plot(epochs, rates, color=MUTED, marker=_dots(epochs))
            below.set_title("Learning rate", loc="left")
            below.set_ylim(bottom=0)
            below.set_xlabel("Epoch")
            below.locator_params(axis="y", nbins=3)
            plots[field] = to_svg(figure)
    return plots


def _curve(axes: Any, curves: Mapping[str, Any], field: str) -> None:
    """Draws loss or accuracy of all splits; accuracy on a log scale of the error rate, to resolve 99 to 100 %."""

    def heights(records: Sequence[Mapping[str, Any]], name: str = field) -> list[float]:
        if field == "loss":
            return [record[name] for record in records]
        return [max(1 - record[name], 0.5 / record["examples"]) for record in records]

    train, is_smoothed = curves["train"], curves["smoothed_over"] > 1
    logged = {"alpha": 0.5, "linewidth": 1, "label": "train, as logged"}
    looks = {
        "train": {"color": BLUE} | (logged if is_smoothed else {"marker": _dots(train), "label": "train"}),
        "holdout": {"color": ORANGE, "marker": "s", "markersize": 4.5, "linestyle": "--", "label": "hold-out"},
        "test": {"color": GREEN, "marker": "*", "markersize": 12, "linestyle": "none", "label": "test, at the end"},
    }
    for split, look in looks.items():
        epochs = [record["epoch"] for record in curves[split]]
        if epochs:
            axes.plot(epochs, heights(curves[split]), **look)
        if split == "train" and is_smoothed:
            axes.plot(epochs, heights(train, f"smoothed_{field}"), color=BLUE, label="train, smoothed")
    axes.margins(y=0.09)
    log_axis(axes, field)


def population_curves(curves: Mapping[str, Any]) -> dict[str, bytes]:
    """Draws loss and accuracy of a population over the epochs, the mean as a line and the range as a band.

    Each point of `train`, `holdout` and `test` has `epoch`, and `mean`, `min` and `max` of `loss` and `accuracy`.
    Returns the SVG files by name.
    """
    return {f"curves_{field}": as_file(_bands(curves, field)) for field in ("loss", "accuracy")}


def _bands(curves: Mapping[str, Any], field: str) -> str:
    """Draws loss or accuracy; accuracy on a log scale of the error rate, to resolve 99 to 100 %."""

    def columns(split: str) -> tuple[list[float], np.ndarray, np.ndarray, np.ndarray]:
        names = ("mean", "min", "max") if field == "loss" else ("mean", "max", "min")  # ascending on the axis
        values = np.array([[point[field][name] for name in names] for point in curves[split]])
        mean, low, high = (values if field == "loss" else np.maximum(1 - values, 1e-5)).T  # a log axis cannot show 0
        return [point["epoch"] for point in curves[split]], mean, low, high

    with new_figure(3.8) as figure:
        axes = figure.subplots()
        for split, name, color, dashes in (("train", "train", BLUE, "-"), ("holdout", "hold-out", ORANGE, "--")):
            if curves[split]:
                epochs, mean, low, high = columns(split)
                axes.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
                axes.plot(epochs, mean, dashes, color=color, label=name)
        if curves["test"]:
            epochs, mean, low, high = columns("test")
            ends = np.abs([low - mean, high - mean])
            axes.errorbar(epochs, mean, yerr=ends, fmt="*", color=GREEN, markersize=10, label="test, at the end")
        log_axis(axes, field)
        axes.set_title(_AXIS_TITLES[field], loc="left")
        axes.set_xlabel("Epoch (lines: mean of the members; bands: their range)")
        if axes.get_legend_handles_labels()[0]:  # runs of different lengths may share no point
            axes.legend()
        return to_svg(figure)


def log_axis(axes: Any, field: str) -> None:
    """Makes the y axis logarithmic, in loss or error rate; plain numbers label it, at 1, 2 and 5 if it is long."""
    from matplotlib.ticker import MaxNLocator

    axes.set_yscale("log")
    low, high = sorted(axes.get_ylim())
    ticks = [tick for k in range(-7, 39) for m in (1, 2, 5) if low <= (tick := m * 10.0**k) <= high]
    if len(ticks) < 2:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    elif len(ticks) > 8:
        ticks = [tick for tick in ticks if f"{tick:e}"[0] == "1"]
        ticks = ticks[:: -(-len(ticks) // 8)]
    axes.set_yticks(ticks, [f"{y:.6g}" if field == "loss" else f"{100 * (1 - y):.6g} %" for y in ticks])
    axes.minorticks_off()
    if field == "accuracy":
        axes.invert_yaxis()


def _dots(records: Sequence[Any]) -> str:
    return "o" if len(records) < 12 else ""


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, str]:
    """Draws the confusion matrix twice, as counts and as shares of each label."""
    counts = np.asarray(matrix)
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {
        "confusion_counts": _matrix(counts, rates, [[str(n) for n in row] for row in counts], names),
        "confusion_rates": _matrix(counts, rates, [[f"{100 * r:.1f}" for r in row] for row in rates], names),
    }


def _matrix(counts: np.ndarray, rates: np.ndarray, texts: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """Draws a square for each nonzero cell: blue on the diagonal, orange elsewhere."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    size = len(counts)
    side = WIDTH if size <= MAX_CLASSES_WITH_TEXT else max(WIDTH, 0.19 * size + 1)
    errors = rates - np.diag(np.diag(rates))
    upright = max(map(len, names)) > 3
    bottom = 0.45 + (_width_of(names) if upright else 0.2)
    with new_figure(side, side, left=0.35 + _width_of(names), bottom=bottom) as figure:
        axes = figure.subplots()
        cells, colors = [], []
        for i, j in zip(*np.nonzero(counts), strict=True):
            # The square root makes single mistakes visible beside frequent ones.
            strength = rates[i, j] if i == j else 0.1 + 0.9 * np.sqrt(errors[i, j] / errors.max())
            cells.append(Rectangle((j - 0.5, i - 0.5), 1, 1))
            colors.append(to_rgba(BLUE if i == j else ORANGE, 0.8 * strength))
            if size <= MAX_CLASSES_WITH_TEXT:
                color = ON_FILL if strength > 0.65 else INK
                axes.text(j, i, texts[i][j], ha="center", va="center", color=color, fontsize=10)
        axes.add_collection(PatchCollection(cells, facecolors=colors, edgecolors="none"))
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
        axes.set(xlabel="Prediction", ylabel="Label", xticks=range(size), yticks=range(size))
        axes.set_xticklabels(names, rotation=90 if upright else 0)
        axes.set_yticklabels(names)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor")
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
        return to_svg(figure)


def classes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draws precision, recall and F1 of each class, with intervals."""
    rows = [row for row in rows if row["examples"] or row["predictions"]]
    with new_figure(max(2.5, 0.36 * len(rows) + 1.1), left=0.15 + _width_of([row["name"] for row in rows])) as figure:
        axes = figure.subplots()
        looks = (("precision", BLUE, "o", -0.24), ("recall", ORANGE, "s", 0.0), ("f1", GREEN, "D", 0.24))
        for field, color, marker, offset in looks:
            known = [(i, row) for i, row in enumerate(rows) if row[field] is not None]
            x = np.array([row[field] for _, row in known])
            ends = np.array([row[f"{field}_interval"] for _, row in known]).reshape(-1, 2).T
            look = {"fmt": marker, "color": color, "markersize": 4.5, "elinewidth": 1.3}
            label = "F1" if field == "f1" else field
            axes.errorbar(x, [i + offset for i, _ in known], xerr=np.abs(ends - x), label=label, **look)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.4g} %")
        axes.locator_params(axis="x", nbins=6)
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), borderaxespad=0, ncols=3)
        return to_svg(figure)


def reliability_diagram(calibration: Mapping[str, Any]) -> str:
    """Draws accuracy against confidence, with and without the temperature, and the number of examples below."""
    bins, uncalibrated, num_bins = (calibration[name] for name in ("bins", "uncalibrated_bins", "num_bins"))
    with new_figure(4.8) as figure:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
        middles = [(row["from"] + row["to"]) / 2 for row in bins]
        top.bar(middles, [row["accuracy"] for row in bins], width=1 / num_bins, color=BLUE, alpha=0.18)
        name = "with temperature" if uncalibrated else "network"
        looks = ((uncalibrated, ORANGE, "s", "without temperature"), (bins, BLUE, "o", name))
        for rows, color, marker, label in looks:
            x, y = (np.array([row[field] for row in rows]) for field in ("confidence", "accuracy"))
            ends = np.array([row["accuracy_interval"] for row in rows]).reshape(-1, 2).T
            if len(rows):
                yerr = np.abs(ends - y)
                top.errorbar(x, y, yerr=yerr, fmt=marker, color=color, markersize=5, elinewidth=1.3, label=label)
        top.legend(loc="upper left")
        top.set(ylabel="Accuracy", xlim=(0, 1), ylim=(0, 1.03))
        below.bar(middles, [row["examples"] for row in bins], width=0.9 / num_bins, color=BLUE)
        below.set_yscale("log")
        below.set_ylim(bottom=0.8)  # so that at least 1 is labelled
        below.yaxis.set_major_formatter("{x:,.0f}")  # matplotlib's own needs `text.parse_math`
        below.yaxis.set_minor_formatter("")
        below.set(xlabel="Confidence (probability of the prediction)", ylabel="Examples")
        figure.align_ylabels()
        return to_svg(figure)
