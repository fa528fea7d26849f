"""Loss functions: each computes a loss for every example from logits and labels."""

from typing import Protocol

import jax
import optax
from jax import Array


class Loss(Protocol):
    """Computes a loss for each example, `f32[B,C], i32[B] -> f32[B]`.

    Rows of padding have the label 0, and their losses are ignored.
    """

    def __call__(self, logits: Array, labels: Array, *, label_smoothing: float) -> Array:
        """Computes the losses."""
        ...


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
    """Computes the categorical cross-entropy in nats, `f32[B,C], i32[B] -> f32[B]`.

    Label smoothing spreads a share of each label evenly over all classes (Szegedy et al., 2016).
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy}
