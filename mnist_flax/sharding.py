"""Where arrays live: on a mesh of devices, over which a batch is split, and on each of which is all the rest.

The steps know nothing of it. XLA makes a program of them for many devices, sums of gradients included, out of where
their arguments lie; with one device it is the program that it always was. Several processes see one mesh, each holds
its own part of it, and all must make the same calls in the same order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnist_flax.errors import ConfigError

AXIS = "data"  # of the mesh: examples of a batch, or members of a population


def make_mesh(num_devices: int = 0) -> Mesh:
    """Returns the devices to compute on, the same number of each process, in the order of the processes.

    Args:
      num_devices: of all processes together; 0 means all accelerators there are, and of a CPU, whose devices share its
        cores, one in each process.

    Raises:
      ConfigError: there are not as many, or the processes cannot share them evenly.
    """
    devices, num_processes = jax.devices(), jax.process_count()
    default = num_processes if devices[0].platform == "cpu" else len(devices)
    count = num_devices or default
    if count > len(devices):
        raise ConfigError(
            f"config.train.num_devices = {num_devices}: there are only {len(devices)} here; use at most as many, or 0"
            " for all"
        )
    if count % num_processes:
        raise ConfigError(
            f"config.train.num_devices = {num_devices}: must be a multiple of the number of processes, {num_processes}"
        )
    own = [[device for device in devices if device.process_index == index] for index in range(num_processes)]
    return Mesh(np.array([device for part in own for device in part[: count // num_processes]]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the placement of what is on every device, whole."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the placement of what is split along one axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Checks that a batch can be split evenly over the devices.

    Raises:
      ConfigError: it cannot; the message names the nearest sizes that can.
    """
    below = batch_size // mesh.size * mesh.size
    if below != batch_size:
        nearest = " or ".join(str(size) for size in (below, below + mesh.size) if size)
        raise ConfigError(
            f"config.train.batch_size = {batch_size}: cannot be split evenly over {mesh.size} devices; use {nearest},"
            " or another config.train.num_devices"
        )


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts arrays, the same ones in every process, where a sharding says; those that are there already stay."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _place_own_part(leaf, sharding), tree)


def _place_own_part(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts this process's part of an array on its devices, without a word to the other processes."""
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place_own_part(jax.random.key_data(leaf), sharding))
    on_host = np.asarray(jax.device_get(leaf))
    with jax.transfer_guard("allow"):  # JAX does not count this as the explicit transfer that it is
        return jax.make_array_from_callback(on_host.shape, sharding, lambda index: on_host[index])


def own_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """Returns which rows of a batch this process's devices hold: neighbours, for so the mesh is ordered."""
    parts: Any = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [rows.indices(batch_size) for (rows,) in parts]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def place_rows(tree: Any, sharding: NamedSharding, batch_size: int) -> Any:
    """Puts this process's rows, as `own_rows` says, on its devices: with those of the others they are the batch."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    with jax.transfer_guard("allow"):  # as above
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:])), tree
        )


def gather(tree: Any) -> Any:
    """Brings arrays to the host, whole, wherever their parts lie."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
