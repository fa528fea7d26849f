"""The state of a run and the pure functions that take it forward: from an image to a gradient to new weights."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mnist_flax import metrics, rng
from mnist_flax.config import IMAGE_SIZE, Config
from mnist_flax.data import batches
from mnist_flax.data.augment import augment
from mnist_flax.data.batches import Batch
from mnist_flax.data.splits import Examples
from mnist_flax.models.cnn import build, crop
from mnist_flax.optimizer import optimizer

Variables = dict[str, Any]  # what linen's `apply` takes: params and batch_stats


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries from step to step: arrays only.

    Attributes:
      step: `i32[]`, finished updates.
      params: the weights.
      batch_stats: running means and variances of batch norm; empty without it.
      opt_state: of the optax chain.
      ema: moving average of the weights; empty when `optimizer.ema_decay` is 0.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any


class StepMetrics(NamedTuple):
    """Sums over the examples of a batch, so that batches of unequal size add up.

    Attributes:
      loss: `f32[]`, in nats, label smoothing included.
      correct: `i32[]`.
      examples: `i32[]`.
    """

    loss: Array
    correct: Array
    examples: Array


def init_state(config: Config, key: Array) -> TrainState:
    """Draws the first weights.

    Args:
      config: of the run.
      key: its root key.
    """
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 1), jnp.uint8)
    variables = build(config).init(rng.stream(key, "init"), images)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer(config).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {},
    )


def forward(config: Config, variables: Variables, images: Array) -> Array:
    """Computes the logits as at test time, `u8[B,28,28,1] -> f32[B,C]`.

    Where `model.test_views` is 5 they are logarithms: of the mean of the probabilities of each image and of its shifts
    by a pixel up, down, left and right.
    """
    views = images[:, None]
    if config.model.test_views > 1:
        height, width = images.shape[1:3]
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
        views = jnp.stack([padded[:, i : i + height, j : j + width] for i, j in corners], 1)
    logits: Any = build(config).apply(variables, crop(config.model, views.reshape(-1, *images.shape[1:])))
    if config.model.test_views > 1:
        logits = jax.nn.log_softmax(logits).reshape(*views.shape[:2], -1)
        logits = jax.nn.logsumexp(logits, 1) - jnp.log(config.model.test_views)
    return logits


def eval_variables(state: TrainState) -> Variables:
    """Returns what `forward` wants: the averaged weights where there are any, else the weights."""
    return {"params": state.ema or state.params, "batch_stats": state.batch_stats}


def loss_fn(config: Config, params: Any, batch_stats: Any, batch: Batch, key: Array) -> tuple[Array, Any]:
    """Computes the mean loss of a batch in training.

    Args:
      config: of the run.
      params: the weights to differentiate by.
      batch_stats: running statistics before the batch.
      batch: augmented; places labelled `NO_LABEL` weigh nothing.
      key: for dropout.

    Returns:
      `f32[]` the loss, and beside it the sums of the batch and the statistics after it.
    """
    is_example = batch["label"] != batches.NO_LABEL
    logits, updates = build(config, train=True).apply(
        {"params": params, "batch_stats": batch_stats},
        crop(config.model, batch["image"]),
        is_example,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    losses = metrics.cross_entropy(logits, batch["label"], label_smoothing=config.train.label_smoothing)
    sums = StepMetrics(
        loss=jnp.sum(losses, where=is_example),
        correct=jnp.sum(metrics.correct(logits, batch["label"]), where=is_example, dtype=jnp.int32),
        examples=jnp.sum(is_example, dtype=jnp.int32),
    )
    return sums.loss / sums.examples, (sums, updates.get("batch_stats", {}))


def train_step(config: Config, state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, StepMetrics]:
    """Makes one update: augment, forward, loss, gradient, optimiser, moving average.

    Args:
      config: of the run.
      state: before the step.
      batch: `u8[B,28,28,1]` and `i32[B]`, with at least one example.
      key: the run's root key, the same at every call.

    Returns:
      The state after the step, and the metrics of the batch under the weights before it.
    """
    images = augment(config.augment, batch["image"], rng.stream(key, "augment", state.step))
    augmented: Batch = {"image": images, "label": batch["label"]}
    grads, (sums, batch_stats) = jax.grad(loss_fn, argnums=1, has_aux=True)(
        config, state.params, state.batch_stats, augmented, rng.stream(key, "dropout", state.step)
    )
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return (
        TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=moving_average(config.optimizer.ema_decay, state.ema, params, state.step),
        ),
        sums,
    )


def moving_average(decay: float, ema: Any, params: Any, step: Array) -> Any:
    """Takes the weights into their exponential moving average, which starts short so that the first weights fade.

    The decay grows as (1 + t) / (10 + t) up to its value (An et al., 2020).
    """
    if not decay:
        return ema
    t = step.astype(jnp.float32)
    return optax.incremental_update(params, ema, 1.0 - jnp.minimum(decay, (1.0 + t) / (10.0 + t)))


def train_steps(
    config: Config, state: TrainState, examples: Examples, order: Array, key: Array, num_steps: Array | int
) -> tuple[TrainState, StepMetrics]:
    """Makes `num_steps` updates within an epoch, or within several, all in one loop on the device.

    Args:
      config: of the run.
      state: before the first of them; `state.step` tells the place in the order.
      examples: the training split, on the device.
      order: `i32[S,B]`, of the epoch that `state.step` is in; or the orders of E epochs, `i32[E*S,B]`, the first of
        which has a number that E divides.
      key: the run's root key.
      num_steps: at most what is left of the order. A traced number serves any part of it with one program; a Python
        int gives the compiler the trip count.

    Returns:
      The state after them, and the metrics `[S]` of the order, filled at the places of these steps and 0 elsewhere.
    """
    length = len(order)

    def body(_: int, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
        state, history = carry
        place = state.step % length
        state, sums = train_step(config, state, batches.take(examples, order[place]), key)
        return state, jax.tree.map(lambda column, value: column.at[place].set(value), history, sums)

    empty = StepMetrics(
        loss=jnp.zeros(length),
        correct=jnp.zeros(length, jnp.int32),
        examples=jnp.zeros(length, jnp.int32),
    )
    return jax.lax.fori_loop(0, num_steps, body, (state, empty))


def train_epoch(
    config: Config, state: TrainState, examples: Examples, rows: Array, key: Array
) -> tuple[TrainState, StepMetrics]:
    """Trains one epoch over `rows`, from its first step to its last, in one loop on the device.

    Args:
      config: of the run.
      state: at the start of an epoch.
      examples: the training split, on the device.
      rows: `i32[R]`, the row numbers to train on.
      key: the run's root key.

    Returns:
      The state after the epoch, and the metrics `[S]` of its steps.
    """
    steps_per_epoch = -(-len(rows) // config.train.batch_size)
    order = batches.epoch_order(key, state.step // steps_per_epoch, rows, config.train.batch_size)
    return train_steps(config, state, examples, order, key, steps_per_epoch)


# The compiled handles. The state's memory is given over to the new state. The first weights are drawn once in a run: a
# program that is not optimised draws them in 10 ms and is compiled in 0.5 s, an optimised one takes 3 s to compile.
jit_init_state = jax.jit(init_state, static_argnames="config", compiler_options={"xla_backend_optimization_level": 0})
jit_train_step = jax.jit(train_step, static_argnames="config", donate_argnames="state")
jit_train_steps = jax.jit(train_steps, static_argnames="config", donate_argnames="state")
jit_train_epoch = jax.jit(train_epoch, static_argnames="config", donate_argnames="state")
jit_forward = jax.jit(forward, static_argnames="config")
