"""Loss functions: each computes a loss for every example from logits and labels."""

from collections.abc import Callable

import jax
import optax
from jax import Array


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
    """Computes the categorical cross-entropy in nats, `f32[B,C], i32[B] -> f32[B]`.

    Label smoothing spreads a share of each label evenly over all classes (Szegedy et al., 2016). The one-hot row of a
    label outside 0..C-1 is all zeros; without smoothing, its loss is 0.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


LOSSES: dict[str, Callable[..., Array]] = {"cross_entropy": cross_entropy}  # called with the keyword label_smoothing
