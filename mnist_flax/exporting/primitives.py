"""Translates JAX primitives to operations of the graph."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax.exporting.graph import Builder, ExportError, symbolic

Translation = Callable[[Builder, Any, tuple[str, ...]], str]  # builder, equation, names of inputs -> name of output

# Primitives that are rewritten in terms of other primitives, which are then translated.
REWRITES: dict[str, Callable[..., Any]] = {
    "clamp": lambda low, x, high: lax.min(lax.max(x, low), high),
    "erfc": lambda x: 1 - lax.erf(x),
    "expm1": lambda x: lax.exp(x) - 1,
    "integer_pow": lambda x, y: math.prod([x] * (y - 1), start=x) if 2 <= y <= 4 else lax.pow(x, lax.full_like(x, y)),
    "is_finite": lambda x: x - x == 0,  # for infinity and NaN, x - x is NaN
    "log1p": lambda x: lax.log(x + 1),
    "ne": lambda x, y: ~(x == y),
    "rsqrt": lambda x: 1 / lax.sqrt(x),
    "split": lambda x, sizes, axis: [
        lax.slice_in_dim(x, end - size, end, axis=axis)
        for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)
    ],
    "square": lambda x: x * x,
    "stack": lambda *parts, axis: lax.concatenate([lax.expand_dims(part, [axis]) for part in parts], axis),
}
SAME_INPUTS = {  # JAX primitive -> the graph operation that takes the same inputs
    **{name: name for name in ("add", "sub", "mul", "max", "min", "pow", "neg", "abs")},
    **{name: name for name in ("sign", "floor", "exp", "log", "sqrt", "tanh", "erf", "logistic", "sin", "cos")},
    **{name: name for name in ("reduce_sum", "reduce_max", "reduce_min")},
    "convert_element_type": "cast",
    **{"eq": "equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"},
}


def unsupported(builder: Builder, what: str) -> NoReturn:
    """Raises an `ExportError` that names an operation and its layer."""
    raise ExportError(
        f"layer {builder.layer or '(outside all layers)'}: its operation {what!r} cannot be exported to ONNX, NumPy or"
        " the demo page; use --format=stablehlo, or write the layer with other operations"
    )


def add(builder: Builder, op: str, eqn: Any, inputs: tuple[str, ...], **attrs: Any) -> str:
    """Adds a node with the shape and type of an equation's first result."""
    aval = eqn.outvars[0].aval
    return builder.add(op, inputs, aval.shape, aval.dtype, **attrs)


def _layout(builder: Builder, op: str, x: str, shape: Any, dtype: Any, **attrs: Any) -> str:
    """Reshapes or transposes `x`: a constant at once, under the same name; anything else by a new node."""
    if attrs.get("axes") == (0, 1, 2, 3):  # nothing to do
        return x
    if x not in builder.constants:
        return builder.add(op, (x,), shape, dtype, **attrs)
    array = builder.constants[x]
    return builder.constant(array.transpose(attrs["axes"]) if op == "transpose" else array.reshape(shape), x)


