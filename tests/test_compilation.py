"""The cache of compiled programs: later processes use it, and a broken cache costs nothing but time."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from mnist_flax.run import compilation

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from mnist_flax.run import compilation
compilation.keep_programs()
import jax, jax.numpy as jnp
jax.monitoring.register_event_listener(lambda event, **_: print(event) if "cache_hits" in event else None)
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))[0, 0]))
"""


def run(*, cwd: pathlib.Path | None = None, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=cwd,
        env={**env, "JAX_PLATFORMS": "cpu", **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "compilation cache" not in done.stderr
    return done.stdout


def test_second_process_finds_the_programs_of_the_first(tmp_path: pathlib.Path) -> None:
    first = run(XDG_CACHE_HOME=str(tmp_path))
    assert "cache_hits" not in first
    assert list((tmp_path / "mnist_flax" / "programs").iterdir())
    second = run(XDG_CACHE_HOME=str(tmp_path))
    assert "cache_hits" in second
    assert second.splitlines()[-1] == first.splitlines()[-1]


def test_a_program_that_a_killed_process_left_incomplete_does_not_stop_the_cache(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "mnist_flax" / "programs"
    folder.mkdir(parents=True)
    (folder / "jit_f-0123-cache").write_bytes(b"written by a process that was killed before it noted the time")
    run(XDG_CACHE_HOME=str(tmp_path))
    programs, times = (
        {path.name.rpartition("-")[0] for path in folder.glob(f"*-{kind}")} for kind in ("cache", "atime")
    )
    assert len(programs) > 1
    assert programs == times


def test_jax_own_variables_take_precedence(tmp_path: pathlib.Path) -> None:
    chosen = tmp_path / "chosen"
    run(XDG_CACHE_HOME=str(tmp_path / "user"), JAX_COMPILATION_CACHE_DIR=str(chosen))
    assert list(chosen.iterdir())
    assert not (tmp_path / "user").exists()
    run(XDG_CACHE_HOME=str(tmp_path / "off"), JAX_ENABLE_COMPILATION_CACHE="false")
    assert not list((tmp_path / "off").rglob("*-cache"))


@pytest.mark.parametrize("damage", ["no folder", "torn entries"])
def test_broken_cache_does_not_stop_a_run(damage: str, tmp_path: pathlib.Path) -> None:
    if damage == "no folder":
        (tmp_path / "file").touch()
        output = run(XDG_CACHE_HOME=str(tmp_path / "file"))
        assert "compiled programs are not kept" in output
    else:
        run(XDG_CACHE_HOME=str(tmp_path))
        entries = list(tmp_path.rglob("*-cache"))
        assert entries
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[:10])
        output = run(XDG_CACHE_HOME=str(tmp_path))
    assert output.splitlines()[-1].startswith("6.7")


def test_user_without_a_home_gets_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without $HOME and a passwd entry
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OSError, match="is not an absolute path; set XDG_CACHE_HOME"):
        compilation.cache_dir()
    monkeypatch.chdir(tmp_path)
    compilation.keep_programs()
    assert not list(tmp_path.iterdir())


def test_bucket_is_left_to_jax(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs")
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", given.__setitem__)
    compilation.keep_programs()
    assert given["jax_compilation_cache_dir"] == "gs://bucket/programs"
    assert not list(tmp_path.iterdir())


def test_tilde_in_a_variable_means_home(tmp_path: pathlib.Path) -> None:
    home = tmp_path / "home"
    (tmp_path / "work").mkdir()
    run(cwd=tmp_path / "work", XDG_CACHE_HOME="~/caches", HOME=str(home), PYTHONPATH=str(ROOT))
    assert list((home / "caches" / "mnist_flax" / "programs").iterdir())
    assert not list((tmp_path / "work").iterdir())
