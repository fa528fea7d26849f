"""The recipe in PyTorch: like its tutorials, but tuned, with all data in memory, fused Adam, no sync in the loop.

python -m scripts.peers.pytorch --variant=eager|channels_last|compiled ...
"""

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.peers.harness import Examples, Recipe, pixels, serve, shifted


class Block(nn.Module):
    """A residual block with pre-activation (He et al., 2016)."""

    def __init__(self, channels: int, width: int, first: bool) -> None:
        super().__init__()
        self._first_norm, self._second_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self._first = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self._second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self._pool = nn.MaxPool2d(2) if first else nn.Identity()
        self._shortcut = nn.Conv2d(channels, width, 1, bias=False) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps `f32[B,C,H,W] -> f32[B,width,H',W']`."""
        y = functional.relu(self._pool(self._first_norm(x)), inplace=True)
        shortcut = self._shortcut(y) if self._shortcut else x
        y = functional.relu(self._second_norm(self._first(y)), inplace=True)
        return shortcut + self._second(y)


def resnet(model: dict[str, Any]) -> list[nn.Module]:
    """Returns the layers of a `resnet`."""
    channels = model["stem_width"]
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, 1, 1, bias=False)]
    for width in model["widths"]:
        for block in range(model["blocks"]):
            layers.append(Block(channels, width, first=block == 0))
            channels = width
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [*layers, nn.Dropout(model["dropout"]), nn.Linear(channels, 10)]


def cnn(recipe: Recipe) -> list[nn.Module]:
    """Returns the layers of a `cnn`; pooling before the ReLU is faster and gives the same result."""
    model, channels, size = recipe.model, 1, 28
    layers: list[nn.Module] = []
    for width, kernel, stride, padding, pool in recipe.blocks():
        pad = kernel // 2 if padding == "SAME" else 0
        layers.append(nn.Conv2d(channels, width, kernel, stride, pad, bias=not model["batch_norm"]))
        layers += [nn.BatchNorm2d(width)] if model["batch_norm"] else []
        layers += [nn.MaxPool2d(pool)] if pool > 1 else []
        layers += [nn.ReLU(inplace=True), *([nn.Dropout(model["conv_dropout"])] if model["conv_dropout"] else [])]
        channels, size = width, ((size + 2 * pad - kernel) // stride + 1) // pool
    layers.append(nn.Flatten())
    features = channels * size**2
    for width in model["dense"]:
        layers.append(nn.Linear(features, width, bias=not model["batch_norm"]))
        layers += [nn.BatchNorm1d(width)] if model["batch_norm"] else []
        layers.append(nn.ReLU(inplace=True))
        features = width
    return [*layers, *([nn.Dropout(model["dropout"])] if model["dropout"] else []), nn.Linear(features, 10)]


def network(recipe: Recipe) -> nn.Sequential:
    """Returns the network of a config."""
    model = nn.Sequential(*(resnet(recipe.model) if recipe.model["name"] == "resnet" else cnn(recipe)))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if recipe.he_init:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def distorted(images: Tensor, augment: dict[str, Any]) -> Tensor:
    """Rotates, scales and shears each image of a batch at random: `f32[B,1,28,28] -> f32[B,1,28,28]`."""
    rotate, scale, shear = (augment.get(name, 0) for name in ("rotate", "scale", "shear"))
    if not (rotate or scale or shear):
        return images
    angle, size, slant = torch.rand(3, len(images)) * 2 - 1
    angle, size, slant = torch.deg2rad(angle * rotate), 1 + size * scale, torch.tan(torch.deg2rad(slant * shear))
    cos, sin, zero = torch.cos(angle) / size, torch.sin(angle) / size, torch.zeros(len(images))
    places = torch.stack([cos, cos * slant + sin, zero, -sin, cos - sin * slant, zero], 1).reshape(-1, 2, 3)
    grid = functional.affine_grid(places, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def as_tensor(images: np.ndarray) -> Tensor:
    """Converts images to a tensor in the default layout: `f32[N,28,28,1] -> f32[N,1,28,28]`."""
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
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)  # without decay, this is Adam
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
        # The last batch is smaller; compiling for both sizes is faster than compiling for dynamic shapes.
        self._forward = torch.compile(self._model, dynamic=False) if given.variant == "compiled" else self._model
        self._done = 0

    def epoch(self) -> float:
        """Trains one epoch."""
        recipe = self._recipe
        self._model.train()
        images = as_tensor(shifted(self._images, recipe.shift, self._generator))
        total = torch.zeros(())
        for rows in torch.randperm(len(images)).split(recipe.batch_size):
            logits = self._forward(self._batch(distorted(images[rows], recipe.augment)))
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
        """Computes the accuracy."""
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
