"""Compiles training steps and feeds them to the device: the only module that jits training.

A driver advances M runs of one program together, M >= 1: `advance(states, num_steps) -> (states, metrics)`. The states
have a leading axis M and are all at the same step; the metrics are on the host, `[M, num_steps]`. `state.step` alone
determines where a run is in its epoch.

`scan` keeps the data on the device and runs many steps per call. `stream` sends one batch per call from the host, so
the data need not fit on the device. Both train on the same batches.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnist_flax import rng, sharding
from mnist_flax.config import Program
from mnist_flax.data import batches
from mnist_flax.data.splits import Examples
from mnist_flax.errors import ConfigError
from mnist_flax.step import Teacher, TrainState, forward, init_state, train_step, train_steps

Advance = Callable[[TrainState, int], tuple[TrainState, dict[str, np.ndarray]]]

# `init_state` runs once, so compile time matters most: without optimisation it is 0.5 s instead of 3 s, and the call
# still takes only 10 ms.
jit_init_state = jax.jit(init_state, static_argnames="program", compiler_options={"xla_backend_optimization_level": 0})

jit_forward = jax.jit(forward, static_argnames="program")


class Job(NamedTuple):
    """M runs of one program, their data, and their teacher, if they have one.

    Each run has its own seed and its own training rows, `i32[R]`: row numbers of the shared `examples`, which are on
    the host. `num_devices` and `epochs_per_dispatch` are as in `TrainConfig`.
    """

    program: Program
    seeds: Sequence[int]
    rows: Sequence[np.ndarray]
    examples: Examples
    num_devices: int = 0
    epochs_per_dispatch: int = 0
    teacher: Teacher | None = None

    @property
    def mesh(self) -> Mesh:
        """The devices to train on; see `job_mesh`."""
        return job_mesh(self.program, len(self.seeds), self.num_devices)


def job_mesh(program: Program, num_runs: int, num_devices: int) -> Mesh:
    """Returns the mesh to train on: it splits the batches of a single run, or gives each device a share of the runs.

    Several runs use the largest number of devices that divides their number.

    Raises:
      ConfigError: there are too few devices, or a batch cannot be split evenly over them.
    """
    mesh = sharding.make_mesh(num_devices)
    if num_runs > 1:
        return sharding.make_mesh(max(count for count in range(1, mesh.size + 1) if num_runs % count == 0))
    below = program.batch_size // mesh.size * mesh.size
    if below != program.batch_size:
        nearest = " or ".join(str(size) for size in (below, below + mesh.size) if size)
        raise ConfigError(
            f"config.train.batch_size = {program.batch_size}: cannot be split evenly over {mesh.size} devices; use"
            f" {nearest}, or another config.train.num_devices"
        )
    return mesh


def stack(states: Sequence[TrainState], job: Job) -> TrainState:
    """Stacks the states of M runs and places them on the job's devices."""
    # Stacked with NumPy, because JAX would compile a program for each shape.
    stacked: TrainState = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(list(states)))
    return sharding.place(stacked, _run_sharding(job.mesh, len(states)))


def _run_sharding(mesh: Mesh, num_runs: int) -> NamedSharding:
    return sharding.replicated(mesh) if num_runs == 1 else sharding.split(mesh)


def runs_take_turns() -> bool:
    """Returns whether a device trains its runs one after another instead of all at once; this is faster on a CPU."""
    return jax.default_backend() == "cpu"


def over_runs(steps: Callable[..., Any], mesh: Mesh, num_runs: int) -> Callable[..., Any]:
    """Maps `steps(state, order, key, examples, teacher, num_steps)` over the leading axis M of the first three.

    With `lax.map`, the results are bitwise identical to those of separate runs; with `vmap`, they agree up to rounding.
    """
    if num_runs == 1:

        def single(states: TrainState, orders: Array, keys: Array, *rest: Any) -> Any:
            first = jax.tree.map(lambda leaf: leaf[0], (states, orders, keys))
            return jax.tree.map(lambda leaf: leaf[None], steps(*first, *rest))

        return single

    own, whole = PartitionSpec(sharding.AXIS), PartitionSpec()

    # Runs do not communicate. shard_map gives each device its own runs, so XLA does not have to work out the split.
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(own, own, own, whole, whole, whole), out_specs=own, check_vma=False
    )
    def on_device(states: TrainState, orders: Array, keys: Array, *rest: Any) -> Any:
        def one(run: tuple[TrainState, Array, Array]) -> Any:
            return steps(*run, *rest)

        runs = (states, orders, keys)
        return jax.lax.map(one, runs) if runs_take_turns() else jax.vmap(one)(runs)

    return on_device


def steps_per_order(num_steps: int, steps_per_epoch: int, epochs_per_dispatch: int) -> int:
    """Returns the number of steps in one `order`: it holds whole epochs, and a call trains at most one order."""
    return min(max(1, epochs_per_dispatch) * steps_per_epoch, num_steps)


