"""Schemas of the JSON that a run writes, and the check of a value against one."""

from collections.abc import Iterator
from typing import Any

NUMBER = int | float
SPLITS = ("train", "holdout", "test")  # in metrics.jsonl
LINE = {"step": int, "epoch": NUMBER, "split": str, "seconds": NUMBER, "*": int | float | None}  # of metrics.jsonl


def mismatches(value: Any, shape: Any, path: str) -> Iterator[str]:
    """Yields a message for each place where a JSON value does not match the schema `shape`; `path` names the value.

    In a schema, a dict is an object with at least these keys ("name?" is optional, "*" is any other key), a list is an
    array whose items all match its one element, a tuple (schema, None) is a schema or null, and a type is any value of
    that type.
    """
    if isinstance(shape, tuple):
        if value is not None:
            yield from mismatches(value, shape[0], path)
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{path} = {value!r:.60}: must be an object"
            return
        yield from (f"{path}.{name} is missing" for name in shape if name[-1] not in "*?" and name not in value)
        for name, item in value.items():
            schema = shape.get(name, shape.get(f"{name}?", shape.get("*", object)))
            yield from mismatches(item, schema, f"{path}.{name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{path} = {value!r:.60}: must be an array"
            return
        for i, item in enumerate(value):
            yield from mismatches(item, shape[0], f"{path}[{i}]")
    elif shape is not object and (not isinstance(value, shape) or isinstance(value, bool)):
        yield f"{path} = {value!r:.60}: must be {getattr(shape, '__name__', None) or str(shape).replace(' |', ' or')}"
    elif isinstance(value, int) and abs(value) >= 2**53:
        yield f"{path} = {value!r:.60}: is too large"
