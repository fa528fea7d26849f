"""Simplifies a graph: drops operations without effect, and fuses groups of operations into one."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from mnist_flax.exporting.graph import IMAGE_SHAPE, INPUT, Graph, Node

BINARY = ("add", "sub", "mul", "div", "max", "min", "pow", "equal", "less", "less_equal", "greater", "greater_equal")


def simplify(graph: Graph) -> Graph:
    """Applies the rules until none matches; the outputs stay the same."""
    while True:
        simpler = _drop_unused(_Pass(graph).run())
        if simpler.nodes == graph.nodes:
            return _renumber(simpler)
        graph = simpler


def _renumber(graph: Graph) -> Graph:
    """Renames nodes and constants in order: a name gets a numeric suffix only if it is already taken."""
    names = {INPUT: INPUT}

    def rename(old: str, stem: str) -> None:
        candidates = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(1)))
        names[old] = next(name for name in candidates if name not in names.values())

    for name in graph.constants:
        rename(name, re.sub(r"#\d+$", "", name))
    for node in graph.nodes:
        function = "" if node.function == node.op else node.function
        rename(node.name, "/".join(filter(None, (node.layer, function, node.op))))
    nodes = [
        dataclasses.replace(node, name=names[node.name], inputs=tuple(names[name] for name in node.inputs))
        for node in graph.nodes
    ]
    constants = {names[name]: np.asarray(array, order="C") for name, array in graph.constants.items()}
    return Graph(tuple(nodes), constants, {name: names[node] for name, node in graph.outputs.items()})


def _drop_unused(graph: Graph) -> Graph:
    used = set(graph.outputs.values())
    for node in reversed(graph.nodes):
        if node.name in used:
            used.update(node.inputs)
    constants = {name: array for name, array in graph.constants.items() if name in used}
    return Graph(tuple(node for node in graph.nodes if node.name in used), constants, graph.outputs)


class _Pass:
    """Applies the rules to every node once.

    `nodes` holds the nodes so far, `alias` maps replaced names to new ones, and `uses` counts the users of each name;
    it may count too many, never too few.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.constants = dict(graph.constants)
        self.nodes: dict[str, Node] = {}
        self.alias: dict[str, str] = {}
        self.uses = Counter(name for node in graph.nodes for name in node.inputs) + Counter(graph.outputs.values())

    def run(self) -> Graph:
        for old in self.graph.nodes:
            inputs = tuple(self.alias.get(name, name) for name in old.inputs)
            node = dataclasses.replace(old, inputs=inputs)
            for rule in RULES:
                result = rule(self, node)
                if isinstance(result, str):  # the name of an existing node or constant that replaces this node
                    self.replace(old.name, result)
                    break
                if result is not None:
                    node = result
            else:
                self.uses.update(set(node.inputs) - set(inputs))
                self.nodes[node.name] = node
                if node.name != old.name:
                    self.replace(old.name, node.name)
        outputs = {name: self.alias.get(node, node) for name, node in self.graph.outputs.items()}
        return Graph(tuple(self.nodes.values()), self.constants, outputs)

    def replace(self, old: str, new: str) -> None:
        """Redirects the users of `old` to `new`; the one use of `new` by `old` itself goes."""
        self.alias[old] = new
        self.uses[new] += self.uses[old] - 1

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name in self.constants:
            return self.constants[name].shape
        if name == INPUT:
            return (-1, *IMAGE_SHAPE)
        return self.nodes[name].shape if name in self.nodes else None

    def number(self, name: str) -> float | None:
        """Returns the value of a constant with one element, else None."""
        array = self.constants.get(name)
        return float(array.item()) if array is not None and array.size == 1 and array.dtype != bool else None

    def only(self, name: str, op: str) -> Node | None:
        """Returns the node with this name if its operation is `op` and its result is used once."""
        node = self.nodes.get(name)
        return node if node and node.op == op and self.uses[name] == 1 else None


Rule = Callable[[_Pass, Node], Node | str | None]


