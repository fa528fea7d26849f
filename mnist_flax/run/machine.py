"""The CPU that a process runs on, and its memory allocator."""

import contextlib
import ctypes
import os
import pathlib
import platform
import sys

ALLOCATOR_OPTIONS = {  # of mallopt(3)
    -4: 0,  # M_MMAP_MAX: large arrays come from the heap, too
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: up to 2 GiB of freed memory are kept
    -8: 1,  # M_ARENA_MAX: one heap for all threads, because only the main one can hold arrays over 64 MiB
}


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next array; call it before any thread starts.

    By default, glibc returns the memory of each large array to the system. The next call then waits while the system
    clears new pages: without this function, two epochs of four convolutions with batch norm took 1.4 times as long on
    one core of a virtual machine. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            for option, value in ALLOCATOR_OPTIONS.items():
                mallopt(option, value)


def allow_many_files() -> None:
    """Raises the limit on open files as far as it goes: each member of a population keeps one open."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not Unix, or not allowed
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
    """Returns the CPU's model name with its widest vectors, such as `AMD EPYC, AVX-512`, or at least its architecture.

    CPUs of one name can have different vectors, and may then round sums differently.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):  # not Linux
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    flags = found.get("flags", "").split()
    vectors = [width for flag, width in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags]
    return ", ".join([name, *vectors[:1]])
