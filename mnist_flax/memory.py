"""Estimates the least memory that a run needs and, before anything is allocated, rejects a run that cannot fit."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from mnist_flax import sharding
from mnist_flax.config import Config, Program
from mnist_flax.data.registry import DATASETS, IMAGE_SIZE
from mnist_flax.errors import ConfigError
from mnist_flax.step import Teacher, TrainState, eval_variables, forward, state_shapes

HARMLESS_BATCH, HARMLESS_LAYER = 4096, 256  # the check is skipped up to these sizes, which saves 0.1 s of tracing
PRODUCTS = ("conv_general_dilated", "dot_general")


def check_memory(config: Config, teacher: Teacher | None = None) -> None:
    """Checks that weights, a training batch and an evaluation batch can fit into memory; nothing is allocated.

    The estimates are lower bounds, so a run that passes can still run out of memory. They are per device or, on CPUs,
    per process, because the devices of a CPU share its memory.

    Raises:
      ConfigError: one of them cannot fit.
    """
    layers = [size for size in jax.tree.leaves(dataclasses.astuple(config.model)) if type(size) is int]
    is_small_batch = max(config.train.batch_size, config.eval.batch_size) <= HARMLESS_BATCH
    if teacher is None and is_small_batch and max(layers, default=0) <= HARMLESS_LAYER:
        return
    available, dataset = available_bytes(), DATASETS[config.data.name]
    mesh = sharding.make_mesh(config.train.num_devices)
    num_parts = jax.process_count() if jax.default_backend() == "cpu" else mesh.size  # of a batch
    state = state_shapes(config.program)
    weights = sum(_num_bytes(leaf) for leaf in jax.tree.leaves(state))
    outputs = list(_product_bytes(config.program, state))  # of one image, in the order of the layers
    # The backward pass needs every layer's output for the whole batch.
    training = weights + sum(_num_bytes(leaf) for leaf in jax.tree.leaves(teacher))
    training += config.train.batch_size // num_parts * sum(outputs)
    largest = max(dataset.num_test, config.num_holdout_rows)  # batches are cut to the number of images
    evaluation = min(config.eval.batch_size, largest) // num_parts * max(outputs, default=0)
    for subject, needed in [
        (f"config.model: {config.model}: its weights and their optimizer state need", weights),
        (f"config.train.batch_size = {config.train.batch_size}: a training step needs at least", training),
        (f"config.eval.batch_size = {config.eval.batch_size}: an evaluation needs at least", evaluation),
    ]:
        if needed > available:
            readable = [f"{size / 2**30:,.1f} GiB" for size in (needed, available)]
            raise ConfigError(f"{subject} {readable[0]}, but there are {readable[1]}; make it smaller")


def _product_bytes(program: Program, state: TrainState) -> Iterator[int]:
    """Yields the output size, in bytes, of each convolution and matrix product for one image."""
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 1), np.uint8)

    def products(jaxpr: Any) -> Iterator[int]:
        for equation in jaxpr.eqns:
            if equation.primitive.name in PRODUCTS:
                yield sum(_num_bytes(variable.aval) for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from products(inner)

    traced = jax.make_jaxpr(lambda variables, images: forward(program, variables, images))
    yield from products(traced(eval_variables(state), image).jaxpr)


def _num_bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def available_bytes() -> int:
    """Returns the memory of the first device in bytes; on a CPU, the memory of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
