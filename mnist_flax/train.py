"""The training loop: trains runs together, logs, evaluates and saves them.

A single run is a population of one: the same loop trains any number of runs.
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

from mnist_flax import drivers, external, sharding
from mnist_flax.analysis import statistics
from mnist_flax.config import Config, dotted, replace
from mnist_flax.data.load import adapt_to_dataset, load_splits
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.distillation import LoadedTeacher, load_teacher
from mnist_flax.errors import ConfigError, WorkdirError
from mnist_flax.members import Member, announce, evaluate_holdout, finish, member_configs, open_member, trained_member
from mnist_flax.memory import check_memory
from mnist_flax.pacing import is_save_due, next_call_limit, next_stop
from mnist_flax.run import checkpoint, console, processes, provenance
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import check_finite
from mnist_flax.run.progress import Progress
from mnist_flax.run.signals import Interrupted, StopRequest, stop_request
from mnist_flax.step import TrainState, try_step

logger = logging.getLogger(__name__)

# Fields that may differ between the processes of a run.
PATHS = ("data.source", "data.data_dir", "data.raw_dir", "data.on_missing", "train.teacher")


def fit(config: Config, workdir: workdirs.Folder, *, fork: workdirs.Folder | None = None) -> TrainState:
    """Starts or resumes a run, trains it to the end, and returns its final state.

    Args:
      config: the run's config, which `adapt_to_dataset` changes if a substitute dataset is used.
      workdir: the run's folder; created if it is missing, resumed if it holds checkpoints.
      fork: the folder of another run. A new run starts from its latest weights, at step 0 and with a fresh optimiser;
        a resumed run does not read it again.

    Raises:
      UserError: the data, the workdir or the config cannot be used, or the loss is no longer finite.
      Interrupted: a signal asked to stop; the state is saved.

    In a multi-process run, every process calls this with the same arguments after `processes.join`; only the primary
    claims the folder, prints, and writes logs and results.
    """
    workdir = pathlib.Path(workdir).expanduser()
    workdirs.check(workdir)
    if workdirs.MEMBERS in workdirs.names_in(workdir):
        raise WorkdirError(
            f"--workdir={workdir}: holds a population; name another folder, or continue it with"
            f" {console.command('population')}"
        )
    teacher = load_teacher(config, workdir)
    check_program(config, teacher)
    # A student must use its teacher's dataset, and a resumed run its own: neither may fall back to a substitute.
    data = workdirs.read_json(workdir / workdirs.CONFIG).get("data")
    is_bound = teacher or (isinstance(data, dict) and data.get("name") == config.data.name)
    splits = load_splits(replace(config, data__on_missing="error").data if is_bound else config.data)
    config = adapt_to_dataset(config, splits)
    recipe = {name: value for name, value in dotted(config).items() if name not in PATHS}
    sources = splits.fingerprint, bool(fork), teacher and teacher.origin["digest"]
    processes.check_same("configs, data, forks or teachers", recipe, sources)
    drivers.job_mesh(config.program, 1, config.train.num_devices)  # only now: a substitute may have smaller batches
    source = pathlib.Path(fork).expanduser() if fork else None
    (member,) = fit_all({workdir: config}, splits, fork=source, teacher=teacher)
    return member.state


def check_program(config: Config, teacher: LoadedTeacher | None) -> None:
    """Checks what can be checked without data, before data is read or anything is written.

    Raises:
      ConfigError: there are too few devices or too little memory, or code from outside the package cannot be used.
    """
    sharding.make_mesh(config.train.num_devices)
    if external.entries(config.program.code):
        try_step(config.program)
    check_memory(config, teacher and teacher.arrays)


def fit_population(config: Config, workdir: workdirs.Folder, *, seeds: int = 0, folds: int = 0) -> dict[str, Any]:
    """Starts or resumes M seeds or K folds, trains them to the end, and returns the contents of `population.json`.

    Raises:
      UserError, Interrupted: as for `fit`.
    """
    if bool(seeds) == bool(folds):
        raise ConfigError(f"give {'only one of' if seeds else 'either'} --seeds=M or --folds=K, such as --seeds=10")
    workdir = pathlib.Path(workdir).expanduser()
    workdirs.check(workdir)
    if workdirs.CHECKPOINTS in workdirs.names_in(workdir):
        raise WorkdirError(f"--workdir={workdir}: holds a run, not a population; name another folder")
    teacher = load_teacher(config, workdir)
    check_program(config, teacher)
    splits = load_splits(replace(config, data__on_missing="error").data)  # its statistics are about this dataset
    configs = member_configs(config, seeds=seeds, folds=folds)
    kind = "folds" if folds else "seeds"
    statistics.check_population(workdir, kind, [config.seed for config in configs.values()])
    for name in ("holdout", "folds", "fold"):
        if folds and (value := getattr(config.data, name)):
            logger.info("config.data.%s = %d is not used: each member holds out its own fold", name, value)
    with workdirs.claim(workdir):
        folder = workdir / workdirs.MEMBERS
        runs = {workdirs.inside(workdir, workdirs.MEMBERS, name): config for name, config in configs.items()}
        members = fit_all(runs, splits, teacher=teacher, in_population=True)
        result = statistics.load_population_result(workdir) if all(member.is_finished for member in members) else None
        expected = (list(configs), members[0].config.num_steps)
        if result and ([member["name"] for member in result["members"]], result["steps"]) == expected:
            more = [] if config.length_matters else ["raise --config.train.epochs"]
            more += [] if folds else ["raise --seeds"]
            logger.info("%s is finished%s", workdir, f"; to train further, {' or '.join(more)}" if more else "")
            return result
        trained = {member.workdir.name: trained_member(member, splits) for member in members}
        result, arrays = statistics.population_result(kind, trained, splits, folder)
        statistics.save_population_result(result, arrays, workdir)
    return result


def fit_all(
    configs: Mapping[pathlib.Path, Config],
    splits: Splits,
    *,
    fork: pathlib.Path | None = None,
    teacher: LoadedTeacher | None = None,
    in_population: bool = False,
) -> list[Member]:
    """Trains every run to the end, given configs by folder; runs with equal programs train together.

    Raises:
      UserError, Interrupted: as for `fit`.
    """
    provenance.git_commit()  # remembered for the summary: the checkout may change while the run trains
    # `bound_together` is innermost: a failing process exits before the stack waits for saves that need the others.
    with stop_request(processes.stop_signals()) as request, contextlib.ExitStack() as stack, processes.bound_together():
        members = [
            stack.enter_context(
                open_member(config, workdir, splits, fork=fork, teacher=teacher, in_population=in_population)
            )
            for workdir, config in configs.items()
        ]
        digests = [checkpoint.digest(member.state) for member in members] if jax.process_count() > 1 else []
        found = [(member.step, member.is_finished) for member in members]
        processes.check_same("checkpoints in --workdir, or weights in --fork", found, digests)
        unfinished = [member for member in members if not member.is_finished]
        if unfinished and processes.is_primary():
            announce(unfinished, splits)
        train_all(unfinished, splits.train, request)
        for member in unfinished:
            finish(member, splits)
            (signum,) = processes.agree(request.signum)  # no process leaves before the primary has written everything
            if in_population:  # a single run is now finished; a population still has to write its result
                stop_if_requested(members, signum)
    return members


def train_all(members: Sequence[Member], examples: Examples, request: StopRequest) -> None:
    """Makes all remaining updates; runs that are behind the others catch up first.

    Raises:
      NonFiniteLossError: a loss or weight is not finite; the last good checkpoints are kept.
      Interrupted: a signal asked to stop; all runs are saved.
    """
    while behind := [member for member in members if member.step < member.config.num_steps]:
        first = min(behind, key=lambda member: member.step)
        alike = [member for member in behind if member.config.program == first.config.program]
        group = [member for member in alike if member.step == first.step]
        ahead = [member.step for member in alike if member.step > first.step]
        train_group(group, examples, until=min(ahead, default=first.config.num_steps), request=request)


def train_group(members: Sequence[Member], examples: Examples, *, until: int, request: StopRequest) -> None:
    """Trains runs of the same program, all at the same step, up to the step `until`.

    Raises:
      NonFiniteLossError, Interrupted: as for `train_all`.
    """
    config, step = members[0].config, members[0].step
    started = time.perf_counter()
    states, advance = compile_steps(members, examples)
    logger.info("compiled in %.1f s", time.perf_counter() - started)
    stop_if_requested(members, *processes.agree(request.signum))

    progress = Progress(config, step, num_runs=len(members), quiet=not processes.is_primary())
    call_limit = config.num_steps if config.train.epochs_per_dispatch else 1  # the most steps for the next call
    last_save = mark = time.perf_counter()
    calls = itertools.count()
    with contextlib.closing(progress):
        while step < until:
            stop = min(next_stop(config, step), until)
            target = min(step + call_limit, stop)
            with jax.transfer_guard("disallow"):  # no hidden copy may slow the loop
                states, metrics = advance(states, target - step)
            seconds = time.perf_counter() - mark
            for i, member in enumerate(members):  # each run counts its share of the time
                member.log.add_steps({name: column[i] for name, column in metrics.items()}, seconds / len(members))
            rate = (target - step) / max(seconds, 1e-9)
            step, mark = target, time.perf_counter()
            progress.update(step, seconds, [member.log.epoch_means() for member in members])
            is_timed_save_due = 0 < config.checkpoint.every_seconds <= mark - last_save
            # Processes have different clocks and receive different signals, but must all do the same.
            preempted = processes.preemption(next(calls))
            call_limit, timed_save, signum = processes.agree(
                next_call_limit(config, call_limit, rate), is_timed_save_due, request.signum or preempted
            )
            if step < stop and not timed_save and not signum:
                continue

            # The host has something to do: it evaluates at the end of an epoch, and saves when a checkpoint is due.
            unstack(members, states, step)
            scores: list[dict[str, Any] | None] = [None] * len(members)
            if step % config.steps_per_epoch == 0:
                scores = [evaluate_holdout(member) for member in members]
                progress.epoch_line(step, [member.log.epoch_means() for member in members], scores)
            (signum,) = processes.agree(signum or request.signum)
            if is_save_due(config, step) or timed_save or signum or step == until:
                for member, of_member in zip(members, scores, strict=True):
                    member.store.save(member.state, member.log.snapshot(), holdout=of_member)
                last_save = time.perf_counter()
            stop_if_requested(members, signum)
            mark = time.perf_counter()


def compile_steps(members: Sequence[Member], examples: Examples) -> tuple[TrainState, drivers.Advance]:
    """Stacks the states of the runs, and compiles the driver that advances them."""
    program, train = members[0].config.program, members[0].config.train
    seeds, rows = [member.config.seed for member in members], [member.rows for member in members]
    teacher = members[0].teacher and members[0].teacher.arrays
    num_devices = members[0].num_devices if len(members) == 1 else train.num_devices
    job = drivers.Job(
        program, seeds, rows, examples,
        num_devices=num_devices, epochs_per_dispatch=train.epochs_per_dispatch, teacher=teacher,
    )  # fmt: skip
    states = drivers.stack([member.state for member in members], job)
    return states, drivers.compile_driver(train.driver, job, states)


def unstack(members: Sequence[Member], states: TrainState, step: int) -> None:
    """Copies each run's state to the host as `member.state`, and checks that its weights and averages are finite."""
    on_host = jax.device_get(states)
    for i, member in enumerate(members):
        member.state = jax.tree.map(lambda leaf, i=i: np.array(leaf[i]), on_host)
        for leaf in jax.tree.leaves((member.state.params, member.state.batch_stats, member.state.ema)):
            check_finite(float(np.max(np.abs(leaf))), f"{member.workdir}: the largest weight after step {step}")


def stop_if_requested(members: Sequence[Member], signum: int) -> None:
    """Raises if `signum`, the same in all processes, is not 0; call it only when the runs are saved, or before a step.

    Raises:
      Interrupted: a signal asked to stop.
      WorkdirError: a checkpoint, saved in the background, could not be written.
    """
    if not signum:
        return
    for member in members:
        member.store.wait()
    step, num_steps = members[0].step, members[0].config.num_steps
    message = f"stopped at step {step} of {num_steps}; nothing is lost: the same command continues from here"
    raise Interrupted(message, signum)
