"""What a command asks of the memory allocator, and how it names the CPU."""

import pathlib
import platform
import subprocess
import sys

import pytest

from mnist_flax.run import machine

# Another thread allocates and fills 100 MB twice, as training steps do, and prints the second time's page faults.
PROGRAM = """
import concurrent.futures, ctypes, resource
from mnist_flax import cli

def step(libc):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100_000_000)))
    ctypes.memset(array, 1, 100_000_000)
    libc.free(array)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def main(argv):
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        print([pool.submit(step, libc).result() for _ in range(2)][-1])

cli.run(main)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_command_keeps_the_memory_of_a_freed_array_for_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000  # 24,415 if its memory goes back to the system in between


def test_the_limit_on_open_files_is_raised() -> None:
    program = """
import resource
from mnist_flax.run import machine
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (40, most))
machine.allow_many_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("flags", "name"),
    [("fpu avx avx2 fma avx512f avx512dq", "Zen, AVX-512"), ("fpu avx avx2 fma", "Zen, AVX2"), ("fpu sse2", "Zen")],
)
def test_a_cpu_is_named_with_its_widest_vectors(tmp_path: pathlib.Path, flags: str, name: str) -> None:
    """Two CPUs of one model name but other vectors may round sums differently, so a resumed run tells them apart."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model\t\t: 2\nmodel name\t: Zen\nflags\t\t: {flags}\n\nmodel name\t: other\n")
    assert machine.cpu_name(cpuinfo) == name
    assert machine.cpu_name(tmp_path / "missing")  # not Linux: the architecture
