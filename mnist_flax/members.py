"""Opens, announces, evaluates and finishes the runs that train together."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mnist_flax import drivers, external, rng, sharding
from mnist_flax.analysis.calibration import calibrate
from mnist_flax.analysis.evaluation import evaluate, evaluation_of, fit_of, make_predictor, member_logits
from mnist_flax.analysis.report.facts import Reported
from mnist_flax.analysis.report.layers import layer_table, layers
from mnist_flax.analysis.report.write import write_report
from mnist_flax.analysis.statistics import TrainedMember
from mnist_flax.config import Config, Program, replace
from mnist_flax.data import batches
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.distillation import LoadedTeacher, teacher_warnings
from mnist_flax.errors import WorkdirError
from mnist_flax.exporting import demo
from mnist_flax.exporting.graph import ExportError
from mnist_flax.models.layers import NORM_MOMENTUM
from mnist_flax.optimizer import schedule
from mnist_flax.run import checkpoint, processes
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import RunLog
from mnist_flax.run.provenance import provenance, versions
from mnist_flax.run.schema import NUMBER, mismatches
from mnist_flax.run.store import Store, open_store
from mnist_flax.run.weights import save_weights
from mnist_flax.step import TrainState, eval_variables

logger = logging.getLogger(__name__)

_SUMMARY = {"steps": int, "epochs": int, "test_accuracy": float, "train_seconds": NUMBER}
ENVIRONMENT = ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")  # can change how sums are rounded


@dataclasses.dataclass
class Member:
    """A run that is open for training on `rows`, `i32[R]`; between saves, its state may lag behind `log.step`.

    The batches of a single run are split over `num_devices`. A run in a population trains on one device, so that on a
    CPU its result is bitwise the same however many others train. `finish` sets `test_logits`, `f32[N,C]`, at
    temperature 1.
    """

    config: Config
    workdir: pathlib.Path
    rows: np.ndarray
    holdout: Examples
    store: Store
    state: TrainState
    log: RunLog
    is_finished: bool
    teacher: LoadedTeacher | None
    num_devices: int
    test_logits: np.ndarray | None = None

    @property
    def step(self) -> int:
        """The number of finished updates."""
        return self.log.step


def member_configs(config: Config, *, seeds: int = 0, folds: int = 0) -> dict[str, Config]:
    """Returns the configs of M seeds, or of K folds, keyed by member name.

    The first member has the seed of `config`; the others have the seeds that follow. Each fold holds out a different
    part of the training rows, instead of `data.holdout`. Members get no report and no demo page, because writing them
    would take longer than training; the commands `report` and `demo` write them on request.

    Raises:
      ConfigError: the last seed is too large, or the rows cannot be split into so many folds.
    """
    config = replace(config, train__driver="scan", train__report=False, train__demo=False)
    if not folds:
        return {f"seed-{seed}": replace(config, seed=seed) for seed in range(config.seed, config.seed + seeds)}
    return {
        f"fold-{k}": replace(config, seed=config.seed + k, data__folds=folds, data__fold=k, data__holdout=0)
        for k in range(folds)
    }


@contextlib.contextmanager
def open_member(
    config: Config,
    workdir: pathlib.Path,
    splits: Splits,
    *,
    fork: pathlib.Path | None = None,
    teacher: LoadedTeacher | None = None,
    in_population: bool = False,
) -> Iterator[Member]:
    """Claims a run's folder, and restores its newest checkpoint or starts a new run.

    Raises:
      UserError: the folder cannot be used or holds another run, or the rows cannot be split as the config says.
    """
    rows, holdout_rows = batches.rows_of(splits.train.label, config.data)
    num_devices = 1 if in_population else sharding.make_mesh(config.train.num_devices).size
    setup = setup_of(config, num_devices)
    is_primary = processes.is_primary()
    with contextlib.ExitStack() as stack:
        if is_primary:
            stack.enter_context(workdirs.claim(workdir))
        store = stack.enter_context(open_store(config, splits.fingerprint, workdir))
        found, skipped = store.restore_latest()
        for line in skipped:
            logger.warning("%s: %s", workdir, line)
        if found:
            check_origin(found.record["origin"], fork, teacher, setup, workdir)
            state, record = found.state, found.record
        else:
            state, source = initial_state(config, fork)
            origin = {"fork": source, "teacher": teacher and teacher.origin, "versions": versions(), "setup": setup}
            record = {"origin": origin}
        summary = finished_summary(config, record["step"], workdir) if found else {}
        if summary:
            announce_finished(config, workdir, summary)
        writes = is_primary and not summary
        if writes:
            if not found:  # the summary of a run whose checkpoints were deleted
                workdirs.remove(workdir / workdirs.SUMMARY)
            workdirs.write_text(workdir / workdirs.CONFIG, config.to_json())
        log = RunLog(config, workdir, record, learning_rate=jit_schedule(config.program), writes=writes)
        holdout = splits.train.select(holdout_rows)
        yield Member(config, workdir, rows, holdout, store, state, log, bool(summary), teacher, num_devices)


def setup_of(config: Config, num_devices: int) -> dict[str, str]:
    """Returns what else can change a result: settings that change how sums are rounded, and the user's own code."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)}
    return {
        "driver": config.train.driver,
        "devices": str(num_devices),
        **environment,
        **external.digests(config.program.code),
    }


