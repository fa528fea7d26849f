"""What produced a result, and when: package versions, device, commit and date."""

import contextlib
import datetime
import functools
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax

from mnist_flax.run.machine import cpu_name, num_cores

_PACKAGES = ("mnist-flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def versions() -> dict[str, str]:
    """Returns what the last bits of a result depend on: the versions of Python and of packages, and the device.

    Packages that are not installed are left out. On a CPU, XLA divides sums among the cores, which changes their
    rounding.
    """
    backend = jax.default_backend()
    device = f"{cpu_name()}, {num_cores()} cores" if backend == "cpu" else jax.devices()[0].device_kind
    return {"python": platform.python_version(), backend: device, **_packages()}


@functools.cache
def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def git_commit() -> str:
    """Returns the commit of the code, with `+changes` if tracked files were modified; empty outside a checkout.

    It is that of the first call, so training calls it when it starts: the checkout may change in the meantime.
    """
    folder = pathlib.Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # do not report the commit of a project that this package is installed in
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def provenance() -> dict[str, Any]:
    """Returns the `date`, `device`, `versions` and `git_commit` to record with a result."""
    devices = jax.devices()
    kind = cpu_name() if devices[0].platform == "cpu" else devices[0].device_kind
    device = f"{len(devices)} x {devices[0].platform} ({kind})"
    date = datetime.date.today().isoformat()
    return {"date": date, "device": device, "versions": versions(), "git_commit": git_commit()}
