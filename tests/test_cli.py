"""The command line: one clear message and an exit status for every mistake, and nothing written."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = "--config=configs/tiny.py"


def run(*arguments: str, module: str = "mnist_flax.main", cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing: name a file, such as --config=configs/default.py"),
        (["--config=nowhere.py"], "--config=nowhere.py: cannot be read"),
        (["--confg=configs/tiny.py"], "Unknown command line flag 'confg'. Did you mean: config"),
        ([TINY, "stray"], "'stray': is no flag"),
        ([TINY, "--config.optimzer.name=sgd"], "config.optimzer: no such field; did you mean 'optimizer'?"),
        ([TINY, "--config.optimizer.nam=sgd"], "config.optimizer.nam: no such field; did you mean 'name'?"),
        ([TINY, "--config.train.epochs.x=1"], "config.train.epochs is a value and has none"),
        ([TINY, "--config.train.epochs=1e3"], "--config.train.epochs=1e3: invalid literal for int()"),
        ([TINY, "--config.train.epochs=-1"], "config.train.epochs = -1: must be at least 1"),
        ([TINY, "--config.optimizer.learning_rate=nan"], "config.optimizer.learning_rate = nan: must be finite"),
        ([TINY, "--config.model.kernel_sizes=(29,)"], "29x29 kernel of convolution 1 is larger than its 28x28"),
        ([TINY, "--config.train.batch_size=5000"], "config.train.batch_size = 5000: more than the 1800 rows"),
    ],
)
def test_a_mistake_gets_one_message(arguments: list[str], message: str, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    result = run(*arguments, f"--workdir={workdir}")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return 1 / 0\n", "the config file fails with ZeroDivisionError: division by zero"),
        ("this is no Python\n", "the config file fails with SyntaxError"),
        ("import nothing_like_this\n", "the config file fails with ModuleNotFoundError"),
        ("x = 1\n", "the config file fails with AttributeError"),
        ("def get_config():\n    return 5\n", "its get_config() must return a ConfigDict"),
        ("def get_config():\n    pass\n", "--config"),
        (
            "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'model': 3})\n",
            "config.model = 3: must be a group of fields",
        ),
    ],
)
def test_a_bad_config_file_gets_one_message(text: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    result = run(f"--config={path}", cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_help_says_all_and_needs_neither_jax_nor_tensorflow() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "--workdir" in result.stdout
    assert "--config" in result.stdout
    code = (
        "import sys, runpy; sys.argv = ['main', '--help']\n"
        "try: runpy.run_module('mnist_flax.main', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'orbax'} & set(sys.modules), 'slow'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, timeout=60)


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
