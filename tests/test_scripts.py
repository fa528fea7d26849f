"""The scripts: the two commands of the README, and the measurements."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from mnist_flax.config import Config, replace

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEASUREMENTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_says_what_it_measures_and_is_listed(name: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / name), "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert f"scripts/{name}:" in result.stdout
    assert f"`{name}`" in (ROOT / "scripts" / "README.md").read_text()


@pytest.mark.parametrize("name", ["train", "test"])
def test_an_unsuitable_interpreter_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for interpreter in (str(old), "no-such-python"):
        environment = {**os.environ, "PYTHON": interpreter}
        command = [str(ROOT / "scripts" / name)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2
        assert f"PYTHON={interpreter}: must be Python 3.11 to 3.13" in result.stderr


def test_the_arithmetic_of_the_published_network() -> None:
    spec = importlib.util.spec_from_file_location("bench_steps", ROOT / "scripts" / "bench_steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, second = 2 * 26**2 * 9 * 1 * 32, 2 * 11**2 * 9 * 32 * 64
    forward = first + second + 2 * 3**2 * 9 * 64 * 64 + 2 * 576 * 64 + 2 * 64 * 10
    assert module.training_flops(Config()) == 3 * forward - first
    perceptron = replace(Config(), model__widths=(), model__pools=(1,), model__dense=(5,))
    assert module.training_flops(perceptron) == 2 * (784 * 5 * 2 + 5 * 10 * 3)
