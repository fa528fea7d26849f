"""The loop: trains runs together, logs, evaluates and saves them.

A single run is a population of one: there is one loop, and it does not know how many runs it trains.
"""

import contextlib
import itertools
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mnist_flax import drivers
from mnist_flax.analysis import statistics
from mnist_flax.config import Config, replace
from mnist_flax.data.load import adapt_to_dataset, load_splits
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.distillation import LoadedTeacher, load_teacher
from mnist_flax.errors import NonFiniteLossError, WorkdirError
from mnist_flax.members import Member, announce, evaluate_holdout, finish, open_member
from mnist_flax.memory import check_memory
from mnist_flax.run import processes
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import check_finite
from mnist_flax.run.progress import Progress
from mnist_flax.run.signals import Interrupted, StopRequest, stop_request
from mnist_flax.step import TrainState, eval_variables

logger = logging.getLogger(__name__)

# How long the device works on one call: the longest that the progress bar, a signal or a timed checkpoint waits.
DISPATCH_SECONDS = 0.5


def fit(config: Config, workdir: pathlib.Path, *, fork: pathlib.Path | None = None) -> TrainState:
    """Trains a run to its end, from wherever it is, and returns its last state.

    Args:
      config: of the run. If its dataset cannot be had, that of the substitute is used (`adapt_to_dataset`).
      workdir: the run's folder; created if it is missing, resumed if it holds checkpoints.
      fork: the folder of another run, whose latest weights a new run starts from, at step 0 and with a fresh optimiser.
        A resumed run does not read it again.

    Raises:
      UserError: the data, the workdir or the config does not allow it; or the loss is no longer finite.
      Interrupted: a signal asked to stop; the state is saved.

    Several processes call this with the same arguments after `processes.join`; the primary claims the folder, logs and
    writes.
    """
    workdirs.check(workdir)
    if (workdir / workdirs.MEMBERS).exists():
        raise WorkdirError(
            f"--workdir={workdir}: holds a population; name another folder, or continue it with"
            " python -m mnist_flax.population"
        )
    teacher = load_teacher(config, workdir)
    check_memory(config, teacher and teacher.networks)  # before data are read and anything is written
    drivers.job_mesh(config.program, 1, config.train.num_devices)
    splits = load_splits(config)
    (member,) = fit_all({workdir: adapt_to_dataset(config, splits)}, splits, fork=fork, teacher=teacher)
    return member.state


def fit_population(config: Config, workdir: pathlib.Path, *, seeds: int = 0, folds: int = 0) -> dict[str, Any]:
    """Trains M seeds, or K folds, to their end, from wherever they are, and returns what `population.json` holds.

    Raises:
      UserError, Interrupted: as for `fit`.
    """
    workdirs.check(workdir)
    if (workdir / workdirs.CHECKPOINTS).exists():
        raise WorkdirError(f"--workdir={workdir}: holds a run, not a population; name another folder")
    teacher = load_teacher(config, workdir)
    check_memory(config, teacher and teacher.networks)
    splits = load_splits(config)
    configs = member_configs(adapt_to_dataset(config, splits), seeds=seeds, folds=folds)
    if folds and config.data.holdout:
        logger.info("config.data.holdout = %d is not used: each member holds out its fold", config.data.holdout)
    with workdirs.claim(workdir):
        folder = workdir / workdirs.MEMBERS
        folders = [workdirs.inside(workdir, workdirs.MEMBERS, name) for name in configs]
        members = fit_all(dict(zip(folders, configs.values(), strict=True)), splits, teacher=teacher)
        result = statistics.load_population_result(workdir) if all(member.is_finished for member in members) else None
        if result and [member["name"] for member in result["members"]] == list(configs):
            logger.info("%s is finished; a larger --seeds, or more epochs, trains further", workdir)
            return result
        named = {member.workdir.name: (member.config, eval_variables(member.state)) for member in members}
        result, arrays = statistics.population_result(named, splits, folder)
        statistics.save_population_result(result, arrays, workdir)
    return result


