"""Handles Ctrl-C, SIGTERM and SIGHUP at once, whatever the main thread is doing."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from mnist_flax.errors import UserError

HANGUP = getattr(signal, "SIGHUP", None)  # a terminal was closed; Windows has no such signal
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))


class Interrupted(UserError):
    """The run was asked to stop; all training so far is saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum  # what shells expect


class StopRequest:
    """Whether a signal has asked the run to stop: `signum` is the number of the first one, 0 until one arrives."""

    signum = 0

    def receive(self, signum: int) -> None:
        """Records the first signal; a second one ends the process at once."""
        if not self.signum:
            self.signum = signum
            _print("\nstopping soon, after a checkpoint; a second signal ends the program at once\n")
        elif signum != HANGUP:  # a second SIGHUP is ignored, because the terminal and its shell may both send one
            end_process(128 + signum)


def end_process(status: int, message: str = "") -> NoReturn:
    """Exits the process now, without clean-up and without waiting for threads, libraries or other processes.

    An exception would not work: a config file may catch it, a callback may swallow it, a library may crash on it while
    it is imported, and on a normal exit JAX waits for dead processes.
    """
    _print(message)
    os._exit(status)


def _print(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, message.encode())


@contextlib.contextmanager
def listening(receive: Callable[[int], None], signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Calls `receive` with the number of each signal, in a thread, while the context lasts.

    Python runs handlers in the main thread, between two bytecode instructions, and therefore not while it compiles a
    program or waits for the device. The handlers here do nothing; another thread reads the wakeup file descriptor, to
    which the interpreter writes the number of each signal when it arrives.

    Only the main thread can install handlers; in other threads, this function does nothing. A signal that the parent
    process set to be ignored, as `nohup` does, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] in signals:
                receive(number[0])

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {signum: signal.signal(signum, lambda *_: None) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(previous_fd)
        os.close(writer)
        listener.join()
        os.close(reader)


@contextlib.contextmanager
def stop_request(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
    """Collects signals in a `StopRequest` while the context lasts."""
    request = StopRequest()
    with listening(request.receive, signals):
        yield request
