"""Measures the time from starting `python -m mnist_flax.main` to the end of its first training step.

    python scripts/bench_startup.py --config=configs/default.py --repeats=5

A cold start has an empty compilation cache; a warm start uses the cache that the preceding cold start filled. In both,
the dataset is already decoded. Each start is a separate process. Prints one JSON line for cold starts and one for warm
starts, with the seconds in total and by part, measured in the main thread: `import` (until all imports are done),
`data` (waiting for the images), `compile` (the training loop: tracing, and XLA or its cache), `first_step`, and `rest`
(initial weights, workdir, log).
"""

import functools
import json
import os
import pathlib
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from absl import flags

from mnist_flax import cli
from mnist_flax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("import", "data", "compile", "first_step")


def probe(started: float, arguments: Sequence[str]) -> None:
    """Runs `mnist_flax.main` to the end of its first step, prints the seconds of each part, and exits immediately.

    Args:
      started: the value of `time.monotonic()` when the parent started this process.
      arguments: the command line.
    """
    from mnist_flax.run import compilation

    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.monotonic() - began

        return wrapper

    def first_step(advance: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            timed("first_step", advance)(*args)
            total = time.monotonic() - started
            print(json.dumps({"total": total, **seconds, "rest": total - sum(seconds.values())}), flush=True)
            os._exit(0)

        return wrapper

    keep_programs = compilation.keep_programs  # `main` calls it when its imports are done

    def after_imports() -> None:
        from mnist_flax import drivers, train
        from mnist_flax.data.load import load_splits

        seconds["import"] = time.monotonic() - started
        mock.patch.object(train, "load_splits", timed("data", load_splits)).start()
        compiled = timed("compile", drivers.compile_driver)
        mock.patch.object(drivers, "compile_driver", lambda *args: first_step(compiled(*args))).start()
        keep_programs()

    compilation.keep_programs = after_imports
    sys.argv = ["main", *arguments]
    runpy.run_module("mnist_flax.main", run_name="__main__", alter_sys=True)


def start(config_file: str, programs: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Runs one start in a new process, and returns the seconds of each part.

    Args:
      config_file: the preset.
      programs: the folder of the compilation cache.
      overrides: `section.field=value` for each field to override.

    Raises:
      UserError: the process failed before its first step.
    """
    paths = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_COMPILATION_CACHE_DIR": programs}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--config={config_file}", f"--workdir={folder}/run", "--config.data.on_missing=error"]
        arguments += [f"--config.{override}" for override in overrides]
        code = f"import bench_startup; bench_startup.probe({time.monotonic()}, {arguments})"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    try:
        seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise UserError(f"--config={config_file}: the process failed before its first step:\n{done.stderr}") from error
    return seconds


def bench(config_file: str, repeats: int, overrides: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yields the timings of cold starts, then those of warm starts."""
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as programs:
            for kind, seconds in starts.items():  # the warm start reuses the cache of the cold one
                seconds.append(start(config_file, programs, overrides))
                print(f"{kind}: {seconds[-1]['total']:.2f} s", file=sys.stderr, flush=True)
    for kind, seconds in starts.items():
        columns = {part: [one[part] for one in seconds] for part in seconds[0]}
        yield {
            "start": kind,
            "seconds_median": {part: round(statistics.median(column), 3) for part, column in columns.items()},
            "total_seconds": [round(total, 3) for total in columns["total"]],
        }


def main(argv: Sequence[str]) -> None:
    """Measures starts with the config from the flags."""
    del argv
    cli.config()  # reports a mistake in the config before anything is measured
    results = list(bench(flags.FLAGS.config, flags.FLAGS.repeats, flags.FLAGS.override))
    from mnist_flax.run.provenance import provenance  # only now: JAX would compete with the measured processes

    made = cli.config_facts() | provenance()
    for result in results:
        print(json.dumps({**result, **made}))


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_integer("repeats", 5, "starts of each kind", lower_bound=1)
    cli.run(main)
