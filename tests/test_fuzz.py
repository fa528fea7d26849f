"""Fuzzers with fixed seeds: the result is correct or one message, and nothing is written outside a run.

pytest -m slow tests/test_fuzz.py
"""

import json
import pathlib
import random
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from small_run import SMALL, outcome

from mnist_flax import cli, preset
from mnist_flax.config import Config, default_config_dict, replace
from mnist_flax.errors import ConfigError, UserError, WorkdirError
from mnist_flax.run import checkpoint, checkpoint_files
from mnist_flax.run import workdir as workdirs
from mnist_flax.train import fit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

VALUES: list[Any] = [None, True, 0, -1, 3, 2**31, 2**70, 1.5, -0.0, 1e300, float("nan"), float("inf"), "", "x", "3"]
VALUES += ["adam", "SAME", (), (3,), (3, "x"), [], [[]], {}, {"name": "cnn"}, {"x": 1}, b"x", "\0", "é" * 50]
TEXTS = [
    "",
    "=",
    "1",
    "-1",
    "1e3",
    "nan",
    "inf",
    "true",
    "None",
    "()",
    "(1,",
    "(1,2)",
    "[3]",
    "{}",
    "'x'",
    "__import__('os')",
]
TEXTS += ["9" * 50, "\0", "é", "(" * 500, "1,2", "0x10", " 3 ", "\n", "config", "adam", "resnet", "1_000", "--3"]


