"""Ctrl-C and SIGTERM as a wish to stop, granted between two steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

from mnist_flax.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(UserError):
    """The run was asked to stop, and nothing that was trained is lost."""

    def __init__(self, message: str, signum: int) -> None:
        """Keeps the message, and the exit status that shells expect after a signal: 128 plus its number."""
        super().__init__(message)
        self.exit_status = 128 + signum


class StopRequest:
    """Whether a signal has asked the run to stop.

    Attributes:
      signum: the number of the first signal, None before it.
    """

    def __init__(self) -> None:
        """Starts without a wish."""
        self.signum: int | None = None

    def receive(self, signum: int) -> None:
        """Notes the first signal; the second ends the process at once."""
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; a second signal leaves at once\n")


@contextlib.contextmanager
def stop_request(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
    """Turns signals into a `StopRequest` while the context lasts (only the main thread may do so).

    Python runs a signal's handler in the main thread, and only when that is not inside a library: not while XLA
    compiles or the device is waited for. So the handlers do nothing, and a thread listens at the file descriptor that
    the interpreter writes each signal's number to as it arrives.
    """
    wish = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] in signals:
                wish.receive(number[0])

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {signum: signal.signal(signum, lambda *_: None) for signum in signals}
    try:
        yield wish
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(writer)
        listener.join()
        os.close(reader)
