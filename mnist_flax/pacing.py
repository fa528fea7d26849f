"""How many steps a call to the device makes, and when checkpoints are saved."""

from mnist_flax import drivers
from mnist_flax.config import Config

# The target duration of a call to the device. The progress bar, signals and timed checkpoints wait for up to this long.
DISPATCH_SECONDS = 0.5


def next_call_limit(config: Config, call_limit: int, rate: float) -> int:
    """Returns the most steps for the next call: as many as fit into `DISPATCH_SECONDS`, at most twice `call_limit`.

    `call_limit` is that of the previous call, and `rate` is in steps per second. If the config sets
    `epochs_per_dispatch`, the limit does not change.
    """
    if config.train.epochs_per_dispatch:
        return call_limit
    return max(1, min(2 * call_limit, int(rate * DISPATCH_SECONDS)))


def next_stop(config: Config, step: int) -> int:
    """Returns the first step after `step` at which the host has something to do.

    That is the end of an epoch (or of `epochs_per_dispatch` epochs), a multiple of `every_steps`, or the last step.
    """
    stride = _stride(config)
    every = config.checkpoint.every_steps or config.num_steps
    return min((step // stride + 1) * stride, (step // every + 1) * every, config.num_steps)


def _stride(config: Config) -> int:
    return drivers.steps_per_order(config.num_steps, config.steps_per_epoch, config.train.epochs_per_dispatch)


def is_save_due(config: Config, step: int) -> bool:
    """Returns whether a checkpoint is due at `step`, by epochs, by steps or because the run ends.

    If `every_epochs` falls due within a call of several epochs, the checkpoint is saved at the end of that call.
    """
    cadence, stride = config.checkpoint, _stride(config)
    every = cadence.every_epochs * config.steps_per_epoch
    by_epochs = every and step % stride == 0 and step // every > (step - stride) // every
    by_steps = cadence.every_steps and step % cadence.every_steps == 0
    return bool(by_epochs or by_steps or step == config.num_steps)
