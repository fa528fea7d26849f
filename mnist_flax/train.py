"""The loop: claims a workdir, goes on from its newest checkpoint, trains, logs, evaluates, saves."""

import contextlib
import json
import logging
import pathlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from mnist_flax import rng, sharding
from mnist_flax.analysis.evaluation import Evaluation, evaluate, make_predictor
from mnist_flax.analysis.report.write import write_report
from mnist_flax.config import IMAGE_SIZE, Config
from mnist_flax.data import batches
from mnist_flax.data.datasets import Examples
from mnist_flax.data.load import Splits, follow, load_splits
from mnist_flax.errors import WorkdirError
from mnist_flax.models.cnn import build
from mnist_flax.run import checkpoint, processes
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.log import RunLog, refuse_non_finite
from mnist_flax.run.provenance import provenance, versions
from mnist_flax.run.signals import SIGNALS, Interrupted, StopWish, stop_wish
from mnist_flax.step import (
    StepMetrics,
    TrainState,
    eval_variables,
    jit_init_state,
    train_step,
    train_steps,
)

logger = logging.getLogger(__name__)

# How long the device works on one call: the longest that the progress bar, a signal or a timed checkpoint waits.
DISPATCH_SECONDS = 0.5

Fetch = Callable[[], StepMetrics]  # waits for the metrics of some steps, `[n]`, and brings them to the host
Advance = Callable[[TrainState, int, int], tuple[TrainState, Fetch]]  # (state, step, n) -> n updates later


def fit(config: Config, workdir: pathlib.Path, *, fork: pathlib.Path | None = None) -> TrainState:
    """Trains a run to its end, from wherever it is.

    Args:
      config: of the run; the dataset may turn out to be another one (`data.follow`).
      workdir: the run's folder; made if it is missing, resumed if it holds checkpoints.
      fork: the folder of another run: a new run starts with the weights of that one's latest checkpoint (and its
        running statistics and averages), but at step 0 and with a fresh optimiser. When the run is resumed, nothing is
        read there any more.

    Returns:
      The state at the end.

    Raises:
      UserError: the data, the workdir or the config does not allow it; or the loss is no longer finite.
      Interrupted: a signal asked to stop; the state is saved.

    Several processes, once they have joined (`processes.join`), call this with the same arguments, and see the same
    folder; the primary claims it, logs and writes.
    """
    workdirs.check(workdir)
    if (workdir / workdirs.MEMBERS).exists():
        raise WorkdirError(
            f"--workdir={workdir}: holds a population; name another folder, or go on with it by"
            " python -m mnist_flax.population"
        )
    mesh_of(config)  # before anything is read or written
    splits = load_splits(config)
    config = follow(config, splits)
    is_primary = processes.is_primary()
    with (
        stop_wish(signals_to_hear()) as wish,
        workdirs.claim(workdir) if is_primary else contextlib.nullcontext(),
        checkpoint.open_store(config, splits.fingerprint, workdir) as store,
        processes.bound_together(),
    ):
        found, skipped = store.restore_latest()
        for line in skipped:
            logger.warning(line)
        if found:
            check_origin(found.record["origin"], fork, workdir)
            state, record = found.state, found.record
        else:
            state, origin = begin(config, fork)
            record = {"origin": origin}
        if found and is_finished(config, found.record, workdir):
            return state
        if is_primary:
            workdirs.write_text(workdir / workdirs.CONFIG, config.to_json())
        log = RunLog(config, workdir if is_primary else None, record, quiet=not is_primary)
        try:
            if is_primary:
                announce(config, splits, workdir, log.step)
            state = train(config, state, splits, rng.root_key(config.seed), log=log, store=store, wish=wish)
            finish(config, state, splits, workdir, log=log, store=store)
            processes.agree(0)  # none leaves before the primary has written all
        finally:
            log.close()
    return state


def is_finished(config: Config, record: dict[str, Any], workdir: pathlib.Path) -> bool:
    """Returns whether nothing is left to do after a checkpoint, and if so, says how to train further.

    The summary is what a run writes last.
    """
    summary = workdirs.read_json(workdir / workdirs.SUMMARY)
    if record["step"] < config.num_steps or not isinstance(summary, dict) or summary.get("steps") != record["step"]:
        return False
    logger.info(
        "%s is finished: %s epochs, test accuracy %.2f %%. To train further, raise --config.train.epochs (under a"
        " schedule that does not depend on it); to train anew, name another --workdir.",
        workdir, summary["epochs"], 100 * summary["test_accuracy"],
    )  # fmt: skip
    return True


