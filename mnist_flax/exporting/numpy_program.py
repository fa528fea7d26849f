"""Writes a graph as a Python file that needs only NumPy, and an .npz file with its weights."""

import inspect
import io
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import numpy as np

from mnist_flax.exporting.graph import INPUT, Graph
from mnist_flax.exporting.reference import IN_NUMPY, OPERATIONS, windows

HEADER = '''"""A trained network in NumPy alone: `predict(images)` maps images to probabilities and logits.

u8[N,28,28,1] -> {"logits": f32[N,C], "probabilities": f32[N,C]}, for any N.

Made by mnist_flax. The weights are in the .npz file beside it, under the names used below.
"""

import math
import pathlib
from typing import Any

import numpy as np

Array = np.ndarray
with np.load(pathlib.Path(__file__).with_suffix(".npz")) as weights:
    w = dict(weights)


'''


def to_numpy(graph: Graph) -> dict[str, bytes]:
    """Returns the .npz file, with the graph's arrays under their names, and the .py file."""
    arrays = {name: array for name, array in graph.constants.items() if array.ndim}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    sources = [
        inspect.getsource(OPERATIONS[op]) for op in dict.fromkeys(n.op for n in graph.nodes) if op not in IN_NUMPY
    ]
    if any("windows(" in source for source in sources):
        sources.insert(0, inspect.getsource(windows))
    program = HEADER + "".join(source + "\n\n" for source in sources) + _predict(graph)
    return {".npz": file.getvalue(), ".py": program.encode()}


def _predict(graph: Graph) -> str:
    names = {INPUT: "images"}
    lines = ["def predict(images: Array) -> dict[str, Array]:", "    n = len(images)"]
    for number, node in enumerate(graph.nodes):
        names[node.name] = f"x{number}"
        prefix, function = "np." * (node.op in IN_NUMPY), OPERATIONS[node.op]
        arguments = [names.get(name) or _constant(graph.constants[name], name) for name in node.inputs]
        attributes = {"shape": node.shape} if node.op in ("reshape", "broadcast") else node.attrs
        attributes = {"dtype": node.dtype} if node.op == "cast" else attributes
        arguments += [("" if prefix else f"{name}=") + _literal(value) for name, value in attributes.items()]
        lines.append(f"    x{number} = {prefix}{function.__name__}({', '.join(arguments)})  # {node.name}")
    results = ", ".join(f'"{output}": {names[node]}' for output, node in graph.outputs.items())
    return "\n".join([*lines, f"    return {{{results}}}", ""])


def _constant(array: np.ndarray, name: str) -> str:
    if array.ndim:
        return f'w["{name}"]'
    value = array.item()
    return f"np.{array.dtype}({value!r})" if np.isfinite(value) else f'np.{array.dtype}("{value}")'


def _literal(value: Any) -> str:
    """Returns an attribute as Python code; a size that comes from the batch becomes a multiple of n."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    if isinstance(value, int) and value < 0:
        return "n" if value == -1 else f"{-value} * n"
    return repr(value)


def load_program(path: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Runs the .py file beside an .npz file and returns its `predict`."""
    return runpy.run_path(str(path.with_suffix(".py")))["predict"]
