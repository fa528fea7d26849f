"""The command line: every mistake gets one clear message and an exit status, and nothing is written."""

import itertools
import os
import pathlib
import subprocess
import sys

import forked
import pytest

from mnist_flax import cli, preset
from mnist_flax.config import default_config_dict
from mnist_flax.errors import ConfigError
from mnist_flax.run import console

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = "--config=configs/tiny.py"


def run(*arguments: str, module: str = "mnist_flax.main", cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    return forked.run("-m", module, *arguments, cwd=cwd)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --config is missing: name a preset or a file, such as --config=configs/default.py"),
        (["--confg=configs/tiny.py"], "error: --confg: no such flag; did you mean 'config'?"),
        ([TINY, "--epochs=3"], "error: --epochs: no such flag; did you mean --config.train.epochs?"),
        ([TINY, "--zzz"], "error: --zzz: no such flag; --help lists the flags"),
        ([TINY, "stray"], "error: 'stray': is not a flag; a flag starts with two dashes"),
        ([TINY, "--fork="], "error: --fork: is empty; name a path, or leave it out"),
        (
            [TINY, "--config.data.raw_dir"],
            "error: --config.data.raw_dir: needs a value, such as --config.data.raw_dir=VALUE",
        ),
        ([TINY, "--config.train.epochs=1e3"], "error: --config.train.epochs=1e3: must be an integer"),
    ],
)
def test_mistake_gets_one_message(arguments: list[str], message: str, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    result = run(*arguments, f"--workdir={workdir}")
    assert (result.returncode, result.stderr) == (2, message + "\n")
    assert not workdir.exists()


def test_a_config_field_for_a_command_without_any_gets_no_wrong_hint() -> None:
    result = run("--config.data.name=mnist", "--workdir=x", "3.png", module="mnist_flax.predict")
    assert (result.returncode, result.stderr) == (
        2,
        "error: --config.data.name: no such flag; --help lists the flags\n",
    )


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_needs_neither_jax_nor_tensorflow(verb: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['{verb}', '--help']\n"
        f"try: runpy.run_module('mnist_flax.{verb}', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'orbax'} & set(sys.modules), 'slow'"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, timeout=60)
    assert b"--workdir" in done.stdout
    assert (b"--config" in done.stdout) == (verb != "predict")


def test_no_module_imports_tensorflow_or_a_heavy_library() -> None:
    modules = sorted(path.stem for path in (ROOT / "mnist_flax").glob("*.py"))
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module('mnist_flax.' + name)\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'orbax', 'matplotlib', 'sklearn', 'skimage'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# Verbs ----------------------------------------------------------------------------------------------------------------


def test_only_verbs_that_exist_are_offered() -> None:
    modules = {path.stem for path in (ROOT / "mnist_flax").glob("*.py")}
    assert {"main", "evaluate", "report", "predict", "population"} <= cli.VERBS.keys() <= modules


@pytest.mark.parametrize("how", [("-m", "mnist_flax"), ("-c", "from mnist_flax import cli; cli.main()")])
def test_verb_does_what_python_m_does(how: tuple[str, str], tmp_path: pathlib.Path) -> None:
    command = [sys.executable, *how, "main", "--config=tiny", "stray"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (2, "error: 'stray': is not a flag; a flag starts with two dashes\n")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "usage: mnist-flax VERB [flags]"),
        (["--help"], 0, "usage: mnist-flax VERB [flags]"),
        (["predcit"], 2, "error: 'predcit': no such verb; did you mean 'predict'?\n"),
    ],
)
def test_verbs_are_listed(
    arguments: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(console, "program", "")  # restored at the end
    monkeypatch.setattr(sys, "argv", ["mnist-flax", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == status
    assert (said.err or said.out).startswith(message)
    assert console.command("report") == "mnist-flax report"


def test_messages_name_the_script_that_was_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "program", "")
    assert console.command("report") == "python -m mnist_flax.report"
    monkeypatch.setattr(sys, "argv", ["nets/my_net.py", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith("usage: python nets/my_net.py VERB [flags]")
    assert console.command("report") == "python nets/my_net.py report"


# Overrides ------------------------------------------------------------------------------------------------------------


def test_every_spelling_of_an_override_is_understood() -> None:
    given = ["main", "--config=x", "--config.train.epochs=3", "-config.seed", "4", "--config.train.report"]
    given += ["--noconfig.train.tensorboard", "--config.data.raw_dir=a=b", "--", "--config.seed=5"]
    assert cli._with_overrides(given) == [
        "main",
        "--config=x",
        "--override=train.epochs=3",
        "--override=seed=4",
        "--override=train.report",
        "--override=train.tensorboard=false",
        "--override=data.raw_dir=a=b",
        "--",
        "--config.seed=5",
    ]


def test_negated_override_takes_no_value() -> None:
    with pytest.raises(ConfigError, match=r"--noconfig.train.report=true: takes no value; write --config.train.report"):
        cli._with_overrides(["main", "--noconfig.train.report=true"])


def test_override_gets_the_type_of_its_field() -> None:
    overrides = ["train.epochs=3", "model.widths=(3, 4)", "model.dense=5", "train.report=false", "seed=7"]
    overrides += ["optimizer.learning_rate=1e-2", "data.raw_dir=/a=b", "model.paddings=('SAME',)"]
    config = preset.load_config("tiny", overrides)
    model = config.to_dict()["model"]
    assert (config.train.epochs, model["widths"], model["dense"]) == (3, (3, 4), (5,))
    assert (config.train.report, config.seed, config.optimizer.learning_rate) == (False, 7, 0.01)
    assert (config.data.raw_dir, model["paddings"]) == ("/a=b", ("SAME",))


@pytest.mark.parametrize("overrides", [*itertools.permutations(["model.name=resnet", "model.dropout=0.5"])])
def test_override_may_choose_another_family(overrides: tuple[str, ...]) -> None:
    config = preset.load_config("tiny", overrides)
    assert config.to_dict()["model"] == default_config_dict("resnet").model.to_dict() | {"dropout": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.name=sgd", "config.optimzer: no such field; did you mean 'optimizer'?"),
        ("epochs=3", "config.epochs: no such field; did you mean config.train.epochs?"),
        ("optimizer.nam=sgd", "config.optimizer.nam: no such field; did you mean 'name'?"),
        ("train.epochs.x=1", "config.train.epochs.x: no such field; config.train.epochs is a value and has none"),
        ("train=3", "--config.train=3: is a group of fields; name one of them"),
        ("=3", "config.: no such field"),
        ("model.name=rsenet", "config.model.name = 'rsenet': did you mean 'resnet'?"),
        ("model.name=CNN", "config.model.name = 'CNN': did you mean 'cnn'?"),
        ("train.batch_size=0", "config.train.batch_size = 0: must be at least 1"),
        ("train.epochs", "--config.train.epochs: needs a value, such as --config.train.epochs=3"),
        ("model.pools", "--config.model.pools: needs a value, such as --config.model.pools='(2,)'"),
        ("data.fold=2", "config.data.fold = 2: is used only with config.data.folds; set that, or leave it at 0"),
        ("train.report=perhaps", "--config.train.report=perhaps: must be true or false"),
        ("optimizer.learning_rate=fast", "--config.optimizer.learning_rate=fast: must be a number"),
        ("optimizer.learning_rate=nan", "config.optimizer.learning_rate = nan: must be finite"),
        ("model.widths=(16,", "--config.model.widths=(16,: must be a tuple, such as (8,16)"),
        ("model.widths=" + "(" * 10_000, "must be a tuple"),
        ("model.paddings=SAME", "--config.model.paddings=SAME: must be a tuple, such as ('VALID',)"),
        ("model.widths=('a',)", "config.model.widths[0] = 'a': must be of type int, not str"),
        ("train.batch_size=5000", "config.train.batch_size = 5000: more than the 1800 rows"),
    ],
)
def test_wrong_override_gets_one_message(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        preset.load_config("tiny", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Presets --------------------------------------------------------------------------------------------------------------

START = "from mnist_flax.config import default_config_dict\n\n\ndef get_config():\n    config = default_config_dict()\n"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ('config.train.epochs = int("abc")', "ValueError: invalid literal for int() with base 10: 'abc'"),
        ("config.trian.epochs = 3", "AttributeError: "),
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this'"),
    ],
)
def test_failing_preset_names_line_and_reason(statement: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"{START}    {statement}\n    return config\n")
    with pytest.raises(ConfigError) as error:
        preset.load_config(path)
    assert str(error.value).startswith(f"--config={path}: line 6: {statement}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ('config.train.epochs = "three"', "config.train.epochs = 'three': must be of type int, not str"),
        ("config.train.epochs = 3.0", "config.train.epochs = 3.0: must be of type int, not float"),
        ("config.model.widths = 32", "config.model.widths = 32: must be a tuple, such as (32,)"),
        ('config.train["epochs"] = "x"', "config.train.epochs = 'x': must be of type int, not str"),
        ('setattr(config.train, "epochs", 3.5)', "config.train.epochs = 3.5: must be of type int, not float"),
        ("config.train.epoch = 3", "config.train.epoch: no such field; did you mean 'epochs'?"),
        ("config.train.batch_size = 0", "config.train.batch_size = 0: must be at least 1"),
        ("config.train.epochs = None", "config.train.epochs = None: must be of type int, not NoneType"),
        ("config.model.widths = (1, 'a')", "config.model.widths[1] = 'a': must be of type int, not str"),
        ("return {'train': {'epochs': '3'}}", "config.train.epochs = '3': must be of type int, not str"),
        ("return {'train': {'epoch': 3}}", "config.train.epoch: no such field; did you mean 'epochs'?"),
        ("return {'model': 3}", "config.model = 3: must be a group of fields"),
    ],
)
def test_wrong_value_in_a_preset_names_its_line(statement: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"{START}    {statement}\n    return config\n")
    with pytest.raises(ConfigError) as error:
        preset.load_config(path)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(f"({path}, line 6)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("this is no Python\n", "line 1: SyntaxError: invalid syntax"),
        ("x = 1\n", "defines no function get_config()"),
        ("get_config = 1\n", "defines no function get_config()"),
        ("def get_config():\n    return 5\n", "its get_config() must return a ConfigDict, not 5"),
        ("def get_config():\n    pass\n", "its get_config() must return a ConfigDict, not None"),
        ("def get_config(a):\n    pass\n", "TypeError: get_config() missing 1 required positional argument: 'a'"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_file_that_is_not_a_preset_gets_one_message(text: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        preset.load_config(path)
    assert str(error.value).startswith(f"--config={path}: ")
    assert message in str(error.value)


def test_preset_may_import_its_neighbour_and_define_dataclasses(tmp_path: pathlib.Path) -> None:
    (tmp_path / "neighbour_of_a_preset.py").write_text("EPOCHS = 3\n")
    path = tmp_path / "own.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\nimport neighbour_of_a_preset\n"
        f"{START}    config.train.epochs = neighbour_of_a_preset.EPOCHS\n    return config\n"
        "@dataclasses.dataclass\nclass Own:\n    width: int = 1\n"
    )
    for before in (list(sys.path), [str(tmp_path), *sys.path]):
        sys.path[:] = before
        assert preset.load_config(path).train.epochs == 3
        assert sys.path == before
    sys.path.remove(str(tmp_path))


def test_preset_is_found_by_name_or_path(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert preset.find_preset("tiny") == ROOT / "configs" / "tiny.py"
    (tmp_path / "tiny").write_text(START + "    return config\n")
    assert preset.find_preset("tiny") == pathlib.Path("tiny")
    with pytest.raises(ConfigError, match=r"--config=defautl: cannot be read \(No such file.+; did you mean 'default'"):
        preset.find_preset("defautl")
    with pytest.raises(ConfigError, match="; did you mean 'fast'"):
        preset.find_preset("fast.py")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a Python file; to repeat a run, name its report"):
        preset.load_config(tmp_path / "config.json")
    (tmp_path / "mine.py").touch()
    with pytest.raises(ConfigError, match=rf"; did you mean '{tmp_path}/mine.py'"):
        preset.find_preset(f"{tmp_path}/mien.py")
    for name in (".", "zero\0byte", "nowhere.py", "long" * 100):
        with pytest.raises(ConfigError, match="cannot be read"):
            preset.find_preset(name)


# Paths ----------------------------------------------------------------------------------------------------------------


def test_home_folder_in_a_flag_is_expanded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.path("~/runs/a") == tmp_path / "runs" / "a"
    assert cli.path("a~b") == pathlib.Path("a~b")
    (tmp_path / "mine.py").write_text("from ml_collections import ConfigDict\n\nget_config = ConfigDict\n")
    done = forked.run("-m", "mnist_flax.main", "--config=~/mine.py", "--config.train.epochs=0", cwd=tmp_path)
    assert done.stderr == "error: config.train.epochs = 0: must be at least 1\n"  # the file was found


def test_a_script_may_postpone_its_annotations(tmp_path: pathlib.Path) -> None:
    (tmp_path / "late.py").write_text(
        """from __future__ import annotations
import dataclasses
from typing import Optional
import flax.linen as nn
from mnist_flax import cli, models
from mnist_flax.models.base import ModelConfig

@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(ModelConfig):
    width: Optional[int] = None

    def module(self, num_classes, *, train=False):
        return nn.Dense(num_classes)

models.MODELS["late"] = Late
if __name__ == "__main__":
    cli.main()
"""
    )
    wrong = "--config.train.batch_size=0"
    done = forked.run("late.py", "main", "--config=default", "--config.model.name=late", wrong, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: config.train.batch_size = 0: must be at least 1\n")
