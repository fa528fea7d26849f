"""Renders the report as one self-contained HTML page."""

from collections.abc import Mapping
from typing import Any

from mnist_flax.analysis.report.plots import MAX_CLASSES_WITH_TEXT
from mnist_flax.templates import load_template, percent

SECTIONS = {
    "curves": "Learning curves",
    "trained-on": "Training images",
    "confusion": "Confusion",
    "pairs": "Confused pairs",
    "classes": "Classes",
    "calibration": "Calibration",
    "mistakes": "Mistakes",
    "uncertain": "Least certain",
    "correct": "Correct",
    "doubtful": "Doubtful labels",
    "filters": "Filters",
    "activations": "Activations",
    "network": "Network",
    "again": "Repeat this run",
}


def render_page(facts: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """Returns the page as HTML, with every number from `facts`.

    `pictures` holds `plots` (SVG elements by name), `thumbnails` (URIs by test row), `sheets` (URIs by name),
    `activation_pictures` (by layer and example) and the `title`.
    """
    template = load_template(
        "analysis/report/page.html.jinja", score=calibration_value, thousands="{:,}".format, duration=duration
    )
    missing = {
        "curves": "loss" not in pictures["plots"],
        "trained-on": not facts["augmented"],
        "doubtful": not facts["galleries"]["doubtful"],
        "filters": "filters" not in pictures["sheets"],
    }
    sections = [(name, title) for name, title in SECTIONS.items() if not missing.get(name)]
    return template.render(**facts, **pictures, sections=sections, max_classes_with_text=MAX_CLASSES_WITH_TEXT)


def calibration_value(value: float, field: str) -> str:
    """Formats a calibration metric: the ECE as a percentage, the others with four decimals."""
    return percent(value) if field == "ece" else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
