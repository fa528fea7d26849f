"""JAX's persistent compilation cache: compiled programs are kept on disk for later processes."""

import contextlib
import logging
import os
import pathlib
import warnings

import jax

logger = logging.getLogger(__name__)

OPTIONS = {
    # By default, JAX does not cache programs that compile in under a second, most of those of a small network.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_compilation_cache_max_size": 256 * 2**20,  # bytes; the least recently used programs are deleted beyond this
}


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, for small programs too: later processes start faster.

    JAX's own environment variables take precedence: JAX_ENABLE_COMPILATION_CACHE=false turns it off. If the folder
    cannot be created, a message is logged and the run continues without a cache.
    """
    try:
        folder = cache_dir()
        if "://" not in folder:
            os.makedirs(folder, exist_ok=True)
            _complete(pathlib.Path(folder))
    except OSError as error:
        logger.info("compiled programs are not kept: %s", error)
        return
    # A damaged entry, or a full disk, costs only time.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", folder)
    for option, value in OPTIONS.items():
        if option.upper() not in os.environ:
            jax.config.update(option, value)


def _complete(folder: pathlib.Path) -> None:
    """Gives each program a time of last use. A killed process leaves some without; JAX 0.10 then stores no more."""
    for program in folder.glob("*-cache"):
        time_of_use = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not time_of_use.exists():
            with contextlib.suppress(OSError):
                time_of_use.write_bytes(bytes(8))  # the first to be deleted if space is needed


def cache_dir() -> str:
    """Returns where programs are kept: `$JAX_COMPILATION_CACHE_DIR`, or a folder in the user's cache folder.

    Raises:
      OSError: the path of that folder is not absolute, for example because the user has no home folder.
    """
    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return chosen if "://" in chosen else os.path.expanduser(chosen)  # it may be a bucket: gs://...
    folder = os.path.join(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "mnist_flax", "programs")
    if not os.path.isabs(folder):
        raise OSError(f"{folder} is not an absolute path; set XDG_CACHE_HOME to a folder")
    return folder
