"""Checks of config fields: each yields a message if the value is invalid, and nothing otherwise."""

import difflib
import math
from collections.abc import Iterable, Iterator


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint: the known name most similar to `name`, or a list of all of them if none is similar."""
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {match[0]!r}?" if match else f"choose from: {', '.join(sorted(known))}"


def among(field: str, value: str, choices: Iterable[str], *, is_registry: bool = False) -> Iterator[str]:
    """Checks that a value is one of the choices, which a script can extend if they are a registry."""
    choices = list(choices)
    if value not in choices:
        hint = nearest(value, choices)
        if is_registry and hint.startswith("choose"):
            hint += ", or run the script that adds it"
        yield f"config.{field} = {value!r}: {hint}"


def within(
    field: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> Iterator[str]:
    """Checks that a number lies in an interval, which includes its endpoints unless they are declared open."""
    if (low < value if open_low else low <= value) and (value < high if open_high else value <= high):
        return
    lower = f"above {low}" if open_low else f"at least {low}"
    upper = f"below {high}" if open_high else f"at most {high}"
    yield f"config.{field} = {value!r}: must be {lower}" + (f" and {upper}" if high != math.inf else "")
