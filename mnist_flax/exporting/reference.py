"""NumPy implementations of the graph's operations; exported programs contain their source code."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


def windows(x: Array, size: Any, strides: Any, dilations: Any = (1, 1)) -> Array:
    """Strided sliding windows of images: [N,H,W,C] -> [N,H',W',C,h,w]."""
    spans = [(n - 1) * d + 1 for n, d in zip(size, dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(x, spans, (1, 2))
    return views[:, :: strides[0], :: strides[1], :, :: dilations[0], :: dilations[1]]


def conv2d(x: Array, kernel: Array, bias: Any = 0.0, *, strides: Any, pads: Any, dilations: Any, groups: int) -> Array:
    """Convolution: [N,H,W,C], [h,w,C/groups,D] -> [N,H',W',D]."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    patches = windows(x, kernel.shape[:2], strides, dilations)
    parts = zip(np.split(patches, groups, 3), np.split(kernel, groups, 3), strict=True)
    return np.concatenate([np.tensordot(p, k, ((3, 4, 5), (2, 0, 1))) for p, k in parts], 3) + bias


def dense(x: Array, kernel: Array, bias: Any = 0.0) -> Array:
    """Matrix product: [...,K], [K,D] -> [...,D]."""
    return x @ kernel + bias


def max_pool2d(x: Array, *, size: Any, strides: Any, pads: Any) -> Array:
    """Maximum of each window."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-np.inf)
    return windows(x, size, strides).max((4, 5))


def sum_pool2d(x: Array, *, size: Any, strides: Any, pads: Any) -> Array:
    """Sum of each window."""
    return windows(np.pad(x, ((0, 0), *pads, (0, 0))), size, strides).sum((4, 5))


def avg_pool2d(x: Array, *, size: Any, strides: Any, pads: Any) -> Array:
    """Mean of each window."""
    return windows(np.pad(x, ((0, 0), *pads, (0, 0))), size, strides).mean((4, 5))


def relu(x: Array) -> Array:
    """Sets negative values to 0."""
    return np.maximum(x, 0)


def softmax(x: Array) -> Array:
    """Logits to probabilities, over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * np.tanh(0.5 * x) + 0.5


def erf(x: Array) -> Array:
    """The error function."""
    return np.vectorize(math.erf, [x.dtype])(x)


def concat(*inputs: Array, axis: int) -> Array:
    """Concatenates along an axis."""
    return np.concatenate(inputs, axis)


def slice_(x: Array, *, starts: Any, limits: Any, strides: Any) -> Array:
    """Slices every axis."""
    return x[tuple(slice(*part) for part in zip(starts, limits, strides, strict=True))]


def pad(x: Array, value: Array, *, low: Any, high: Any) -> Array:
    """Pads every axis with a constant."""
    return np.pad(x, tuple(zip(low, high, strict=True)), constant_values=value)


def cast(x: Array, *, dtype: str) -> Array:
    """Casts to another dtype."""
    return x.astype(dtype)


def einsum(x: Array, y: Array, *, equation: str) -> Array:
    """Contracts two arrays by an einsum equation."""
    return np.einsum(equation, x, y)


# NumPy's own functions. Attributes are passed to them by position.
IN_NUMPY: dict[str, Callable[..., Array]] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power},
    **{"max": np.maximum, "min": np.minimum, "equal": np.equal, "less": np.less, "less_equal": np.less_equal},
    **{"greater": np.greater, "greater_equal": np.greater_equal, "and": np.logical_and, "or": np.logical_or},
    **{"not": np.logical_not, "where": np.where, "neg": np.negative, "abs": np.abs, "sign": np.sign},
    **{"floor": np.floor, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "sin": np.sin, "cos": np.cos},
    **{"reduce_sum": np.sum, "reduce_mean": np.mean, "reduce_max": np.max, "reduce_min": np.min},
    **{"reshape": np.reshape, "broadcast": np.broadcast_to, "transpose": np.transpose},
}
OPERATIONS: dict[str, Callable[..., Array]] = {
    **{"slice": slice_, "conv": conv2d, "max_pool": max_pool2d, "sum_pool": sum_pool2d, "avg_pool": avg_pool2d},
    **{function.__name__: function for function in (dense, relu, softmax, logistic, erf, concat, pad, cast, einsum)},
    **IN_NUMPY,
}
