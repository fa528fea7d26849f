"""Tests that need a GPU: `scripts/test -m gpu`. The processes that train use it; pytest itself stays on the CPU."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from small_run import ROOT, SMALL, config_file, outcome

from mnist_flax.config import replace

pytestmark = pytest.mark.gpu


def train(workdir: pathlib.Path, *flags: str, **fields: Any) -> dict[str, Any]:
    """Trains in a new process on the GPU, with XLA's flag for deterministic operations; returns the summary."""
    config = config_file(replace(SMALL, **fields), workdir.with_suffix(".py"))
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
    command = [sys.executable, "-m", "mnist_flax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((workdir / "summary.json").read_text())
    assert "gpu" in summary["device"]
    return summary


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_command_gives_the_same_bits(tmp_path: pathlib.Path, dtype: str) -> None:
    for name in ("one", "other"):
        train(tmp_path / name, model__dtype=dtype, train__num_devices=1)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "other")


def test_a_run_trained_on_a_gpu_can_be_evaluated_on_a_cpu(tmp_path: pathlib.Path) -> None:
    summary = train(tmp_path / "run", model__matmul_precision="highest", train__num_devices=1)
    command = [sys.executable, "-m", "mnist_flax.evaluate", f"--workdir={tmp_path / 'run'}", "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(summary["test_loss"], rel=1e-4)  # sums in another order
