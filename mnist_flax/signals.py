"""Ctrl-C and SIGTERM as a wish to stop, granted between two steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from mnist_flax.errors import UserError


class Interrupted(UserError):
    """The run was asked to stop and has saved its state."""

    def __init__(self, message: str, signum: int) -> None:
        """Keeps the message, and the exit status that shells expect after a signal: 128 plus its number."""
        super().__init__(message)
        self.exit_status = 128 + signum


class StopWish:
    """Whether a signal has asked the run to stop."""

    def __init__(self) -> None:
        """Starts without a wish."""
        self.signum: int | None = None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Notes the first signal; the second ends the process at once."""
        del frame
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        os.write(2, b"\nstopping after this step; the same signal again leaves at once\n")


@contextlib.contextmanager
def stop_wish() -> Iterator[StopWish]:
    """Turns SIGINT and SIGTERM into a `StopWish` while the context lasts (only the main thread may do so)."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    previous = {signum: signal.signal(signum, wish.receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
