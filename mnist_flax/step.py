"""The state of a run and the pure functions that advance it: from an image to a gradient to new weights."""

import functools
import logging
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mnist_flax import rng
from mnist_flax.config import Program
from mnist_flax.data import batches
from mnist_flax.data.augment import augment
from mnist_flax.data.registry import IMAGE_SIZE
from mnist_flax.data.splits import Examples, check_images
from mnist_flax.errors import ConfigError
from mnist_flax.external import is_external, naming_the_line
from mnist_flax.logged import METRICS, StepView
from mnist_flax.losses import LOSSES
from mnist_flax.network import init_variables
from mnist_flax.optimizer import optimizer

logger = logging.getLogger(__name__)

Variables = dict[str, Any]  # what linen's `apply` takes: params and batch_stats
Metrics = dict[str, Array]  # sums over examples; dividing by `examples` gives the means


class TrainState(flax.struct.PyTreeNode):
    """Everything that a run carries from step to step, as arrays.

    Attributes:
      step: `i32[]`, finished updates.
      params: the weights.
      batch_stats: running means and variances of batch norm; empty without it.
      opt_state: the state of the optax chain.
      ema: moving average of the weights; empty when `optimizer.ema_decay` is 0.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any


class Teacher(flax.struct.PyTreeNode):
    """Trained networks whose mean probabilities a student learns, passed to each step as an argument.

    Attributes:
      members: the variables of M networks, stacked: each leaf has a leading axis M.
      temperature: `f32[]`, which divides the log of the mean probabilities.
      program: the program of the networks; static.
    """

    members: Any
    temperature: Any
    program: Program = flax.struct.field(pytree_node=False)


_RESERVED = ("step", "epoch", "split", "seconds", "learning_rate")  # the keys of a log line besides the metrics
_BUILT_IN = ("loss", "accuracy", "examples")  # the metrics that the rest of the package reads


def scale_pixels(program: Program, images: Array) -> Array:
    """Turns grey values into the network's input, `u8[B,H,W,1] -> f32[B,H,W,1]`."""
    return (images.astype(jnp.float32) / 255.0 - program.model.pixel_mean) / program.model.pixel_std


def crop(program: Program, images: Array) -> Array:
    """Cuts off the pixels that no logit depends on, `u8[B,28,28,1] -> u8[B,h,h,1]`.

    This saves a sixth of the arithmetic of the classic networks.
    """
    size = program.model.seen_size(images.shape[1])
    return images[:, :size, :size]


def init_state(program: Program, key: Array) -> TrainState:
    """Returns the initial state, with weights drawn from `key`, the run's root key.

    Raises:
      ConfigError: the network cannot be used; see `init_variables`.
    """
    variables = init_variables(program, rng.stream(key, "init"))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=_optimizer(program).init(params),
        # A copy, because both are donated to the next step, and a buffer can be donated only once.
        ema=jax.tree.map(jnp.copy, params) if program.optimizer.ema_decay else {},
    )


def state_shapes(program: Program) -> TrainState:
    """Returns the shape and dtype of every array of a state, without computing anything."""
    shapes: TrainState = jax.eval_shape(lambda: init_state(program, rng.root_key(0)))
    return shapes


def _optimizer(program: Program) -> optax.GradientTransformation:
    return optimizer(program.optimizer, program.num_steps, program.steps_per_epoch)


def forward(program: Program, variables: Variables, images: Array) -> Array:
    """Computes the logits in evaluation mode, `u8[B,28,28,1] -> f32[B,C]`."""
    module = program.model.module(program.num_classes)
    logits: Any = module.apply(variables, scale_pixels(program, crop(program, images)))
    return logits


def eval_variables(state: TrainState) -> Variables:
    """Returns what `forward` takes: the moving average of the weights if there is one, else the weights."""
    return {"params": state.ema or state.params, "batch_stats": state.batch_stats}


def soft_targets(teacher: Teacher, images: Array) -> Array:
    """Computes the teacher's probabilities, `u8[B,28,28,1] -> f32[B,C]`, as `evaluate` does with one view.

    The networks run one after the other, so that compile time and memory do not grow with their number.
    """
    log_probs = jax.lax.map(
        lambda variables: jax.nn.log_softmax(forward(teacher.program, variables, images)), teacher.members
    )
    return jax.nn.softmax(jax.nn.logsumexp(log_probs, axis=0) / teacher.temperature)


