"""Errors meant for the user: one message, no traceback, and a nonzero exit status.

A message says what is wrong (the field, file or flag), its value, and the remedy. `cli.run` prints it, so nothing in
between has to catch these errors.
"""

import contextlib
from collections.abc import Iterator


def reason(error: BaseException) -> str:
    """Returns a one-line reason for a failed operation."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class UserError(Exception):
    """An error that the user can fix."""

    exit_status = 2


@contextlib.contextmanager
def failures_as(
    kind: type[UserError], before: str, after: str = "", *, unchanged: type[Exception] = UserError
) -> Iterator[None]:
    """Converts errors into `kind`, with the message `BEFORE (TYPE: REASON)AFTER`; a UserError stays as it is.

    So does an error of the type `unchanged`.
    """
    try:
        yield
    except (UserError, unchanged):
        raise
    except Exception as error:
        raise kind(f"{before} ({type(error).__name__}: {reason(error)}){after}") from error


class ConfigError(UserError):
    """A flag, a field of the config, or the config file itself is wrong."""


class DataError(UserError):
    """A dataset is missing, unreachable, corrupt, or different from what its name says."""


class WorkdirError(UserError):
    """A workdir cannot be used: it is not a folder, cannot be written, holds something else, or is in use."""


class LostPeerError(UserError):
    """Another process of the same run is gone, so this one cannot continue."""

    exit_status = 4


class NonFiniteLossError(UserError):
    """The loss or a weight became NaN or infinite; further training would only corrupt the weights."""

    exit_status = 3
