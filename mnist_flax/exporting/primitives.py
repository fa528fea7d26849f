"""Translates JAX primitives, each to one or more operations of the graph."""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from mnist_flax.exporting.graph import Builder, ExportError, symbolic

Translation = Callable[[Builder, Any, tuple[str, ...]], str]

ELEMENTWISE = {
    **{name: name for name in ("add", "sub", "mul", "div", "max", "min", "pow", "and", "or", "not", "neg", "abs")},
    **{name: name for name in ("sign", "floor", "exp", "log", "sqrt", "tanh", "erf", "logistic", "sin", "cos")},
    **{name: name for name in ("reduce_sum", "reduce_max", "reduce_min")},
    **{"eq": "equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"},
}


def unsupported(builder: Builder, what: str) -> NoReturn:
    """Raises an `ExportError` that names the operation and the layer."""
    raise ExportError(
        f"layer {builder.layer or '(outside all layers)'}: its operation {what!r} cannot be exported to ONNX, NumPy or"
        " the demo page; use --format=stablehlo, or write the layer with other operations"
    )


def add(builder: Builder, op: str, eqn: Any, inputs: tuple[str, ...], **attrs: Any) -> str:
    """Adds a node with the shape and type of an equation's first result."""
    aval = eqn.outvars[0].aval
    return builder.add(op, inputs, aval.shape, aval.dtype, **attrs)


def _number(builder: Builder, eqn: Any, value: float) -> str:
    return builder.constant(np.asarray(value, eqn.outvars[0].aval.dtype))


