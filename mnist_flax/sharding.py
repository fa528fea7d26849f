"""Places arrays on a mesh of devices: batches are split over the devices, everything else is replicated.

The steps do not depend on the devices. XLA compiles them for many devices, including the all-reduce of the gradients,
according to the sharding of their arguments; with one device, the program does not change. Several processes share one
mesh: each holds its own part of it, and all must make the same calls in the same order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnist_flax.errors import ConfigError

AXIS = "data"  # the mesh axis: examples of a batch, or members of a population


def make_mesh(num_devices: int = 0) -> Mesh:
    """Returns a mesh of `num_devices` in total, an equal number from each process, ordered by process.

    0 means all accelerators or, on CPUs, one device in each process, because the devices of a CPU share its cores.

    Raises:
      ConfigError: there are fewer devices, or the processes cannot share them evenly.
    """
    devices, num_processes = jax.devices(), jax.process_count()
    default = num_processes if devices[0].platform == "cpu" else len(devices)
    count = num_devices or default
    if count > len(devices):
        raise ConfigError(
            f"config.train.num_devices = {num_devices}: there are only {len(devices)} here; use at most as many, or 0"
            " for the default"
        )
    own = [[device for device in devices if device.process_index == index] for index in range(num_processes)]
    share, rest = divmod(count, num_processes)
    if rest or share > min(map(len, own)):
        raise ConfigError(
            f"config.train.num_devices = {num_devices}: {count} devices cannot be shared evenly by the processes, which"
            f" have {', '.join(str(len(part)) for part in own)}; use a multiple of {num_processes} that each can share"
        )
    return Mesh(np.array([device for part in own for device in part[:share]]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of arrays that are split along one axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Places arrays that are identical in every process; arrays that already have this sharding are not moved."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _place_own_part(leaf, sharding), tree)


def _place_own_part(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts this process's part of an array on its devices, without communication between processes."""
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place_own_part(jax.random.key_data(leaf), sharding))
    on_host = np.asarray(jax.device_get(leaf))
    with jax.transfer_guard("allow"):  # JAX does not recognise this as an explicit transfer
        return jax.make_array_from_callback(on_host.shape, sharding, lambda index: on_host[index])


def own_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """Returns the rows of a batch that this process's devices hold; they are contiguous because of the mesh's order."""
    parts: Any = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [rows.indices(batch_size) for (rows,) in parts]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def place_rows(tree: Any, sharding: NamedSharding) -> Any:
    """Puts this process's rows (`own_rows`) on its devices; the rows of all processes together make the batch."""
    with jax.transfer_guard("allow"):  # as in `_place_own_part`
        return jax.make_array_from_process_local_data(sharding, tree)


def gather(tree: Any) -> Any:
    """Copies whole arrays to the host, wherever their shards are."""
    return multihost_utils.process_allgather(tree, tiled=True)
