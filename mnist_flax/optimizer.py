"""The learning rate over a run, and the optax chain that turns a gradient into an update."""

from collections.abc import Callable
from functools import partial

import jax
import optax

from mnist_flax.config import Config


def schedule(config: Config) -> optax.Schedule:
    """Returns the learning rate as a function of the number of finished updates.

    One-cycle is Smith and Topin's (2018), with cosine flanks; cosine is Loshchilov and Hutter's (2017), no restarts.
    """
    o = config.optimizer
    peak, total = o.learning_rate, config.num_steps
    warmup = round(o.warmup_epochs * config.steps_per_epoch)
    decay_steps = max(1, round(o.decay_epochs * config.steps_per_epoch))
    if o.schedule == "one_cycle":
        peak_step = min(max(1, round(o.peak_at * total)), max(1, total - 1))
        scales = {peak_step: 1 / o.start_fraction, total: o.end_fraction}
        return optax.piecewise_interpolate_schedule("cosine", peak * o.start_fraction, scales)
    main: optax.Schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(1, total - warmup), alpha=o.end_fraction),
        "exponential": lambda: optax.exponential_decay(peak, decay_steps, o.decay_rate),
        "step": lambda: optax.exponential_decay(peak, decay_steps, o.decay_rate, staircase=True),
    }[o.schedule]()
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def is_decayed(config: Config, params: optax.Params) -> optax.Params:
    """Marks the leaves that weight decay applies to: kernels, but not a fixed one, and neither biases nor norms."""
    fixed = {"Conv_0"} if config.model.stem == "cosine" else set()
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.ndim > 1 and path[0].key not in fixed, params)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the chain: clip the gradient, add L2 (with AdamW: decay later), scale by the optimiser and the rate."""
    o = config.optimizer
    rate = schedule(config)
    decayed = partial(is_decayed, config)
    make: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adam": lambda: optax.adam(rate, o.b1, o.b2, o.eps),  # Kingma and Ba, 2015
        "adamw": lambda: optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decayed),
        "sgd": lambda: optax.sgd(rate, o.momentum or None, o.nesterov),
    }
    chain = [make[o.name]()]
    if o.weight_decay and o.name != "adamw":
        chain.insert(0, optax.add_decayed_weights(o.weight_decay, mask=decayed))
    if o.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(o.clip_norm))
    return optax.chain(*chain)
