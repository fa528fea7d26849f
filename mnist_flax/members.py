"""The members: runs like any other, of which one compiled program makes the steps of all."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mnist_flax import rng, sharding
from mnist_flax.analysis import statistics as results
from mnist_flax.config import Config, replace
from mnist_flax.data import batches
from mnist_flax.data.datasets import Examples
from mnist_flax.data.load import Splits, follow, load_splits
from mnist_flax.errors import NonFiniteLossError, WorkdirError
from mnist_flax.run import checkpoint
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import RunLog
from mnist_flax.run.signals import StopWish, stop_wish
from mnist_flax.step import StepMetrics, TrainState, eval_variables, train_steps
from mnist_flax.train import (
    begin,
    check_origin,
    finish,
    first_num_steps,
    is_save_due,
    judge,
    next_num_steps,
    next_stop,
    refuse_spoilt,
    stopped,
    warn_of_slow_dtype,
)

logger = logging.getLogger(__name__)


def members_of(config: Config, *, seeds: int = 0, folds: int = 0) -> dict[str, Config]:
    """Returns the config of each member, by its name.

    Args:
      config: of all; its seed is the first member's, the others have those that follow.
      seeds: M, the number of members; or
      folds: K, each member holding out another part of the training rows (`data.holdout` is then not used).

    Raises:
      ConfigError: there are not as many seeds, or the rows cannot be divided so.
    """
    if folds:
        return {
            f"fold-{fold}": replace(
                config, seed=config.seed + fold, data__folds=folds, data__fold=fold, data__holdout=0
            )
            for fold in range(folds)
        }
    return {f"seed-{seed}": replace(config, seed=seed) for seed in range(config.seed, config.seed + seeds)}


@dataclasses.dataclass
class Member:
    """A run of the population, open to go on with.

    Attributes:
      name: of its folder, such as `seed-3`.
      config: of the run.
      folder: where it lives.
      rows: `i32[R]`, the row numbers to train on.
      holdout: the examples held out.
      store: its checkpoints.
      state: at `step`, on the host or on the device.
      step: finished updates.
      log: what it tells; None if the run is finished.
    """

    name: str
    config: Config
    folder: pathlib.Path
    rows: np.ndarray
    holdout: Examples
    store: checkpoint.Store
    state: TrainState
    step: int
    log: RunLog | None


def fit_population(config: Config, workdir: pathlib.Path, *, seeds: int = 0, folds: int = 0) -> dict[str, Any]:
    """Trains all members to their end, from wherever they are, and sums up what they say.

    Args:
      config: of the members; the dataset may turn out to be another one (`data.follow`).
      workdir: the population's folder; made if it is missing, resumed if it holds members.
      seeds: M, the number of members; or
      folds: K.

    Returns:
      What is saved as `population.json`.

    Raises:
      UserError: the data, the workdir or the config does not allow it; or a loss is no longer finite.
      Interrupted: a signal asked to stop; all members are saved.
    """
    workdirs.check(workdir)
    if (workdir / workdirs.CHECKPOINTS).exists():
        raise WorkdirError(f"--workdir={workdir}: holds a run, and no population; name another folder")
    splits = load_splits(config)
    configs = members_of(follow(config, splits), seeds=seeds, folds=folds)
    if folds and config.data.holdout:
        logger.info("config.data.holdout = %d is not used: each member holds out its fold", config.data.holdout)
    with stop_wish() as wish, contextlib.ExitStack() as stack:
        stack.enter_context(workdirs.claim(workdir))
        members = [
            open_member(name, of_member, workdir / workdirs.MEMBERS / name, splits, stack)
            for name, of_member in configs.items()
        ]
        unfinished = [member for member in members if member.log]
        if not unfinished:
            result = results.load(workdir)
            if result and [member["name"] for member in result["members"]] == list(configs):
                logger.info("%s is finished; a larger --seeds, or more epochs, trains further", workdir)
                return result
        announce(list(configs.values()), splits)
        train_all(unfinished, splits, wish)
        for member in unfinished:
            assert member.log
            # A report of each would cost more than the training; `report --workdir` writes one when it is wanted.
            config = replace(member.config, train__report=False)
            state = jax.device_put(member.state)
            finish(config, state, splits, member.folder, log=member.log, store=member.store)
        result, arrays = results.gather(
            {member.name: (member.config, eval_variables(member.state)) for member in members},
            splits,
            workdir / workdirs.MEMBERS,
        )
        results.save(result, arrays, workdir)
    return result


def announce(configs: Sequence[Config], splits: Splits) -> None:
    """Tells what is about to be trained, and on what."""
    warn_of_slow_dtype(configs[0])
    logger.info(
        "%s (%s, fingerprint %s): %d members, each with %d rows to train on and %d held out; %d to test",
        splits.name, splits.source, splits.fingerprint[:12], len(configs), configs[-1].num_train,
        configs[-1].num_holdout, len(splits.test.label),
    )  # fmt: skip


def open_member(name: str, config: Config, folder: pathlib.Path, splits: Splits, stack: contextlib.ExitStack) -> Member:
    """Claims a member's folder and restores its newest checkpoint, or begins it.

    Raises:
      UserError: the folder cannot be used, or holds another run.
    """
    rows, holdout_rows = batches.rows_of(splits.train.label, config.data)
    stack.enter_context(workdirs.claim(folder))
    store = stack.enter_context(checkpoint.open_store(config, splits.fingerprint, folder))
    found, skipped = store.restore_latest()
    for line in skipped:
        logger.warning("%s: %s", name, line)
    record: Mapping[str, Any]
    if found:
        check_origin(found.record["origin"], None, folder)
        state, record = found.state, found.record
    else:
        state, origin = begin(config, None)
        record = {"origin": origin}
    step = record.get("step", 0)
    summary = workdirs.read_json(folder / workdirs.SUMMARY)
    log = None
    if step < config.num_steps or not isinstance(summary, dict) or summary.get("steps") != step:
        workdirs.write_text(folder / workdirs.CONFIG, config.to_json())
        log = RunLog(config, folder, record, quiet=True)
        stack.callback(log.close)
    holdout = Examples(splits.train.image[holdout_rows], splits.train.label[holdout_rows])
    return Member(name, config, folder, rows, holdout, store, state, step, log)


def train_all(members: Sequence[Member], splits: Splits, wish: StopWish) -> None:
    """Makes all the updates that are left.

    Members that are behind (another one was saved later, or they are new) catch up first.

    Raises:
      NonFiniteLossError: nothing is saved after the last good checkpoints.
      Interrupted: a signal asked to stop; all members are saved.
    """
    while behind := [member for member in members if member.step < member.config.num_steps]:
        step = min(member.step for member in behind)
        group = [member for member in behind if member.step == step]
        ahead = [member.step for member in behind if member.step > step]
        train_group(group, splits.train, until=min(ahead, default=group[0].config.num_steps), wish=wish)


def train_members(
    config: Config,
    states: TrainState,
    examples: Examples,
    orders: Array,
    keys: Array,
    num_steps: Array | int,
    *,
    mesh: Mesh,
    vectorized: bool,
) -> tuple[TrainState, StepMetrics]:
    """Makes `num_steps` updates of every member within an epoch; each device has members of its own.

    Args:
      config: of the members; seed and fold are no part of the program.
      states: with a leading axis M.
      examples: the training split, on the device.
      orders: `i32[M,S,B]`, of the epoch that the members are in.
      keys: `key[M]`, their root keys.
      num_steps: at most what is left of the epoch.
      mesh: of devices, whose number divides M.
      vectorized: all members of a device at once (`vmap`) instead of one after the other (`map`). The same up to
        rounding.

    Returns:
      The states after them, and the metrics `[M,S]` of the epoch, as `step.train_steps` returns them.
    """
    own, whole = PartitionSpec(sharding.AXIS), PartitionSpec()

    # Members have nothing to tell each other: their devices' programs are separate, and XLA need not find that out.
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(own, own, own, whole, whole), out_specs=own, check_vma=False)
    def of_device(
        states: TrainState, orders: Array, keys: Array, examples: Examples, num_steps: Array
    ) -> tuple[TrainState, StepMetrics]:
        def member(state: TrainState, order: Array, key: Array) -> tuple[TrainState, StepMetrics]:
            return train_steps(config, state, examples, order, key, num_steps)

        if vectorized:
            return jax.vmap(member)(states, orders, keys)
        trained: tuple[TrainState, StepMetrics] = jax.lax.map(lambda one: member(*one), (states, orders, keys))
        return trained

    return of_device(states, orders, keys, examples, num_steps)


jit_train_members = jax.jit(train_members, static_argnames=("config", "mesh", "vectorized"), donate_argnames="states")


def mesh_of(config: Config, num_members: int) -> Mesh:
    """Returns the devices to spread members over: as many as there are and may be used, and can have equal shares.

    Raises:
      ConfigError: `train.num_devices` is more than there are.
    """
    count = sharding.make_mesh(config.train.num_devices).size
    return sharding.make_mesh(max(divisor for divisor in range(1, count + 1) if num_members % divisor == 0))


def is_vectorized() -> bool:
    """Returns whether the platform is faster with all members at once; a CPU is busy with one, and slow with many.

    There one after the other also gives each the same bits as a run of its own.
    """
    return jax.default_backend() != "cpu"


def train_group(members: Sequence[Member], examples: Examples, *, until: int, wish: StopWish) -> None:
    """Trains members that are all at one step, up to another step.

    Raises:
      NonFiniteLossError: nothing is saved after the last good checkpoints.
      Interrupted: a signal asked to stop; all of these members are saved.
    """
    config, step = members[0].config, members[0].step
    mesh, vectorized = mesh_of(config, len(members)), is_vectorized()
    everywhere, by_member = sharding.replicated(mesh), sharding.split(mesh)
    keys = jnp.stack([rng.root_key(member.config.seed) for member in members])
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[member.state for member in members])
    keys, states = sharding.place((keys, states), by_member)
    examples = sharding.place(examples, everywhere)
    orders_of = orders_at(members, by_member)

    def advance(states: TrainState, step: int, num_steps: int) -> tuple[TrainState, StepMetrics]:
        orders = orders_of(step)
        count = sharding.place(np.int32(num_steps), everywhere)
        return jit_train_members(config, states, examples, orders, keys, count, mesh=mesh, vectorized=vectorized)

    started = time.perf_counter()
    states, _ = jax.block_until_ready(advance(states, step, 0))  # no step: it only compiles
    logger.info(
        "%s to %s: from step %d to %d of %d; compiled in %.1f s",
        members[0].name, members[-1].name, step, until, config.num_steps, time.perf_counter() - started,
    )  # fmt: skip
    if wish.signum is not None:
        raise stopped(config, step, wish.signum)
    progress = Progress(members, step)
    num_steps = first_num_steps(config)  # of the next call
    last_save = mark = time.perf_counter()
    try:
        while step < until:
            target = min(step + num_steps, next_stop(config, step), until)
            with jax.transfer_guard("disallow"):
                states, metrics = advance(states, step, target - step)
            sums = jax.device_get(metrics)
            start = step % metrics.loss.shape[1]
            place = slice(start, start + target - step)
            step, seconds = target, time.perf_counter() - mark
            tell(members, jax.tree.map(lambda column, place=place: column[:, place], sums), seconds)
            progress.update(step, seconds)
            num_steps = next_num_steps(config, num_steps, (place.stop - place.start) / seconds)
            mark = time.perf_counter()
            timed_save = 0 < config.checkpoint.every_seconds <= mark - last_save
            is_asked_to_save = timed_save or wish.signum is not None
            if step != until and step != next_stop(config, step - 1) and not is_asked_to_save:
                continue
            refuse_spoilt(states, step)
            keep_states(members, states, step)
            scores: list[dict[str, float] | None] = [None] * len(members)
            if step % config.steps_per_epoch == 0:
                scores = [judge_holdout(member) for member in members]
                progress.line(step, scores)
            if is_save_due(config, step) or is_asked_to_save:
                for member, of_member in zip(members, scores, strict=True):
                    assert member.log
                    member.store.save(member.state, member.log.snapshot(), holdout=of_member)
                last_save = time.perf_counter()
            if wish.signum is not None:
                for member in members:
                    member.store.wait()
                raise stopped(config, step, wish.signum)
            mark = time.perf_counter()
    finally:
        progress.close()


def orders_at(members: Sequence[Member], placement: NamedSharding) -> Callable[[int], Array]:
    """Returns what computes the orders `i32[M,S,B]` that a step belongs to, and keeps them until others are needed.

    Each member's own, by the program that a single run uses: folds may differ in their number of rows.
    """
    config = members[0].config
    num_epochs = max(1, config.train.epochs_per_dispatch)  # that one order covers
    keys = [rng.root_key(member.config.seed) for member in members]
    rows = [jax.device_put(member.rows) for member in members]
    orders: dict[int, Array] = {}

    def orders_of(step: int) -> Array:
        part = step // (num_epochs * config.steps_per_epoch)
        if part not in orders:
            orders.clear()
            of_members = [
                batches.epochs_order(key, part * num_epochs, num_epochs, of_member, config.train.batch_size)
                for key, of_member in zip(keys, rows, strict=True)
            ]
            orders[part] = sharding.place(jnp.stack(of_members), placement)
        return orders[part]

    return orders_of


def tell(members: Sequence[Member], sums: StepMetrics, seconds: float) -> None:
    """Lets every member's log take in some steps, `[M,n]`; each is said to have taken its share of the time.

    Raises:
      NonFiniteLossError: names the member.
    """
    for i, member in enumerate(members):
        assert member.log
        try:
            member.log.steps(jax.tree.map(lambda column, i=i: column[i], sums), seconds / len(members))
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{member.name}: {error}") from error


def keep_states(members: Sequence[Member], states: TrainState, step: int) -> None:
    """Gives each member its own state out of the stacked ones, as a copy on the host."""
    on_host = jax.device_get(states)
    for i, member in enumerate(members):
        member.state = jax.tree.map(lambda leaf, i=i: np.array(leaf[i]), on_host)
        member.step = step


def judge_holdout(member: Member) -> dict[str, float] | None:
    """Evaluates a member on the rows that it holds out, if any, and logs it."""
    if not len(member.holdout.label):
        return None
    assert member.log
    scores = judge(member.config, jax.device_put(member.state), member.holdout)
    member.log.evaluation("holdout", **scores)
    return scores


class Progress:
    """Where the training of all members is: a bar on a terminal, and a line an epoch."""

    def __init__(self, members: Sequence[Member], step: int) -> None:
        """Starts at `step`."""
        self._config = members[0].config
        self._num_members = len(members)
        self._step, self._seconds, self._steps = step, 0.0, 0
        self._bar = tqdm(
            total=self._config.num_steps * len(members),
            initial=step * len(members),
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def update(self, step: int, seconds: float) -> None:
        """Shows that all members have come to `step`, in `seconds` more."""
        self._bar.update((step - self._step) * self._num_members)
        self._steps += step - self._step
        self._step, self._seconds = step, self._seconds + seconds

    def line(self, step: int, scores: Sequence[Mapping[str, float] | None]) -> None:
        """Prints the mean and the range on hold-out rows, the speed and the time that is left."""
        accuracies = [of_member["accuracy"] for of_member in scores if of_member]
        held_out = (
            f"  hold-out {np.mean(accuracies):.2%} ({min(accuracies):.2%} to {max(accuracies):.2%})"
            if accuracies
            else ""
        )
        rate = self._steps / max(self._seconds, 1e-9)
        logger.info(
            "epoch %d/%d of %d members%s  %s images/s  %s left",
            step // self._config.steps_per_epoch, self._config.train.epochs, self._num_members, held_out,
            f"{rate * self._num_members * self._config.num_train / self._config.steps_per_epoch:,.0f}",
            tqdm.format_interval((self._config.num_steps - step) / max(rate, 1e-9)),
        )  # fmt: skip

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
