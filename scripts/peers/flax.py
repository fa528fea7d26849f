"""The recipe in plain Flax, like its own MNIST example: `nn.Conv`, a TrainState, one jitted step per batch.

python -m scripts.peers.flax ...
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import Array

from scripts.peers.harness import Examples, Recipe, pixels, serve, shifted


class CNN(nn.Module):
    """The network of `three_conv_adam.py`."""

    he_init: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Computes the logits, `f32[B,28,28,1] -> f32[B,10]`."""
        init = nn.initializers.he_normal() if self.he_init else nn.initializers.glorot_uniform()
        x = nn.Conv(32, (3, 3), padding="VALID", kernel_init=init)(x)
        x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.Conv(64, (3, 3), padding="VALID", kernel_init=init)(x)
        x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.relu(nn.Conv(64, (3, 3), padding="VALID", kernel_init=init)(x))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(64, kernel_init=init)(x))
        return nn.Dense(10, kernel_init=init)(x)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns AdamW (Adam if there is no weight decay) with the learning rate of the recipe."""
    rate = recipe.learning_rate
    schedule: Any = rate
    if recipe.one_cycle:
        start, peak_step = recipe.start_fraction * rate, round(recipe.peak_at * recipe.num_steps)
        schedule = optax.warmup_cosine_decay_schedule(start, rate, peak_step, recipe.num_steps)
    return optax.adamw(
        schedule, weight_decay=recipe.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )


class Flax:
    """Training in Flax."""

    def __init__(self, given: argparse.Namespace, recipe: Recipe, train: Examples) -> None:
        del given
        self._recipe = recipe
        self._generator = np.random.default_rng(recipe.seed)
        self._images, self._labels = pixels(train.image), train.label
        model = CNN(recipe.he_init)
        params = model.init(jax.random.key(recipe.seed), jnp.zeros((1, 28, 28, 1)))["params"]
        self._state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer(recipe))

        @jax.jit
        def train_step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, Array]:
            def loss_fn(params: Any) -> Array:
                logits = state.apply_fn({"params": params}, images)
                targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), recipe.label_smoothing)
                return optax.softmax_cross_entropy(logits, targets).mean()

            loss, grads = jax.value_and_grad(loss_fn)(state.params)
            return state.apply_gradients(grads=grads), loss

        self._train_step = train_step
        self._forward = jax.jit(lambda params, images: model.apply({"params": params}, images))

    def epoch(self) -> float:
        """Trains one epoch."""
        images = shifted(self._images, self._recipe.shift, self._generator)
        order = self._generator.permutation(len(images))
        losses = []
        for start in range(0, len(order), self._recipe.batch_size):
            rows = order[start : start + self._recipe.batch_size]
            self._state, loss = self._train_step(self._state, images[rows], self._labels[rows])
            losses.append(loss)
        return float(np.mean(jax.device_get(losses)))

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Computes the accuracy."""
        right = 0
        for start in range(0, len(images), 1000):
            logits = self._forward(self._state.params, pixels(images[start : start + 1000]))
            right += int((np.argmax(logits, 1) == labels[start : start + 1000]).sum())
        return right / len(labels)


if __name__ == "__main__":
    serve(Flax, ["flax", "jax", "jaxlib", "optax"])
