"""Converts a graph to an ONNX model, and loads ONNX files as functions."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mnist_flax.exporting.graph import IMAGE_SHAPE, INPUT, ExportError, Graph, Node

# Supported by onnxruntime and onnxruntime-web since 1.14 (2023).
OPSET, IR_VERSION = 18, 8

# Operations that `_Writer.write` does not list keep their inputs and attributes; ONNX's name for them is the graph's in
# title case, except for these.
RENAMED = {"less_equal": "LessOrEqual", "greater_equal": "GreaterOrEqual", "logistic": "Sigmoid"}
TO_NCHW, TO_NHWC, TO_OIHW = (0, 3, 1, 2), (0, 2, 3, 1), (3, 2, 0, 1)


class _Writer:
    """Collects ONNX nodes and initialisers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Any] = []
        self.arrays: dict[str, np.ndarray] = dict(graph.constants)
        self.names = {node: output for output, node in graph.outputs.items()}
        self.shapes = {INPUT: (-1, *IMAGE_SHAPE), **{node.name: node.shape for node in graph.nodes}}

    def add(self, op: str, inputs: tuple[str, ...], name: str, output: str = "", **attrs: Any) -> str:
        from onnx import helper

        output = output or name
        inputs = tuple(self.names.get(x, x) for x in inputs)
        self.nodes.append(helper.make_node(op, inputs, [self.names.get(output, output)], name=name, **attrs))
        return output

    def array(self, name: str, values: Any) -> str:
        self.arrays[name] = np.asarray(values)
        return name

    def ints(self, name: str, values: Any) -> str:
        return self.array(name, np.asarray(values, np.int64))

    def write(self, node: Node) -> None:
        name, inputs, attrs = node.name, node.inputs, node.attrs
        match node.op:
            case "conv":
                self._conv(node)
            case "max_pool" | "sum_pool" | "avg_pool":
                self._pool(node)
            case "dense" if len(inputs) == 2:
                self.add("MatMul", inputs, name)
            case "dense":
                product = self.add("MatMul", inputs[:2], name, f"{name}/product")
                self.add("Add", (product, inputs[2]), f"{name}/bias", name)
            case "slice":
                self.add("Slice", self._slice(node), name)
            case "pad":
                pads = self.ints(f"{name}/pads", (*attrs["low"], *attrs["high"]))
                self.add("Pad", (inputs[0], pads, inputs[1]), name)
            case "reshape":
                self.add("Reshape", self._reshape(node), name)
            case "broadcast":
                self.add("Expand", self._expand(node), name)
            case "cast":
                self.add("Cast", inputs, name, to=_onnx_type(node.dtype))
            case "transpose":
                self.add("Transpose", inputs, name, perm=attrs["axes"])
            case op if op.startswith("reduce_"):
                axes = self.ints(f"{name}/axes", attrs["axes"])
                self.add(op.title().replace("_", ""), (*inputs, axes), name, keepdims=0)
            case op:
                self.add(RENAMED.get(op, op.title()), inputs, name, **attrs)

    def _images(self, op: str, inputs: tuple[str, ...], name: str, **attrs: Any) -> str:
        """Adds a channels-first node between two transposes; onnxruntime cancels those between consecutive nodes."""
        first = self.add("Transpose", inputs[:1], f"{name}/to_nchw", perm=TO_NCHW)
        result = self.add(op, (first, *inputs[1:]), name, f"{name}/nchw", **attrs)
        return self.add("Transpose", (result,), f"{name}/to_nhwc", name, perm=TO_NHWC)

    def _conv(self, node: Node) -> None:
        kernel = node.inputs[1]
        name = f"{kernel}/oihw"
        if kernel in self.graph.constants:
            self.array(name, np.ascontiguousarray(self.graph.constants[kernel].transpose(TO_OIHW)))
        else:
            self.add("Transpose", (kernel,), name, perm=TO_OIHW)
        self._images(
            "Conv",
            (node.inputs[0], name, *node.inputs[2:]),
            node.name,
            strides=node.attrs["strides"],
            pads=_pads(node.attrs["pads"]),
            dilations=node.attrs["dilations"],
            group=node.attrs["groups"],
        )

    def _pool(self, node: Node) -> None:
        size, name = node.attrs["size"], node.name
        attrs = {"kernel_shape": size, "strides": node.attrs["strides"], "pads": _pads(node.attrs["pads"])}
        if node.op == "max_pool":
            self._images("MaxPool", node.inputs, name, **attrs)
        elif node.op == "avg_pool":
            self._images("AveragePool", node.inputs, name, **attrs, count_include_pad=1)
        else:
            mean = self._images("AveragePool", node.inputs, f"{name}/mean", **attrs, count_include_pad=1)
            self.add("Mul", (mean, self.array(f"{name}/count", np.asarray(np.prod(size), node.dtype))), name)

    def _slice(self, node: Node) -> tuple[str, ...]:
        of = self.shapes.get(node.inputs[0], ())
        parts = list(zip(node.attrs["starts"], node.attrs["limits"], node.attrs["strides"], strict=True))
        axes = [axis for axis, part in enumerate(parts) if part != (0, of[axis], 1)]
        if any(of[axis] < 0 for axis in axes):
            raise ExportError(
                f"layer {node.layer or node.name}: slices the batch axis, which the ONNX export does not support"
            )
        columns = zip(("starts", "limits", "strides"), zip(*(parts[axis] for axis in axes), strict=True), strict=True)
        starts, limits, strides = (self.ints(f"{node.name}/{label}", values) for label, values in columns)
        return (*node.inputs, starts, limits, self.ints(f"{node.name}/axes", axes), strides)

    def _reshape(self, node: Node) -> tuple[str, ...]:
        if sum(size < 0 for size in node.shape) > 1:
            raise ExportError(
                f"layer {node.layer or node.name}: reshapes the batch into several axes, which the ONNX export does"
                " not support"
            )
        return (*node.inputs, self.ints(f"{node.name}/shape", [max(size, -1) for size in node.shape]))

    def _expand(self, node: Node) -> tuple[str, ...]:
        """Returns the inputs of an Expand node; sizes that come from the batch are computed at run time."""
        sizes = []
        for axis, size in enumerate(node.shape):
            label = f"{node.name}/size_{axis}"
            if size >= 0:
                sizes.append(self.ints(label, [size]))
                continue
            batch = self.add("Shape", (INPUT,), f"{label}/batch", start=0, end=1)
            sizes.append(self.add("Mul", (batch, self.ints(f"{label}/times", [-size])), label))
        return (*node.inputs, self.add("Concat", tuple(sizes), f"{node.name}/shape", axis=0))


def _pads(pads: Any) -> tuple[int, ...]:
    (top, bottom), (left, right) = pads
    return top, left, bottom, right


def _onnx_type(dtype: str) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def to_onnx(graph: Graph, metadata: dict[str, str]) -> bytes:
    """Returns a checked ONNX model, `images` u8[N,28,28,1] -> `logits`, `probabilities` f32[N,C].

    Raises:
      ExportError: the graph contains something that ONNX cannot express.
    """
    import onnx
    from onnx import helper, numpy_helper

    writer = _Writer(graph)
    for node in graph.nodes:
        writer.write(node)
    used = {name for node in writer.nodes for name in node.input}
    inputs = [helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, ["N", *IMAGE_SHAPE])]
    outputs = [
        helper.make_tensor_value_info(output, _onnx_type("float32"), ["N", *writer.shapes[node][1:]])
        for output, node in graph.outputs.items()
    ]
    arrays = [numpy_helper.from_array(array, name) for name, array in writer.arrays.items() if name in used]
    model = helper.make_model(
        helper.make_graph(writer.nodes, "mnist_flax", inputs, outputs, arrays),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mnist_flax",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def load_onnx(path: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Loads an ONNX file with onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {INPUT: images}), strict=True))
