"""Ctrl-C, SIGTERM and SIGHUP: heard at once, whatever the main thread is doing."""

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
    """The run was asked to stop; everything that was trained is saved."""

    def __init__(self, message: str, signum: int) -> None:
        """Sets the exit status that shells expect after a signal: 128 plus its number."""
        super().__init__(message)
        self.exit_status = 128 + signum


class StopRequest:
    """Whether a signal has asked the run to stop.

    Attributes:
      signum: the number of the first signal, None before it arrives.
    """

    def __init__(self) -> None:
        """Starts without a request."""
        self.signum: int | None = None

    def receive(self, signum: int) -> None:
        """Records the first signal; a second one ends the process at once."""
        if self.signum is None:
            self.signum = signum
            _print("\nstopping after this step; a second signal ends the program at once\n")
        elif signum != HANGUP:  # a closed terminal and its shell both send one
            end_process(128 + signum)


def end_process(status: int, message: str = "") -> NoReturn:
    """Ends the process now: no clean-up, no waiting for threads, libraries or other processes.

    The only call of `os._exit`. An exception would not do: a config file may catch it, a callback may lose it, a
    library that is being imported may crash over it, and JAX waits at a normal exit for processes that are gone.
    """
    _print(message)
    os._exit(status)


def _print(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, message.encode())


@contextlib.contextmanager
def listening(receive: Callable[[int], None], signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Calls `receive` with the number of each signal, in a thread, while the context lasts.

    Python runs a signal handler in the main thread, and only between two of its own instructions: not while XLA
    compiles, the device is waited for, or another process is. So the handlers do nothing, and a thread reads the file
    descriptor to which the interpreter writes each signal's number on arrival.

    Only the main thread can do this; elsewhere nothing happens. A signal that the parent process chose to ignore, as
    `nohup` does, stays ignored.
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