def begin(config: Config, fork: pathlib.Path | None) -> tuple[TrainState, dict[str, Any]]:
    """Returns the first state of a new run, and how it begins, as JSON.

    Raises:
      WorkdirError: there is no checkpoint to fork, or its weights do not fit this config's network.
    """
    state = jit_init_state(config, rng.root_key(config.seed))
    origin: dict[str, Any] = {"fork": None, "versions": versions()}
    if fork is None:
        return state, origin
    source = checkpoint.load_run(fork)
    weights = {"params": source.state.params, "batch_stats": source.state.batch_stats}
    there = checkpoint.layout(weights)
    here = checkpoint.layout({"params": state.params, "batch_stats": state.batch_stats})
    differing = [name for name in there | here if there.get(name) != here.get(name)]
    if differing:
        lines = [f"  {name}: {there.get(name)} there, {here.get(name)} here" for name in differing]
        raise WorkdirError(
            f"--fork={fork}: its weights do not fit this config's network:\n" + "\n".join(lines) + "\nGive config.model"
            f" the values that it has in {fork / workdirs.CONFIG}."
        )
    # A moving average goes on from theirs, or starts at the weights; it must not share memory with them.
    ema = jax.tree.map(jnp.copy, source.state.ema or source.state.params) if config.optimizer.ema_decay else {}
    origin["fork"] = {"workdir": str(fork), "step": source.record["step"]}
    logger.info("starting with the weights of %s at step %d", fork, source.record["step"])
    return state.replace(**weights, ema=ema), origin


def check_origin(origin: Mapping[str, Any], fork: pathlib.Path | None, workdir: pathlib.Path) -> None:
    """Compares how a run began with how this command would begin it, and warns of other versions.

    Raises:
      WorkdirError: it would be a fork, and was none.
    """
    if fork and not origin["fork"]:
        raise WorkdirError(
            f"--fork={fork}: {workdir} holds a run that began without it; leave it out to go on with that run, or name"
            " another --workdir"
        )
    there, here = origin["versions"], versions()
    changed = [
        f"{name} {there.get(name)} -> {here.get(name)}" for name in there | here if there.get(name) != here.get(name)
    ]
    if changed:
        logger.warning("not the versions that this run began with, so its last bits may differ: %s", ", ".join(changed))


def mesh_of(config: Config) -> Mesh:
    """Returns the devices to train on.

    Raises:
      ConfigError: there are not as many, or a batch cannot be split evenly over them.
    """
    mesh = sharding.make_mesh(config.train.num_devices)
    sharding.refuse_uneven(mesh, config.train.batch_size)
    return mesh


def warn_of_slow_dtype(config: Config) -> None:
    """Says so when the type of the products is not one that the platform is fast at."""
    if config.model.dtype != "float32" and jax.default_backend() == "cpu":
        logger.warning(
            "config.model.dtype = %r: is several times slower than 'float32' on a CPU, and gains nothing there",
            config.model.dtype,
        )


def announce(config: Config, splits: Splits, workdir: pathlib.Path, step: int) -> None:
    """Tells what is about to be trained, on what, and where it goes."""
    warn_of_slow_dtype(config)
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 1), jnp.uint8)
    style = {"width": 100, "force_terminal": False, "no_color": True}
    table = nn.tabulate(build(config), rng.root_key(0), compute_flops=True, console_kwargs=style)(images)
    logger.info(table.strip("\n"))
    logger.info(
        "%s (%s, fingerprint %s): %d rows to train on, %d held out, %d to test",
        splits.name, splits.source, splits.fingerprint[:12], config.num_train, config.num_holdout,
        len(splits.test.label),
    )  # fmt: skip
    if step:
        logger.info("resuming %s at step %d of %d", workdir, step, config.num_steps)
    else:
        logger.info("training %d steps (%d epochs) into %s", config.num_steps, config.train.epochs, workdir)


