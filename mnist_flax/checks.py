"""Checks of config fields: each yields a message if the value is invalid, and nothing otherwise."""

import ctypes
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a hint: the known name most similar to `name`, or a list of all of them if none is similar."""
    known = {entry.casefold(): entry for entry in names}
    match = difflib.get_close_matches(name.casefold(), known, n=1)
    return f"did you mean {known[match[0]]!r}?" if match else f"choose from: {', '.join(sorted(known.values()))}"


def among(field: str, value: str, choices: Iterable[str], *, is_registry: bool = False) -> Iterator[str]:
    """Checks that a value is one of the choices, which a script can extend if they are a registry."""
    choices = list(choices)
    if value not in choices:
        hint = nearest(value, choices)
        if is_registry and hint.startswith("choose"):
            hint += ", or run the script that adds it"
        yield f"config.{field} = {value!r}: {hint}"


def of_type(registry: str, entries: Mapping[str, Any], kind: type) -> Iterator[str]:
    """Checks that all entries of a registry, which a script can extend, have their type."""
    for name, entry in entries.items():
        if not isinstance(entry, kind):
            yield f"{registry}[{name!r}] is a {type(entry).__name__}; make it {kind.__name__}(...)"


def within(
    field: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> Iterator[str]:
    """Checks that a number lies in an interval, which includes its endpoints unless they are declared open.

    Floats are rounded to 32 bits, as for training, before they are compared with an open endpoint.
    """
    given, value = value, _rounded(value) if isinstance(value, float) and (open_low or open_high) else value
    if (low < value if open_low else low <= value) and (value < high if open_high else value <= high):
        return
    lower = f"above {low}" if open_low else f"at least {low}"
    upper = f"below {high}" if open_high else f"at most {high}"
    yield f"config.{field} = {given!r}: must be {lower}" + (f" and {upper}" if high != math.inf else "")


def _rounded(value: float) -> float:
    """Rounds to 32 bits; what has no full precision there becomes 0, as in XLA, or infinite."""
    return 0.0 if abs(value) < 2**-126 else ctypes.c_float(value).value
