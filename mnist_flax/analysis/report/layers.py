"""Inspects a network of any family: its layers, and the input of each.

A layer is a linen module with its own parameters or a `fixed_kernel`. Nothing else is assumed about the network:
`forward` is traced with an interceptor that records every call of such a module.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.core.tracers import current_trace
from jax import Array

from mnist_flax.config import Program
from mnist_flax.data.registry import IMAGE_SIZE
from mnist_flax.step import Variables, forward


class Layer(NamedTuple):
    """A module with its own parameters or a fixed kernel."""

    name: str  # its path in the network, such as `Conv_0` or `Block_1/Conv_0`
    kind: str  # its class, such as `Conv`
    input_shape: tuple[int, ...]  # of one example
    output_shape: tuple[int, ...]  # of one example
    parameters: int  # how many are trainable; running statistics do not count
    multiply_adds: int  # the multiply-add operations of its kernel, for one example


class _Call(NamedTuple):
    """One call of a layer while the network is traced; `params` holds the original arrays, not tracers."""

    module: nn.Module
    params: dict[str, Any]
    kernel: Any
    x: Array
    output: Array

    @property
    def name(self) -> str:
        return "/".join(self.module.path)


def _trace(program: Program, variables: Variables) -> list[_Call]:
    """Returns the calls of all layers, in order, for one image, from abstract evaluation (`jax.eval_shape`)."""
    calls: list[_Call] = []
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 1), np.uint8)
    jax.eval_shape(lambda traced, images: _observed(program, traced, images, variables, calls.append), variables, image)
    return calls


def _observed(
    program: Program, traced: Variables, images: Array, variables: Variables, note: Callable[[_Call], None]
) -> Array:
    """Computes the logits, and passes every call of a layer to `note`."""

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        module, own = context.module, variables["params"]
        for name in module.path:
            own = own.get(name, {})
        own = {name: leaf for name, leaf in own.items() if hasattr(leaf, "shape")}
        kernel = own.get("kernel", getattr(module, "fixed_kernel", None))
        # A layer may take keywords, or return several arrays, such as a recurrent cell.
        inputs, outputs = (
            [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Array)] for tree in ((args, kwargs), output)
        )
        if context.method_name == "__call__" and (own or kernel is not None) and inputs and outputs:
            note(_Call(module, own, kernel, inputs[0], outputs[0]))
        return output

    with nn.intercept_methods(intercept):
        return forward(program, traced, images)


def layers(program: Program, variables: Variables) -> list[Layer]:
    """Lists the layers in call order; a layer that is called again is listed again, with 0 parameters."""
    found: list[Layer] = []
    for call in _trace(program, variables):
        is_first = all(call.name != one.name for one in found)
        found.append(
            Layer(
                name=call.name,
                kind=type(call.module).__name__,
                input_shape=call.x.shape[1:],
                output_shape=call.output.shape[1:],
                parameters=sum(leaf.size for leaf in call.params.values()) if is_first else 0,
                multiply_adds=_multiply_adds(call),
            )
        )
    return found


def layer_table(network: Sequence[Layer]) -> str:
    """Formats layers as a text table."""
    rows = [("layer", "input", "output", "parameters", "multiply-adds")]
    rows += [
        (one.name, _shape(one.input_shape), _shape(one.output_shape), f"{one.parameters:,}", f"{one.multiply_adds:,}")
        for one in network
    ]
    parameters, multiply_adds = sum(one.parameters for one in network), sum(one.multiply_adds for one in network)
    rows.append(("total", "", "", f"{parameters:,}", f"{multiply_adds:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [f"{{:{side}{width}}}" for side, width in zip("<<<>>", widths, strict=True)]
    return "\n".join("  ".join(aligned).format(*row) for row in rows)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _multiply_adds(call: _Call) -> int:
    """Counts the kernel's multiply-adds: for a convolution that also pools, at every position before pooling."""
    kernel, module = call.kernel, call.module
    if kernel is None:
        return 0
    sizes = list(call.output.shape[1:-1])
    padding = getattr(module, "padding", None)
    if kernel.ndim == 4 and padding in ("SAME", "VALID"):
        stride = getattr(module, "stride", getattr(module, "strides", 1)) or 1
        strides = stride if isinstance(stride, tuple | list) else (stride, stride)
        covered = kernel.shape[:2] if padding == "VALID" else (1, 1)
        sizes = [-((k - 1 - n) // s) for n, k, s in zip(call.x.shape[1:3], covered, strides, strict=True)]
        return math.prod(sizes) * int(kernel.size)
    for axes in range(1, kernel.ndim):  # dense: the last axes of the input are contracted with the kernel's first
        made = kernel.shape[axes:]
        if call.x.shape[-axes:] == kernel.shape[:axes] and call.output.shape[-len(made) :] == made:
            sizes = list(call.x.shape[1:-axes])
    return math.prod(sizes) * int(kernel.size)


def layer_inputs(program: Program, variables: Variables, images: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Computes the input of each layer with a kernel, except the first, and the logits, for images `u8[B,28,28,1]`.

    An input, after the preceding activation and pooling, is `f32[B,H,W,C]` or `f32[B,D]`, with the name of its layer.
    An input that several layers share, such as the two branches of a residual block, is listed once.
    """
    names: list[str] = []
    channels: list[int] = []  # of the preceding layer's feature maps, 0 if its output has none

    def run(traced: Variables, images: Array) -> list[Array]:
        inputs: list[Array] = []
        last, outside = 0, current_trace()

        def note(call: _Call) -> None:
            nonlocal last
            if call.kernel is not None and current_trace() == outside:  # inside nn.remat or nn.scan, x would leak
                if not any(call.x is other for other in inputs):
                    inputs.append(call.x)
                    names.append(call.name)
                    channels.append(last)
                last = call.output.shape[-1] if call.output.ndim == 4 else 0

        logits = _observed(program, traced, images, variables, note)
        return [*inputs, logits]

    # Compiled without optimisation: compiling takes longer than running, and this halves the compile time.
    unoptimised = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    values = [np.asarray(value, np.float32) for value in unoptimised(variables, images)]
    seen = [_unflatten(value, before) for value, before in zip(values, [*channels, 0], strict=True)]
    found = list(zip([*names, "logits"], seen, strict=True))
    return found[1:] if names else found


def _unflatten(values: np.ndarray, channels: int) -> np.ndarray:
    """Restores the shape of square maps that were flattened for a dense layer: `f32[B,H*W*C] -> f32[B,H,W,C]`."""
    side = math.isqrt(values.shape[-1] // channels) if channels else 0
    is_map = values.ndim == 2 and side > 1 and values.shape[1] == side * side * channels
    return values.reshape(len(values), side, side, channels) if is_map else values


def first_filters(program: Program, variables: Variables) -> np.ndarray | None:
    """Returns the first kernel as one square image per output, `f32[W,k,k]`.

    The result is None if no layer has a kernel, or the first kernel does not apply to a square image with one channel.
    """
    kernel = np.asarray(next((call.kernel for call in _trace(program, variables) if call.kernel is not None), 0.0))
    if kernel.ndim == 4 and kernel.shape[2] == 1:
        return np.moveaxis(kernel[:, :, 0, :], -1, 0)
    side = math.isqrt(len(kernel)) if kernel.ndim == 2 else 0
    return kernel.T.reshape(-1, side, side) if side and side * side == len(kernel) else None