def scan_driver(config: Config, state: TrainState, examples: Examples, rows: np.ndarray, key: Array) -> Advance:
    """Compiles the loop on the device: the data lie there, and one call makes any steps up to the next common stop."""
    mesh = mesh_of(config)
    everywhere, order_split = sharding.replicated(mesh), sharding.split(mesh, axis=1)
    num_epochs = max(1, config.train.epochs_per_dispatch)  # that one order covers
    rows_there = jax.device_put(rows)
    orders: dict[int, Array] = {}

    def order_of(part: int) -> Array:
        if part not in orders:
            orders.clear()
            # Drawn on one device and split afterwards: random values may depend on how their computation is split.
            order = batches.epochs_order(key, part * num_epochs, num_epochs, rows_there, config.train.batch_size)
            orders[part] = sharding.place(order, order_split)
        return orders[part]

    state, examples, root = sharding.place((state, examples, key), everywhere)
    program = jax.jit(train_steps, static_argnames="config", donate_argnames="state", out_shardings=everywhere)
    none = sharding.place(np.int32(0), everywhere)
    compiled = program.lower(config, state, examples, order_of(0), root, none).compile()

    def advance(state: TrainState, step: int, num_steps: int) -> tuple[TrainState, Fetch]:
        part, start = divmod(step, num_epochs * config.steps_per_epoch)
        state, count = sharding.place((state, np.int32(num_steps)), everywhere)
        state, sums = compiled(state, examples, order_of(part), root, count)
        return state, lambda: jax.tree.map(lambda column: column[start : start + num_steps], jax.device_get(sums))

    return advance


def stream_driver(config: Config, state: TrainState, examples: Examples, rows: np.ndarray, key: Array) -> Advance:
    """Compiles one step: each batch comes from the host, so the data need not fit on the device."""
    mesh = mesh_of(config)
    everywhere, batch_split = sharding.replicated(mesh), sharding.split(mesh)
    step, batch_size = int(jax.device_get(state.step)), config.train.batch_size
    stream = batches.stream(examples, jax.device_put(rows), key, step, batch_size, batch_split)
    batch = jax.tree.map(
        lambda column: jax.ShapeDtypeStruct((batch_size, *column.shape[1:]), column.dtype, sharding=batch_split),
        examples,
    )
    state, root = sharding.place((state, key), everywhere)
    program = jax.jit(train_step, static_argnames="config", donate_argnames="state", out_shardings=everywhere)
    compiled = program.lower(config, state, batch._asdict(), root).compile()

    def advance(state: TrainState, step: int, num_steps: int) -> tuple[TrainState, Fetch]:
        del step  # the stream is there already
        state, sums = sharding.place(state, everywhere), []
        for _ in range(num_steps):
            state, of_step = compiled(state, next(stream), root)
            sums.append(of_step)
        return state, lambda: jax.tree.map(lambda *values: np.stack(values), *jax.device_get(sums))

    return advance


DRIVERS = {"scan": scan_driver, "stream": stream_driver}


def train(
    config: Config,
    state: TrainState,
    splits: Splits,
    key: Array,
    *,
    log: RunLog,
    store: checkpoint.Store,
    wish: StopWish,
) -> TrainState:
    """Makes all the updates that are left, and at every epoch's end evaluates on the rows held out, and saves.

    Raises:
      NonFiniteLossError: nothing is saved after the last good checkpoint.
      Interrupted: a signal asked to stop; the state is saved.
    """
    rows, holdout_rows = batches.rows_of(splits.train.label, config.data)
    holdout = Examples(splits.train.image[holdout_rows], splits.train.label[holdout_rows])
    step = log.step
    if step >= config.num_steps:
        return state
    started = time.perf_counter()
    advance = DRIVERS[config.train.driver](config, state, splits.train, rows, key)
    logger.info("compiled in %.1f s", time.perf_counter() - started)

    (signum,) = processes.agree(wish.signum or 0)
    if signum:
        raise stopped(config, step, signum)
    num_steps, rate = first_num_steps(config), 0.0  # of the next call; of the last that was measured, in steps a second
    under_way: list[Fetch] = []
    last_save = mark = time.perf_counter()
    call = 0
    while step < config.num_steps:
        target = min(step + num_steps, next_stop(config, step))
        with jax.transfer_guard("disallow"):
            state, fetch = advance(state, step, target - step)
        under_way.append(fetch)
        step = target
        is_late = 0 < config.checkpoint.every_seconds <= time.perf_counter() - last_save
        # No process has the same clock or hears the same signals, but all have to do the same.
        num_steps, timed_save, signum = processes.agree(
            next_num_steps(config, num_steps, rate), is_late, wish.signum or store.preemption(call)
        )
        call += 1
        pause = step == next_stop(config, step - 1) or timed_save or signum
        # While the device works on this call, the host reads the metrics of the one before.
        while len(under_way) > (0 if pause else 1):
            sums = under_way.pop(0)()
            now, since = time.perf_counter(), mark
            mark = now
            log.steps(sums, now - since)
            rate = len(sums.loss) / max(now - since, 1e-9)
        if not pause:
            continue
        refuse_spoilt(state, step)
        scores = None
        if step % config.steps_per_epoch == 0:
            if len(holdout_rows):
                scores = judge(config, state, holdout)
                log.evaluation("holdout", **scores)
            log.epoch_line()
        (signum,) = processes.agree(signum or wish.signum or 0)
        if is_save_due(config, step) or timed_save or signum:
            store.save(state, log.snapshot(), holdout=scores)
            last_save = time.perf_counter()
        if signum:
            store.wait()
            raise stopped(config, step, signum)
        mark = time.perf_counter()
    return state