def _no_op(state: _Pass, node: Node) -> str | None:
    """Drops operations that return one of their inputs unchanged."""
    x = node.inputs[0]
    same = state.shape(x) == node.shape
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1, "max": -np.inf, "min": np.inf}
    if node.op in neutral:
        for x, other in (node.inputs, node.inputs[::-1])[: 1 if node.op in ("sub", "div") else 2]:
            if state.number(other) == neutral[node.op] and state.shape(x) == node.shape:
                return x
    unchanged = {
        "reshape": same,
        "broadcast": same,
        "pad": same,
        "slice": same and not any(node.attrs.get("starts", ())),
        "transpose": node.attrs.get("axes") == tuple(range(len(node.shape))),
        "cast": x in state.nodes and state.nodes[x].dtype == node.dtype,
    }
    return x if unchanged.get(node.op) else None


def _reshape_twice(state: _Pass, node: Node) -> Node | None:
    inner = state.nodes.get(node.inputs[0])
    if node.op == "reshape" and inner and inner.op == "reshape":
        return dataclasses.replace(node, inputs=inner.inputs)
    return None


def _broadcast(state: _Pass, node: Node) -> Node | None:
    """Drops broadcasts before elementwise operations, which broadcast their inputs anyway."""
    if node.op not in (*BINARY, "where"):
        return None
    inputs = tuple(
        inner.inputs[0] if (inner := state.nodes.get(name)) and inner.op == "broadcast" else name
        for name in node.inputs
    )
    shapes = [state.shape(name) for name in inputs]
    if inputs == node.inputs or None in shapes:
        return None
    # On every axis, one of the inputs must still have the output's size. Negative sizes come from the batch.
    for axis in range(1, len(node.shape) + 1):
        sizes = {shape[-axis] for shape in shapes if shape is not None and len(shape) >= axis}
        if node.shape[-axis] not in sizes:
            return None
    return dataclasses.replace(node, inputs=inputs)


def _relu(state: _Pass, node: Node) -> Node | None:
    if node.op == "max":
        for x, other in (node.inputs, node.inputs[::-1]):
            if state.number(other) == 0 and state.shape(x) == node.shape:
                return dataclasses.replace(node, op="relu", inputs=(x,))
    return None


def _vector(state: _Pass, node: Node) -> None:
    """Drops leading axes of size 1 from constants, such as those of batch norm, where broadcasting adds them anyway."""
    if node.op in BINARY:
        for x, name in (node.inputs, node.inputs[::-1]):
            array = state.constants.get(name)
            if array is not None and state.uses[name] == 1 and len(state.shape(x) or ()) == len(node.shape):
                while array.ndim > 1 and len(array) == 1:
                    array = array[0]
                state.constants[name] = array


def _bias(state: _Pass, node: Node) -> Node | str | None:
    """Fuses a bias, a constant for each channel, into the convolution or dense layer before it.

    Max pooling may lie between them, because max(x) + b and max(x + b) are equal, rounding included.
    """
    if node.op != "add":
        return None
    for x, bias in (node.inputs, node.inputs[::-1]):
        array = state.constants.get(bias)
        if array is None or array.shape != node.shape[-1:]:
            continue
        pool = state.only(x, "max_pool")
        inner = state.only(pool.inputs[0], "conv") if pool else state.only(x, "conv") or state.only(x, "dense")
        if inner and len(inner.inputs) == 2 and inner.dtype == node.dtype and state.shape(x) == node.shape:
            state.nodes[inner.name] = dataclasses.replace(inner, inputs=(*inner.inputs, bias))
            return x
    return None


def _mean(state: _Pass, node: Node) -> Node | None:
    """Fuses a sum and its division by the number of terms into a mean."""
    if node.op not in ("div", "mul"):
        return None
    number = state.number(node.inputs[1])
    for op, mean in (("sum_pool", "avg_pool"), ("reduce_sum", "reduce_mean")):
        inner = state.only(node.inputs[0], op)
        if not inner or not number or inner.shape != node.shape:
            continue
        of = state.shape(inner.inputs[0]) or ()
        sizes = inner.attrs["size"] if op == "sum_pool" else [of[axis] for axis in inner.attrs["axes"]]
        count = np.prod(sizes)
        if count > 0 and np.isclose(number if node.op == "div" else 1 / number, count, rtol=1e-6):
            joined = dataclasses.replace(inner, op=mean)
            del state.nodes[inner.name]
            return joined
    return None


RULES: tuple[Rule, ...] = (_no_op, _reshape_twice, _broadcast, _vector, _bias, _relu, _mean)