def member_configs(config: Config, *, seeds: int = 0, folds: int = 0) -> dict[str, Config]:
    """Returns the configs of M seeds, or of K folds, by the names of the members.

    The first member has the seed of `config`, the others those that follow. Each fold holds out another part of the
    training rows, instead of `data.holdout`. Members get no report and no demo page, which would cost more than the
    training; their verbs write one on request.

    Raises:
      ConfigError: there are not as many seeds, or the rows cannot be divided so.
    """
    config = replace(config, train__report=False, train__demo=False)
    if not folds:
        return {f"seed-{seed}": replace(config, seed=seed) for seed in range(config.seed, config.seed + seeds)}
    return {
        f"fold-{k}": replace(config, seed=config.seed + k, data__folds=folds, data__fold=k, data__holdout=0)
        for k in range(folds)
    }


def fit_all(
    configs: Mapping[pathlib.Path, Config],
    splits: Splits,
    *,
    fork: pathlib.Path | None = None,
    teacher: LoadedTeacher | None = None,
) -> list[Member]:
    """Trains every run, given by folder and config, to its end; those of equal programs train together.

    Raises:
      UserError, Interrupted: as for `fit`.
    """
    with stop_request(processes.stop_signals()) as request, contextlib.ExitStack() as stack, processes.bound_together():
        members = [open_member(config, workdir, splits, fork, teacher, stack) for workdir, config in configs.items()]
        unfinished = [member for member in members if not member.is_finished]
        if unfinished and processes.is_primary():
            announce(unfinished, splits)
        train_all(unfinished, splits.train, request)
        for member in unfinished:
            finish(member, splits)
        processes.agree(0)  # none leaves before the primary has written everything
    return members


def train_all(members: Sequence[Member], examples: Examples, request: StopRequest) -> None:
    """Makes all the updates that are left; runs that are behind the others catch up first.

    Raises:
      NonFiniteLossError: nothing is saved after the last good checkpoints.
      Interrupted: a signal asked to stop; all runs are saved.
    """
    while behind := [member for member in members if member.step < member.config.num_steps]:
        first = min(behind, key=lambda member: member.step)
        alike = [member for member in behind if member.config.program == first.config.program]
        group = [member for member in alike if member.step == first.step]
        ahead = [member.step for member in alike if member.step > first.step]
        train_group(group, examples, until=min(ahead, default=first.config.num_steps), request=request)


def train_group(members: Sequence[Member], examples: Examples, *, until: int, request: StopRequest) -> None:
    """Trains runs of one program that are all at one step up to another step.

    Raises:
      NonFiniteLossError, Interrupted: as for `train_all`.
    """
    config, step = members[0].config, members[0].step
    started = time.perf_counter()
    states, advance = compile_steps(members, examples)
    logger.info("compiled in %.1f s", time.perf_counter() - started)
    (signum,) = processes.agree(request.signum)
    if signum:
        raise stopped(config, step, signum)

    progress = Progress(config, step, num_runs=len(members), quiet=not processes.is_primary())
    num_steps = config.num_steps if config.train.epochs_per_dispatch else 1  # of the next call, at most
    last_save = mark = time.perf_counter()
    calls = itertools.count()
    with contextlib.closing(progress):
        while step < until:
            target = min(step + num_steps, next_stop(config, step), until)
            with jax.transfer_guard("disallow"):
                states, metrics = advance(states, target - step)
            seconds = time.perf_counter() - mark
            log_steps(members, metrics, seconds)
            rate = (target - step) / max(seconds, 1e-9)
            step, mark = target, time.perf_counter()
            progress.update(step, seconds, [member.log.epoch() for member in members])
            is_late = 0 < config.checkpoint.every_seconds <= mark - last_save
            # Processes have different clocks and receive different signals, but must all do the same.
            preempted = members[0].store.preemption(next(calls))
            num_steps, timed_save, signum = processes.agree(
                next_num_steps(config, num_steps, rate), is_late, request.signum or preempted
            )
            if step not in (until, next_stop(config, step - 1)) and not timed_save and not signum:
                continue

            # The host has something to do: it evaluates at the end of an epoch, and saves when a checkpoint is due.
            unstack(members, states, step)
            scores: list[dict[str, Any] | None] = [None] * len(members)
            if step % config.steps_per_epoch == 0:
                scores = [evaluate_holdout(member) for member in members]
                progress.epoch_line(step, [member.log.epoch() for member in members], scores)
            (signum,) = processes.agree(signum or request.signum)
            if is_save_due(config, step) or timed_save or signum:
                for member, of_member in zip(members, scores, strict=True):
                    member.store.save(member.state, member.log.snapshot(), holdout=of_member)
                last_save = time.perf_counter()
            if signum:
                for member in members:
                    member.store.wait()
                raise stopped(config, step, signum)
            mark = time.perf_counter()


