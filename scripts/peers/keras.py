"""The recipe in Keras on TensorFlow, like its examples: `compile` and `fit` on arrays in memory.

python -m scripts.peers.keras ...
"""

import argparse
import os
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from scripts.peers.harness import Examples, Recipe, pixels, serve, shifted


def network(recipe: Recipe) -> keras.Model:
    """Returns the network of a config."""
    model = recipe.model
    init = {"kernel_initializer": "he_normal" if recipe.he_init else "glorot_uniform"}
    inputs = keras.Input((28, 28, 1))
    x = resnet(model, inputs, init) if model["name"] == "resnet" else cnn(recipe, inputs, init)
    if model["dropout"]:
        x = layers.Dropout(model["dropout"])(x)
    return keras.Model(inputs, layers.Dense(10, **init)(x))


def cnn(recipe: Recipe, x: Any, init: dict[str, str]) -> Any:
    """Applies all layers of a `cnn` but the last; pooling before the ReLU is faster and gives the same result."""
    norm = recipe.model["batch_norm"]
    for width, kernel, stride, padding, pool in recipe.blocks():
        x = layers.Conv2D(width, kernel, stride, padding.lower(), use_bias=not norm, **init)(x)
        x = layers.BatchNormalization()(x) if norm else x
        x = layers.ReLU()(layers.MaxPooling2D(pool)(x) if pool > 1 else x)
        x = layers.Dropout(recipe.model["conv_dropout"])(x) if recipe.model["conv_dropout"] else x
    x = layers.Flatten()(x)
    for width in recipe.model["dense"]:
        x = layers.Dense(width, use_bias=not norm, **init)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x) if norm else x)
    return x


def resnet(model: dict[str, Any], x: Any, init: dict[str, str]) -> Any:
    """Applies all layers of a `resnet` but the last."""

    def conv(width: int, kernel: int) -> layers.Layer:
        return layers.Conv2D(width, kernel, padding="same", use_bias=False, **init)

    x = conv(model["stem_width"], 3)(x)
    for width in model["widths"]:
        for block in range(model["blocks"]):
            y = layers.BatchNormalization()(x)
            y = layers.ReLU()(y if block else layers.MaxPooling2D(2)(y))
            shortcut = x if block else conv(width, 1)(y)
            y = layers.ReLU()(layers.BatchNormalization()(conv(width, 3)(y)))
            x = layers.Add()([shortcut, conv(width, 3)(y)])
    return layers.GlobalAveragePooling2D()(layers.ReLU()(layers.BatchNormalization()(x)))


class Keras:
    """Training in Keras."""

    def __init__(self, given: argparse.Namespace, recipe: Recipe, train: Examples) -> None:
        del given
        keras.utils.set_random_seed(recipe.seed)
        self._recipe = recipe
        self._generator = np.random.default_rng(recipe.seed)
        self._images, self._labels = pixels(train.image), keras.utils.to_categorical(train.label, 10)
        self._model = network(recipe)
        optimizer = keras.optimizers.AdamW(  # without weight decay, this is Adam
            learning_rate(recipe), weight_decay=recipe.weight_decay, epsilon=1e-8
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing)
        self._model.compile(optimizer, loss)

    def epoch(self) -> float:
        """Trains one epoch."""
        images = shifted(self._images, self._recipe.shift, self._generator)
        history = self._model.fit(images, self._labels, batch_size=self._recipe.batch_size, verbose=0)
        return float(history.history["loss"][0])

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Computes the accuracy."""
        logits = self._model.predict(pixels(images), batch_size=1000, verbose=0)
        return float((logits.argmax(1) == labels).mean())


def learning_rate(recipe: Recipe) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Returns the learning rate or its schedule; the warm-up to the peak is linear, as in Keras."""
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
