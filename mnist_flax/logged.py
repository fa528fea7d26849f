"""Logged metrics: what is computed at every training step, besides the update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class StepView(NamedTuple):
    """What a logged metric can read: the values of one step, before the weights change.

    Attributes:
      logits: `f32[B,C]`.
      losses: `f32[B]`, including label smoothing and distillation; 0 for padding.
      penalty: `f32[]`, the sum of what the network has sown into the collection `losses`.
      labels: `i32[B]`.
      is_example: `bool[B]`, False for padding.
      grads: the gradient of the mean loss.
      params: the weights before the step.
    """

    logits: Array
    losses: Array
    penalty: Array
    labels: Array
    is_example: Array
    grads: Any
    params: Any


# Each entry is a sum over a batch, so that batches of unequal size can be combined. Every entry is logged.
METRICS: dict[str, Callable[[StepView], Array]] = {
    "loss": lambda view: jnp.sum(view.losses),
    "accuracy": lambda view: jnp.sum(
        jnp.argmax(view.logits, axis=-1) == view.labels, where=view.is_example, dtype=jnp.int32
    ),
    "examples": lambda view: jnp.sum(view.is_example, dtype=jnp.int32),
}
