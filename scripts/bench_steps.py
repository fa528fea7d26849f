"""Times steady-state training and prints one JSON line for each driver and batch size.

    python scripts/bench_steps.py --config=configs/three_conv_adam.py --batch_sizes=64,256

Each line has images/s (median and all repeats), this machine's f32 matrix-product rate, measured between the repeats,
and the share of it that the network reaches. FLOPs are counted as for plain convolutions on 28x28 pixels, whatever is
computed.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from mnist_flax import cli
from mnist_flax.config import Config, replace
from mnist_flax.data.registry import IMAGE_SIZE


def training_flops(config: Config) -> int:
    """Returns the FLOPs of the convolutions and matrix products in a training step, for one image.

    Three times the forward pass, less the gradient with respect to the pixels, which is not needed. This is the
    arithmetic of the network as it is written, on 28x28 pixels; training does less if it crops pixels that no logit
    depends on, uses Winograd's form, or has a fixed first layer.
    """
    import jax

    module = config.model.module(config.num_classes)
    pixels = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 1), "float32")
    flops = list(_product_flops(jax.make_jaxpr(module.init)(jax.random.key(0), pixels).jaxpr))
    return 3 * sum(flops) - flops[0]


def _product_flops(jaxpr: Any) -> Iterator[int]:
    """Yields the FLOPs of each convolution and matrix product, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            right, outputs = equation.invars[1].aval, equation.outvars[0].aval
            yield 2 * outputs.size * (right.size // right.shape[-1])
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _product_flops(inner)


def random_examples(count: int, num_classes: int) -> Any:
    """Returns random pictures and labels, `u8[N,28,28,1]`, `i32[N]`."""
    import numpy as np

    from mnist_flax.data.splits import Examples

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.uint8)
    return Examples(images, generator.integers(0, num_classes, count).astype(np.int32))


def matmul_rate(size: int = 1024, dtype: str = "float32") -> Callable[[], float]:
    """Returns a function that measures a device's square matrix products at JAX's default precision, in FLOP/s."""
    import jax
    import jax.numpy as jnp

    count = 20
    matrix = jnp.full((size, size), 1e-3, dtype)
    program = jax.jit(lambda a: jax.lax.fori_loop(0, count, lambda _, x: x @ a, a))
    program(matrix).block_until_ready()

    def measure() -> float:
        started = time.perf_counter()
        program(matrix).block_until_ready()
        return 2 * count * size**3 / (time.perf_counter() - started)

    return measure


def timed_steps(config: Config, num_steps: int) -> Callable[[], float]:
    """Compiles a driver on random pixels and returns a function that measures seconds per step."""
    import jax
    import numpy as np

    from mnist_flax import rng
    from mnist_flax.distillation import load_teacher
    from mnist_flax.drivers import Job, compile_driver, jit_init_state, stack

    examples = random_examples(config.num_train_rows, config.num_classes)
    teacher = load_teacher(config)
    rows = np.arange(config.num_train_rows, dtype=np.int32)
    job = Job(config.program, [config.seed], [rows], examples, teacher=teacher and teacher.arrays)
    states = stack([jit_init_state(config.program, rng.root_key(config.seed))], job)
    advance = compile_driver(config.train.driver, job, states)

    def measure() -> float:
        nonlocal states
        if int(states.step[0]) % config.steps_per_epoch + num_steps > config.steps_per_epoch:
            states = states.replace(step=jax.numpy.zeros_like(states.step))  # a call must not cross the end of an epoch
        started = time.perf_counter()
        states, _ = advance(states, num_steps)
        return (time.perf_counter() - started) / num_steps

    measure()
    return measure


def bench(config: Config, repeats: int) -> dict[str, Any]:
    """Measures one config, alternating with measurements of the machine's matrix-product rate."""
    from mnist_flax.run.provenance import provenance

    flops = training_flops(config)
    num_steps = min(config.steps_per_epoch, max(10, 10_000 // config.train.batch_size))
    rate, seconds = matmul_rate(), timed_steps(config, num_steps)
    rates, steps = [], []
    for _ in range(repeats):
        rates.append(rate())
        steps.append(seconds())
    speeds = [config.train.batch_size / step for step in steps]
    return {
        "driver": config.train.driver,
        "batch_size": config.train.batch_size,
        "images_per_second_median": statistics.median(speeds),
        "images_per_second": speeds,
        "epoch_seconds_median": config.num_train_rows / statistics.median(speeds),
        "matmul_flops_per_second_median": statistics.median(rates),
        "share_of_matmul_rate": statistics.median(
            speed * flops / rate for speed, rate in zip(speeds, rates, strict=True)
        ),
        "model": config.to_dict()["model"],
        **cli.config_facts(),
        **provenance(),
    }


def main(argv: Sequence[str]) -> None:
    """Benchmarks the drivers and batch sizes named by the flags."""
    del argv
    config = cli.config()
    for driver in flags.FLAGS.drivers:
        for batch_size in flags.FLAGS.batch_sizes:
            print(f"{driver}, batch {batch_size} ...", file=sys.stderr)
            chosen = replace(config, data__holdout=0, train__driver=driver, train__batch_size=int(batch_size))
            print(json.dumps(bench(chosen, flags.FLAGS.repeats)), flush=True)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_list("drivers", "scan,stream", "train.driver")
    cli.define_counts("batch_sizes", "64", "train.batch_size")
    flags.DEFINE_integer("repeats", 9, "how often each is timed", lower_bound=1)
    cli.run(main)
