"""Strict settings for all tests, and shared fixtures."""

import gc
import logging
import os
import pathlib
from collections.abc import Iterator

# Set before JAX is imported: eight devices on one CPU. Tests spend more time compiling than running, so LLVM's
# optimisations are off, as in JAX's own tests. XLA's own passes, such as fusion, stay on.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests and the processes they start share a cache of compiled programs: many train the same small networks.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")  # with a limit, every new program lists the whole cache

import jax
import numpy as np
import pytest
from idx_files import Published

from mnist_flax.data.splits import Examples

gc.set_threshold(100_000)  # as the command line does: tracing creates many long-lived objects
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Files with few but long tests run first, so that none of them is still running when all other workers are done.
LONG = (
    *("test_processes", "test_faults", "test_extension", "test_sharding", "test_resume", "test_parity", "test_demo"),
    *("test_demo_network", "test_export_graph", "test_step", "test_ops", "test_population", "test_distillation"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of `LONG` to the front."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def root() -> pathlib.Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def data_messages() -> Iterator[list[str]]:
    """Collects what `mnist_flax.data` logs at INFO and above, as `LEVEL: text`."""
    logged: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(f"{record.levelname}: {record.getMessage()}")

    logger, listener = logging.getLogger("mnist_flax.data"), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    yield logged
    logger.setLevel(level)
    logger.removeHandler(listener)


@pytest.fixture
def small(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """A small dataset called mnist, with its official files in a folder."""
    return Published(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def examples() -> Examples:
    """96 images that can be learned: noise with a bright bar, whose position is the label."""
    generator = np.random.default_rng(0)
    label = np.arange(96, dtype=np.int32) % 10
    image = generator.integers(0, 60, (96, 28, 28, 1), dtype=np.uint8)
    for i, number in enumerate(label):
        image[i, 4 + 2 * number : 6 + 2 * number] = 255
    return Examples(image, label)