def fields(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every field of a config, dotted."""
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{name}.")


NAMES = [*fields(default_config_dict().to_dict()), *fields(default_config_dict("resnet").to_dict())]


def mutated(name: str, chance: random.Random) -> str:
    """A name with one character added, removed or replaced."""
    i = chance.randrange(len(name))
    return name[:i] + chance.choice(["", ".", "x", name[i] * 2, "\0", "é"]) + name[i + chance.randint(0, 1) :]


def check_message(error: UserError) -> None:
    """Checks that a message is neither nearly empty nor a dump."""
    assert 10 < len(str(error)) < 1000, error


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_flags_give_a_config_or_a_message(seed: int) -> None:
    chance, accepted = random.Random(seed), 0
    path = preset.find_preset("tiny")
    for _ in range(500):
        names = [chance.choice(NAMES) for _ in range(chance.randint(1, 3))]
        names = [mutated(name, chance) if chance.random() < 0.2 else name for name in names]
        arguments = [f"--config.{name}={chance.choice(TEXTS)}" for name in names]
        if chance.random() < 0.2:
            arguments.append(chance.choice(["--config.", "--noconfig.train.report", "--config.x", "--config", "--"]))
        rewritten = [text for text in cli._with_overrides(arguments) if text.startswith("--override=")]
        try:
            config = preset.load_config(path, [text.removeprefix("--override=") for text in rewritten])
            accepted += 1
            assert Config.from_dict(json.loads(config.to_json())) == config
        except ConfigError as error:
            check_message(error)
    assert accepted > 5


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_presets_give_a_config_or_a_message(seed: int, tmp_path: pathlib.Path) -> None:
    chance, accepted = random.Random(seed), 0
    path = tmp_path / "own.py"
    for _ in range(300):
        name, value = chance.choice(NAMES), chance.choice(VALUES)
        name = mutated(name, chance) if chance.random() < 0.2 else name
        *sections, field = name.split(".")
        start = "from mnist_flax.config import default_config_dict\nnan, inf = float('nan'), float('inf')\n"
        start += "def get_config():\n    config = default_config_dict()\n"
        nested: Any = {field: value}
        for section in reversed(sections):
            nested = {section: nested}
        statement = chance.choice(
            [
                f"config.{name} = {value!r}",
                f"config.update({nested!r})",
                f"return {nested!r}",
                f"config = {value!r}",
                f"config.unlock().{name} = {value!r}",
                f"del config.{name}",
                f"raise {chance.choice(['SystemExit', 'KeyboardInterrupt', 'GeneratorExit', 'MemoryError', '3'])}",
            ]
        )
        path.write_text(f"{start}    {statement}\n    return config\n")
        try:
            preset.load_config(path)
            accepted += 1
        except ConfigError as error:
            check_message(error)
            assert str(path) in str(error), error
    assert accepted > 5


# Workdirs -------------------------------------------------------------------------------------------------------------

SHORT = replace(SMALL, checkpoint__keep_latest=3)


@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled programs, so that each is compiled once and not in every run."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    fit(SHORT, workdir)
    return workdir


@pytest.fixture(scope="module")
def quiet(finished: pathlib.Path) -> dict[str, Any]:
    return outcome(finished)


def resume(workdir: pathlib.Path, quiet: dict[str, Any]) -> str:
    """Continues a run; returns the message if it is refused, else checks that its outcome is `quiet`."""
    try:
        fit(SHORT, workdir)
    except UserError as error:
        check_message(error)
        return str(error)
    assert outcome(workdir) == quiet
    return ""


def mutate(value: Any, chance: random.Random) -> Any:
    """A JSON value with one part replaced or removed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(sorted(value))
        changed = {**value, name: mutate(value[name], chance)}
        if chance.random() < 0.1:
            del changed[name]
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        i = chance.randrange(len(value))
        return [*value[:i], mutate(value[i], chance), *value[i + 1 :]]
    usable = [other for other in VALUES if not isinstance(other, bytes | tuple)]
    return chance.choice(usable)


@pytest.mark.parametrize("seed", range(2))
def test_fuzzed_records_give_a_run_or_a_message(seed: int, finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    chance, refused = random.Random(seed), 0
    for number in range(25):
        workdir = tmp_path / str(number)
        shutil.copytree(finished, workdir)
        newest = workdir / workdirs.CHECKPOINTS / "14"
        path = newest / "record" / "metadata"
        path.write_text(json.dumps(mutate(json.loads(path.read_text()), chance)))
        (newest / checkpoint_files.CHECKSUMS).write_text(checkpoint_files.checksums(newest))
        (workdir / workdirs.SUMMARY).unlink()
        try:
            fit(SHORT, workdir)
        except UserError as error:
            check_message(error)
            refused += 1
        try:
            checkpoint.load_run(workdir)
        except WorkdirError as error:
            check_message(error)
        shutil.rmtree(workdir)
    assert refused > 5


def harm(path: pathlib.Path, chance: random.Random) -> None:
    """Deletes, cuts, zeroes or lengthens a file, or puts a folder in its place."""
    content = path.read_bytes()
    cut = chance.randrange(len(content) + 1)
    kind = chance.choice(["delete", "cut", "zero", "lengthen", "folder"])
    if kind in ("delete", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        changed = {"cut": content[:cut], "zero": bytes(len(content)), "lengthen": content[:cut] + b"x" + content[cut:]}
        path.write_bytes(changed[kind])


@pytest.mark.parametrize("seed", range(2))
def test_fuzzed_workdirs_give_the_same_run_or_a_message(
    seed: int, finished: pathlib.Path, quiet: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    chance = random.Random(seed)
    for number in range(12):
        workdir = tmp_path / str(number)
        shutil.copytree(finished, workdir)
        for _ in range(chance.randint(1, 4)):
            paths = sorted(path for path in workdir.rglob("*") if path.is_file())
            path = chance.choice(paths)
            harm(path, chance)
        workdirs.remove(workdir / workdirs.SUMMARY)  # with it, the run would count as finished
        resume(workdir, quiet)
        shutil.rmtree(workdir)


@pytest.mark.parametrize("seed", range(2))
def test_fuzzed_links_are_never_written_through(
    seed: int, finished: pathlib.Path, quiet: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    chance = random.Random(seed)
    for number in range(12):
        workdir, outside = tmp_path / str(number), tmp_path / f"outside-{number}"
        shutil.copytree(finished, workdir)
        outside.mkdir()
        (outside / "file").write_text("precious")
        (outside / "folder").mkdir()
        places = [path for path in workdir.rglob("*") if not path.is_symlink()]
        places += [workdir / name for name in ("report", workdirs.DAMAGED, ".summary.json.tmp", ".config.json.00.tmp")]
        places += [workdir / workdirs.CHECKPOINTS / name for name in ("14.unfinished", "15", "7.unfinished.x")]
        for path in chance.sample(places, chance.randint(1, 3)):
            if path.parent.is_dir() and not path.parent.is_symlink():
                workdirs.remove(path)
                target = chance.choice(["file", "folder", "missing"])
                path.symlink_to(outside / target)
        workdirs.remove(workdir / workdirs.SUMMARY)
        resume(workdir, quiet)
        assert sorted(path.name for path in outside.rglob("*")) == ["file", "folder"]
        assert (outside / "file").read_text() == "precious"
        shutil.rmtree(workdir)
