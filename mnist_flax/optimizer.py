"""Learning-rate schedules and optimisers: each entry builds an optax schedule or transformation from the config."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from mnist_flax.checks import among, of_type, within
from mnist_flax.external import naming_the_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser, learning-rate schedule, weight decay, gradient clipping, and moving average of the weights.

    Attributes:
      name: a key of `OPTIMIZERS`.
      learning_rate: the peak of the schedule.
      b1, b2, eps: the decay rates and epsilon of `adam`, `adamw` and `muon`.
      momentum, nesterov: for `sgd`; `muon` also reads `momentum`.
      adam_fraction: `muon` trains all but the convolution kernels with Adam, at this fraction of the learning rate.
      weight_decay: applied to kernels, not to biases or norms. L2 (added to the gradient) for `adam` and `sgd`,
        decoupled for the others. `muon` decays convolution kernels only.
      clip_norm: largest global norm of the gradient; 0 turns clipping off.
      schedule: a key of `SCHEDULES`.
      warmup_epochs: linear warm-up from 0 before any schedule but `one_cycle`, which has its own.
      start_fraction, peak_at: `one_cycle` starts at `start_fraction` times the peak, and reaches the peak at the
        fraction `peak_at` of the run.
      end_fraction: the last learning rate of `cosine`, `linear` and `one_cycle`, as a fraction of the peak.
      decay_rate, decay_epochs: the learning rate is multiplied by `decay_rate` every `decay_epochs` epochs, gradually
        (`exponential`) or at once (`step`).
      ema_decay: evaluate an exponential moving average of the weights with this decay; 0 evaluates the weights.
    """

    name: str = "adam"
    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    adam_fraction: float = 0.25
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    start_fraction: float = 0.04
    end_fraction: float = 0.0
    peak_at: float = 0.25
    decay_rate: float = 0.95
    decay_epochs: float = 1.0
    ema_decay: float = 0.0

    def check(self, epochs: int, steps_per_epoch: int) -> Iterator[str]:
        """Yields a message for each value that is out of range, given the length of the run."""
        known = {field.name for field in dataclasses.fields(self)}
        yield from of_type("OPTIMIZERS", OPTIMIZERS, Optimizer)
        yield from of_type("SCHEDULES", SCHEDULES, Schedule)
        for registry, entries in (("OPTIMIZERS", OPTIMIZERS), ("SCHEDULES", SCHEDULES)):
            for name, entry in entries.items():
                if not known.issuperset(entry.fields):
                    example = "('momentum',)"
                    yield f"{registry}[{name!r}]: fields = {entry.fields!r}: must name config fields, such as {example}"
        yield from among("optimizer.name", self.name, OPTIMIZERS, is_registry=True)
        yield from among("optimizer.schedule", self.schedule, SCHEDULES, is_registry=True)
        for name in ("learning_rate", "eps", "decay_rate"):
            yield from within(f"optimizer.{name}", getattr(self, name), 0, open_low=True)
        most = (2**31 - 1) // steps_per_epoch  # steps are counted in 32 bits
        yield from within("optimizer.decay_epochs", self.decay_epochs, 0, most, open_low=True)
        for name in ("b1", "b2", "momentum", "ema_decay"):
            yield from within(f"optimizer.{name}", getattr(self, name), 0, 1, open_high=True)
        for name in ("weight_decay", "clip_norm"):
            yield from within(f"optimizer.{name}", getattr(self, name), 0)
        yield from within("optimizer.end_fraction", self.end_fraction, 0, 1)
        yield from within("optimizer.adam_fraction", self.adam_fraction, 0)
        for name in ("start_fraction", "peak_at"):
            yield from within(f"optimizer.{name}", getattr(self, name), 0, 1, open_low=True, open_high=True)
        yield from within("optimizer.warmup_epochs", self.warmup_epochs, 0, epochs)
        if self.nesterov and not self.momentum:
            yield "config.optimizer.nesterov = True: needs config.optimizer.momentum above 0"

    def unused(self) -> list[str]:
        """Returns the changed fields that the chosen optimiser and schedule do not read."""
        default = OptimizerConfig()
        entries: list[Optimizer | Schedule] = [*OPTIMIZERS.values(), *SCHEDULES.values()]
        optional = {field for entry in entries for field in entry.fields}
        read = {*OPTIMIZERS[self.name].fields, *SCHEDULES[self.schedule].fields}
        if SCHEDULES[self.schedule].own_warmup:
            optional.add("warmup_epochs")
        return [name for name in sorted(optional - read) if getattr(self, name) != getattr(default, name)]


class RunLength(NamedTuple):
    """The length of a run in updates, without the warm-up; at least 1."""

    num_steps: int
    steps_per_epoch: int


class Schedule(NamedTuple):
    """A learning rate over a run, as a function of the number of finished updates.

    `fields` names the fields of `OptimizerConfig` that it reads besides `learning_rate`. A linear warm-up
    (`warmup_epochs`) precedes it, unless it has a warm-up of its own (`own_warmup`).

        SCHEDULES["halving"] = Schedule(
            lambda config, run: optax.exponential_decay(config.learning_rate, run.steps_per_epoch, 0.5, staircase=True)
        )
    """

    make: Callable[[OptimizerConfig, RunLength], optax.Schedule]
    fields: tuple[str, ...] = ()
    own_warmup: bool = False