@functools.lru_cache(maxsize=1)
def jit_schedule(program: Program) -> Any:
    """Compiles the learning-rate schedule for the log; evaluated op by op, it would take milliseconds per line."""
    return jax.jit(schedule(program.optimizer, program.num_steps, program.steps_per_epoch))


def finished_summary(config: Config, step: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the summary, written last, of a run that has no step left; an empty one if the run is not finished."""
    summary = workdirs.read_json(workdir / workdirs.SUMMARY)  # a damaged summary is written again
    is_whole = not any(mismatches(summary, _SUMMARY, workdirs.SUMMARY))
    return summary if step >= config.num_steps and is_whole and summary["steps"] == step else {}


def announce_finished(config: Config, workdir: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Logs the result of a finished run, and how to train further."""
    more = f"start another run with --fork={workdir}" if config.length_matters else "raise --config.train.epochs"
    what = f"{summary['epochs']} epochs, test accuracy {summary['test_accuracy']:.2%}"
    logger.info(
        "%s is finished: %s. To train further, %s; to train again, name another --workdir.", workdir, what, more
    )


def initial_state(config: Config, fork: pathlib.Path | None) -> tuple[TrainState, dict[str, Any] | None]:
    """Returns the initial state of a new run, and which run and step its weights are from, ready for JSON.

    Raises:
      WorkdirError: there is no checkpoint to fork, or its weights do not fit this config's network.
    """
    state = drivers.jit_init_state(config.program, rng.root_key(config.seed))
    if fork is None:
        return state, None
    try:
        source = checkpoint.load_run(fork)
    except WorkdirError as error:
        raise WorkdirError(f"--fork: {error}") from error
    weights = eval_variables(source.state)
    there = checkpoint.layout(weights)
    here = checkpoint.layout({"params": state.params, "batch_stats": state.batch_stats})
    differing = [name for name in there | here if there.get(name) != here.get(name)]
    if differing:
        lines = [f"  {name}: {there.get(name)} there, {here.get(name)} here" for name in differing]
        raise WorkdirError(
            f"--fork={fork}: its weights do not fit this config's network:\n" + "\n".join(lines) + "\nGive config.model"
            f" the values that it has in {fork / workdirs.CONFIG}."
        )
    ema = weights["params"] if config.optimizer.ema_decay else {}
    logger.info("starting from the weights of %s at step %d", fork, source.record["step"])
    return state.replace(**weights, ema=ema), {"workdir": str(fork.absolute()), "step": source.record["step"]}


def check_origin(
    origin: Mapping[str, Any],
    fork: pathlib.Path | None,
    teacher: LoadedTeacher | None,
    setup: dict[str, str],
    workdir: pathlib.Path,
) -> None:
    """Checks that a resumed run has the teacher of this command; warns if the fork, the versions or the setup differ.

    Raises:
      WorkdirError: `fork` is given, but the run began without one; or its teacher and `teacher` have different weights.
    """
    if fork and not origin["fork"]:
        raise WorkdirError(
            f"--fork={fork}: {workdir} holds a run that began without it; leave it out to continue that run, or name"
            " another --workdir"
        )
    if fork and os.path.realpath(fork) != os.path.realpath(origin["fork"]["workdir"]):
        source = origin["fork"]["workdir"]
        logger.warning("--fork=%s is not read: this run started from the weights of %s", fork, source)
    teachers = (origin.get("teacher"), teacher.origin if teacher else None)
    old, new = (f"{one['workdir']} (digest {one['digest'][:12]})" if one else "none" for one in teachers)
    if len({one and one["digest"] for one in teachers}) > 1:
        raise WorkdirError(
            f"{workdir}: holds a run with a different teacher: {old} then, {new} now; to continue that run, set"
            " config.train.teacher to the folder of its teacher ('' for none); or name another --workdir"
        )
    before, now = origin["versions"] | (origin.get("setup") or setup), versions() | setup
    differing = [name for name in before | now if before.get(name) != now.get(name)]
    if changed := [f"{name} {before.get(name)} -> {now.get(name)}" for name in differing]:
        logger.warning("this run began with another setup, so its result may differ: %s", ", ".join(changed))


def announce(members: Sequence[Member], splits: Splits) -> None:
    """Logs the network, the data and the folder of the runs that are about to be trained."""
    config, workdir, step = members[0].config, members[0].workdir, members[0].step
    if config.model.dtype != "float32" and jax.default_backend() == "cpu":
        logger.warning("config.model.dtype = %r is several times slower than 'float32' on a CPU", config.model.dtype)
    for message in config.unused():
        logger.warning("%s", message)
    is_fork = bool(members[0].log.origin["fork"])  # it begins with the averages of another run
    if members[0].state.batch_stats and NORM_MOMENTUM**config.num_steps > 0.05 and not is_fork:
        logger.warning(
            "batch norm's running averages need about 300 steps; after %d, the hold-out and test scores are too low:"
            " train for longer, or use smaller batches",
            config.num_steps,
        )
    logger.info(layer_table(layers(config.program, eval_variables(members[0].state))))
    logger.info(
        "%s (%s, fingerprint %s): %d rows to train on, %d held out, %d to test",
        splits.name, splits.source, splits.fingerprint[:12], config.num_train_rows, config.num_holdout_rows,
        len(splits.test.label),
    )  # fmt: skip
    if not config.data.folds and config.num_holdout_rows > config.num_train_rows:
        logger.warning(
            "config.data.holdout = %d holds out more rows than are left to train on", config.num_holdout_rows
        )
    if teacher := members[0].teacher:
        logger.info("learning from %(workdir)s (networks: %(networks)d, digest: %(digest).12s)", teacher.origin)
        doubts = [doubt for member in members for doubt in teacher_warnings(teacher, member.config, splits)]
        for doubt in dict.fromkeys(doubts):
            logger.warning("config.train.teacher = %r: %s", config.train.teacher, doubt)
    runs = str(workdir) if len(members) == 1 else f"{len(members)} runs in {workdir.parent}"
    if step:
        logger.info("resuming %s at step %d of %d", runs, step, config.num_steps)
    else:
        logger.info("training %d steps (epochs: %d) into %s", config.num_steps, config.train.epochs, runs)


def evaluate_holdout(member: Member) -> dict[str, Any] | None:
    """Evaluates a run on the rows that it holds out, if any, and logs the scores."""
    if not len(member.holdout.label):
        return None
    scores = evaluate(make_predictor(member.config, eval_variables(member.state)), member.holdout).scores()
    member.log.add_evaluation("holdout", **scores)
    return scores


def finish(member: Member, splits: Splits) -> None:
    """Evaluates a run on the whole test set, and writes its weights, demo page, report and, last, summary.

    If the process dies before the summary is written, a resumed run does all of this again, with the same result.

    Raises:
      WorkdirError: a file, or the last checkpoint (saved in the background), cannot be written.
    """
    config, workdir, log = member.config, member.workdir, member.log
    variables = eval_variables(member.state)
    predictor = calibrate(make_predictor(config, variables), member.holdout)
    logits = member_logits(predictor, splits.test.image)
    (member.test_logits,) = logits
    evaluation = evaluation_of(logits, splits.test.label, predictor.temperature)
    member.store.wait()
    log.add_evaluation("test", **evaluation.scores())
    if not processes.is_primary():
        return
    log.sync()
    save_weights(config, workdir, variables)
    summary = {
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "config": config.to_dict(),
        "seed": config.seed,
        "steps": log.step,
        "epochs": config.train.epochs,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(member.state.params)),
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_examples": evaluation.examples,
        **fit_of(predictor),
        "train_seconds": log.seconds,
        "images_per_second": config.num_train_rows * config.train.epochs / log.seconds,
        "restarts": log.restarts,
        **{name: log.origin.get(name) for name in ("fork", "teacher")},
        "num_devices": member.num_devices,
        "num_processes": jax.process_count(),
        "earlier_versions": log.versions[:-1],
        **provenance(),
    }
    name = f"{workdir.name}, " if workdir.parent.name == workdirs.MEMBERS else ""
    logger.info("%s%s: test %s, after %.1f s of training", name, splits.name, evaluation.line(), log.seconds)
    if config.train.demo:
        try:
            logger.info("draw digits: %s", demo.write_page(config, predictor, evaluation, splits, log.step, workdir))
        except ExportError as error:
            logger.warning("no demo page: %s", error)
    if config.train.report:
        run = Reported(config, predictor, splits, evaluation, log.snapshot()["log"], log.step, summary, summary["fork"])
        logger.info("report: %s", write_report(run, workdir))
    workdirs.write_text(workdir / workdirs.SUMMARY, json.dumps(summary, indent=2) + "\n")


def trained_member(member: Member, splits: Splits) -> TrainedMember:
    """Returns what the statistics need from a finished run; one that an earlier command finished is evaluated again."""
    variables, logits = eval_variables(member.state), member.test_logits
    if logits is None:
        (logits,) = member_logits(make_predictor(member.config, variables), splits.test.image)
    return TrainedMember(member.config, variables, logits)
