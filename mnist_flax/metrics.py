"""Logits and labels in, numbers out."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
    """Returns the categorical cross-entropy against one-hot labels, in nats: `f32[B,C], i32[B] -> f32[B]`.

    A label outside 0..C-1 gives a one-hot row of zeros, and so, without smoothing, a loss of 0.

    Args:
      logits: before the softmax.
      labels: class numbers.
      label_smoothing: this share of each label is spread evenly over all classes (Szegedy et al., 2016).
    """
    num_classes = logits.shape[-1]
    targets = jax.nn.one_hot(labels, num_classes) * (1.0 - label_smoothing) + label_smoothing / num_classes
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def correct(logits: Array, labels: Array) -> Array:
    """Returns whether the likeliest class is the label: `f32[B,C], i32[B] -> bool[B]`."""
    return jnp.argmax(logits, axis=-1) == labels


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns what `cross_entropy` does without smoothing, on the host and in f64: `f32[N,C], i32[N] -> f64[N]`.

    For results that are reported: no rounding to speak of, and nothing to compile for each N.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    picked: np.ndarray = -np.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    return picked
