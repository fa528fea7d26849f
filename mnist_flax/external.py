"""Code from outside the package: what a user's script or notebook has added to the registries."""

import contextlib
import functools
import hashlib
import inspect
import pathlib
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from mnist_flax.errors import ConfigError, UserError, reason

NOTEBOOK = "the notebook"  # or another place without a file
_REMEDIES = {  # by the name of an error of JAX, because `cli` imports this module before JAX
    "TracerBoolConversionError": "; use jnp.where instead of if",
    "TracerArrayConversionError": "; use jax.numpy instead of numpy",
}
SCRIPT = "__script__"  # the module that a user's script becomes when a verb takes its place as `__main__`


def is_external(entry: Any) -> bool:
    """Returns whether a class or function comes from outside the package."""
    return not (getattr(_unwrapped(entry), "__module__", None) or "").startswith("mnist_flax.")


def entries(code: Any) -> list[Callable[..., Any]]:
    """Returns the classes and functions from outside the package in a tree, such as `Program.code`."""
    import jax  # late, because `cli` imports this module

    return [leaf for leaf in jax.tree.leaves(code) if callable(leaf) and is_external(leaf)]


def digests(code: Any) -> dict[str, str]:
    """Returns a digest of the source of each file that the entries in a tree come from, keyed by its name.

    A class that is defined in a notebook has no source, so it is left out.
    """
    sources = defaultdict(set)
    for entry in map(_unwrapped, entries(code)):
        name = getattr(entry, "__module__", None) or ""
        module = sys.modules.get(SCRIPT if name == "__main__" and SCRIPT in sys.modules else name)
        file = getattr(module, "__file__", None)
        with contextlib.suppress(OSError, TypeError):  # there is no source
            source = pathlib.Path(file).read_text(errors="replace") if file else inspect.getsource(entry)
            sources[pathlib.Path(file).name if file else NOTEBOOK].add(source)
    return {name: hashlib.sha256("".join(sorted(texts)).encode()).hexdigest()[:12] for name, texts in sources.items()}


@contextlib.contextmanager
def naming_the_line(what: str, function: Any, owner: Any = None) -> Iterator[None]:
    """Converts an error in code from outside the package into one message that names the line in the function's file.

    `owner` is the entry that the function belongs to, if it is not the function itself.

    Raises:
      ConfigError: instead of the error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_external(owner or function):
            raise
        file = getattr(getattr(_unwrapped(function), "__code__", None), "co_filename", "")
        lines = [f", line {at.lineno}" for at in traceback.extract_tb(error.__traceback__) if at.filename == file]
        where = f"{pathlib.Path(file).name}{lines[-1] if lines else ''}: " if file else ""
        remedy = _REMEDIES.get(type(error).__name__, "")
        raise ConfigError(f"{what} fails ({where}{type(error).__name__}: {reason(error)}){remedy}") from error


def _unwrapped(entry: Any) -> Any:
    while isinstance(entry, functools.partial):
        entry = entry.func
    return entry
