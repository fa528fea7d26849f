"""The function that is exported: pixels to logits, including shifted views, committee and temperature."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from mnist_flax.analysis.evaluation import Predictor, views_of
from mnist_flax.errors import failures_as
from mnist_flax.exporting.graph import ExportError, Graph, trace
from mnist_flax.step import Variables, forward


def in_float32(predictor: Predictor) -> Predictor:
    """Returns the predictor in float32, matrix products included, on every device; all exports have this precision."""
    model = dataclasses.replace(predictor.program.model, dtype="float32", matmul_precision="highest")
    return dataclasses.replace(predictor, program=dataclasses.replace(predictor.program, model=model))


def logits_of(predictor: Predictor, members: Sequence[Variables], images: Array) -> Array:
    """Computes the same as `predict_logits`, but can be traced by JAX: `u8[N,28,28,1] -> f32[N,C]`.

    The weights come from `members`, everything else from the predictor. N may be symbolic.
    """
    views = images
    if predictor.views > 1:  # u8[N*V,H,W,1]: the V views of an image are consecutive
        views = jnp.stack(views_of(images, predictor.views), 1).reshape(
            images.shape[0] * predictor.views, *images.shape[1:]
        )
    outputs = []
    for i, variables in enumerate(members):
        with jax.named_scope(f"member_{i}") if len(members) > 1 else contextlib.nullcontext():
            logits = forward(predictor.program, variables, views)
            outputs.append(logits.reshape(images.shape[0], predictor.views, logits.shape[-1]))
    if len(outputs) == predictor.views == 1:
        return outputs[0][:, 0] / predictor.temperature
    log_probs = jax.nn.log_softmax(jnp.concatenate(outputs, 1))
    return (jax.nn.logsumexp(log_probs, axis=1) - math.log(log_probs.shape[1])) / predictor.temperature


def graph_of(predictor: Predictor) -> Graph:
    """Returns the graph of a predictor.

    Raises:
      ExportError: the network contains an operation that the graph does not support, or cannot be traced.
    """
    exact = in_float32(predictor)
    names = [f"member_{i}" for i in range(len(exact.members))]
    with failures_as(ExportError, "the network cannot be exported"):  # an export must not end the user's training
        if len(names) == 1:
            return trace(lambda variables, images: logits_of(exact, [variables], images), exact.members[0])
        members = dict(zip(names, exact.members, strict=True))
        return trace(lambda named, images: logits_of(exact, [named[name] for name in names], images), members)
