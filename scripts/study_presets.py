"""Trains variants of a preset and scores them on hold-out rows; the test set is never used.

Each finished run appends one JSON line: the fields that differ from the preset, and its errors, loss and calibration.

    python scripts/study_presets.py --jobs=jobs.jsonl --output=scripts/results/study_presets.jsonl

A job is a JSON object such as {"preset": "default", "seed": 1, "train__label_smoothing": 0.0}. "block": 0 to 5 holds
out a sixth of the file, in order: rows 0 to 9,999, and so on. The optimizer `lookahead` exists only here: it is Muon
with lookahead.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from mnist_flax import cli, drivers, preset, rng
from mnist_flax.analysis.calibration import calibration_scores, fit_temperature
from mnist_flax.analysis.evaluation import make_predictor, predict_logits
from mnist_flax.config import Config, replace
from mnist_flax.data import batches
from mnist_flax.data.load import load_splits
from mnist_flax.data.splits import Splits
from mnist_flax.distillation import load_teacher
from mnist_flax.errors import UserError
from mnist_flax.optimizer import OPTIMIZERS, Optimizer
from mnist_flax.run import compilation
from mnist_flax.run.provenance import provenance
from mnist_flax.step import eval_variables

BLOCKS = np.arange(60_000, dtype=np.int32).reshape(6, 10_000)


class LookaheadState(NamedTuple):
    """The state of the inner rule, the slow weights, and the number of updates, `i32[]`."""

    inner: Any
    slow: Any
    num_updates: jax.Array


def lookahead(inner: optax.GradientTransformation, every: int = 5, pull: float = 0.5) -> optax.GradientTransformation:
    """Zhang et al. (2019): after every few updates, the weights return half of the way to where they were before."""

    def update(grads: Any, state: LookaheadState, params: Any = None) -> tuple[Any, LookaheadState]:
        updates, inner_state = inner.update(grads, state.inner, params)
        num_updates = state.num_updates + 1
        is_due = num_updates % every == 0
        fast = optax.apply_updates(params, updates)
        slow = jax.tree.map(lambda old, new: jnp.where(is_due, old + pull * (new - old), old), state.slow, fast)
        to_slow = jax.tree.map(lambda old, new, step: jnp.where(is_due, new - old, step), params, slow, updates)
        return to_slow, LookaheadState(inner_state, slow, num_updates)

    return optax.GradientTransformation(
        lambda params: LookaheadState(inner.init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32)),
        update,
    )


OPTIMIZERS["lookahead"] = Optimizer(
    lambda config, rate: lookahead(OPTIMIZERS["muon"].make(config, rate)), OPTIMIZERS["muon"].fields
)


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes errors, loss and calibration, without and with temperature scaling.

    The temperature is fitted on each half of the rows and applied to the other half.
    """
    halves = (slice(0, None, 2), slice(1, None, 2))
    fitted = [fit_temperature(logits[half], labels[half]) for half in halves]
    scaled = logits.copy()
    scaled[halves[0]] /= fitted[1]
    scaled[halves[1]] /= fitted[0]
    result = {"errors": int((logits.argmax(1) != labels).sum()), "temperature": float(np.mean(fitted))}
    for suffix, values in (("", logits), ("_scaled", scaled)):
        result |= {name + suffix: value for name, value in calibration_scores(values, labels).items()}
    return {name: round(value, 5) for name, value in result.items()}


def run(config: Config, splits: Splits, block: int | None) -> dict[str, Any]:
    """Trains one variant, and scores its last step on the rows that the config or `block` holds out."""
    rows, held = batches.rows_of(splits.train.label, config.data)
    if block is not None:
        rows, held = np.setdiff1d(np.r_[rows, held], BLOCKS[block]).astype(rows.dtype), BLOCKS[block]
        if len(rows) != config.num_train_rows:
            raise UserError("a block of 10,000 rows needs data.holdout = 10000, and all 60,000 rows in use")
    teacher = load_teacher(config)
    job = drivers.Job(config.program, [config.seed], [rows], splits.train, teacher=teacher and teacher.arrays)
    states = drivers.stack([drivers.jit_init_state(config.program, rng.root_key(config.seed))], job)
    advance = drivers.compile_driver("scan", job, states)
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(config.train.epochs):
        states, _ = advance(states, config.steps_per_epoch)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    variables = eval_variables(jax.tree.map(lambda leaf: leaf[0], states))
    predictor = make_predictor(config, variables)
    images, labels = splits.train.image[held], splits.train.label[held]
    five = predict_logits(dataclasses.replace(predictor, views=5), images)
    return {
        "holdout": len(held),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "one": scores(predict_logits(dataclasses.replace(predictor, views=1), images), labels),
        "five": scores(five, labels),
        "wrong_rows": held[five.argmax(1) != labels].tolist(),  # in the official file, with five views
        "seconds": round(seconds),
        "cpu_seconds": round(cpu),
    }


def main(_: Sequence[str]) -> None:
    """Runs the jobs in a file one after the other; the file may grow in the meantime."""
    jobs, output = pathlib.Path(flags.FLAGS.jobs), pathlib.Path(flags.FLAGS.output)
    compilation.keep_programs()
    done = 0
    while len(lines := jobs.read_text().splitlines()) > done:
        try:
            job = json.loads(lines[done])
        except ValueError as error:
            message = f"--jobs={jobs}: line {done + 1} is not a JSON object; the jobs before it are done"
            raise UserError(message) from error
        done += 1
        fields = {
            "data__holdout": 10_000,
            "data__on_missing": "error",
            **{name: value for name, value in job.items() if name not in ("preset", "block")},
        }
        config = replace(preset.load_config(job["preset"]), **fields)
        made = provenance()
        result = {**job, **run(config, load_splits(config.data), job.get("block")), **made}
        with output.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("jobs", None, "a file with one JSON object for each run", required=True)
    flags.DEFINE_string("output", None, "the file that the results are appended to", required=True)
    cli.run(main)
