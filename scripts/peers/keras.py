"""The recipe in Keras on TensorFlow, as its examples write it: `compile` and `fit`, on arrays in memory.

python -m scripts.peers.keras ...
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from scripts.peers.harness import Examples, Recipe, pixels, serve, shifted


def network(recipe: Recipe) -> keras.Sequential:
    """Returns the three convolutions."""
    init = {"kernel_initializer": "he_normal" if recipe.he_init else "glorot_uniform"}
    return keras.Sequential([
        keras.Input((28, 28, 1)),
        layers.Conv2D(32, 3, **init), layers.MaxPooling2D(2), layers.ReLU(),
        layers.Conv2D(64, 3, **init), layers.MaxPooling2D(2), layers.ReLU(),
        layers.Conv2D(64, 3, activation="relu", **init),
        layers.Flatten(),
        layers.Dense(64, activation="relu", **init),
        layers.Dense(10, **init),
    ])  # fmt: skip


class Keras:
    """Training in Keras."""

    def __init__(self, given: argparse.Namespace, recipe: Recipe, train: Examples) -> None:
        del given
        keras.utils.set_random_seed(recipe.seed)
        self._recipe = recipe
        self._generator = np.random.default_rng(recipe.seed)
        self._images, self._labels = pixels(train.image), keras.utils.to_categorical(train.label, 10)
        self._model = network(recipe)
        optimizer = keras.optimizers.AdamW(  # without decay it is Adam
            learning_rate(recipe), weight_decay=recipe.weight_decay, epsilon=1e-8
        )
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing)
        self._model.compile(optimizer, loss)

    def epoch(self) -> float:
        """Trains one epoch."""
        images = shifted(self._images, self._recipe.shift, self._generator)
        history = self._model.fit(images, self._labels, batch_size=self._recipe.batch_size, verbose=0)
        return float(history.history["loss"][0])

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Judges the network."""
        logits = self._model.predict(pixels(images), batch_size=1000, verbose=0)
        return float((logits.argmax(1) == labels).mean())


def learning_rate(recipe: Recipe) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Returns the rate, or its schedule over the run; the rise to the peak is linear, as Keras has it."""
    if not recipe.one_cycle:
        return recipe.learning_rate
    rising = round(recipe.peak_at * recipe.num_steps)
    return keras.optimizers.schedules.CosineDecay(
        recipe.start_fraction * recipe.learning_rate,
        recipe.num_steps - rising,
        warmup_target=recipe.learning_rate,
        warmup_steps=rising,
    )


if __name__ == "__main__":
    serve(Keras, ["keras", "tensorflow"])
