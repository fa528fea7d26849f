"""Measures training by batch size, dtype, driver, devices and members: one JSON line each, and a plot at the end.

    python scripts/bench_accelerator.py --config=configs/three_conv_adam.py --batch_sizes=64,256,1024,4096

One call trains a full epoch on random pixels: shuffling, augmentation, gradients, optimiser, and metrics to the host.
Besides its time, each line has the compile time, the peak memory so far, the device's own matrix-product rate in that
dtype and the share of it that the network reaches (`flop_utilisation`), the speed of n devices relative to n times that
of one (`scaling_efficiency`), and the energy, if nvidia-smi reports the power. On GPUs with PyTorch installed, it also
measures the network in PyTorch, tuned as a user could: channels_last, bfloat16 or TF32, torch.compile, the step as a
CUDA graph, the data on the device. The PyTorch network has only convolutions, ReLU, max pooling and dense layers, so
use a `cnn` without batch norm and dropout. To try the script on a CPU, set
XLA_FLAGS=--xla_force_host_platform_device_count=4 and use small numbers.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from bench_steps import matmul_rate, random_examples, training_flops

from mnist_flax import cli
from mnist_flax.config import Config, replace
from mnist_flax.data.registry import IMAGE_SIZE

FLAGS = flags.FLAGS


class Program(NamedTuple):
    """A compiled and warm training function.

    Attributes:
      compile_seconds: the time to compile, including the first call.
      images: how many images one call trains on.
      steps: how many steps one call takes.
      call: trains, and returns when the device has finished.
    """

    compile_seconds: float
    images: int
    steps: int
    call: Callable[[], None]


def warm(started: float, images: int, steps: int, call: Callable[[], None]) -> Program:
    """Makes the first call, and counts all time since `started` as compile time."""
    call()
    return Program(time.perf_counter() - started, images, steps, call)


def run_program(config: Config, num_runs: int = 1) -> Program:
    """Compiles a driver for one run, or for several spread over the devices; a call trains one epoch of each."""
    from mnist_flax import drivers, rng

    rows = np.arange(config.num_train_rows, dtype=np.int32)
    seeds = range(config.seed, config.seed + num_runs)
    examples = random_examples(config.num_train_rows, config.num_classes)
    job = drivers.Job(config.program, seeds, [rows] * num_runs, examples, num_devices=config.train.num_devices)
    states = drivers.stack([drivers.jit_init_state(config.program, rng.root_key(seed)) for seed in seeds], job)
    started = time.perf_counter()
    advance = drivers.compile_driver(config.train.driver, job, states)

    def call() -> None:
        nonlocal states
        states, _ = advance(states, config.steps_per_epoch)

    return warm(started, config.num_train_rows * num_runs, config.steps_per_epoch, call)


def torch_program(config: Config) -> Program:
    """Builds a `cnn` in PyTorch, compiled, with the step captured in a CUDA graph; a call trains one epoch."""
    import torch
    from torch import nn

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    network: Any = config.model
    layers: list[Any] = []
    size, channels = IMAGE_SIZE, 1
    for block in network.blocks():
        padding = "same" if block.padding == "SAME" else 0
        layers += [nn.Conv2d(channels, block.width, block.kernel_size, block.stride, padding), nn.ReLU()]
        layers += [nn.MaxPool2d(block.pool)] * (block.pool > 1)
        size, channels = block.output_size(size), block.width
    layers.append(nn.Flatten())
    features = size**2 * channels
    for width in network.dense:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    model = nn.Sequential(*layers, nn.Linear(features, config.num_classes)).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), config.optimizer.learning_rate, fused=True, capturable=True)
    batch_size, num_steps = config.train.batch_size, config.num_train_rows // config.train.batch_size
    images, labels = (
        torch.from_numpy(column).cuda() for column in random_examples(config.num_train_rows, config.num_classes)
    )
    images, labels = images.permute(0, 3, 1, 2), labels.long()
    rows = torch.zeros(batch_size, dtype=torch.long, device="cuda")  # the input of the captured step
    started = time.perf_counter()
    forward = torch.compile(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
            pixels = (images[rows].float() / 255).contiguous(memory_format=torch.channels_last)
            logits = forward(pixels)
        nn.functional.cross_entropy(logits.float(), labels[rows]).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # PyTorch requires warm-up steps on a side stream before a capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def call() -> None:
        order = torch.randperm(len(labels), device="cuda")
        for i in range(num_steps):
            rows.copy_(order[i * batch_size : (i + 1) * batch_size])
            graph.replay()
        torch.cuda.synchronize()

    return warm(started, num_steps * batch_size, num_steps, call)


def best_matmul_rate(dtype: str) -> float:
    """Measures one device's matrix-product rate for a dtype, in FLOP/s: the best of five."""
    import jax

    measure = matmul_rate(512 if jax.default_backend() == "cpu" else 8192, dtype)
    return max(measure() for _ in range(5))


def peak_memory() -> int | None:
    """Returns the peak memory of any device so far, in bytes; None if no device reports it."""
    import jax

    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((count for count in told if count is not None), default=None)


