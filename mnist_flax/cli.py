"""What all verbs share: flags become a Config, and a user's mistake becomes one message and an exit status."""

import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from mnist_flax.config import Config, default_config_dict, nearest
from mnist_flax.errors import ConfigError, UserError

FLAGS = flags.FLAGS


class _Console(logging.Handler):
    """Prints messages to standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def define_config() -> None:
    """Defines `--config=FILE.py`, which brings `--config.section.field=value` with it."""
    config_flags.DEFINE_config_file(
        "config", None, "a file such as configs/default.py; --config.section.field=value overrides one of its fields"
    )
    flags.declare_key_flag("config")


def config_file() -> str:
    """Returns the path that was given as `--config`."""
    return str(config_flags.get_config_filename(FLAGS["config"]))


def config() -> Config:
    """Returns the config that the flags describe.

    Raises:
      ConfigError: there is none, or one of its fields is wrong.
    """
    if FLAGS.config is None:
        raise ConfigError("--config is missing: name a file, such as --config=configs/default.py")
    try:
        values = FLAGS.config.to_dict()
    except OSError as error:  # ml_collections reports a missing file only when the config is looked at
        raise ConfigError(
            f"--config={config_file()}: cannot be read ({_last_line(error.__cause__ or error)})"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"--config={config_file()}: its get_config() must return a ConfigDict") from error
    return Config.from_dict(values)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags, calls `main` with what is left of the command line, and exits.

    A `UserError` ends the program with its message alone and its own exit status; anything else is a bug, and shows its
    traceback.
    """
    # Importing JAX and tracing make a million objects that stay; to look through them for garbage at every 700th costs
    # 0.2 of the 1.8 s to the first step.
    gc.set_threshold(100_000)
    package = logging.getLogger("mnist_flax")
    package.handlers = [_Console()]
    package.setLevel(logging.INFO)
    package.propagate = False
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax and JAX tell a lot; --verbosity=0 shows it
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as shells have it for SIGINT to a background job
            signal.signal(signum, _leave)
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"{'' if error.exit_status > 128 else 'error: '}{error}", file=sys.stderr)
        sys.exit(error.exit_status)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Ends the program, where no loop hears the signal (`signals.stop_request`): the status is 128 plus its number.

    At once, for an exception, which Python makes of Ctrl-C, can come at a bad moment: in a config file that catches it,
    in a callback that must not raise and loses it, or while a library is imported whose C++ crashes over it.
    """
    del frame
    os.write(2, b"stopped\n")
    os._exit(128 + signum)


def _parse(arguments: Sequence[str]) -> Sequence[str]:
    """Parses the command line, strictly.

    Raises:
      ConfigError: a flag or a field is unknown, or its value cannot be read, or the config file is broken.
    """
    _check_fields(arguments)
    if any(re.fullmatch(r"--?help(short|full|xml)?", argument) for argument in arguments):
        try:
            FLAGS(arguments)
        except SystemExit:  # absl leaves with status 1, but being asked for help is no failure
            sys.exit(0)
    try:
        rest: Sequence[str] = FLAGS(arguments)
    except flags.Error as error:
        raise ConfigError(_first_line(error)) from error
    except (Exception, SystemExit) as error:  # a config file is a program, and can fail in every way
        raise ConfigError(f"the config file fails with {type(error).__name__}: {_last_line(error)}") from error
    if len(rest) > 1 and "config" in FLAGS:
        raise ConfigError(f"{rest[1]!r}: is no flag; a flag starts with two dashes")
    return rest


def _check_fields(arguments: Sequence[str]) -> None:
    """Looks for overrides of fields that do not exist.

    Raises:
      ConfigError: names the nearest field.
    """
    for argument in arguments:
        match = re.match(r"--?config\.([^=]*)", argument)
        path: list[str] = []
        node = default_config_dict()
        for name in match[1].split(".") if match else ():
            if not isinstance(node, ConfigDict) or name not in node:
                parent = ".".join(["config", *path])
                known = list(node) if isinstance(node, ConfigDict) else []
                hint = nearest(name, known) if known else f"{parent} is a value and has none"
                raise ConfigError(f"{parent}.{name}: no such field; {hint}")
            path.append(name)
            node = node[name]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[-1]
