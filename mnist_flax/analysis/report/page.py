"""Renders the report as one self-contained HTML page."""

from collections.abc import Mapping
from typing import Any

from mnist_flax.analysis.report.plots import MAX_CLASSES_WITH_TEXT
from mnist_flax.templates import load_template


def render_page(facts: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """Returns the page as HTML, with every number from `facts`.

    `pictures` holds `plots` (SVG elements by name), `thumbnails` (URIs by test row), `sheets` (URIs by name),
    `activation_pictures` (by layer and example) and the `title`.
    """
    template = load_template("analysis/report/page.html.jinja", thousands="{:,}".format, duration=duration)
    return template.render(**facts, **pictures, max_classes_with_text=MAX_CLASSES_WITH_TEXT)


def duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
