"""JAX's primitives, each as one or several operations of the graph."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from mnist_flax.exporting.graph import BATCH_SIZE, Builder, ExportError, symbolic

Translation = Callable[[Builder, Any, tuple[str, ...]], str]

CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters under which a primitive keeps the function that it calls

# Of constants, too, these are translated and not computed: a broadcast to save memory, the others to keep the name.
KEPT = ("broadcast_in_dim", "copy", "expand_dims", "reshape", "squeeze", "stop_gradient")

ELEMENTWISE = {
    **{name: name for name in ("add", "sub", "mul", "div", "max", "min", "pow", "and", "or", "not", "neg", "abs")},
    **{name: name for name in ("sign", "floor", "exp", "log", "sqrt", "tanh", "erf", "logistic", "sin", "cos")},
    **{name: name for name in ("reduce_sum", "reduce_max", "reduce_min")},
    **{"eq": "equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"},
}


def inline(builder: Builder, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[str], stack: str) -> list[str]:
    """Adds the nodes of a jaxpr and of everything that it calls.

    Args:
      builder: receives them.
      jaxpr: the program.
      consts: the values of its constants.
      inputs: names of its arguments.
      stack: the name stack of the place where it is called.

    Returns:
      The names of its results.
    """
    names: dict[Any, str] = dict(zip(jaxpr.invars, inputs, strict=True))
    names |= {var: builder.constant(jax.device_get(value)) for var, value in zip(jaxpr.constvars, consts, strict=True)}
    function = builder.function

    def read(atom: Any) -> str:
        if isinstance(atom, core.Literal):
            return builder.constant(np.asarray(atom.val, getattr(atom.aval, "dtype", None)))
        return names[atom]

    for eqn in jaxpr.eqns:
        path = "/".join(filter(None, (stack, str(eqn.source_info.name_stack))))
        builder.layer, builder.function = layer_of(path), function
        if eqn.primitive.name == "platform_index":
            names[eqn.outvars[0]] = ""  # the cond that takes it is resolved below
            continue
        arguments = tuple(read(atom) for atom in eqn.invars)
        for var, name in zip(eqn.outvars, _results(builder, eqn, arguments, path), strict=True):
            names[var] = name
    builder.function = function
    return [read(atom) for atom in jaxpr.outvars]


def layer_of(stack: str) -> str:
    """Returns the path of a linen module within its root, with the member of a committee in front."""
    parts = [part for part in stack.split("/") if part and "." not in part]  # a dot: a method, not a module
    member = [parts.pop(0)] if parts and parts[0].startswith("member_") else []
    return "/".join(member + parts[1:])


def _results(builder: Builder, eqn: Any, inputs: tuple[str, ...], stack: str) -> Sequence[str]:
    """Translates one equation."""
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return inputs
    if name == "cond":
        branch, inputs = _branch(builder, eqn, inputs)
        return inline(builder, branch.jaxpr, branch.consts, inputs, stack)
    called = next((eqn.params[key] for key in CALLS if key in eqn.params), None)
    if called is not None and name not in ("scan", "while"):
        label = str(eqn.params.get("name", ""))
        builder.function = label if label.isidentifier() and not label.startswith("_") else builder.function
        return inline(builder, getattr(called, "jaxpr", called), getattr(called, "consts", ()), inputs, stack)
    batched = any(size % BATCH_SIZE == 0 for var in eqn.outvars for size in var.aval.shape if size)
    if all(name in builder.constants for name in inputs) and not batched and name not in KEPT:
        return _compute(builder, eqn, inputs)
    if name == "split":
        return _split(builder, eqn, inputs)
    if name not in TRANSLATIONS and name not in ELEMENTWISE:
        _unsupported(builder, name)
    if name in ELEMENTWISE:
        attrs = {"axes": eqn.params["axes"]} if "axes" in eqn.params else {}
        return [_add(builder, ELEMENTWISE[name], eqn, inputs, **attrs)]
    return [TRANSLATIONS[name](builder, eqn, inputs)]


def _unsupported(builder: Builder, what: str) -> None:
    raise ExportError(
        f"layer {builder.layer or '(outside all layers)'}: its operation {what!r} cannot be exported to ONNX, NumPy or"
        " the demo page; use --format=stablehlo, or write the layer with other operations"
    )


def _branch(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Chooses a branch: the default one of `platform_dependent`, or the one that a constant names."""
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
    if platforms:
        return branches[platforms.index(None) if None in platforms else 0], inputs[1:]
    if inputs[0] not in builder.constants:
        _unsupported(builder, "cond")
    return branches[min(int(builder.constants[inputs[0]]), len(branches) - 1)], inputs[1:]


