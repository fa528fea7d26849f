"""Serialises a predictor as StableHLO with `jax.export`, and loads such files as functions."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mnist_flax.analysis.evaluation import Predictor
from mnist_flax.errors import reason
from mnist_flax.exporting.graph import IMAGE_SHAPE, ExportError
from mnist_flax.exporting.inference import in_float32, logits_of

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(predictor: Predictor) -> bytes:
    """Returns a serialised program for any number of images on any of `PLATFORMS`.

    Raises:
      ExportError: the network cannot be traced with an unknown number of images.
    """
    exact = in_float32(predictor)

    def outputs(images: jax.Array) -> dict[str, jax.Array]:
        logits = logits_of(exact, exact.members, images)
        return {"logits": logits, "probabilities": jax.nn.softmax(logits)}

    (batch,) = export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, *IMAGE_SHAPE), jnp.uint8)
    try:
        exported = export.export(jax.jit(outputs), platforms=PLATFORMS)(images)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        raise ExportError(
            f"the network cannot be traced for any number of images ({reason(error)}); use x.shape[0] rather than"
            " len(x), and let no size depend on the batch"
        ) from error
    return bytes(exported.serialize())


def load_stablehlo(path: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Loads a serialised program and compiles it for the current device."""
    call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: jax.device_get(call(images))
