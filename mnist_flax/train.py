"""The loop: claims a workdir, goes on from its newest checkpoint, trains, logs, evaluates, saves."""

import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mnist_flax import batches, checkpoint, rng
from mnist_flax import workdir as workdirs
from mnist_flax.batches import Examples
from mnist_flax.config import IMAGE_SIZE, Config
from mnist_flax.data import Splits, follow, load_splits
from mnist_flax.evaluate import evaluate
from mnist_flax.logs import RunLog
from mnist_flax.model import build
from mnist_flax.provenance import provenance
from mnist_flax.signals import Interrupted, StopWish, stop_wish
from mnist_flax.step import (
    StepMetrics,
    TrainState,
    eval_variables,
    jit_init_state,
    jit_train_step,
    jit_train_steps,
)

logger = logging.getLogger(__name__)

# How long the device works on one call: the longest that the progress bar, a signal or a timed checkpoint waits.
DISPATCH_SECONDS = 0.5

Fetch = Callable[[], StepMetrics]  # waits for the metrics of some steps, `[n]`, and brings them to the host
Advance = Callable[[TrainState, int, int], tuple[TrainState, Fetch]]  # (state, step, n) -> n updates later


def fit(config: Config, workdir: pathlib.Path) -> TrainState:
    """Trains a run to its end, from wherever it is.

    Args:
      config: of the run; the dataset may turn out to be another one (`data.follow`).
      workdir: the run's folder; made if it is missing, resumed if it holds checkpoints.

    Returns:
      The state at the end.

    Raises:
      UserError: the data, the workdir or the config does not allow it; or the loss is no longer finite.
      Interrupted: a signal asked to stop; the state is saved.
    """
    workdirs.check(workdir)
    splits = load_splits(config)
    config = follow(config, splits)
    with (
        stop_wish() as wish,
        workdirs.claim(workdir),
        checkpoint.open_store(config, splits.fingerprint, workdir) as store,
    ):
        found, skipped = store.restore_latest()
        for line in skipped:
            logger.warning(line)
        summary = workdirs.read_json(workdir / workdirs.SUMMARY)
        if found and summary and found.record["step"] == summary["steps"] >= config.num_steps:
            logger.info(
                "%s is finished: %d epochs, test accuracy %.2f %%. To train further, raise --config.train.epochs (under"
                " a schedule that does not depend on it); to train anew, name another --workdir.",
                workdir, summary["epochs"], 100 * summary["test_accuracy"],
            )  # fmt: skip
            return found.state
        workdirs.write_text(workdir / workdirs.CONFIG, config.to_json())
        key = rng.root_key(config.seed)
        state = found.state if found else jit_init_state(config, key)
        log = RunLog(config, workdir, found.record if found else {})
        try:
            announce(config, splits, workdir, log.step)
            state = train(config, state, splits, key, log=log, store=store, wish=wish)
            finish(config, state, splits, workdir, log)
        finally:
            log.close()
    return state


def announce(config: Config, splits: Splits, workdir: pathlib.Path, step: int) -> None:
    """Tells what is about to be trained, on what, and where it goes."""
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 1), jnp.uint8)
    style = {"width": 100, "force_terminal": False, "no_color": True}
    table = nn.tabulate(build(config), rng.root_key(0), compute_flops=True, console_kwargs=style)(images)
    logger.info(table.strip("\n"))
    logger.info(
        "%s (%s, fingerprint %s): %d rows to train on, %d held out, %d to test",
        splits.name, splits.source, splits.fingerprint[:12], config.num_train, config.data.holdout,
        len(splits.test.label),
    )  # fmt: skip
    if step:
        logger.info("resuming %s at step %d of %d", workdir, step, config.num_steps)
    else:
        logger.info("training %d steps (%d epochs) into %s", config.num_steps, config.train.epochs, workdir)


def scan_driver(config: Config, state: TrainState, examples: Examples, rows: np.ndarray, key: Array) -> Advance:
    """Compiles the loop on the device: the data lie there, and one call makes any number of steps of an epoch."""
    examples, rows = jax.device_put((examples, rows))
    batch_size, steps_per_epoch = config.train.batch_size, config.steps_per_epoch
    orders: dict[int, Array] = {}

    def order_of(epoch: int) -> Array:
        if epoch not in orders:
            orders.clear()
            orders[epoch] = batches.jit_epoch_order(key, jax.device_put(np.int32(epoch)), rows, batch_size)
        return orders[epoch]

    compiled = jit_train_steps.lower(config, state, examples, order_of(0), key, jax.device_put(np.int32(0))).compile()

    def advance(state: TrainState, step: int, num_steps: int) -> tuple[TrainState, Fetch]:
        epoch, start = divmod(step, steps_per_epoch)
        state, sums = compiled(state, examples, order_of(epoch), key, jax.device_put(np.int32(num_steps)))
        return state, lambda: jax.tree.map(lambda column: column[start : start + num_steps], jax.device_get(sums))

    return advance


