"""The recipe in PyTorch, as its tutorials write it, tuned: all data in memory, fused Adam, no waiting in the loop.

python -m scripts.peers.pytorch --variant=eager|channels_last|compiled ...
"""

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.peers.harness import Examples, Recipe, pixels, serve, shifted


def network(recipe: Recipe) -> nn.Sequential:
    """Returns the three convolutions; pooling before the ReLU is the faster order of two that mean the same."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if recipe.he_init:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def as_tensor(images: np.ndarray) -> Tensor:
    """Wraps images, `f32[N,28,28,1] -> f32[N,1,28,28]`, in the default layout."""
    return torch.from_numpy(images).reshape(-1, 1, 28, 28)


class PyTorch:
    """Training in PyTorch."""

    def __init__(self, given: argparse.Namespace, recipe: Recipe, train: Examples) -> None:
        torch.manual_seed(recipe.seed)
        self._recipe = recipe
        self._generator = np.random.default_rng(recipe.seed)
        self._images, self._labels = pixels(train.image), torch.from_numpy(train.label).long()
        self._layout = torch.contiguous_format if given.variant == "eager" else torch.channels_last
        self._model = network(recipe).to(memory_format=self._layout)
        kernels = [p for p in self._model.parameters() if p.ndim > 1]
        biases = [p for p in self._model.parameters() if p.ndim == 1]
        groups = [{"params": kernels, "weight_decay": recipe.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)  # without decay it is Adam
        self._schedule = (
            torch.optim.lr_scheduler.OneCycleLR(
                self._optimizer,
                recipe.learning_rate,
                recipe.num_steps,
                pct_start=recipe.peak_at,
                div_factor=1 / recipe.start_fraction,
                cycle_momentum=False,
            )
            if recipe.one_cycle
            else None
        )
        # The last batch is smaller: a program for each of the two sizes is faster than one for any.
        self._forward = torch.compile(self._model, dynamic=False) if given.variant == "compiled" else self._model
        self._done = 0

    def epoch(self) -> float:
        """Trains one epoch."""
        recipe = self._recipe
        self._model.train()
        images = as_tensor(shifted(self._images, recipe.shift, self._generator))
        total = torch.zeros(())
        for rows in torch.randperm(len(images)).split(recipe.batch_size):
            logits = self._forward(self._batch(images[rows]))
            loss = functional.cross_entropy(logits, self._labels[rows], label_smoothing=recipe.label_smoothing)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._done += 1
            if self._schedule and self._done < recipe.num_steps:
                self._schedule.step()
            total += loss.detach() * len(rows)
        return float(total) / len(images)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Judges the network."""
        self._model.eval()
        right = 0
        with torch.inference_mode():
            for start in range(0, len(images), 1000):
                x = as_tensor(pixels(images[start : start + 1000]))
                right += int((self._model(self._batch(x)).argmax(1).numpy() == labels[start : start + 1000]).sum())
        return right / len(labels)

    def _batch(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self._layout)


if __name__ == "__main__":
    serve(PyTorch, ["torch"])
