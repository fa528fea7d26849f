"""Jinja templates: the report, the demo page, the page on robustness and the model card."""

import pathlib
from collections.abc import Callable
from typing import Any


def load_template(name: str, **filters: Callable[..., str]) -> Any:
    """Returns a Jinja template of this package, HTML or Markdown, with the filter `percent` and the given `filters`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, **filters}
    return environment.get_template(name)


def percent(value: float | None, digits: int = 2) -> str:
    """Formats a fraction as a percentage, with a no-break space; None becomes a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"
