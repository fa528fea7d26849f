"""The C library's memory allocator, set up for arrays that are allocated and freed at each step."""

import contextlib
import ctypes
import sys

OPTIONS = {  # of mallopt(3)
    -4: 0,  # M_MMAP_MAX: large arrays come from the heap, too
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: up to 2 GiB of freed memory are kept
    -8: 1,  # M_ARENA_MAX: one heap for all threads, because only the main one can hold arrays over 64 MiB
}


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next array; call it before any thread starts.

    By default, glibc returns the memory of each large array to the system. The next step then waits while the system
    clears new pages: with `configs/accurate.py` on one core of a virtual machine, for a quarter of its time. Other C
    libraries are left as they are.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            for option, value in OPTIONS.items():
                mallopt(option, value)