def compile_steps(members: Sequence[Member], examples: Examples) -> tuple[TrainState, drivers.Advance]:
    """Stacks the states of the runs, and compiles the driver that advances them."""
    program, train = members[0].config.program, members[0].config.train
    seeds, rows = [member.config.seed for member in members], [member.rows for member in members]
    teacher = members[0].teacher and members[0].teacher.networks
    job = drivers.Job(program, seeds, rows, examples, train.num_devices, train.epochs_per_dispatch, teacher)
    states = drivers.stack([member.state for member in members], job)
    return states, drivers.driver(train.driver, job, states)


def log_steps(members: Sequence[Member], metrics: Mapping[str, np.ndarray], seconds: float) -> None:
    """Logs the metrics `[M,n]` of some steps; each run counts its share of the time.

    Raises:
      NonFiniteLossError: names the run.
    """
    for i, member in enumerate(members):
        try:
            member.log.steps({name: column[i] for name, column in metrics.items()}, seconds / len(members))
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{member.workdir}: {error}") from error


def unstack(members: Sequence[Member], states: TrainState, step: int) -> None:
    """Gives each run its own state, on the host; a weight that is not finite stops the program."""
    on_host = jax.device_get(states)
    for i, member in enumerate(members):
        member.state = jax.tree.map(lambda leaf, i=i: np.array(leaf[i]), on_host)
        for leaf in jax.tree.leaves((member.state.params, member.state.batch_stats, member.state.ema)):
            check_finite(float(np.max(np.abs(leaf))), f"{member.workdir}: the largest weight after step {step}")


def stopped(config: Config, step: int, signum: int) -> Interrupted:
    """Returns what ends the program when a signal asked for it and `step` is saved, or no step was made."""
    message = f"stopped at step {step} of {config.num_steps}; nothing is lost: the same command continues from here"
    return Interrupted(message, signum)


def next_num_steps(config: Config, num_steps: int, rate: float) -> int:
    """Returns how many steps the next call makes, at most: up to twice as many, until it takes `DISPATCH_SECONDS`.

    `rate` is in steps a second. If the config says how many epochs a call makes, the number stays.
    """
    if config.train.epochs_per_dispatch:
        return num_steps
    return max(1, min(2 * num_steps, int(rate * DISPATCH_SECONDS)))


def next_stop(config: Config, step: int) -> int:
    """Returns the first step after `step` at which the host has something to do.

    That is the end of an epoch, or of the epochs of a call, a checkpoint by steps, or the end of the run.
    """
    stride = max(1, config.train.epochs_per_dispatch) * config.steps_per_epoch
    every = config.checkpoint.every_steps or config.num_steps
    return min((step // stride + 1) * stride, (step // every + 1) * every, config.num_steps)


def is_save_due(config: Config, step: int) -> bool:
    """Returns whether the cadence by epochs or steps, or the end of the run, asks for a checkpoint at `step`."""
    cadences = (config.checkpoint.every_epochs * config.steps_per_epoch, config.checkpoint.every_steps)
    return step == config.num_steps or any(every and step % every == 0 for every in cadences)
