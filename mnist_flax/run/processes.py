"""Several processes as one program: how they find each other, agree, and end together.

All run the same command. They compute together on all devices, by the same calls in the same order
(`jax.distributed`); only the first one, the primary, prints and writes files. What one process knows alone, such as the
time or a signal, decides nothing until all have agreed on it. When one is gone, none can continue: the others end too,
and the same commands, with the same number of processes or another, continue from the newest checkpoint.
"""

import contextlib
import logging
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
import numpy as np

from mnist_flax.errors import ConfigError, LostPeerError, UserError
from mnist_flax.run import console, signals

logger = logging.getLogger(__name__)

JOIN_SECONDS = 120  # how long a process waits for the others to start
HEARTBEAT_SECONDS = 20  # how long one may be silent before it counts as gone
LEAVE_SECONDS = 3  # the others cannot outlive the primary, so it waits this long for their last messages

# What JAX, its collectives and its coordination service say when another process is gone.
_LOST = re.compile("gloo|nccl|unavailable|deadline.exceeded|cancelled|aborted|coordination", re.IGNORECASE)


def join(coordinator: str | None, num_processes: int | None, process_index: int | None) -> None:
    """Makes this process one of several; to be called before JAX computes anything.

    Args:
      coordinator: `host:port` on the machine of the first process, the same for all. All three arguments may be None:
        JAX learns them from SLURM, Open MPI, GKE or Cloud TPU.
      num_processes: how many there are.
      process_index: which of them this one is, from 0.

    Raises:
      ConfigError: only some of the three are given, or JAX cannot find them out, or the first process cannot be
        reached.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_index": process_index}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ConfigError(f"{missing[0]} is missing: give all of {', '.join(given)}, or none if JAX can find them out")
    if num_processes is not None and process_index is not None and not 0 <= process_index < num_processes:
        raise ConfigError(f"--process_index={process_index}: must be from 0 to {num_processes - 1}")
    if coordinator is not None:
        _wait_for(coordinator, is_first=process_index == 0)
        logger.info("waiting for %d processes at %s, up to %d s", num_processes, coordinator, JOIN_SECONDS)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_index,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed: found no cluster to join ({str(error).splitlines()[0]}); give --coordinator=HOST:PORT,"
            " --num_processes and --process_index"
        ) from error
    logging.getLogger("mnist_flax").setLevel(logging.INFO if is_primary() else logging.WARNING)


def _wait_for(coordinator: str, *, is_first: bool) -> None:
    """Waits until the first process answers: JAX kills one that cannot reach it before we can print anything.

    Raises:
      ConfigError: the address is invalid, or nothing answers there.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--coordinator={coordinator}: must be HOST:PORT, such as 10.0.0.1:1234")
    deadline = time.monotonic() + JOIN_SECONDS
    while not is_first:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--coordinator={coordinator}: cannot be reached ({error.strerror or error}); start the process"
                    " with --process_index=0 there"
                ) from error
        time.sleep(0.2)


def leave() -> None:
    """Disconnects this process from the others, when all have finished."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def is_primary() -> bool:
    """Returns whether this is the process that prints and writes files; a single one is."""
    return jax.process_index() == 0


def agree(*numbers: int) -> tuple[int, ...]:
    """Returns the maximum of each number over all processes, and waits for all of them."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    return tuple(multihost_utils.process_allgather(np.array(numbers)).max(axis=0).tolist())


def stop_signals() -> Sequence[signal.Signals]:
    """Returns the signals that ask a run to stop; with several processes, JAX handles SIGTERM (`Store.preemption`)."""
    return [signum for signum in signals.SIGNALS if signum != signal.SIGTERM or jax.process_count() == 1]


@contextlib.contextmanager
def bound_together() -> Iterator[None]:
    """Ends this process at once if it is one of several and an error occurs, here or in another one.

    The others notice within `HEARTBEAT_SECONDS`, usually at once, and end in the same way. A normal exit would wait for
    them: in a save that all take part in, or in JAX's shutdown. A kill would lose no less.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _end(error)


def _end(error: BaseException) -> NoReturn:
    """Prints the error, as `cli.run` would, and ends the process."""
    if not isinstance(error, UserError) and isinstance(error, Exception) and _LOST.search(str(error)):
        error = LostPeerError(
            f"another of the {jax.process_count()} processes is gone or out of reach"
            f" ({str(error).splitlines()[0][:200]}); stop all of them, and the same commands continue from the newest"
            " checkpoint"
        )
    status = 1
    if isinstance(error, UserError):
        status = console.print_error(error)
    else:
        traceback.print_exception(error)
    with contextlib.suppress(UserError):
        sys.stdout.flush()
    sys.stderr.flush()
    if is_primary():
        time.sleep(LEAVE_SECONDS)
    signals.end_process(status)
