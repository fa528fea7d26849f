"""Converts the forward pass of any model to a small graph of primitive operations, by tracing its jaxpr.

`trace` walks the jaxpr of a function `(variables, u8[N,28,28,1]) -> f32[N,C]`: it inlines calls, folds operations on
weights alone into constants, and names all other operations after the linen modules they came from. Nothing here
depends on a model family, so families defined outside this package can be exported too.

**Format.** `Graph.to_json()` returns

    {"input": "images",
     "outputs": {"logits": "Dense_1/dense", "probabilities": "softmax"},
     "nodes": [{"name": "Conv_0/conv", "op": "conv", "inputs": ["div", "params/Conv_0/kernel", "params/Conv_0/bias"],
                "attrs": {"strides": [1, 1], "pads": [[0, 0], [0, 0]], "dilations": [1, 1], "groups": 1},
                "shape": [-1, 26, 26, 32], "dtype": "float32", "layer": "Conv_0", "function": ""}, ...],
     "constants": {"params/Conv_0/kernel": {"shape": [3, 3, 1, 32], "dtype": "float32", "offset": 0}, ...}}

Nodes are in topological order. An input is `images`, or the name of an earlier node or of a constant.
`Graph.weights()` returns the constants as bytes: little-endian, in C order, each at its offset, a multiple of 8.
`layer` is the path of the linen module, empty outside all submodules; in a committee it starts with `member_<i>/`.
`function` is the jitted function that a node came from, such as `silu`, or empty.

**Sizes.** A negative size -k in a shape or an attribute means k times the batch size N: -1 is N, -5 is 5N (five views
of each image). With N = 1, the size is k.

**Operations** (images are NHWC, kernels HWIO; attributes in brackets):

- `conv` x, kernel, optional bias [strides, pads, dilations, groups]; `dense` x[...,K], kernel[K,D], optional bias
- `max_pool`, `sum_pool`, `avg_pool` x [size, strides, pads]: `max_pool` pads with -inf, the others with 0, which
  `avg_pool` includes in its mean
- `einsum` x, y [equation]
- `relu` x; `softmax` x, over the last axis
- `reduce_sum`, `reduce_mean`, `reduce_max`, `reduce_min` x [axes]: the reduced axes are removed
- elementwise, inputs broadcast as in NumPy: `add sub mul div max min pow`, `equal less less_equal greater
  greater_equal and or` (to bool), `neg abs sign floor exp log sqrt tanh erf logistic sin cos not`, and `where`
  condition, x, y
- layout: `reshape` and `broadcast` to the node's shape, `transpose` [axes], `concat` [axis], `slice` [starts, limits,
  strides], `pad` x, value [low, high], `cast` to the node's dtype
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnist_flax.errors import UserError

IMAGE_SHAPE = (28, 28, 1)
INPUT = "images"

# Models are traced with this batch size. It is a large prime, so any size divisible by it must come from the batch.
# Unlike a symbolic size, it is an integer, so models may use `len(x)`.
BATCH_SIZE = 65_537

Shape = tuple[int, ...]


class ExportError(UserError):
    """A model cannot be exported, or the exported file gives different results."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation; the module docstring explains the fields."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attrs: dict[str, Any]
    shape: Shape
    dtype: str
    layer: str = ""
    function: str = ""


@dataclasses.dataclass(frozen=True)
class Graph:
    """Operations in topological order, the constants they use, and the name of the node behind each output."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, np.ndarray]
    outputs: Mapping[str, str]

    def to_json(self) -> str:
        """Returns the graph as JSON, without the constants' values."""
        offset, constants = 0, {}
        for name, array in self.constants.items():
            constants[name] = {"shape": array.shape, "dtype": str(array.dtype), "offset": offset}
            offset += _padded(array.nbytes)
        nodes = [dataclasses.asdict(node) for node in self.nodes]
        return json.dumps({"input": INPUT, "outputs": dict(self.outputs), "nodes": nodes, "constants": constants})

    def weights(self) -> bytes:
        """Returns the constants' values as bytes."""
        content = bytearray()
        for array in self.constants.values():
            content += array.tobytes().ljust(_padded(array.nbytes), b"\0")
        return bytes(content)


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def symbolic(shape: Any) -> Shape:
    """Replaces sizes that come from the batch with negative numbers: k * BATCH_SIZE becomes -k."""
    return tuple(int(size) if size % BATCH_SIZE else -int(size // BATCH_SIZE) for size in shape)


class Builder:
    """Collects nodes and constants under unique names."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.layer = ""
        self.function = ""

    def constant(self, value: Any, name: str = "") -> str:
        """Adds an array and returns its name; an unnamed scalar is named after its value, so equal ones are shared."""
        is_key = jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
        array = value if is_key else np.asarray(value)
        if not name and not is_key:
            name = f"{array.item()!r}:{array.dtype}" if array.ndim == 0 else self._unique("constant")
        else:
            name = self._unique(name or "key")
        self.constants[name] = array
        return name

    def add(self, op: str, inputs: tuple[str, ...], shape: Any, dtype: Any, **attrs: Any) -> str:
        """Adds a node and returns its name."""
        name = self._unique("/".join(filter(None, (self.layer, self.function, op))))
        self.nodes[name] = Node(
            name, op, inputs, attrs, symbolic(shape), str(np.dtype(dtype)), self.layer, self.function
        )
        return name

    def _unique(self, name: str) -> str:
        candidates = itertools.chain([name], (f"{name}#{i}" for i in itertools.count(1)))  # "#" is in no other name
        return next(name for name in candidates if name not in self.nodes and name not in self.constants)


def trace(logits: Callable[[Any, jax.Array], jax.Array], variables: Any) -> Graph:
    """Turns a function into a graph with the outputs `logits` and `probabilities`.

    `logits` is a pure function of variables and `u8[N,28,28,1]` that processes each image independently. The constants
    are named after their paths in `variables`.

    Raises:
      ExportError: the function contains an operation that the graph does not support.
    """
    from mnist_flax.exporting import jaxpr, patterns

    images = jax.ShapeDtypeStruct((BATCH_SIZE, *IMAGE_SHAPE), jnp.uint8)
    closed = jax.make_jaxpr(logits)(variables, images)
    builder = Builder()
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(variables))
    names = [builder.constant(leaf, jax.tree_util.keystr(path, simple=True, separator="/")) for path, leaf in leaves]
    (result,) = jaxpr.inline_jaxpr(builder, closed.jaxpr, closed.consts, [*names, INPUT], stack="")
    builder.layer = builder.function = ""
    (output,) = closed.out_avals
    probabilities = builder.add("softmax", (result,), output.shape, output.dtype)
    graph = Graph(tuple(builder.nodes.values()), builder.constants, {"logits": result, "probabilities": probabilities})
    return patterns.simplify(graph)