def _reshape(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    x, shape = inputs[0], eqn.outvars[0].aval.shape
    if x in builder.constants:
        return builder.constant(builder.constants[x].reshape(shape), x)  # keeps its name
    return add(builder, "reshape", eqn, inputs[:1])


def _broadcast(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    """Reshapes to insert axes of size 1, then broadcasts; `patterns` drops broadcasts before elementwise operations."""
    shape, dtype = eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype
    of = eqn.invars[0].aval.shape
    places = dict(zip(eqn.params["broadcast_dimensions"], of, strict=True))
    inner = tuple(places.get(axis, 1) for axis in range(len(shape)))
    (x,) = inputs[:1]
    if inner != of and of and x in builder.constants:
        x = builder.constant(builder.constants[x].reshape(inner), x)
    elif inner != of and of:
        x = builder.add("reshape", (x,), inner, dtype)
    return x if inner == shape else builder.add("broadcast", (x,), shape, dtype)


def _transpose(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "transpose", eqn, inputs, axes=eqn.params["permutation"])


def _cast(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "cast", eqn, inputs)


def _slice(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    return add(builder, "slice", eqn, inputs, starts=tuple(starts), limits=symbolic(limits), strides=tuple(strides))


def split_axis(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> list[str]:
    """Translates `split`: one slice for each part."""
    axis, start, names = eqn.params["axis"], 0, []
    (x,) = eqn.invars
    for var, size in zip(eqn.outvars, eqn.params["sizes"], strict=True):
        starts, limits = [0] * x.aval.ndim, list(x.aval.shape)
        starts[axis], limits[axis] = start, start + size
        attrs = {"starts": tuple(starts), "limits": symbolic(limits), "strides": (1,) * x.aval.ndim}
        names.append(builder.add("slice", inputs, var.aval.shape, var.aval.dtype, **attrs))
        start += size
    return names


def _concat(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "concat", eqn, inputs, axis=eqn.params["dimension"])


def _stack(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    aval, axis = eqn.outvars[0].aval, eqn.params["axis"]
    one = tuple(1 if i == axis else size for i, size in enumerate(aval.shape))
    parts = tuple(builder.add("reshape", (x,), one, aval.dtype) for x in inputs)
    return add(builder, "concat", eqn, parts, axis=axis)


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


def _clamp(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    low, x, high = inputs
    return add(builder, "min", eqn, (add(builder, "max", eqn, (x, low)), high))


def _power(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    exponent = eqn.params["y"]
    if not 2 <= exponent <= 4:
        return add(builder, "pow", eqn, (*inputs, _number(builder, eqn, exponent)))
    (power,) = inputs
    for _ in range(exponent - 1):
        power = add(builder, "mul", eqn, (power, *inputs))
    return power


def _square(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "mul", eqn, inputs * 2)


def _rsqrt(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "div", eqn, (_number(builder, eqn, 1), add(builder, "sqrt", eqn, inputs)))


def _log1p(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "log", eqn, (add(builder, "add", eqn, (*inputs, _number(builder, eqn, 1))),))


def _expm1(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "sub", eqn, (add(builder, "exp", eqn, inputs), _number(builder, eqn, 1)))


def _erfc(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "sub", eqn, (_number(builder, eqn, 1), add(builder, "erf", eqn, inputs)))


def _not_equal(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return add(builder, "not", eqn, (add(builder, "equal", eqn, inputs),))


def _is_finite(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    """Tests whether x - x equals 0: for infinity and NaN it is NaN."""
    aval = eqn.invars[0].aval
    difference = builder.add("sub", inputs * 2, aval.shape, aval.dtype)
    return add(builder, "equal", eqn, (difference, builder.constant(np.zeros((), aval.dtype))))


def _conv(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    params = eqn.params
    x, kernel = eqn.invars
    if x.aval.ndim != 4 or params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        unsupported(builder, "convolution that is not of images, or is transposed or grouped by batch")
    specs = params["dimension_numbers"]
    # A spec lists the axes (batch, channel, rows, columns); for a kernel (output, input, rows, columns).
    lhs = tuple(specs.lhs_spec[i] for i in (0, 2, 3, 1))
    rhs = tuple(specs.rhs_spec[i] for i in (2, 3, 1, 0))
    out = tuple(specs.out_spec[i] for i in (0, 2, 3, 1))
    image, weights = inputs
    if lhs != (0, 1, 2, 3):
        image = builder.add("transpose", (image,), [x.aval.shape[i] for i in lhs], x.aval.dtype, axes=lhs)
    if rhs != (0, 1, 2, 3) and weights in builder.constants:
        weights = builder.constant(np.ascontiguousarray(builder.constants[weights].transpose(rhs)), weights)
    elif rhs != (0, 1, 2, 3):
        weights = builder.add("transpose", (weights,), [kernel.aval.shape[i] for i in rhs], kernel.aval.dtype, axes=rhs)
    aval = eqn.outvars[0].aval
    name = builder.add(
        "conv",
        (image, weights),
        [aval.shape[i] for i in out],
        aval.dtype,
        strides=tuple(params["window_strides"]),
        pads=tuple((int(low), int(high)) for low, high in params["padding"]),
        dilations=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
    )
    back = tuple(int(i) for i in np.argsort(out))
    return name if out == (0, 1, 2, 3) else add(builder, "transpose", eqn, (name,), axes=back)


def _pool(op: str) -> Translation:
    def translate(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
        params = eqn.params
        size, strides, pads = params["window_dimensions"], params["window_strides"], params["padding"]
        dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
        if len(size) != 4 or (size[0], size[3], strides[0], strides[3]) != (1, 1, 1, 1) or dilated:
            unsupported(builder, "pooling over other axes than rows and columns")
        pads = tuple((int(low), int(high)) for low, high in pads[1:3])
        return add(builder, op, eqn, inputs, size=tuple(size[1:3]), strides=tuple(strides[1:3]), pads=pads)

    return translate


def _dot(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    """Translates a matrix product to a dense layer if it is one, otherwise to an einsum."""
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
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "concatenate": _concat,
    "conv_general_dilated": _conv,
    "convert_element_type": _cast,
    "copy": lambda builder, eqn, inputs: inputs[0],
    "dot_general": _dot,
    "erfc": _erfc,
    "expand_dims": _reshape,
    "expm1": _expm1,
    "integer_pow": _power,
    "is_finite": _is_finite,
    "log1p": _log1p,
    "ne": _not_equal,
    "pad": _pad,
    "reduce_window_max": _pool("max_pool"),
    "reduce_window_sum": _pool("sum_pool"),
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "select_n": _where,
    "slice": _slice,
    "square": _square,
    "squeeze": _reshape,
    "stack": _stack,
    "stop_gradient": lambda builder, eqn, inputs: inputs[0],
    "transpose": _transpose,
}