def stream_driver(config: Config, state: TrainState, examples: Examples, rows: np.ndarray, key: Array) -> Advance:
    """Compiles one step: each batch comes from the host, so the data need not fit on the device."""
    step = int(jax.device_get(state.step))
    stream = batches.stream(examples, jax.device_put(rows), key, step, config.train.batch_size)
    batch = jax.tree.map(
        lambda column: jax.ShapeDtypeStruct((config.train.batch_size, *column.shape[1:]), column.dtype), examples
    )
    compiled = jit_train_step.lower(config, state, batch._asdict(), key).compile()

    def advance(state: TrainState, step: int, num_steps: int) -> tuple[TrainState, Fetch]:
        del step  # the stream is there already
        sums = []
        for _ in range(num_steps):
            state, of_step = compiled(state, next(stream), key)
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
    rows, holdout_rows = batches.split_rows(splits.train.label, config.data.num_train, config.data.holdout)
    holdout = Examples(splits.train.image[holdout_rows], splits.train.label[holdout_rows])
    step = log.step
    if step >= config.num_steps:
        return state
    started = time.perf_counter()
    advance = DRIVERS[config.train.driver](config, state, Examples(*splits.train), rows, key)
    logger.info("compiled in %.1f s", time.perf_counter() - started)

    num_steps = 1  # of the next call; grows until a call takes DISPATCH_SECONDS
    under_way: list[Fetch] = []
    last_save = mark = time.perf_counter()
    while step < config.num_steps:
        target = min(step + num_steps, next_stop(config, step))
        with jax.transfer_guard("disallow"):
            state, fetch = advance(state, step, target - step)
        under_way.append(fetch)
        step = target
        now = time.perf_counter()
        timed_save = 0 < config.checkpoint.every_seconds <= now - last_save
        pause = step == next_stop(config, step - 1) or timed_save or wish.signum is not None
        # While the device works on this call, the host reads the metrics of the one before.
        while len(under_way) > (0 if pause else 1):
            sums = under_way.pop(0)()
            now, since = time.perf_counter(), mark
            mark = now
            log.steps(sums, now - since)
            rate = len(sums.loss) / max(now - since, 1e-9)
            num_steps = max(1, min(2 * num_steps, int(rate * DISPATCH_SECONDS)))
        if not pause:
            continue
        scores = None
        if step % config.steps_per_epoch == 0:
            if len(holdout_rows):
                evaluation = evaluate(config, eval_variables(state), holdout)
                scores = {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
                log.evaluation("holdout", evaluation)
            log.epoch_line()
        if is_save_due(config, step) or timed_save or wish.signum is not None:
            store.save(state, log.snapshot(), holdout=scores)
            last_save = time.perf_counter()
        if wish.signum is not None:
            store.wait()
            raise Interrupted(
                f"stopped at step {step} of {config.num_steps}; the state is saved: the same command goes on from here",
                wish.signum,
            )
        mark = time.perf_counter()
    return state


def next_stop(config: Config, step: int) -> int:
    """Returns the first step after `step` at which the host has something to do: an epoch's end, a checkpoint."""
    epoch_end = (step // config.steps_per_epoch + 1) * config.steps_per_epoch
    every = config.checkpoint.every_steps
    return min(epoch_end, (step // every + 1) * every) if every else epoch_end


def is_save_due(config: Config, step: int) -> bool:
    """Returns whether the cadence by epochs or steps, or the end of the run, asks for a checkpoint at `step`."""
    epoch, rest = divmod(step, config.steps_per_epoch)
    every_epochs, every_steps = config.checkpoint.every_epochs, config.checkpoint.every_steps
    return (
        step == config.num_steps
        or (every_epochs > 0 and rest == 0 and epoch % every_epochs == 0)
        or (every_steps > 0 and step % every_steps == 0)
    )


def finish(config: Config, state: TrainState, splits: Splits, workdir: pathlib.Path, log: RunLog) -> dict[str, Any]:
    """Reads the test set, once and whole, and writes what is left of a run: its weights and its summary."""
    variables = eval_variables(state)
    evaluation = evaluate(config, variables, Examples(*splits.test))
    log.evaluation("test", evaluation)
    checkpoint.save_weights(config, workdir, variables)
    examples = config.num_train * config.train.epochs
    summary = {
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "config": config.to_dict(),
        "seed": config.seed,
        "steps": log.step,
        "epochs": config.train.epochs,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_examples": evaluation.examples,
        "train_seconds": log.seconds,
        "images_per_second": examples / log.seconds,
        "restarts": log.restarts,
        **provenance(),
    }
    workdirs.write_text(workdir / workdirs.SUMMARY, json.dumps(summary, indent=2) + "\n")
    logger.info(
        "%s: test accuracy %.2f %% (%d of %d right), loss %.4f, after %.1f s of training",
        splits.name, 100 * evaluation.accuracy, round(evaluation.accuracy * evaluation.examples), evaluation.examples,
        evaluation.loss, log.seconds,
    )  # fmt: skip
    return summary
