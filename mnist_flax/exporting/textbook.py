"""Reorders a graph the way textbooks draw a network: convolution, bias, activation, pooling."""

import dataclasses

from mnist_flax.exporting import patterns
from mnist_flax.exporting.graph import Graph, Node


def textbook_order(graph: Graph) -> Graph:
    """Moves each max pooling after the bias and the activation that follow it.

    Models may pool first because that is faster. The result is the same, because a maximum commutes with adding a
    constant and with every non-decreasing function. After reordering, the activations have the full resolution of the
    convolution.
    """
    users: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    for pool in graph.nodes:
        after = users.get(pool.name, ())
        if pool.op == "max_pool" and len(after) == 1 and _commutes(graph, after[0]):
            return textbook_order(patterns.simplify(_exchange(graph, pool, after[0])))
    return graph


def _commutes(graph: Graph, node: Node) -> bool:
    if node.op == "add":
        constants = [graph.constants[name] for name in node.inputs if name in graph.constants]
        return any(array.size == 1 or array.size == array.shape[-1] == node.shape[-1] for array in constants)
    return node.op in ("relu", "tanh", "logistic")


def _exchange(graph: Graph, pool: Node, after: Node) -> Graph:
    """Swaps two adjacent nodes but leaves the names in place, so the nodes that use the result do not change."""
    (source,) = pool.inputs
    shape = next(node.shape for node in graph.nodes if node.name == source)
    inputs = tuple(source if name == pool.name else name for name in after.inputs)
    first = dataclasses.replace(after, name=pool.name, inputs=inputs, shape=shape)
    second = dataclasses.replace(pool, name=after.name, inputs=(pool.name,))
    replaced = {pool.name: first, after.name: second}
    return dataclasses.replace(graph, nodes=tuple(replaced.get(node.name, node) for node in graph.nodes))