def judge(config: Config, state: TrainState, examples: Examples) -> dict[str, Any]:
    """Evaluates on some examples, for the log."""
    return scores_of(evaluate(make_predictor(config, eval_variables(state)), examples))


def scores_of(evaluation: Evaluation) -> dict[str, Any]:
    """Returns loss, accuracy and number of examples: what the log holds of an evaluation."""
    return {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "examples": evaluation.examples}


def refuse_spoilt(state: TrainState, step: int) -> None:
    """Stops before weights are saved with which the next loss would not be finite, though the last one was.

    Raises:
      NonFiniteLossError: a weight, a running statistic or an average is NaN or infinite.
    """
    for leaf in jax.tree.leaves(jax.device_get((state.params, state.batch_stats, state.ema))):
        refuse_non_finite(float(np.max(np.abs(leaf))), f"the largest weight after step {step}")


def signals_to_hear() -> Sequence[signal.Signals]:
    """Returns the signals that ask to stop; where several processes run, JAX hears SIGTERM (`Store.preemption`)."""
    return SIGNALS if jax.process_count() == 1 else [signal.SIGINT]


def stopped(config: Config, step: int, signum: int) -> Interrupted:
    """Returns what ends the program when a signal asked for it and `step` is saved, or none was made."""
    message = f"stopped at step {step} of {config.num_steps}; nothing is lost: the same command goes on from here"
    return Interrupted(message, signum)


def first_num_steps(config: Config) -> int:
    """Returns how many steps the first call makes, at most: one, or all that `next_stop` lets it."""
    return config.num_steps if config.train.epochs_per_dispatch else 1


def next_num_steps(config: Config, num_steps: int, rate: float) -> int:
    """Returns how many steps the next call makes, at most: up to twice as many, until it takes `DISPATCH_SECONDS`.

    Args:
      config: of the run; if it says how many epochs a call makes, it is those.
      num_steps: of the last call.
      rate: measured, in steps a second.
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
    epoch, rest = divmod(step, config.steps_per_epoch)
    every_epochs, every_steps = config.checkpoint.every_epochs, config.checkpoint.every_steps
    return (
        step == config.num_steps
        or (every_epochs > 0 and rest == 0 and epoch % every_epochs == 0)
        or (every_steps > 0 and step % every_steps == 0)
    )


def finish(
    config: Config, state: TrainState, splits: Splits, workdir: pathlib.Path, *, log: RunLog, store: checkpoint.Store
) -> None:
    """Reads the test set, once and whole, and writes what is left of a run: its weights, summary and report.

    Raises:
      WorkdirError: the last checkpoint, which was being written meanwhile, cannot be.
    """
    variables = eval_variables(state)
    evaluation = evaluate(make_predictor(config, variables), splits.test)
    scores = scores_of(evaluation)
    store.wait()
    log.evaluation("test", **scores)
    if not processes.is_primary():
        return
    variables = jax.device_get(variables)  # from here on the primary is alone
    log.sync()
    checkpoint.save_weights(config, workdir, variables)
    summary = {
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "config": config.to_dict(),
        "seed": config.seed,
        "steps": log.step,
        "epochs": config.train.epochs,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "test_accuracy": scores["accuracy"],
        "test_loss": scores["loss"],
        "test_examples": scores["examples"],
        "train_seconds": log.seconds,
        "images_per_second": config.num_train * config.train.epochs / log.seconds,
        "restarts": log.restarts,
        "fork": log.origin["fork"],
        "num_devices": sharding.make_mesh(config.train.num_devices).size,
        "num_processes": jax.process_count(),
        **provenance(),
    }
    workdirs.write_text(workdir / workdirs.SUMMARY, json.dumps(summary, indent=2) + "\n")
    logger.info(
        "%s: test accuracy %.2f %% (%d of %d right), loss %.4f, after %.1f s of training",
        splits.name, 100 * scores["accuracy"], round(scores["accuracy"] * scores["examples"]), scores["examples"],
        scores["loss"], log.seconds,
    )  # fmt: skip
    if config.train.report:
        page = write_report(
            config,
            make_predictor(config, variables),
            records=log.snapshot()["log"],
            splits=splits,
            evaluation=evaluation,
            step=log.step,
            summary=summary,
            workdir=workdir,
        )
        logger.info("report: %s", page)
