"""The provenance of a result: package versions, device and commit."""

import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax

_PACKAGES = ("mnist-flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on; missing packages are omitted."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Returns the commit of the code, plus `+changes` if tracked files are modified; empty outside a checkout."""
    folder = pathlib.Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not (folder / ".git").exists():  # installed inside another project's checkout, whose commit is not ours
            return ""
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_name() -> str:
    """Returns the CPU model, or the architecture if the model is unknown."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Returns the `device`, `versions` and `git_commit` entries of a summary."""
    devices = jax.devices()
    kind = cpu_name() if devices[0].platform == "cpu" else devices[0].device_kind
    return {
        "device": f"{len(devices)} x {devices[0].platform} ({kind})",
        "versions": versions(),
        "git_commit": git_commit(),
    }
