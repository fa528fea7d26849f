"""Judging a set of weights on a whole split: every example once, nothing dropped, nothing counted twice."""

from typing import NamedTuple

import jax
import numpy as np

from mnist_flax import metrics
from mnist_flax.batches import NO_LABEL, Examples
from mnist_flax.config import Config
from mnist_flax.step import Variables, jit_forward


class Evaluation(NamedTuple):
    """What a network says about a split.

    Attributes:
      loss: mean cross-entropy in nats, without label smoothing.
      accuracy: share of examples whose likeliest class is the label.
      examples: how many were judged: all of them.
      logits: `f32[N,C]`, in the order of the split.
    """

    loss: float
    accuracy: float
    examples: int
    logits: np.ndarray


def predict_logits(config: Config, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Computes the logits of any number of images, `u8[N,28,28,1] -> f32[N,C]`.

    The last batch is filled up and its filling cut off again, so one compiled program serves every N.
    """
    size = config.train.eval_batch_size
    batches = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padding = [(0, size - len(batch))] + [(0, 0)] * (images.ndim - 1)
        batches.append(jit_forward(config, variables, jax.device_put(np.pad(batch, padding))))
    logits = np.concatenate(jax.device_get(batches)) if batches else np.zeros((0, config.num_classes), np.float32)
    return logits[: len(images)]


def evaluate(config: Config, variables: Variables, examples: Examples) -> Evaluation:
    """Judges `variables` on all of `examples`.

    Raises:
      ValueError: there are no examples, or a label is no class of the config's dataset.
    """
    labels = np.asarray(examples.label)
    if not len(labels) or labels.min() <= NO_LABEL or labels.max() >= config.num_classes:
        raise ValueError(f"evaluation needs examples with labels from 0 to {config.num_classes - 1}")
    logits = predict_logits(config, variables, np.asarray(examples.image))
    return Evaluation(
        loss=float(np.mean(metrics.negative_log_likelihood(logits, labels))),
        accuracy=float(np.mean(np.argmax(logits, axis=-1) == labels)),
        examples=len(labels),
        logits=logits,
    )