def _compute(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> list[str]:
    """Computes what depends on constants alone."""
    results = eqn.primitive.bind(*(jax.numpy.asarray(builder.constants[name]) for name in inputs), **eqn.params)
    label = "/".join(filter(None, (builder.layer, builder.function, eqn.primitive.name)))
    arrays = map(np.asarray, results if eqn.primitive.multiple_results else [results])
    return [builder.constant(array, label if array.ndim else "") for array in arrays]


def _add(builder: Builder, op: str, eqn: Any, inputs: tuple[str, ...], **attrs: Any) -> str:
    aval = eqn.outvars[0].aval
    return builder.add(op, inputs, aval.shape, aval.dtype, **attrs)


def _number(builder: Builder, eqn: Any, value: float) -> str:
    return builder.constant(np.asarray(value, eqn.outvars[0].aval.dtype))


def _reshape(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    x, shape = inputs[0], eqn.outvars[0].aval.shape
    if x in builder.constants:
        return builder.constant(builder.constants[x].reshape(shape), x)  # it keeps its name
    return _add(builder, "reshape", eqn, inputs[:1])


def _broadcast(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    """A reshape that inserts axes of size 1, then one that repeats; elementwise operations do without the second."""
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
    return _add(builder, "transpose", eqn, inputs, axes=eqn.params["permutation"])


def _cast(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return _add(builder, "cast", eqn, inputs)


def _slice(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    return _add(builder, "slice", eqn, inputs, starts=tuple(starts), limits=symbolic(limits), strides=tuple(strides))


def _split(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> list[str]:
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
    return _add(builder, "concat", eqn, inputs, axis=eqn.params["dimension"])


def _stack(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    aval, axis = eqn.outvars[0].aval, eqn.params["axis"]
    one = tuple(1 if i == axis else size for i, size in enumerate(aval.shape))
    parts = tuple(builder.add("reshape", (x,), one, aval.dtype) for x in inputs)
    return _add(builder, "concat", eqn, parts, axis=axis)


def _pad(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    low, high, interior = zip(*eqn.params["padding_config"], strict=True)
    if any(interior) or min(*low, *high) < 0:
        _unsupported(builder, "pad with dilation or cropping")
    return _add(builder, "pad", eqn, inputs, low=tuple(map(int, low)), high=tuple(map(int, high)))


def _where(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    if len(inputs) != 3 or eqn.invars[0].aval.dtype != bool:
        _unsupported(builder, "select_n of more than two cases")
    condition, if_false, if_true = inputs
    return _add(builder, "where", eqn, (condition, if_true, if_false))


def _clamp(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    low, x, high = inputs
    return _add(builder, "min", eqn, (_add(builder, "max", eqn, (x, low)), high))


def _power(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    exponent = eqn.params["y"]
    if not 2 <= exponent <= 4:
        return _add(builder, "pow", eqn, (*inputs, _number(builder, eqn, exponent)))
    (power,) = inputs
    for _ in range(exponent - 1):
        power = _add(builder, "mul", eqn, (power, *inputs))
    return power


def _square(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return _add(builder, "mul", eqn, inputs * 2)


def _rsqrt(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return _add(builder, "div", eqn, (_number(builder, eqn, 1), _add(builder, "sqrt", eqn, inputs)))


def _log1p(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return _add(builder, "log", eqn, (_add(builder, "add", eqn, (*inputs, _number(builder, eqn, 1))),))


def _expm1(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return _add(builder, "sub", eqn, (_add(builder, "exp", eqn, inputs), _number(builder, eqn, 1)))


def _erfc(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return _add(builder, "sub", eqn, (_number(builder, eqn, 1), _add(builder, "erf", eqn, inputs)))


def _not_equal(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    return _add(builder, "not", eqn, (_add(builder, "equal", eqn, inputs),))


def _is_finite(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    """A finite number minus itself is 0; infinity and NaN give NaN."""
    aval = eqn.invars[0].aval
    difference = builder.add("sub", inputs * 2, aval.shape, aval.dtype)
    return _add(builder, "equal", eqn, (difference, builder.constant(np.zeros((), aval.dtype))))


def _conv(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    params = eqn.params
    x, kernel = eqn.invars
    if x.aval.ndim != 4 or params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        _unsupported(builder, "convolution that is not of images, or is transposed or grouped by batch")
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
    return name if out == (0, 1, 2, 3) else _add(builder, "transpose", eqn, (name,), axes=back)


def _pool(op: str) -> Translation:
    def translate(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
        params = eqn.params
        size, strides, pads = params["window_dimensions"], params["window_strides"], params["padding"]
        dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
        if len(size) != 4 or (size[0], size[3], strides[0], strides[3]) != (1, 1, 1, 1) or dilated:
            _unsupported(builder, "pooling over other axes than rows and columns")
        pads = tuple((int(low), int(high)) for low, high in pads[1:3])
        return _add(builder, op, eqn, inputs, size=tuple(size[1:3]), strides=tuple(strides[1:3]), pads=pads)

    return translate


def _dot(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> str:
    """A dense layer if it is one, else an einsum."""
    (of_x, of_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    x, y = (var.aval for var in eqn.invars)
    if tuple(of_x) == (x.ndim - 1,) and tuple(of_y) == (0,) and not batch_x and y.ndim == 2 and x.ndim > 1:
        return _add(builder, "dense", eqn, inputs)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    of_axis_x = [next(letters) for _ in range(x.ndim)]
    shared = dict(zip((*batch_y, *of_y), (of_axis_x[i] for i in (*batch_x, *of_x)), strict=True))
    of_axis_y = [shared.get(i) or next(letters) for i in range(y.ndim)]
    free_x = [letter for i, letter in enumerate(of_axis_x) if i not in (*batch_x, *of_x)]
    free_y = [letter for i, letter in enumerate(of_axis_y) if i not in shared]
    result = [*(of_axis_x[i] for i in batch_x), *free_x, *free_y]
    equation = f"{''.join(of_axis_x)},{''.join(of_axis_y)}->{''.join(result)}"
    return _add(builder, "einsum", eqn, inputs, equation=equation)


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
