"""Kills short trainings at random moments, restarts them until they are finished, and compares each with a quiet one.

    python scripts/torture.py --mode=all --runs=100 --minutes=60 >> scripts/results/torture.jsonl

Every run is of a small network with dropout, augmentation, batch norm and averaged weights, saved every few steps, by
the scan and the stream driver in turn. It is hit one to three times, each at a moment drawn evenly from the time that a
quiet run takes, and started again with the same command. A run that does not finish by itself then has needed help.
What it left (all arrays of the last checkpoint, the exported weights, metrics.jsonl but for the seconds) must be bit
for bit what a quiet run left. One line of JSON for each mode goes to standard output, progress to standard error.
"""

import collections
import datetime
import itertools
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from safetensors.numpy import load_file

from mnist_flax import cli
from mnist_flax.run import checkpoint
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.provenance import provenance

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODES = ("kill", "term", "damage")
DAMAGES = ("truncated", "zeroed", "deleted")
DRIVERS = ("scan", "stream")
FIELDS = {
    "seed": 7,
    "data.num_train": 600,
    "data.holdout": 60,
    "model.batch_norm": True,
    "model.dropout": 0.2,
    "augment.shift": 1,
    "optimizer.ema_decay": 0.9,
    "train.epochs": 4,
    "train.log_every_steps": 2,
    "checkpoint.every_steps": 3,
}
LONGEST = 120.0  # seconds that a process may take before it counts as hung

_RUNS = flags.DEFINE_integer("runs", 100, "runs of each mode", lower_bound=1)
_MODE = flags.DEFINE_enum("mode", "all", ("all", *MODES), "SIGKILL, SIGTERM, or SIGKILL and a damaged file")
_MINUTES = flags.DEFINE_float("minutes", 60.0, "begin no new run after this time, over all modes", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "of the random moments")


