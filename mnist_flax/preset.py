"""Loads preset files: calls `get_config()`, applies the overrides from the flags, and builds a Config.

A preset is a program, so it may fail in any way. Each failure is reported in one message that names the file, the line,
and the field or the error.
"""

import ast
import contextlib
import pathlib
import shlex
import sys
import traceback
import types
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mnist_flax.checks import nearest
from mnist_flax.config import Config, default_config_dict
from mnist_flax.errors import ConfigError, reason

_PACKAGE = pathlib.Path(__file__).resolve().parent
_IN_WHEEL = _PACKAGE / "configs"
FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / "configs"  # where the presets are


def find_preset(name: str) -> pathlib.Path:
    """Returns the file that `--config` names: a path, or the name of a preset of this project, such as `default`.

    Raises:
      ConfigError: there is no such file.
    """
    path = pathlib.Path(name)
    known = {file.stem: file for file in sorted(FOLDER.glob("*.py"))}
    try:
        if path.is_file() or name not in known:
            path.read_bytes()
            return path
    except (OSError, ValueError) as error:
        beside = [str(file) for file in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        is_ours = name == path.name or (path.parent.name == FOLDER.name and not beside)
        others = [*beside, *known] if is_ours else beside
        hint = f"; {nearest(name, others)}" if others else ""
        raise ConfigError(f"--config={name}: cannot be read ({reason(error)}){hint}") from error
    return known[name]


def preset_dict(name: str) -> ConfigDict:
    """Returns what a preset of this project sets, such as `accurate`, for a `get_config()` that starts from it.

    Raises:
      ConfigError: there is no such preset.
    """
    return ConfigDict(run_preset(FOLDER / f"{name}.py"), type_safe=False)


def load_config(name: str | pathlib.Path, overrides: Iterable[str] = ()) -> Config:
    """Runs the preset that `name` names (see `find_preset`), and applies overrides such as `train.epochs=3`.

    Raises:
      ConfigError: there is no such preset, it fails, or one of its fields or overrides is wrong.
    """
    path = find_preset(str(name))
    values = run_preset(path)
    try:
        config = Config.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{error} ({_place(path, str(error))})") from error
    fields = config.to_dict()
    for override in sorted(overrides, key=lambda override: not override.startswith("model.name=")):  # that one first
        field, _, value = override.partition("=")
        if field == "model.name" and value != fields["model"]["name"]:
            fields["model"] = default_config_dict(value)["model"].to_dict()  # the defaults of the new family
        _override(fields, override)
    return Config.from_dict(fields)


def run_preset(path: pathlib.Path) -> dict[str, Any]:
    """Runs a preset, and returns the result of its `get_config()` as nested dicts.

    Raises:
      ConfigError: the preset fails, has no `get_config()`, or returns something else.
    """
    if path.suffix == ".json":
        raise ConfigError(f"--config={path}: is not a Python file; to repeat a run, name its report/config.py")
    module = types.ModuleType(f"preset_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up the types of their fields there
    folder = str(path.parent)  # a preset may import modules from it, such as another preset
    if is_new := folder not in sys.path:
        sys.path.append(folder)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        values = get_config() if callable(get_config) else None
        values = values.to_dict() if isinstance(values, ConfigDict) else values
    except BaseException as error:  # a preset may call sys.exit; Ctrl-C is not an exception here (`signals.listening`)
        raise ConfigError(f"--config={path}: {_describe(error, path)}") from error
    finally:
        if is_new and folder in sys.path:
            sys.path.remove(folder)
    if not callable(get_config):
        raise ConfigError(f"--config={path}: defines no function get_config()")
    if not isinstance(values, Mapping):
        raise ConfigError(f"--config={path}: its get_config() must return a ConfigDict, not {values!r:.60}")
    return dict(values)


def _describe(error: BaseException, path: pathlib.Path) -> str:
    """Returns the line, source and message of an exception raised in a preset."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    message = " ".join(str(error).split())[:300]
    message = message if isinstance(error, ConfigError) else f"{type(error).__name__}: {message}".rstrip(": ")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"line {frames[-1].lineno}: {frames[-1].line}: {message}" if frames else message


def _place(path: pathlib.Path, message: str) -> str:
    """Returns the file and, if it can be found, the line that sets the field named at the start of a message."""
    field = message.partition(" ")[0].strip(":").split("[")[0].split(".")[1:]
    name, section = (field or [""])[-1], (field[-2:-1] or [""])[0]
    line = 0
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
            if not section or ast.unparse(node.value).split(".")[-1] == section:
                line = max(line, node.lineno)
        elif (isinstance(node, ast.keyword) and node.arg == name) or (
            isinstance(node, ast.Constant) and node.value == name
        ):
            line = line or node.lineno
    return f"{path}, line {line}" if line else str(path)


def _override(fields: dict[str, Any], override: str) -> None:
    """Applies one override to the fields, in place."""
    field, has_value, text = override.partition("=")
    parent, node, path = fields, fields, "config"
    for name in field.split("."):
        if not isinstance(node, dict):
            raise ConfigError(f"{path}.{name}: no such field; {path} is a value and has none")
        if name not in node:
            groups = [section for section, values in fields.items() if isinstance(values, dict) and name in values]
            hint = f"did you mean {path}.{groups[0]}.{name}?" if groups and node is fields else nearest(name, node)
            raise ConfigError(f"{path}.{name}: no such field; {hint}")
        parent, node, path = node, node[name], f"{path}.{name}"
    if isinstance(node, dict):
        raise ConfigError(f"--{path}={text}: is a group of fields; name one of them, such as {path}.{min(node)}")
    if not has_value and not isinstance(node, bool):
        example = shlex.quote(str(node).replace(" ", "")) if isinstance(node, tuple) else node or "VALUE"
        raise ConfigError(f"--{path}: needs a value, such as --{path}={example}")
    parent[name] = _convert(node, text, path) if has_value else True


def _convert(old: Any, text: str, path: str) -> Any:
    """Converts the text of a flag to the type of the value that it replaces."""
    if isinstance(old, str):
        return text
    if text == "None":  # only optional fields accept it
        return None
    if old is None:  # its type is not known here
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(text)
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        if isinstance(old, bool):
            return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}[text.lower()]
        if isinstance(old, int | float):
            return type(old)(text)
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        example = repr(old or (16, 32)).replace(" ", "") if isinstance(old, tuple) else ""
        kinds = {bool: "true or false", int: "an integer", float: "a number", tuple: f"a tuple, such as {example}"}
        raise ConfigError(f"--{path}={text}: must be {kinds[type(old)]}") from error
