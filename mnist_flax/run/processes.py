"""Multi-process runs: how the processes join, agree on decisions and exit together.

All processes run the same command. They compute on all devices together by making the same JAX calls in the same order
(`jax.distributed`); only process 0, the primary, prints and writes files. Clocks and signals differ between
processes, so all of them agree on a value before any acts on it. If one process dies, none can continue: the others
exit too, and the same commands, with any number of processes, resume from the newest checkpoint.
"""

import contextlib
import hashlib
import logging
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from mnist_flax.errors import ConfigError, LostPeerError, UserError, reason
from mnist_flax.run import console, signals

logger = logging.getLogger(__name__)

JOIN_SECONDS = 120  # how long a process waits for the others to start
HEARTBEAT_SECONDS = 20  # a process that sends no heartbeat for this long counts as lost
LEAVE_SECONDS = 3  # how long a failing primary waits, so that the others can print before its exit kills them

# Words in the errors that JAX, its collectives and its coordination service raise when another process is lost.
_LOST = re.compile("gloo|nccl|unavailable|deadline.exceeded|cancelled|aborted|coordination", re.IGNORECASE)


def join(coordinator: str | None, num_processes: int | None, process_index: int | None) -> None:
    """Joins this process to a multi-process run; call it before JAX computes anything.

    `coordinator` is `host:port` of process 0. If all three arguments are None, JAX detects them on SLURM, Open MPI, GKE
    and Cloud TPU. If some process is still missing after `JOIN_SECONDS`, this one prints a message and exits.

    Raises:
      ConfigError: an argument is missing or invalid, JAX cannot detect them, process 0 cannot be reached, or its port
        is not free.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_index": process_index}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ConfigError(f"{missing[0]} is missing: give all of {', '.join(given)}, or none if JAX can detect them")
    if num_processes is not None and process_index is not None and not 0 <= process_index < num_processes:
        raise ConfigError(f"--process_index={process_index}: must be from 0 to {num_processes - 1}")
    if coordinator is not None:
        _wait_for(coordinator, is_first=process_index == 0)
    absent = ConfigError(
        f"--distributed: some processes have not started within {JOIN_SECONDS} s; start all of them again, at about the"
        " same time"
    )
    # JAX would end a process that has waited for too long with an abort, before our message is printed.
    timer = threading.Timer(JOIN_SECONDS, lambda: signals.end_process(console.print_error(absent)))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_index,
            initialization_timeout=2 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed: found no cluster to join ({str(error).splitlines()[0]}); give --coordinator=HOST:PORT,"
            " --num_processes and --process_index"
        ) from error
    except RuntimeError as error:
        if "before" not in str(error):
            raise
        raise ConfigError(
            "--distributed: the preset computes with JAX before the processes have joined; replace that with constants"
        ) from error
    finally:
        timer.cancel()
    logging.getLogger("mnist_flax").setLevel(logging.INFO if is_primary() else logging.WARNING)


def _wait_for(coordinator: str, *, is_first: bool) -> None:
    """Waits until process 0 accepts connections; process 0 itself only checks that the port is free.

    Without this, JAX would kill a process that cannot reach process 0 or use the port, without a clear message.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator={coordinator}: must be HOST:PORT, such as 10.0.0.1:1234")
    if is_first:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ConfigError(
                f"--coordinator={coordinator}: cannot listen at this port ({reason(error)}); choose another"
            ) from error
    logger.info("waiting for the other processes at %s, up to %d s", coordinator, JOIN_SECONDS)
    if is_first:
        return
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()  # brackets: an IPv6 address
            return
        except OSError as error:
            if time.monotonic() > deadline or error.errno == socket.EAI_NONAME:
                raise ConfigError(
                    f"--coordinator={coordinator}: cannot be reached ({reason(error)}); start the process"
                    " with --process_index=0 there"
                ) from error
        time.sleep(0.2)


def is_primary() -> bool:
    """Returns whether this process is the primary, which prints and writes files; a single process always is."""
    return jax.process_index() == 0


def agree(*numbers: int) -> tuple[int, ...]:
    """Returns the maximum of each number over all processes; blocks until every process has called it."""
    return tuple(multihost_utils.process_allgather(np.array(numbers)).max(axis=0).tolist())


def check_same(subject: str, *values: object) -> None:
    """Checks that all processes have values with the same `repr`; blocks until every process has called it.

    Raises:
      ConfigError: in every process, if one has other values; the message calls them `subject`.
    """
    digest = int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:3])  # fits JAX's 32-bit integers
    largest, smallest = agree(digest, -digest)
    if largest != -smallest:
        raise ConfigError(f"--distributed: the processes have different {subject}; give all of them the same")


def stop_signals() -> Sequence[signal.Signals]:
    """Returns the signals that this program handles; JAX handles SIGTERM in multi-process runs (`preemption`)."""
    return [signum for signum in signals.SIGNALS if signum != signal.SIGTERM or jax.process_count() == 1]


def preemption(call: int) -> int:
    """Returns SIGTERM if any process of a multi-process run received it, else 0.

    `call` counts the calls from 0 in every process, so that JAX gives all of them the same answer.
    """
    if jax.process_count() == 1:
        return 0
    from orbax.checkpoint import multihost

    return signal.SIGTERM if multihost.reached_preemption(call) else 0


@contextlib.contextmanager
def bound_together() -> Iterator[None]:
    """In a multi-process run, ends this process if an error occurs in it or in another.

    The others notice within `HEARTBEAT_SECONDS`, usually at once, and exit the same way. They skip the
    normal exit, which could hang in a collective save or in JAX's shutdown. That loses no more than a kill would.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _end(error)


def _end(error: BaseException) -> None:
    """Prints the error as `cli.run` would, and exits."""
    if isinstance(error, Exception) and not isinstance(error, UserError) and _LOST.search(str(error)):
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