def start(workdir: pathlib.Path, driver: str, cache: pathlib.Path) -> subprocess.Popen[str]:
    """Starts the command that is the same every time."""
    fields = [f"--config.{name}={value}" for name, value in {**FIELDS, "train.driver": driver}.items()]
    command = [sys.executable, "-m", "mnist_flax.main", "--config=configs/tiny.py", f"--workdir={workdir}", *fields]
    caching = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment = {**os.environ, **caching, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for a process, and returns its status and the end of what it said; a hung one is killed."""
    try:
        _, said = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
        return -1, f"hung; {said[-1000:]}"
    return process.returncode, said[-1000:]


def outcome(workdir: pathlib.Path) -> dict[str, bytes]:
    """Returns all that must be the same, by name."""
    run = checkpoint.load_run(workdir)
    leaves = {f"state{name}": leaf.tobytes() for name, leaf in checkpoint.leaves(run.state).items()}
    weights = {name: array.tobytes() for name, array in load_file(workdir / workdirs.WEIGHTS).items()}
    lines = [json.loads(line) for line in (workdir / workdirs.METRICS).read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return {**leaves, **weights, workdirs.METRICS: json.dumps(lines).encode()}


def newest(workdir: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the newest checkpoint, if there is one."""
    folder = workdir / workdirs.CHECKPOINTS
    steps = checkpoint.steps_in(folder)
    return folder / str(steps[-1]) if steps else None


def damage(path: pathlib.Path, kind: str, chance: random.Random) -> None:
    """Damages one file of a checkpoint, as a power cut might."""
    file = chance.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    size = file.stat().st_size
    if kind == "deleted":
        file.unlink()
    else:
        keep = chance.randrange(size) if kind == "truncated" else 0
        file.write_bytes(file.read_bytes()[:keep] + bytes(size if kind == "zeroed" else 0))


def where(workdir: pathlib.Path) -> Iterator[str]:
    """Yields what a process was about when it died, as far as its folder shows."""
    if not workdir.exists():
        yield "before the folder was made"
    elif newest(workdir) is None:
        yield "before the first checkpoint"
    if any((workdir / workdirs.CHECKPOINTS).glob("*.unfinished*")):
        yield "during a save"


def torment(
    mode: str, workdir: pathlib.Path, driver: str, *, seconds: float, cache: pathlib.Path, chance: random.Random
) -> tuple[collections.Counter[str], str]:
    """Hits one run until it has had enough, and lets it finish.

    Returns:
      How often what happened, and what help it would have needed: empty if none.
    """
    tally: collections.Counter[str] = collections.Counter()
    wanted = chance.randint(1, 3)
    while tally["hits"] < wanted:
        process = start(workdir, driver, cache)
        try:
            process.wait(timeout=chance.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM if mode == "term" else signal.SIGKILL)
        status, said = finish(process)
        # A signal that comes before Python has started ends it the system's way, which a shell calls 143, too.
        if status not in {"term": (0, 143, -signal.SIGTERM)}.get(mode, (0, -signal.SIGKILL)):
            return tally, f"status {status}: {said}"
        if status == 0:
            if tally["hits"] == 0:  # it was too quick: once more from the start
                shutil.rmtree(workdir)
                continue
            return tally, ""
        tally.update(where(workdir))
        if mode == "damage":
            path = newest(workdir)
            if path is None:
                continue
            kind = chance.choice(DAMAGES)
            damage(path, kind, chance)
            tally[kind] += 1
        tally["hits"] += 1
    status, said = finish(start(workdir, driver, cache))
    return tally, "" if status == 0 else f"status {status}: {said}"


def torture(mode: str, folder: pathlib.Path, deadline: float) -> dict[str, Any]:
    """Torments runs one after the other, and returns what came of it, as JSON."""
    chance = random.Random(f"{_SEED.value} {mode}")
    cache = folder / "cache"
    quiet, seconds = {}, {}
    for driver in DRIVERS:
        for name in ("cold", "warm"):  # the first compiles, the second tells how long a run takes
            began = time.monotonic()
            status, said = finish(start(folder / f"{name}-{driver}", driver, cache))
            if status:
                raise RuntimeError(f"the quiet run failed with status {status}: {said}")
            seconds[driver] = time.monotonic() - began
        quiet[driver] = outcome(folder / f"warm-{driver}")
        shutil.rmtree(folder / f"cold-{driver}")
    tally: collections.Counter[str] = collections.Counter()
    runs, differing, helped = 0, [], []
    for driver in itertools.islice(itertools.cycle(DRIVERS), _RUNS.value):
        if time.monotonic() > deadline:
            break
        workdir = folder / f"run-{runs}"
        counted, help_needed = torment(mode, workdir, driver, seconds=seconds[driver], cache=cache, chance=chance)
        runs += 1
        tally.update(counted)
        if help_needed:
            helped.append(help_needed)
        else:
            found = outcome(workdir)
            names = [name for name in quiet[driver] | found if quiet[driver].get(name) != found.get(name)]
            if names:
                differing.append(names)
        shutil.rmtree(workdir, ignore_errors=True)
        flaws = f"{len(differing)} differing {differing[-1:]}, {len(helped)} needing help {helped[-1:]}"
        print(f"{mode}: run {runs} of {_RUNS.value}, {dict(tally)}, {flaws}", file=sys.stderr, flush=True)
    return {
        "claim": "torture",
        "mode": mode,
        "runs": runs,
        "differing": len(differing),
        "needing_help": len(helped),
        "happened": dict(tally),
        "quiet_seconds": {driver: round(value, 2) for driver, value in seconds.items()},
        "seed": _SEED.value,
    }


def cpu_name() -> str:
    """Returns the name of the processor's model, or at least of its kind."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def main(argv: Sequence[str]) -> None:
    """Tortures in the modes that the flags name; the status is 1 if any run differed or needed help."""
    del argv
    deadline = time.monotonic() + 60 * _MINUTES.value
    flawed = False
    for mode in MODES if _MODE.value == "all" else (_MODE.value,):
        with tempfile.TemporaryDirectory() as folder:
            result = torture(mode, pathlib.Path(folder), deadline)
        flawed = flawed or bool(result["differing"] or result["needing_help"])
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(json.dumps({**result, "date": now, "cpu": cpu_name(), **provenance()}), flush=True)
    sys.exit(flawed)


if __name__ == "__main__":
    cli.run(main)