def _one_cycle(config: OptimizerConfig, run: RunLength) -> optax.Schedule:
    """Smith and Topin (2018), with cosine ramps."""
    peak_step = min(max(1, round(config.peak_at * run.num_steps)), max(1, run.num_steps - 1))
    scales = {peak_step: 1 / config.start_fraction, run.num_steps: config.end_fraction}
    return optax.piecewise_interpolate_schedule("cosine", config.learning_rate * config.start_fraction, scales)


def _decay(config: OptimizerConfig, run: RunLength, *, staircase: bool) -> optax.Schedule:
    decay_steps = max(1, round(config.decay_epochs * run.steps_per_epoch))
    if staircase:  # in whole numbers: optax's own can be a step late, because a compiled division rounds differently
        return lambda step: config.learning_rate * config.decay_rate ** (step // decay_steps)
    return optax.exponential_decay(config.learning_rate, decay_steps, config.decay_rate)


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(lambda config, run: optax.constant_schedule(config.learning_rate)),
    "linear": Schedule(
        lambda config, run: optax.linear_schedule(
            config.learning_rate, config.learning_rate * config.end_fraction, run.num_steps
        ),
        ("end_fraction",),
    ),
    "cosine": Schedule(  # Loshchilov and Hutter (2017), without restarts
        lambda config, run: optax.cosine_decay_schedule(config.learning_rate, run.num_steps, alpha=config.end_fraction),
        ("end_fraction",),
    ),
    "one_cycle": Schedule(_one_cycle, ("start_fraction", "peak_at", "end_fraction"), own_warmup=True),
    "exponential": Schedule(lambda config, run: _decay(config, run, staircase=False), ("decay_rate", "decay_epochs")),
    "step": Schedule(lambda config, run: _decay(config, run, staircase=True), ("decay_rate", "decay_epochs")),
}


def schedule(config: OptimizerConfig, num_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of finished updates."""
    entry = SCHEDULES[config.schedule]
    warmup = 0 if entry.own_warmup else round(config.warmup_epochs * steps_per_epoch)
    naming = functools.partial(naming_the_line, f"config.optimizer.schedule = {config.schedule!r}", entry.make)
    with naming():
        main = entry.make(config, RunLength(max(1, num_steps - warmup), steps_per_epoch))

    @naming()
    def rate(step: Any) -> Any:
        value = main(step)
        if np.shape(value):
            raise ValueError(f"the rate has the shape {np.shape(value)}; return a scalar")
        return value

    if not warmup:
        return rate
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), rate], [warmup])


def depends_on_length(config: OptimizerConfig, num_steps: int, steps_per_epoch: int) -> bool:
    """Returns whether the learning rate would differ within this run if the run were twice as long.

    Compares 33 steps from the first to the last; if they differ, a finished run cannot be trained further.
    """
    runs = [schedule(config, length, steps_per_epoch) for length in (num_steps, 2 * num_steps)]
    steps = np.unique(np.linspace(0, num_steps - 1, 33).round().astype(int)).tolist()
    return any(float(runs[0](step)) != float(runs[1](step)) for step in steps)


def decay_mask(params: optax.Params) -> optax.Params:
    """Marks the leaves that weight decay applies to: kernels, but neither biases nor norms."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


class Optimizer(NamedTuple):
    """An update rule at a scheduled learning rate; `fields` names the fields of `OptimizerConfig` that `make` reads."""

    make: Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]
    fields: tuple[str, ...]


def _with_l2(config: OptimizerConfig, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adds the gradient of the L2 penalty to the gradient before the update rule."""
    if not config.weight_decay:
        return rule
    return optax.chain(optax.add_decayed_weights(config.weight_decay, mask=decay_mask), rule)


def _muon(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Jordan et al. (2024): orthogonalised momentum for convolution kernels, Adam for all other weights.

    A convolution kernel is treated as a matrix that maps patches to output channels. Both use Nesterov momentum.
    """

    def dimensions(leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        last = leaf.ndim - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last) if leaf.ndim > 2 else None

    return optax.contrib.muon(
        rate,
        beta=config.momentum,
        eps=config.eps,
        weight_decay=config.weight_decay,
        weight_decay_mask=decay_mask,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=lambda step: config.adam_fraction * rate(step),
        muon_weight_dimension_numbers=lambda params: jax.tree.map(dimensions, params),
    )


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(  # Kingma and Ba (2015)
        lambda config, rate: _with_l2(config, optax.adam(rate, config.b1, config.b2, config.eps)),
        ("b1", "b2", "eps", "weight_decay"),
    ),
    "adamw": Optimizer(  # Loshchilov and Hutter (2019)
        lambda config, rate: optax.adamw(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
        ),
        ("b1", "b2", "eps", "weight_decay"),
    ),
    "sgd": Optimizer(
        lambda config, rate: _with_l2(config, optax.sgd(rate, config.momentum or None, config.nesterov)),
        ("momentum", "nesterov", "weight_decay"),
    ),
    "muon": Optimizer(_muon, ("b1", "b2", "eps", "momentum", "adam_fraction", "weight_decay")),
}


def optimizer(config: OptimizerConfig, num_steps: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns the whole chain: gradient clipping, then the update rule at the scheduled learning rate."""
    make, rate = OPTIMIZERS[config.name].make, schedule(config, num_steps, steps_per_epoch)
    naming = functools.partial(naming_the_line, f"config.optimizer.name = {config.name!r}", make)
    with naming():
        rule = make(config, rate)
        rule = rule._replace(init=naming()(rule.init), update=naming()(rule.update))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule
