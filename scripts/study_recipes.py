"""Compares training recipes on rows held out of the training set, in PyTorch on one thread; never reads the test set.

The search needs many short runs of very different networks rather than exact reproducibility, so it uses PyTorch, not
this package. Each finished run appends one JSON line with its recipe, hold-out accuracy, loss and CPU time.

    OMP_NUM_THREADS=1 python scripts/study_recipes.py --data=DIR --jobs=jobs.jsonl --output=scripts/results/study.jsonl

A job is a JSON object whose keys override `DEFAULTS`. A network is a comma-separated list of layers: `c5x32` is a 5x5
convolution to 32 channels with batch norm and ReLU (suffix `v`: VALID padding, `s`: stride 2), `r3x64` the same with a
residual connection, `p` 2x2 max pooling, `g` global average pooling, `m` global max pooling, `f` flatten, `d256` a
dense layer with batch norm and ReLU, `x0.2` dropout. Dropout at rate `dropout` and the classifier come last.
"""

import argparse
import gzip
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULTS: dict[str, Any] = {
    "net": "c5x32,p,c3x64,c3x64,p,c3x128,f",
    "dropout": 0.4,
    "epochs": 6,
    "batch": 128,
    "optimizer": "adamw",
    "lr": 5e-3,
    "wd": 1e-2,
    "muon_lr": 0.02,
    "peak": 0.25,
    "smoothing": 0.0,
    "shift": 2,
    "rotate": 10.0,
    "scale": 0.1,
    "shear": 5.0,
    "elastic": 0.0,
    "grid": 4,
    "stroke": 0.0,
    "erase": 0,
    "ema": 0.0,
    "seed": 0,
    "train": 50_000,
    "holdout": 10_000,
    "bf16": False,
}


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """Loads the 60,000 training images and labels."""
    images = np.frombuffer(gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return torch.tensor(images.reshape(-1, 1, 28, 28)), torch.tensor(labels).long()


class Residual(nn.Module):
    """Adds a block's input to its output."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block and adds its input."""
        return x + self.block(x)


def network(spec: str, dropout: float, classes: int = 10) -> nn.Sequential:
    """Builds the network; a forward pass on zeros infers the input sizes of the dense layers."""
    layers: list[nn.Module] = []
    width, x = 1, torch.zeros(2, 1, 28, 28)
    for part in spec.split(","):
        added: list[nn.Module]
        if match := re.fullmatch(r"([cr])(\d)x(\d+)([vs]*)", part):
            kind, size, out, flags = match[1], int(match[2]), int(match[3]), match[4]
            padding = 0 if "v" in flags else size // 2
            conv = nn.Conv2d(width, out, size, 2 if "s" in flags else 1, padding, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            block = [conv, nn.BatchNorm2d(out, momentum=0.1), nn.ReLU()]
            added = [Residual(nn.Sequential(*block))] if kind == "r" else block
            width = out
        elif part == "p":
            added = [nn.MaxPool2d(2)]
        elif part == "g":
            added = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        elif part == "m":
            added = [nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        elif part == "f":
            added = [nn.Flatten()]
        elif part[0] == "x":
            added = [nn.Dropout(float(part[1:]))]
        elif part[0] == "d":
            out = int(part[1:])
            added = [nn.Linear(x.shape[1], out, bias=False), nn.BatchNorm1d(out), nn.ReLU()]
        else:
            raise ValueError(part)
        for layer in added:
            x = layer(x)
        layers += added
    layers += [nn.Dropout(dropout), nn.Linear(x.shape[1], classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.reset_running_stats()
    return model.to(memory_format=torch.channels_last)


def augment(job: dict[str, Any], images: Tensor) -> Tensor:
    """Applies all geometric distortions in one resampling, then changes the stroke width and erases a square."""
    count = len(images)
    angle = torch.deg2rad((torch.rand(count) * 2 - 1) * job["rotate"])
    size = 1 + (torch.rand(count) * 2 - 1) * job["scale"]
    shear = torch.tan(torch.deg2rad((torch.rand(count) * 2 - 1) * job["shear"]))
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    shift = torch.randint(-job["shift"], job["shift"] + 1, (2, count)) / 14.0
    rows = [torch.stack([cos, cos * shear - sin, shift[0]], -1), torch.stack([sin, sin * shear + cos, shift[1]], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, 28, 28], align_corners=False)
    if job["elastic"]:
        field = torch.randn(count, 2, job["grid"], job["grid"]) * job["elastic"] / 14.0
        grid = grid + F.interpolate(field, size=28, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    if job["stroke"]:
        amount = ((torch.rand(count) * 2 - 1) * job["stroke"])[:, None, None, None]
        thicker, thinner = F.max_pool2d(images, 3, 1, 1), -F.max_pool2d(-images, 3, 1, 1)
        images = images + amount.clamp(min=0) * (thicker - images) + (-amount).clamp(min=0) * (thinner - images)
    if job["erase"]:
        corner = torch.randint(0, 28, (2, count, 1)) - job["erase"] // 2
        inside = (torch.arange(28) >= corner) & (torch.arange(28) < corner + job["erase"])
        images = images * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    return images


def orthogonalized(update: Tensor) -> Tensor:
    """Brings the singular values of each matrix close to 1 with five Newton-Schulz steps (Jordan et al., 2024)."""
    x = update.reshape(len(update), -1)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if tall else x
    return (x * max(1.0, x.shape[0] / x.shape[1]) ** 0.5).reshape(update.shape)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum 0.95 and decoupled weight decay."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Applies one update."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(0.95).add_(p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalized(p.grad + 0.95 * buffer), alpha=-group["lr"])


def one_cycle(progress: float, peak: float) -> float:
    """Returns the learning rate as a fraction of its maximum: a cosine from 1/25 to 1, then a cosine to 0.

    Args:
      progress: the fraction of training done.
      peak: the progress at which the maximum is reached.
    """
    if progress < peak:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / peak)) / 2
    return (1 + math.cos(math.pi * (progress - peak) / (1 - peak))) / 2


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, views: bool) -> Tensor:
    """Returns the logits; with `views`, averaged over each image and its four one-pixel shifts."""
    model.eval()
    shifts = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)] if views else [(0, 0)]
    parts = [torch.stack([model(torch.roll(x, s, (2, 3))) for s in shifts]).mean(0) for x in images.split(500)]
    return torch.cat(parts).float()


def score(values: Tensor, labels: Tensor) -> dict[str, float]:
    """Computes errors, accuracy in % and loss from logits, and the loss after temperature scaling.

    The temperature is fitted on each half of the rows and applied to the other half.
    """
    losses = {t: F.cross_entropy(values / t, labels, reduction="none") for t in np.arange(0.3, 2.01, 0.05)}
    halves = [slice(0, None, 2), slice(1, None, 2)]
    fitted = [min(losses, key=lambda t: losses[t][half].mean().item()) for half in halves]
    crossed = sum(losses[fitted[0]][halves[1]]) + sum(losses[fitted[1]][halves[0]])
    wrong = int((values.argmax(1) != labels).sum())
    return {
        "errors": wrong,
        "accuracy": round(100 - 100 * wrong / len(labels), 3),
        "nll": round(F.cross_entropy(values, labels).item(), 5),
        "nll_scaled": round(float(crossed) / len(labels), 5),
        "temperature": round(float(np.mean(fitted)), 3),
    }


def run(job: dict[str, Any], images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Trains one recipe and scores it on its held-out rows."""
    split = torch.from_numpy(np.random.default_rng(15).permutation(len(images)))
    held, rows = split[: job["holdout"]], split[len(split) - job["train"] :]
    torch.manual_seed(job["seed"])
    mean, std = 0.1307, 0.3081
    model = network(job["net"], job["dropout"])
    kernels = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    convs = [p for p in kernels if p.ndim == 4 and job["optimizer"] == "muon"]
    others = [p for p in kernels if not any(p is c for c in convs)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": others, "weight_decay": job["wd"]}, {"params": rest, "weight_decay": 0.0}],
            lr=job["lr"],
            fused=True,
        )
    ]
    if convs:
        optimizers.append(Muon(convs, job["muon_lr"], job["wd"]))
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(job["ema"] or 0.99), use_buffers=True
    )
    steps_per_epoch = job["train"] // job["batch"]
    total, step = job["epochs"] * steps_per_epoch, 0
    started, cpu = time.time(), time.process_time()
    for _ in range(job["epochs"]):
        order = rows[torch.randperm(len(rows))]
        model.train()
        for part in order[: steps_per_epoch * job["batch"]].split(job["batch"]):
            for o, peak in zip(optimizers, peaks, strict=True):
                for group, lr in zip(o.param_groups, peak, strict=True):
                    group["lr"] = lr * one_cycle(step / total, job["peak"])
            x = (augment(job, images[part].float() / 255) - mean) / std
            with torch.autocast("cpu", torch.bfloat16, enabled=job["bf16"]):
                values = model(x.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(values.float(), labels[part], label_smoothing=job["smoothing"])
            for o in optimizers:
                o.zero_grad()
            loss.backward()
            for o in optimizers:
                o.step()
            if job["ema"]:
                average.update_parameters(model)
            step += 1
    seconds, cpu_seconds = time.time() - started, time.process_time() - cpu
    x, y = (images[held].float() / 255 - mean) / std, labels[held]
    result = {
        **{k: v for k, v in job.items() if DEFAULTS.get(k) != v or k in ("net", "seed", "epochs")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "one": score(logits(model, x, False), y),
        "five": score(logits(model, x, True), y),
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
    }
    if job["ema"]:
        result["averaged"] = score(logits(average, x, True), y)
    return result


def main() -> None:
    """Runs those jobs in a file that no other process has claimed; the file may grow in the meantime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the official IDX files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = load(args.data)
    done: set[str] = set()
    while todo := [line for line in args.jobs.read_text().splitlines() if line.strip() and line not in done]:
        done.add(todo[0])
        claim = args.jobs.with_suffix(".claims")
        claim.touch()
        if todo[0] in claim.read_text().splitlines():
            continue
        with claim.open("a") as file:
            file.write(todo[0] + "\n")
        result = run({**DEFAULTS, **json.loads(todo[0])}, images, labels)
        with args.output.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
