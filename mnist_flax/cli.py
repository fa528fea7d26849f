"""Shared by all commands: turns flags into a Config, and a user error into one message and an exit status."""

import contextlib
import functools
import gc
import os
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from mnist_flax.checks import nearest
from mnist_flax.data.registry import DATA_FIELDS
from mnist_flax.errors import ConfigError, UserError
from mnist_flax.external import SCRIPT
from mnist_flax.run import console, machine, signals
from mnist_flax.run import workdir as workdirs

FLAGS = flags.FLAGS

VERBS = {
    "main": "train a network, or continue a run",
    "evaluate": "evaluate a run on a whole split",
    "report": "write the report of a run",
    "predict": "read handwritten digits in pictures",
    "population": "train many seeds or folds, or compare runs",
    "export": "write a run as ONNX, StableHLO or npz",
    "demo": "write a page to draw digits on",
    "robustness": "evaluate a run under corruptions",
}


def main() -> None:
    """Runs `mnist-flax VERB [flags]`, exactly like `python -m mnist_flax.VERB [flags]`; a script can call it too."""
    script, verb = sys.argv[0], sys.argv[1] if len(sys.argv) > 1 else ""
    commands = {"mnist-flax": "mnist-flax", "__main__.py": "python -m mnist_flax"}
    console.program = commands.get(os.path.basename(script), f"python {shlex.quote(script)}")
    if verb in VERBS:
        del sys.argv[1]
        sys.modules[SCRIPT] = sys.modules["__main__"]
        if registered := sys.modules.get("mnist_flax.models"):
            # The verb becomes `__main__`, but the types in a class's annotations are looked up in its module.
            for family in registered.MODELS.values():
                if isinstance(family, type):  # `config` refuses anything else
                    family.__module__ = family.__module__.replace("__main__", SCRIPT)
        runpy.run_module(f"mnist_flax.{verb}", run_name="__main__", alter_sys=True)
    lines = [f"usage: {console.command('VERB')} [flags]; {console.command('VERB')} --help lists the flags", ""]
    lines += [f"  {name:<12}{text}" for name, text in VERBS.items()]
    if verb in ("--help", "-h", "help"):
        print("\n".join(lines))
        sys.exit(0)
    if verb:
        lines = [f"error: {verb!r}: no such verb; {nearest(verb, VERBS)}"]
    print("\n".join(lines), file=sys.stderr)
    sys.exit(2)


def define_config() -> None:
    """Defines `--config=FILE.py` and the overrides `--config.section.field=value`."""
    text = "a preset such as default, or a file; --config.section.field=value overrides one of its fields"
    flags.DEFINE_string("config", None, text)
    flags.DEFINE_multi_string("override", [], "section.field=value: the same as --config.section.field=value")
    FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS["config"])  # so that --help shows it


def config_facts() -> dict[str, Any]:
    """Returns the preset and the overrides on the command line, to record with a result."""
    return {"config": FLAGS.config, "overrides": FLAGS.override}


def config() -> Any:
    """Returns the `Config` that the flags describe.

    Raises:
      ConfigError: `--config` is missing, or one of its fields is wrong.
    """
    if FLAGS.config is None:
        raise ConfigError("--config is missing: name a preset or a file, such as --config=configs/default.py")
    from mnist_flax import preset  # imports JAX, which --help and flag errors need not wait for

    return preset.load_config(os.path.expanduser(FLAGS.config), FLAGS.override)


def define_run(subject: str = "the folder of a run or a population", output: str | None = None) -> None:
    """Defines the flags of commands that read a run: `--workdir`, `--checkpoint` and, given its help text, `--output`.

    Commands with an output also read data, and have a flag for each of `DATA_FIELDS`.
    """
    defined = {"workdir": (None, subject), "checkpoint": ("latest", "latest, best (on hold-out rows) or a step")}
    if output:
        defined["output"] = (None, output)
        texts = {field: f"the {field.partition('.')[2]} of the data to evaluate on" for field in DATA_FIELDS}
        defined |= {f"config.{field}": (None, text) for field, text in texts.items()}
    for name, (default, text) in defined.items():
        flags.DEFINE_string(name, default, text)
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])  # so that --help shows it


def define_counts(name: str, default: str, text: str) -> None:
    """Defines a flag for a list of positive whole numbers, such as `--batch_sizes=64,256`."""
    flags.DEFINE_list(name, default, text)
    are_counts = "must be positive whole numbers, with commas between them"
    flags.register_validator(name, lambda values: all(value.isdecimal() and int(value) for value in values), are_counts)


def data_overrides() -> dict[str, Any]:
    """Returns the values of `DATA_FIELDS` that are given on the command line."""
    given = {field: FLAGS[f"config.{field}"].value for field in DATA_FIELDS}
    return {field: value for field, value in given.items() if value is not None}


def path(value: str) -> pathlib.Path:
    """Returns the path in a flag's value; shells do not expand `~` inside `--flag=~/folder`."""
    return pathlib.Path(os.path.expanduser(value))


