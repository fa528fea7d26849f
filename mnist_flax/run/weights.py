"""Saves the trained weights in a file that can be read without JAX or Flax."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mnist_flax.config import Config
from mnist_flax.run import workdir as workdirs


def save_weights(config: Config, workdir: pathlib.Path, variables: Mapping[str, Any]) -> None:
    """Writes the variables of `forward` to `weights.safetensors`.

    Tensors are named by their path, such as `params/Conv_0/kernel`; the metadata contains the config as JSON.

    Raises:
      WorkdirError: the file cannot be written.
    """
    from safetensors.numpy import save

    by_path = jax.tree_util.tree_leaves_with_path(jax.device_get(dict(variables)))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in by_path]
    arrays = {name: np.asarray(leaf, order="C") for name, (_, leaf) in zip(names, by_path, strict=True)}
    workdirs.write_bytes(workdir / workdirs.WEIGHTS, save(arrays, metadata={"config": json.dumps(config.to_dict())}))