@functools.lru_cache(maxsize=8)
def _jit_scan(program: Program, mesh: Mesh, num_runs: int) -> jax.stages.Wrapped:
    """Returns the jitted loop of steps; it is kept, because tracing it takes longer than a short run."""

    def steps(
        state: TrainState, order: Array, key: Array, examples: Examples, teacher: Teacher | None, num_steps: Array
    ) -> Any:
        return train_steps(program, state, examples, order, key, num_steps, teacher)

    out_shardings = _run_sharding(mesh, num_runs)
    return jax.jit(over_runs(steps, mesh, num_runs), donate_argnums=0, out_shardings=out_shardings)


def scan_steps(job: Job, states: TrainState) -> Advance:
    """Compiles a loop of steps on the device; each call takes its batches from one `order` of whole epochs."""
    program, num_runs = job.program, len(job.seeds)
    mesh = job.mesh
    everywhere, by_run = sharding.replicated(mesh), _run_sharding(mesh, num_runs)
    # Orders are [M,S,B]: a single run is split along the batch, several along the runs.
    by_order = sharding.split(mesh, axis=2) if num_runs == 1 else by_run
    length = steps_per_order(program.num_steps, program.steps_per_epoch, job.epochs_per_dispatch)
    num_epochs = length // program.steps_per_epoch
    root_keys = [rng.root_key(seed) for seed in job.seeds]
    rows = [jax.device_put(of_run) for of_run in job.rows]

    @functools.lru_cache(maxsize=1)  # one order serves several calls
    def orders(part: int) -> Array:
        # Drawn on one device, then split: random values can depend on how their computation is sharded.
        drawn = [
            batches.consecutive_orders(key, part * num_epochs, num_epochs, of_run, program.batch_size)
            for key, of_run in zip(root_keys, rows, strict=True)
        ]
        return sharding.place(jnp.stack(drawn), by_order)

    keys = sharding.place(jnp.stack(root_keys), by_run)
    shared = sharding.place((job.examples, job.teacher), everywhere)
    step = int(jax.device_get(states.step)[0])
    compiled = (
        _jit_scan(program, mesh, num_runs)
        .lower(states, orders(step // length), keys, *shared, sharding.place(np.int32(0), everywhere))
        .compile()
    )

    def advance(states: TrainState, num_steps: int) -> tuple[TrainState, dict[str, np.ndarray]]:
        step = int(jax.device_get(states.step)[0])
        count = sharding.place(np.int32(num_steps), everywhere)
        states, metrics = compiled(states, orders(step // length), keys, *shared, count)
        return states, {name: column[:, :num_steps] for name, column in jax.device_get(metrics).items()}

    return advance


@functools.lru_cache(maxsize=8)
def _jit_stream(program: Program, mesh: Mesh) -> jax.stages.Wrapped:
    """Returns the jitted step of a single run; see `_jit_scan`."""

    def one_step(states: TrainState, batch: Examples, key: Array, teacher: Teacher | None) -> Any:
        state, metrics = train_step(program, jax.tree.map(lambda leaf: leaf[0], states), batch, key, teacher)
        return jax.tree.map(lambda leaf: leaf[None], state), metrics

    return jax.jit(one_step, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def stream_steps(job: Job, states: TrainState) -> Advance:
    """Compiles one step of a single run; every step gets its batch from the host."""
    program = job.program
    mesh = job.mesh
    everywhere, by_batch = sharding.replicated(mesh), sharding.split(mesh)
    root, rows = rng.root_key(job.seeds[0]), jax.device_put(job.rows[0])
    shared = sharding.place((root, job.teacher), everywhere)
    # The stream of batches, by the step of its next one: consecutive calls continue it, any other step starts anew.
    streams: dict[int, Iterator[Examples]] = {}

    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((program.batch_size, *a.shape[1:]), a.dtype, sharding=by_batch), job.examples
    )
    compiled = _jit_stream(program, mesh).lower(states, batch, *shared).compile()

    def advance(states: TrainState, num_steps: int) -> tuple[TrainState, dict[str, np.ndarray]]:
        step = int(jax.device_get(states.step)[0])
        if step not in streams:
            streams[step] = batches.stream_batches(job.examples, rows, root, step, program.batch_size, by_batch)
        feed, of_steps = streams.pop(step), []
        for _ in range(num_steps):
            states, metrics = compiled(states, next(feed), *shared)
            of_steps.append(metrics)
        streams[step + num_steps] = feed
        return states, jax.tree.map(lambda *values: np.stack(values)[None], *jax.device_get(of_steps))

    return advance


def compile_driver(name: str, job: Job, states: TrainState) -> Advance:
    """Compiles the driver called `name`; `stream` takes a single run."""
    return {"scan": scan_steps, "stream": stream_steps}[name](job, states)
