"""Walks a jaxpr: inlines calls, folds what depends on weights alone into constants, and translates the rest."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from mnist_flax.exporting.graph import BATCH_SIZE, Builder
from mnist_flax.exporting.primitives import REWRITES, SAME_INPUTS, TRANSLATIONS, add, unsupported

CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold the function called by a primitive

# Not folded even if their inputs are constants: broadcasts to save memory, the others to keep the constants' names.
KEPT = ("broadcast_in_dim", "copy", "expand_dims", "reshape", "squeeze", "stop_gradient")


def inline_jaxpr(builder: Builder, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[str], stack: str) -> list[str]:
    """Adds the nodes of a jaxpr applied to `inputs`, with all calls inlined; returns the names of its results."""
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
            names[eqn.outvars[0]] = ""  # selects a branch of a `cond`; `_branch` ignores it
            continue
        arguments = tuple(read(atom) for atom in eqn.invars)
        for var, name in zip(eqn.outvars, _results(builder, eqn, arguments, path), strict=True):
            names[var] = name
    builder.function = function
    return [read(atom) for atom in jaxpr.outvars]


def layer_of(stack: str) -> str:
    """Returns the path of a linen module below the root module, after `member_<i>` in a committee."""
    parts = [part for part in stack.split("/") if part and "." not in part]  # a dot: a method, not a module
    parts = [part for part, _ in itertools.groupby(parts)]  # a call of `super().__call__` repeats the module's name
    member = [parts.pop(0)] if parts and parts[0].startswith("member_") else []
    return "/".join(member + parts[1:])


def _results(builder: Builder, eqn: Any, inputs: tuple[str, ...], stack: str) -> Sequence[str]:
    """Translates one equation; returns the names of its results."""
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return inputs
    if name == "cond":
        branch, inputs = _branch(builder, eqn, inputs)
        return inline_jaxpr(builder, branch.jaxpr, branch.consts, inputs, stack)
    called = next((eqn.params[key] for key in CALLS if key in eqn.params), None)
    if called is not None and name not in ("scan", "while"):
        label = str(eqn.params.get("name", ""))
        builder.function = label if label.isidentifier() and not label.startswith("_") else builder.function
        return inline_jaxpr(builder, getattr(called, "jaxpr", called), getattr(called, "consts", ()), inputs, stack)
    batched = any(size % BATCH_SIZE == 0 for var in eqn.outvars for size in var.aval.shape if size)
    if all(name in builder.constants for name in inputs) and not batched and name not in KEPT:
        return _compute(builder, eqn, inputs)
    if name in REWRITES:
        params = {key: eqn.params[key] for key in ("axis", "sizes", "y") if key in eqn.params}
        closed = jax.make_jaxpr(functools.partial(REWRITES[name], **params))(*(var.aval for var in eqn.invars))
        return inline_jaxpr(builder, closed.jaxpr, closed.consts, inputs, stack)
    if name in SAME_INPUTS:
        attrs = {"axes": eqn.params["axes"]} if "axes" in eqn.params else {}
        return [add(builder, SAME_INPUTS[name], eqn, inputs, **attrs)]
    if name not in TRANSLATIONS:
        unsupported(builder, name)
    return [TRANSLATIONS[name](builder, eqn, inputs)]


def _branch(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Chooses a branch: the default of `platform_dependent`, or the one selected by a constant index."""
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
    if platforms:
        return branches[platforms.index(None) if None in platforms else 0], inputs[1:]
    if inputs[0] not in builder.constants:
        unsupported(builder, "cond")
    return branches[min(int(builder.constants[inputs[0]]), len(branches) - 1)], inputs[1:]


def _compute(builder: Builder, eqn: Any, inputs: tuple[str, ...]) -> list[str]:
    """Evaluates an equation whose inputs are all constants."""
    results = eqn.primitive.bind(*(jax.numpy.asarray(builder.constants[name]) for name in inputs), **eqn.params)
    label = "/".join(filter(None, (builder.layer, builder.function, eqn.primitive.name)))
    arrays = results if eqn.primitive.multiple_results else [results]
    return [builder.constant(array, label if array.ndim else "") for array in arrays]