def loss_fn(
    program: Program, params: Any, batch_stats: Any, batch: Examples, key: Array, targets: Array | None = None
) -> tuple[Array, Any]:
    """Computes the training loss of a batch, `f32[]`: the mean over its examples, plus the network's own penalties.

    Also returns the logits, the losses `f32[B]` (0 for padding), the sum of the penalties, which the network sows into
    the collection `losses`, and the updated running statistics. `key` is for dropout, and `targets` are the
    `soft_targets` of a teacher. With cross-entropy, which is linear in its target, mixing the two losses is the same as
    mixing labels and probabilities (Hinton, Vinyals and Dean, 2015).

    Raises:
      ConfigError: the loss function does not return one value for each example, or a penalty is not a scalar.
    """
    is_example = batch.label != batches.NO_LABEL
    logits, updates = program.model.module(program.num_classes, train=True).apply(
        {"params": params, "batch_stats": batch_stats},
        scale_pixels(program, crop(program, batch.image)),
        is_example,
        rngs={"dropout": key},
        mutable=["batch_stats", "losses"],
    )
    # Padding gets the label 0: a loss that is infinite or undefined for -1 would make the whole gradient NaN.
    labels = jnp.maximum(batch.label, 0)
    loss = LOSSES[program.loss]
    with naming_the_line(f"config.train.loss = {program.loss!r}", loss):
        losses = loss(logits, labels, label_smoothing=program.label_smoothing)
        if losses.shape != batch.label.shape:  # it would be broadcast
            raise ConfigError(
                f"config.train.loss = {program.loss!r}: returns an array of shape {losses.shape} for a batch of"
                f" {len(logits)}; return one loss for each example, of shape {batch.label.shape}"
            )
    if targets is not None:
        weight = program.teacher_weight
        losses = (1.0 - weight) * losses + weight * optax.softmax_cross_entropy(logits, targets)
    losses = jnp.where(is_example, losses, 0)
    mean = jnp.sum(losses) / jnp.sum(is_example, dtype=jnp.int32)
    penalty = _sum_of_penalties(program, updates.get("losses", {}))
    return mean + penalty, (logits, losses, penalty, updates.get("batch_stats", {}))


def _sum_of_penalties(program: Program, sown: Any) -> Array:
    for penalty in jax.tree.leaves(sown):
        if jnp.shape(penalty):
            raise ConfigError(
                f"config.model: the network of {type(program.model).__name__} sows an array of shape"
                f" {jnp.shape(penalty)} into 'losses'; sow a scalar, such as a mean over the rows that `mask` marks"
            )
    return jnp.asarray(sum(jax.tree.leaves(sown)), jnp.float32)


def augmented_images(program: Program, batch: Examples, key: Array, step: Array) -> Array:
    """Returns the images that a step trains on, `u8[B,H,W,1]`: augmented, or the originals after `augment_until`."""

    def augmented() -> Array:
        return augment(program.augment, batch.image, batch.label, rng.stream(key, "augment", step))

    if program.augment_until == 1:
        return augmented()
    return jax.lax.cond(step < round(program.augment_until * program.num_steps), augmented, lambda: batch.image)


def train_step(
    program: Program, state: TrainState, batch: Examples, key: Array, teacher: Teacher | None = None
) -> tuple[TrainState, Metrics]:
    """Makes one update: augment, forward, loss, gradient, optimiser, moving average.

    `key` is the run's root key, the same at every step. A teacher sees the same augmented images (Beyer et al., 2022).
    The batch must hold at least one example. The metrics are computed with the weights before the update.

    Raises:
      TypeError, ValueError: the images are not `u8[B,28,28,1]`.
    """
    check_images(batch.image)
    images = augmented_images(program, batch, key, state.step)
    targets = soft_targets(teacher, images) if teacher else None
    augmented, dropout_key = Examples(images, batch.label), rng.stream(key, "dropout", state.step)
    grads, (logits, losses, penalty, batch_stats) = jax.grad(loss_fn, argnums=1, has_aux=True)(
        program, state.params, state.batch_stats, augmented, dropout_key, targets
    )
    updates, opt_state = _optimizer(program).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    view = StepView(logits, losses, penalty, batch.label, batch.label != batches.NO_LABEL, grads, state.params)
    return (
        TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=moving_average(program.optimizer.ema_decay, state.ema, params, state.step),
        ),
        _metrics(view),
    )