def _reshape(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    aval = eqn.outvars[0].aval
    return _layout(builder, "reshape", inputs[0], aval.shape, aval.dtype)


def _broadcast(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    """Reshapes to insert axes of size 1, then broadcasts; `patterns` drops broadcasts before elementwise operations."""
    shape, dtype = eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype
    of = eqn.invars[0].aval.shape
    places = dict(zip(eqn.params["broadcast_dimensions"], of, strict=True))
    inner = tuple(places.get(axis, 1) for axis in range(len(shape)))
    x = _layout(builder, "reshape", inputs[0], inner, dtype) if inner != of and of else inputs[0]
    return x if inner == shape else builder.add("broadcast", (x,), shape, dtype)


def _slice(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    return add(builder, "slice", eqn, inputs, starts=tuple(starts), limits=symbolic(limits), strides=tuple(strides))


def _pad(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    low, high, interior = zip(*eqn.params["padding_config"], strict=True)
    if any(interior) or min(*low, *high) < 0:
        unsupported(builder, "pad with dilation or cropping")
    return add(builder, "pad", eqn, inputs, low=tuple(map(int, low)), high=tuple(map(int, high)))


def _where(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    if len(inputs) != 3 or eqn.invars[0].aval.dtype != bool:
        unsupported(builder, "select_n of more than two cases")
    condition, if_false, if_true = inputs
    return add(builder, "where", eqn, (condition, if_true, if_false))


def _conv(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    params = eqn.params
    if eqn.invars[0].aval.ndim != 4 or params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        unsupported(builder, "convolution that is not 2-D, or is transposed or grouped by batch")
    if min(min(pads) for pads in params["padding"]) < 0:
        unsupported(builder, "convolution with cropping")
    specs = params["dimension_numbers"]
    # A spec lists axes: batch, channel, rows, columns for images; output, input, rows, columns for a kernel.
    lhs = tuple(specs.lhs_spec[i] for i in (0, 2, 3, 1))
    rhs = tuple(specs.rhs_spec[i] for i in (2, 3, 1, 0))
    out = tuple(specs.out_spec[i] for i in (0, 2, 3, 1))
    image, weights = (
        _layout(builder, "transpose", name, [var.aval.shape[i] for i in axes], var.aval.dtype, axes=axes)
        for name, var, axes in zip(inputs, eqn.invars, (lhs, rhs), strict=True)
    )
    aval = eqn.outvars[0].aval
    result = builder.add(
        "conv",
        (image, weights),
        [aval.shape[i] for i in out],
        aval.dtype,
        strides=tuple(params["window_strides"]),
        pads=tuple((int(low), int(high)) for low, high in params["padding"]),
        dilations=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
    )
    return add(builder, "transpose", eqn, (result,), axes=tuple(map(int, np.argsort(out))))


def _of_type(op: str, kind: Any) -> Translation:
    """Translates an operation of one type only: on integers, `div` would round and `and` would be bitwise."""

    def translate(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
        if not all(np.issubdtype(var.aval.dtype, kind) or var.aval.dtype == jnp.bfloat16 for var in eqn.invars):
            unsupported(builder, f"{op} of {eqn.invars[0].aval.dtype}")
        return add(builder, op, eqn, inputs)

    return translate


def _pool(op: str) -> Translation:
    def translate(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
        params = eqn.params
        size, strides, pads = params["window_dimensions"], params["window_strides"], params["padding"]
        dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
        if len(size) != 4 or (size[0], size[3], strides[0], strides[3]) != (1, 1, 1, 1) or dilated:
            unsupported(builder, "pooling that is dilated or covers axes other than rows and columns")
        pads = tuple((int(low), int(high)) for low, high in pads[1:3])
        return add(builder, op, eqn, inputs, size=tuple(size[1:3]), strides=tuple(strides[1:3]), pads=pads)

    return translate


def _dot(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    """Translates a product to `dense` if its form is [...,K] @ [K,D], otherwise to `einsum`."""
    (of_x, of_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    x, y = (var.aval for var in eqn.invars)
    if tuple(of_x) == (x.ndim - 1,) and tuple(of_y) == (0,) and not batch_x and y.ndim == 2 and x.ndim > 1:
        return add(builder, "dense", eqn, inputs)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    of_axis_x = [next(letters) for _ in range(x.ndim)]
    shared = dict(zip((*batch_y, *of_y), (of_axis_x[i] for i in (*batch_x, *of_x)), strict=True))
    of_axis_y = [shared.get(i) or next(letters) for i in range(y.ndim)]
    free_x = [letter for i, letter in enumerate(of_axis_x) if i not in (*batch_x, *of_x)]
    free_y = [letter for i, letter in enumerate(of_axis_y) if i not in shared]
    result = [*(of_axis_x[i] for i in batch_x), *free_x, *free_y]
    equation = f"{''.join(of_axis_x)},{''.join(of_axis_y)}->{''.join(result)}"
    return add(builder, "einsum", eqn, inputs, equation=equation)


TRANSLATIONS: dict[str, Translation] = {
    **{name: _of_type(name, np.bool_) for name in ("and", "or", "not")},
    "div": _of_type("div", np.floating),
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda builder, eqn, inputs: add(builder, "concat", eqn, inputs, axis=eqn.params["dimension"]),
    "conv_general_dilated": _conv,
    "copy": lambda builder, eqn, inputs: inputs[0],
    "dot_general": _dot,
    "expand_dims": _reshape,
    "pad": _pad,
    "reduce_window_max": _pool("max_pool"),
    "reduce_window_sum": _pool("sum_pool"),
    "reshape": _reshape,
    "select_n": _where,
    "slice": _slice,
    "squeeze": _reshape,
    "stop_gradient": lambda builder, eqn, inputs: inputs[0],
    "transpose": lambda builder, eqn, inputs: add(builder, "transpose", eqn, inputs, axes=eqn.params["permutation"]),
}
