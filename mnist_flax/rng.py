"""Derives the PRNG keys of a run.

Every random number in a run is a function of the run's root key, a name for its purpose, and indices such as the step
or the epoch. No random state is carried from step to step, so none needs to be saved.
"""

import zlib

import jax
from jax import Array


def root_key(seed: int) -> Array:
    """Returns the key from which all others of a run with this seed are derived."""
    return jax.random.key(seed, impl="threefry2x32")  # JAX's default, which an environment variable could change


def stream(key: Array, name: str, *indices: Array | int) -> Array:
    """Returns the key for one purpose at one point of the run, independent of all other names and indices.

    `key` is the run's root key, or one derived from it; `name` the purpose, such as "dropout"; `indices` the epoch or
    step, in 32 bits.
    """
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def per_example(key: Array, batch_size: int) -> Array:
    """Returns `key[B]`, one key for each position in a batch.

    An example's random numbers then depend only on its position, not on how the batch is split over devices
    (jax issue 40232).
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jax.numpy.arange(batch_size))