def path_of(flag: str) -> pathlib.Path | None:
    """Returns the path in a flag, or None if the flag is not given.

    Raises:
      ConfigError: it is empty, as after `--flag=$UNSET`.
    """
    value = FLAGS[flag].value
    if value == "":
        raise ConfigError(f"--{flag}: is empty; name a path, or leave it out")
    return None if value is None else path(value)


def training_workdir(suffix: str = "") -> pathlib.Path:
    """Returns the folder that `--workdir` names, by default `runs/`, the preset's name and `suffix`."""
    return path_of("workdir") or pathlib.Path("runs", pathlib.Path(FLAGS.config).stem + suffix)


def output_folder() -> pathlib.Path | None:
    """Returns the folder that `--output` names, created if it is missing; None without the flag.

    Raises:
      WorkdirError: the folder cannot be created.
    """
    folder = path_of("output")
    return folder and workdirs.create_output(folder)


def output_file() -> pathlib.Path | None:
    """Returns the file that `--output` names, in a folder that is created if it is missing; None without the flag.

    Raises:
      UserError: it is a folder, or its folder cannot be created.
    """
    file = path_of("output")
    if file is None:
        return None
    if file.is_dir():
        raise ConfigError(f"--output={FLAGS.output}: is a folder; name a file, such as {file / 'demo.html'}")
    return workdirs.create_output(file.parent) / file.name


def workdir() -> pathlib.Path:
    """Returns the folder that `--workdir` names."""
    folder = path_of("workdir")
    if folder is None:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    return folder


def run(main: Callable[[Sequence[str]], None], *, takes_files: bool = False) -> None:
    """Parses the flags, calls `main` with the program's name and any file arguments, and exits.

    A `UserError` ends the program with its message and exit status; any other exception is a bug and prints
    its traceback. A signal ends the program immediately, unless `signals.stop_request` handles it.
    """
    # Tracing, and importing JAX, create a million long-lived objects. With the default threshold, garbage collection
    # takes 0.2 s of the 1.8 s to the first step.
    gc.set_threshold(100_000)
    machine.keep_freed_memory()
    console.open_streams()
    console.log_to_console()
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax and JAX log a lot; --verbosity=0 shows it
    try:
        try:
            with signals.listening(lambda signum: signals.end_process(128 + signum, "stopped\n")):
                app.run(main, flags_parser=functools.partial(_parse, takes_files=takes_files))
        except SystemExit:
            sys.stdout.flush()
            raise
    except UserError as error:
        with contextlib.suppress(UserError):
            sys.stdout.flush()
        sys.exit(console.print_error(error))


def _parse(arguments: Sequence[str], *, takes_files: bool) -> Sequence[str]:
    """Parses the command line; unknown flags and unexpected arguments are errors."""
    if "override" in FLAGS:
        arguments = _with_overrides(arguments)
    try:
        rest: Sequence[str] = FLAGS(arguments)
    except SystemExit:  # after --help; absl exits with status 1, but a request for help is not a failure
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f"--{error.flagname}: no such flag; {_flag_hint(error.flagname)}") from error
    except flags.Error as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    if rest[1:] and not takes_files:
        raise ConfigError(f"{rest[1]!r}: is not a flag; a flag starts with two dashes")
    return rest


def _flag_hint(name: str) -> str:
    """Returns a hint for the user of a flag that a command does not have."""
    if name.startswith("config.") and "config.data.name" in FLAGS:
        from mnist_flax.config import Config, dotted

        field = name.removeprefix("config.")
        if field in dotted(Config()):
            return f"it is fixed by the run; this command takes only {', '.join(DATA_FIELDS)}"
        return f"this command takes only the fields of the data; {nearest(field, DATA_FIELDS)}"
    if "override" in FLAGS:
        from mnist_flax.config import Config, dotted

        fields = [field for field in dotted(Config()) if field.rpartition(".")[2] == name]
        if fields:
            return f"did you mean {' or '.join(f'--config.{field}' for field in fields)}?"
    hint = nearest(name, [flag for flag in FLAGS if FLAGS[flag].help])
    return hint if hint.startswith("did") else "--help lists the flags"


def _with_overrides(arguments: Sequence[str]) -> list[str]:
    """Replaces `--config.section.field=value` with `--override=section.field=value`, a flag that absl can parse."""
    result: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(=.*)?", argument, re.DOTALL)
        if argument == "--":
            return [*result, argument, *rest]
        if match:
            is_negated, field, value = match.groups()
            if is_negated and value is not None:
                raise ConfigError(f"{argument}: takes no value; write --config.{field}{value} or --noconfig.{field}")
            if value is None:
                has_value = not is_negated and rest and not rest[0].startswith("--")
                value = f"={rest.pop(0)}" if has_value else "=false" if is_negated else ""
            argument = f"--override={field}{value}"
        result.append(argument)
    return result
