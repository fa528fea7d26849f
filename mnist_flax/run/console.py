"""Standard streams: losing the console never stops a run, and a closed pipe (`| head -1`) prints no error."""

import contextlib
import io
import logging
import os
import sys
from typing import Any

from tqdm import tqdm

from mnist_flax.errors import UserError, reason

program = ""  # what `cli.main` was called by, such as `python my_net.py`; empty for `python -m mnist_flax.VERB`


def command(verb: str) -> str:
    """Returns how to run a verb in the way that this process was started."""
    return f"{program} {verb}" if program else f"python -m mnist_flax.{verb}"


class OutputError(UserError):
    """Standard output cannot be written; the message is empty if its reader, such as `head -1`, has exited."""

    def __init__(self, error: Exception) -> None:
        is_pipe = isinstance(error, BrokenPipeError)
        self.exit_status = 141 if is_pipe else 2  # 141: what shells report for a program killed by SIGPIPE
        super().__init__("" if is_pipe else f"standard output cannot be written ({reason(error)})")


class Console:
    """Standard output or error; after a failed write, the stream is redirected to the null device.

    A program that cannot write its results (`is_output`) exits; one that has lost standard error continues without it.
    """

    def __init__(self, stream: Any, *, is_output: bool) -> None:
        self._stream = stream
        self._is_output = is_output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, and returns the number of characters."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._try(self._stream.flush)

    def _try(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError):  # so that flushing what is still buffered cannot fail again
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            if self._is_output:
                raise OutputError(error) from error


class _Handler(logging.Handler):
    """Prints log messages to standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def open_streams() -> None:
    """Makes the standard streams safe to use even if the parent process closed some of them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # so that no other file, such as a checkpoint, gets this number
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(descriptor, "w", closefd=False)  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any file name can be printed in any locale
        setattr(sys, name, stream if isinstance(stream, Console) else Console(stream, is_output=name == "stdout"))


def log_to_console() -> None:
    """Sends this package's log messages to standard error."""
    package = logging.getLogger("mnist_flax")
    package.handlers = [_Handler()]
    package.setLevel(logging.INFO)
    package.propagate = False


def print_error(error: UserError) -> int:
    """Prints the message of an error, if it has one, and returns the exit status."""
    if str(error):
        print(f"{'' if error.exit_status > 128 else 'error: '}{error}", file=sys.stderr)
    return error.exit_status