def _metrics(view: StepView) -> Metrics:
    """Computes every metric.

    Raises:
      ConfigError: a metric is not a scalar, or has the name of another entry of a log line.
    """
    found: Metrics = {}
    for name, metric in METRICS.items():
        with naming_the_line(f"METRICS[{name!r}]", metric):
            value = jnp.asarray(metric(view))
        if name in _RESERVED or (name in _BUILT_IN and is_external(metric)):
            raise ConfigError(f"METRICS[{name!r}]: every log line has this entry already; choose another name")
        if value.shape:
            raise ConfigError(f"METRICS[{name!r}]: has the shape {value.shape}; return a scalar, a sum over examples")
        found[name] = value.astype(jnp.int32) if value.dtype == bool else value
    return found


def try_step(program: Program) -> None:
    """Traces an update of three images, without computing anything, so that code from outside the package is tried.

    Warns if batch norm is used in evaluation mode.

    Raises:
      ConfigError: the network, loss, augmentations, optimiser or metrics cannot be used.
    """
    shapes = state_shapes(program)
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(shapes)):
        name = program.optimizer.name
        raise ConfigError(f"config.optimizer.name = {name!r}: keeps a random key; use a rule that does not")
    image = jax.ShapeDtypeStruct((3, IMAGE_SIZE, IMAGE_SIZE, 1), jnp.uint8)
    batch = Examples(image, jax.ShapeDtypeStruct((3,), jnp.int32))
    jax.eval_shape(functools.partial(train_step, program), shapes, batch, rng.root_key(0))

    def updated_stats(params: Any, stats: Any, batch: Examples) -> Any:
        return loss_fn(program, params, stats, batch, rng.root_key(0))[1][-1]

    traced = jax.make_jaxpr(updated_stats)(shapes.params, shapes.batch_stats, batch).jaxpr
    if any(out is given for out in traced.outvars for given in traced.invars):
        logger.warning(
            "the network of %s does not update all of its running averages in training; pass train=self.train to each"
            " BatchNorm",
            type(program.model).__name__,
        )


def moving_average(decay: float, ema: Any, params: Any, step: Array) -> Any:
    """Updates the exponential moving average of the weights.

    The decay grows as (1 + t) / (10 + t) up to `decay`, so that the initial weights fade (An et al., 2020).
    """
    if not decay:
        return ema
    t = step.astype(jnp.float32)
    return optax.incremental_update(params, ema, 1.0 - jnp.minimum(decay, (1.0 + t) / (10.0 + t)))


def train_steps(
    program: Program,
    state: TrainState,
    examples: Examples,
    order: Array,
    key: Array,
    num_steps: Array | int,
    teacher: Teacher | None = None,
) -> tuple[TrainState, Metrics]:
    """Makes `num_steps` updates in one loop on the device.

    `order`, `i32[S,B]`, holds the rows of every batch of one or more epochs; the next batch is number `state.step % S`.
    `num_steps` is at most the number of batches left; if it is traced, one compiled loop runs any number of steps. The
    metrics are `[S]`, with zeros after the first `num_steps`.
    """
    length = order.shape[0]

    # jit, so that it is traced only once for both uses; inlined, so that it is not compiled separately.
    @functools.partial(jax.jit, inline=True)
    def step(state: TrainState) -> tuple[TrainState, Metrics]:
        return train_step(program, state, batches.take(examples, order[state.step % length]), key, teacher)

    def body(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, history = carry
        state, metrics = step(state)
        return state, jax.tree.map(lambda column, value: column.at[i].set(value), history, metrics)

    _, shapes = jax.eval_shape(step, state)
    empty = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, num_steps, body, (state, empty))
