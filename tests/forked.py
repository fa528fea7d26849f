"""Runs a module or a script as `python` would, but in a fork of a process that has imported the libraries already.

Tests of imports, signals and closed consoles start a new process instead (`small_run.start`).
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import IO, NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What most verbs import. None of these starts a thread or opens a device: a fork would inherit neither.
LIBRARIES = ("jax", "flax.linen", "optax", "orbax.checkpoint", "matplotlib.figure", "sklearn.datasets", "PIL.Image")
OURS = ("mnist_flax.preset", "mnist_flax.train", "mnist_flax.analysis.report.write", "mnist_flax.pictures.segment")


def run(
    *arguments: str, cwd: pathlib.Path = ROOT, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE [flags]` or `python SCRIPT.py [flags]` to its end."""
    server = _server()
    assert server.stdin and server.stdout
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.NamedTemporaryFile("w+b")) for _ in range(3))
        given.write(stdin)
        given.flush()
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "env": {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            "streams": [given.name, out.name, err.name],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended"
        return subprocess.CompletedProcess(arguments, int(answer), out.read().decode(), err.read().decode())


@functools.cache
def _server() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, __file__], env=env, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def _serve(requests: IO[str], answers: IO[str]) -> None:
    """Forks for every line of `requests`, and answers with the exit status."""
    for line in requests:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns about forking with threads, but none has started yet
            pid = os.fork()
        if not pid:
            _exit(functools.partial(_become, **json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _exit(main: Callable[[], None]) -> NoReturn:
    """Calls `main`, and exits as Python would, but without clearing memory, which would copy all that is shared."""
    status: object = 0
    try:
        main()
    except SystemExit as exit_:
        status = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _become(arguments: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Does what `python ARGUMENTS` does, in this process."""
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if arguments[0] == "-m":
        sys.path[0] = cwd
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(pathlib.Path(arguments[0]).resolve().parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for name in LIBRARIES + OURS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the memory that it looks at
    _exit(functools.partial(_serve, requests, answers))
