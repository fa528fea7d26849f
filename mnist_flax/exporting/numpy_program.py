"""Writes a graph as a Python file that needs only NumPy, and an .npz file with its weights."""

import inspect
import io
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import numpy as np

from mnist_flax.exporting import reference
from mnist_flax.exporting.graph import INPUT, Graph, Node

HEADER = '''"""A trained network in NumPy alone: `predict(images)` maps images to probabilities and logits.

u8[N,28,28,1] -> {"logits": f32[N,C], "probabilities": f32[N,C]}, for any N.

Made by mnist_flax. The weights are in the .npz file beside it, under the names used below.
"""

import math
import pathlib
from typing import Any

import numpy as np

Array = np.ndarray
w = dict(np.load(pathlib.Path(__file__).with_suffix(".npz")))


'''


def to_numpy(graph: Graph) -> tuple[str, bytes]:
    """Returns the program and its .npz file, with every weight under its path as in weights.safetensors."""
    arrays = {name: array for name, array in graph.constants.items() if array.ndim}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return HEADER + _functions(graph) + _predict(graph), file.getvalue()


def _functions(graph: Graph) -> str:
    """Returns the source of the functions that the graph needs."""
    used = [reference.OPERATIONS[op] for op in dict.fromkeys(node.op for node in graph.nodes)]
    functions = [function for function in used if not isinstance(function, np.ufunc)]
    if any("windows(" in inspect.getsource(function) for function in functions):
        functions.insert(0, reference.windows)
    return "".join(inspect.getsource(function) + "\n\n" for function in functions)


def _predict(graph: Graph) -> str:
    names = {INPUT: "images"}
    lines = ["def predict(images: Array) -> dict[str, Array]:", "    n = len(images)"]
    for number, node in enumerate(graph.nodes):
        names[node.name] = f"x{number}"
        arguments = [names.get(name) or _constant(graph.constants[name], name) for name in node.inputs]
        arguments += [f"{name}={_literal(value)}" for name, value in reference.attributes(node).items()]
        lines.append(f"    x{number} = {_name(node)}({', '.join(arguments)})  # {node.name}")
    results = ", ".join(f'"{output}": {names[node]}' for output, node in graph.outputs.items())
    return "\n".join([*lines, f"    return {{{results}}}", ""])


def _name(node: Node) -> str:
    function = reference.OPERATIONS[node.op]
    return f"np.{function.__name__}" if isinstance(function, np.ufunc) else function.__name__


def _constant(array: np.ndarray, name: str) -> str:
    return f'w["{name}"]' if array.ndim else f"np.{array.dtype}({_number(array.item())})"


def _number(value: Any) -> str:
    return repr(value) if np.isfinite(value) else f'float("{value}")'


def _literal(value: Any) -> str:
    """Writes an attribute; a size that comes from the batch becomes a multiple of n."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    if isinstance(value, int) and value < 0:
        return "n" if value == -1 else f"{-value} * n"
    return repr(value)


def load_program(path: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Runs the program beside an .npz file, and returns its `predict`."""
    predict: Callable[[np.ndarray], dict[str, np.ndarray]] = runpy.run_path(str(path.with_suffix(".py")))["predict"]
    return predict
