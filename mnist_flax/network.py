"""Initialises the network of a program, and checks that the rest of the package can use it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mnist_flax import external, rng
from mnist_flax.config import Program
from mnist_flax.data.registry import IMAGE_SIZE
from mnist_flax.errors import ConfigError


def init_variables(program: Program, key: Array) -> dict[str, Any]:
    """Draws the initial variables of the network.

    Raises:
      ConfigError: the network does not return one logit for each class, has no weights, empty ones, or variables in
        other collections, or, if it comes from outside the package, raises an error.
    """
    family = type(program.model)
    with external.naming_the_line(f"config.model: the network of {family.__name__}", family.module, family):
        made: Any = program.model.module(program.num_classes).init_with_output(
            key, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 1))
        )
        logits, variables = made
        _check_logits(program, logits, 1)
        variables = {name: tree for name, tree in variables.items() if name != "losses"}  # penalties are no variables
        if others := variables.keys() - {"params", "batch_stats"}:
            raise ConfigError(
                f"config.model: the network of {family.__name__} keeps variables in {min(others)!r};"
                " only 'params' and 'batch_stats' are kept from step to step"
            )
        if not variables.get("params"):
            raise ConfigError(f"config.model: the network of {family.__name__} has no weights to train")
        for path, leaf in jax.tree.leaves_with_path(variables):
            if not leaf.size:
                name = jax.tree_util.keystr(path)
                raise ConfigError(f"config.model: the network of {family.__name__} has an empty variable: {name}")
        if external.is_external(family):
            # Some mistakes, such as a missing axis, show only with several images.
            _check_logits(program, jax.eval_shape(lambda: _train_logits(program, variables, 3)), 3)
    return variables


def _train_logits(program: Program, variables: Any, count: int) -> Any:
    """Applies the network in training mode to blank images and a mask."""
    size = program.model.seen_size(IMAGE_SIZE)
    images, mask = jnp.zeros((count, size, size, 1)), jnp.ones(count, bool)
    module, rngs = program.model.module(program.num_classes, train=True), {"dropout": rng.root_key(0)}
    return module.apply(variables, images, mask, rngs=rngs, mutable=["batch_stats"])[0]


def _check_logits(program: Program, logits: Any, count: int) -> None:
    """Checks the type and the shape of a network's logits for `count` images."""
    found = f"an array of shape {logits.shape}" if hasattr(logits, "shape") else f"a {type(logits).__name__}"
    if not hasattr(logits, "shape") or logits.shape != (count, program.num_classes):
        raise ConfigError(
            f"config.model: the network of {type(program.model).__name__} returns {found} for"
            f" {'one image' if count == 1 else f'{count} images'}; it must return one logit for each of the"
            f" {program.num_classes} classes"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ConfigError(
            f"config.model: the network of {type(program.model).__name__} returns logits of type {logits.dtype};"
            " return floats"
        )