@contextlib.contextmanager
def power() -> Iterator[list[float]]:
    """Samples the total power of all GPUs in watts while the context is open; no samples without nvidia-smi."""
    watts: list[float] = []
    if not shutil.which("nvidia-smi"):
        yield watts
        return
    done = threading.Event()
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]

    def sample() -> None:
        while not done.wait(0.1):
            told = subprocess.run(command, capture_output=True, text=True).stdout.split()
            with contextlib.suppress(ValueError):  # a device that does not report its power prints words instead
                watts.append(sum(map(float, told)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield watts
    finally:
        done.set()
        thread.join()


def measure(program: Program, config: Config, rate: float, num_devices: int) -> dict[str, Any]:
    """Times a program, and measures how well it uses its devices."""
    seconds = []
    with power() as watts:
        for _ in range(FLAGS.repeats):
            started = time.perf_counter()
            program.call()
            seconds.append(time.perf_counter() - started)
    speeds = [program.images / each for each in seconds]
    speed = statistics.median(speeds)
    return {
        "images_per_second_median": speed,
        "images_per_second": speeds,
        "ms_per_step": 1e3 * statistics.median(seconds) / program.steps,
        "compile_seconds": program.compile_seconds,
        "peak_memory_bytes": peak_memory(),
        "matmul_flops_per_second": rate,
        "flop_utilisation": speed * training_flops(config) / (rate * num_devices),
        "joules_per_1000_images": 1e3 * statistics.mean(watts) / speed if watts else None,
    }


def results(config: Config) -> Iterator[dict[str, Any]]:
    """Yields a result for each combination that the flags select."""
    import jax

    rates = {dtype: best_matmul_rate(dtype) for dtype in FLAGS.dtypes}
    first: dict[Any, float] = {}  # the speed on one device, keyed by all other settings
    counts = sorted(map(int, FLAGS.devices)) or [2**i for i in range(jax.device_count().bit_length())]
    kinds = [(driver, 1) for driver in FLAGS.drivers] + [("members", int(count)) for count in FLAGS.members]
    has_torch = jax.default_backend() == "gpu" and importlib.util.find_spec("torch") is not None
    for dtype, batch_size in itertools.product(FLAGS.dtypes, map(int, FLAGS.batch_sizes)):
        chosen = replace(config, model__dtype=dtype, train__batch_size=batch_size)
        chosen = replace(chosen, train__epochs=min(10**6, (2**31 - 1) // chosen.steps_per_epoch))
        for (kind, members), count in itertools.product(kinds, counts):
            print(f"{dtype}, batch {batch_size}, {kind}, {members} members, {count} devices ...", file=sys.stderr)
            sized = replace(chosen, train__num_devices=count)
            if kind == "members":
                program = run_program(sized, members * count)
            else:
                program = run_program(replace(sized, train__driver=kind))
            measured = measure(program, sized, rates[dtype], count)
            if FLAGS.profile:
                with jax.profiler.trace(FLAGS.profile):
                    program.call()
            speed = measured["images_per_second_median"]
            alone = first.setdefault((dtype, batch_size, kind, members), speed if count == 1 else float("nan"))
            yield {
                "kind": kind,
                "dtype": dtype,
                "batch_size": batch_size,
                "num_devices": count,
                "members_per_device": members,
                **measured,
                "scaling_efficiency": None if np.isnan(alone) else speed / (alone * count),
            }
        if has_torch:
            print(f"{dtype}, batch {batch_size}, PyTorch ...", file=sys.stderr)
            measured = measure(torch_program(chosen), chosen, rates[dtype], 1)
            yield {"kind": "pytorch", "dtype": dtype, "batch_size": batch_size, "num_devices": 1,
                   "members_per_device": 1, **measured, "scaling_efficiency": None}  # fmt: skip


def draw(lines: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Plots images/s against batch size, one curve for each setting."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = ("kind", "dtype", "num_devices", "members_per_device")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for way in dict.fromkeys(tuple(line[name] for name in names) for line in lines):
        points = sorted(
            (line["batch_size"], line["images_per_second_median"])
            for line in lines
            if tuple(line[name] for name in names) == way
        )
        kind, dtype, count, members = way
        label = f"{kind}, {dtype}, {count} device{'s' * (count > 1)}" + f", {members} members each" * (members > 1)
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images/s", title=lines[0]["device"])
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmarks and prints the results."""
    del argv
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    from mnist_flax.run.provenance import provenance

    config = replace(cli.config(), data__num_train=FLAGS.images, data__holdout=0)
    facts = {"model": config.to_dict()["model"], **cli.config_facts(), **provenance()}
    lines = []
    for line in results(config):
        lines.append(line | facts)
        print(json.dumps(lines[-1]), flush=True)
    if lines and FLAGS.picture:
        draw(lines, pathlib.Path(FLAGS.picture))
        print(f"picture: {FLAGS.picture}", file=sys.stderr)


if __name__ == "__main__":
    cli.define_config()
    cli.define_counts("batch_sizes", "64,256,1024", "train.batch_size, over all devices together")
    flags.DEFINE_list("dtypes", "float32,bfloat16", "model.dtype")
    flags.DEFINE_list("drivers", "scan,stream", "train.driver")
    cli.define_counts("devices", "", "train.num_devices; if not given, 1, 2, 4 and so on")
    cli.define_counts("members", "8", "members of a population on each device, each with that batch size")
    flags.DEFINE_integer("images", 60_000, "images per epoch; one call trains one epoch", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "how often each is timed", lower_bound=1)
    flags.DEFINE_string("picture", "bench_accelerator.png", "where the picture goes; empty means none")
    flags.DEFINE_string("profile", None, "a folder for a trace of one call each, for TensorBoard or ui.perfetto.dev")
    cli.run(main)
