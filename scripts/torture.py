"""Kills or disturbs short training runs at random times, restarts them, and compares the results with a clean run's.

    python scripts/torture.py --mode=all --runs=100 --minutes=60 >> scripts/results/torture.jsonl

Every run trains a small network with dropout, augmentation, batch norm and averaged weights, and saves every few steps;
runs alternate between the scan and the stream driver. A quiet run is one that nothing disturbs. The modes:

  kill, term, hangup  SIGKILL, SIGTERM or SIGHUP, one to three times, at random times within the length of a quiet run
  damage              SIGKILL, and a file of the newest checkpoint truncated, zeroed or deleted
  end                 SIGKILL, one to three times, while the run evaluates and writes weights, summary and report
  console             standard error is closed, full, or a pipe whose reader exits; the run must finish as usual
  disk                no file may grow beyond a random size, at most that of the largest file of a quiet run; half of
                      the runs are trained already, and only evaluate and write weights, summary and report

In every mode but `console`, the same command then restarts the disturbed run. A run that does not finish, or shows a
traceback, counts as needing help. In a finished run, all arrays of the last checkpoint, the weights and metrics.jsonl
(except the seconds) must match those of a quiet run bit for bit, and summary and report must be complete. Each mode
prints one line of JSON to standard output.
"""

import collections
import functools
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mnist_flax import cli
from mnist_flax.errors import UserError
from mnist_flax.run import checkpoint
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.provenance import provenance

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIGNALS = {"kill": signal.SIGKILL, "damage": signal.SIGKILL, "end": signal.SIGKILL}
SIGNALS |= {"term": signal.SIGTERM, "hangup": signal.SIGHUP}
MODES = (*SIGNALS, "console", "disk")
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
REPORT = "report"
LONGEST = 900.0  # seconds after which a process counts as hung, even on a busy machine

_RUNS = flags.DEFINE_integer("runs", 100, "runs of each mode", lower_bound=1)
_MODE = flags.DEFINE_enum("mode", "all", ("all", *MODES), "the kind of disturbance; all runs every mode")
_MINUTES = flags.DEFINE_float("minutes", 60.0, "begin no new run after this time, over all modes", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "seed of everything random")


class Process:
    """A training process: the same command every time, apart from workdir and driver."""

    def __init__(
        self, workdir: pathlib.Path, driver: str, *, errors: Any = None, prepare: Callable[[], None] | None = None
    ) -> None:
        fields = [f"--config.{name}={value}" for name, value in {**FIELDS, "train.driver": driver}.items()]
        command = [sys.executable, "-m", "mnist_flax.main", "--config=configs/tiny.py", f"--workdir={workdir}", *fields]
        caching = {
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, `finish` closes it
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **caching, "PYTHONPATH": str(ROOT)},
            stderr=self._said if errors is None else errors,
            preexec_fn=prepare,
        )

    def finish(self) -> tuple[int, str]:
        """Waits for the process, kills it if it hangs, and returns its exit status and the tail of its stderr."""
        said = ""
        try:
            self.process.wait(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            said = "hung; "
        self._said.seek(0)
        said += self._said.read().decode(errors="replace")[-1000:]
        self._said.close()
        return self.process.returncode, said


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns everything that must match a quiet run's, by name."""
    run = checkpoint.load_run(workdir)
    leaves = {f"state{name}": leaf.tobytes() for name, leaf in checkpoint.leaves(run.state).items()}
    weights = {name: array.tobytes() for name, array in load_file(workdir / workdirs.WEIGHTS).items()}
    lines = [json.loads(line) for line in (workdir / workdirs.METRICS).read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    summary = json.loads((workdir / workdirs.SUMMARY).read_text())
    report = {path.name for path in (workdir / REPORT).iterdir()}
    page = (workdir / REPORT / "index.html").read_text().rstrip().endswith("</html>")
    return {
        **leaves,
        **weights,
        workdirs.METRICS: lines,
        workdirs.SUMMARY: (summary.keys(), summary["steps"], summary["test_accuracy"]),
        REPORT: (report, page),
    }


def newest(workdir: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the newest checkpoint, if there is one."""
    folder = workdir / workdirs.CHECKPOINTS
    steps = checkpoint.steps_in(folder)
    return folder / str(steps[-1]) if steps else None


def damage(path: pathlib.Path, kind: str, chance: random.Random) -> None:
    """Damages one file of a checkpoint, as a power failure might."""
    file = chance.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    size = file.stat().st_size
    if kind == "deleted":
        file.unlink()
    else:
        keep = chance.randrange(size) if kind == "truncated" else 0
        file.write_bytes(file.read_bytes()[:keep] + bytes(size if kind == "zeroed" else 0))


def where(workdir: pathlib.Path, mode: str) -> Iterator[str]:
    """Yields how far a run had got when its process died, judging by the files in its folder."""
    if mode == "end":
        pieces = (workdirs.WEIGHTS, f"{REPORT}/index.html", workdirs.SUMMARY)  # in the order of writing
        missing = next((name for name in pieces if not (workdir / name).exists()), None)
        yield f"before {missing}" if missing else "after the summary"
        return
    if not workdir.exists():
        yield "before the folder was made"
    elif newest(workdir) is None:
        yield "before the first checkpoint"
    if any((workdir / workdirs.CHECKPOINTS).glob("*.unfinished*")):
        yield "during a save"
    if (workdir / workdirs.WEIGHTS).exists():
        yield "at the end"


def hit(
    mode: str, workdir: pathlib.Path, driver: str, seconds: float, chance: random.Random
) -> tuple[collections.Counter[str], str]:
    """Starts a run one to three times, and sends each process a signal at a random time.

    Returns:
      How often each event happened, and the error if the run needed help, else an empty string.
    """
    tally: collections.Counter[str] = collections.Counter()
    wanted, signum = chance.randint(1, 3), SIGNALS[mode]
    while tally["hits"] < wanted:
        process = Process(workdir, driver)
        try:
            # In mode `end` not before 0.4 of a run: earlier, Python is starting or reading the checkpoint.
            process.process.wait(timeout=chance.uniform(0.4 * seconds if mode == "end" else 0, seconds))
        except subprocess.TimeoutExpired:
            process.process.send_signal(signum)
        status, said = process.finish()
        # A signal that arrives before Python has installed its handlers kills the process with the default action.
        if status not in (0, -signum, 128 + signum) or "Traceback" in said:
            return tally, f"status {status}: {said}"
        if status == 0:
            break
        tally.update(where(workdir, mode))
        tally["hits"] += 1
        path = newest(workdir)
        if mode == "damage" and path:
            kind = chance.choice(DAMAGES)
            damage(path, kind, chance)
            tally[kind] += 1
    return tally, ""


def lose_console(workdir: pathlib.Path, driver: str, seconds: float, chance: random.Random) -> tuple[str, str]:
    """Trains without a working stderr; returns how stderr was lost, and the error, empty if none."""
    kind = chance.choice(("closed", "full", "reader leaves"))
    if kind == "closed":
        process = Process(workdir, driver, prepare=functools.partial(os.close, 2))
    elif kind == "full":
        with open("/dev/full", "wb") as full:
            process = Process(workdir, driver, errors=full)
    else:
        process = Process(workdir, driver, errors=subprocess.PIPE)
        time.sleep(chance.uniform(0, seconds))
        assert process.process.stderr
        process.process.stderr.close()
    status, _ = process.finish()
    return kind, f"status {status} with the console {kind}" if status else ""


def limit_file_size(workdir: pathlib.Path, driver: str, largest: int, chance: random.Random) -> tuple[str, str]:
    """Trains with a limit on file size; returns which file hit the limit, and the error, empty if none."""
    limit = max(2**14, int(largest ** chance.uniform(0.5, 1)))  # stderr is a file too, and must hold the message
    limits = (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    process = Process(workdir, driver, prepare=functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))
    status, said = process.finish()
    if status == 0:
        return "large enough", ""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    is_clear = status == 2 and last.startswith("error: ") and "cannot be written (" in last and "Traceback" not in said
    subject = last.partition("cannot be written")[0]  # the remedy names the checkpoint
    names = ("checkpoint", REPORT, workdirs.WEIGHTS, workdirs.SUMMARY, "tfevents")
    what = next((name for name in names if name in subject), "another file")
    return what, "" if is_clear else f"status {status} at a limit of {limit} bytes: {said}"


def copy_without_results(source: pathlib.Path, workdir: pathlib.Path) -> None:
    """Copies a finished run without the files that are written after the last step."""
    shutil.copytree(source, workdir)
    for name in (workdirs.WEIGHTS, workdirs.SUMMARY, REPORT):
        workdirs.remove(workdir / name)


def quiet_runs(mode: str, folder: pathlib.Path) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Trains the quiet runs; returns for each driver the outcome and the seconds that a run takes."""
    quiet, seconds = {}, {}
    for driver in DRIVERS:
        for name in ("cold", "warm"):  # the first compiles, the second shows how long a run takes
            if mode == "end" and name == "warm":
                copy_without_results(folder / f"cold-{driver}", folder / f"warm-{driver}")
            began = time.monotonic()
            status, said = Process(folder / f"{name}-{driver}", driver).finish()
            if status:
                raise RuntimeError(f"the quiet run failed with status {status}: {said}")
            seconds[driver] = time.monotonic() - began
        quiet[driver] = outcome(folder / f"warm-{driver}")
    return quiet, seconds


def disturb(
    mode: str, workdir: pathlib.Path, driver: str, seconds: float, chance: random.Random
) -> tuple[collections.Counter[str], str]:
    """Disturbs one run in the given mode, then lets the same command finish it.

    Returns:
      How often each event happened, and the error if the run needed help, else an empty string.
    """
    warm = workdir.with_name(f"warm-{driver}")
    if mode == "console":
        kind, error_of_run = lose_console(workdir, driver, seconds, chance)
        return collections.Counter([kind]), error_of_run
    if mode == "disk":
        if chance.random() < 0.5:
            copy_without_results(warm, workdir)
        largest = max(path.stat().st_size for path in warm.rglob("*") if path.is_file())
        kind, error_of_run = limit_file_size(workdir, driver, largest, chance)
        tally = collections.Counter([kind])
    else:
        if mode == "end":
            copy_without_results(warm, workdir)
        tally, error_of_run = hit(mode, workdir, driver, seconds, chance)
    if not error_of_run:
        status, said = Process(workdir, driver).finish()
        error_of_run = f"status {status}: {said}" if status or "Traceback" in said else ""
    return tally, error_of_run


def torture(mode: str, folder: pathlib.Path, deadline: float) -> dict[str, Any]:
    """Disturbs runs in the given mode until the count or the deadline is reached; returns the result as JSON."""
    chance = random.Random(f"{_SEED.value} {mode}")
    quiet, seconds = quiet_runs(mode, folder)
    tally: collections.Counter[str] = collections.Counter()
    runs, differing, errors = 0, [], []
    for driver in itertools.islice(itertools.cycle(DRIVERS), _RUNS.value):
        if time.monotonic() > deadline:
            break
        workdir = folder / f"run-{runs}"
        counted, error_of_run = disturb(mode, workdir, driver, seconds[driver], chance)
        tally.update(counted)
        runs += 1
        try:
            found = {} if error_of_run else outcome(workdir)
        except (OSError, ValueError, KeyError, UserError, SafetensorError) as error:
            found, error_of_run = {}, f"incomplete: {error!r}"
        if error_of_run:
            errors.append(error_of_run)
        elif names := [name for name in quiet[driver] | found if quiet[driver].get(name) != found.get(name)]:
            differing.append(names)
        shutil.rmtree(workdir, ignore_errors=True)
        flaws = f"{len(differing)} differing {differing[-1:]}, {len(errors)} needing help {errors[-1:]}"
        print(f"{mode}: run {runs} of {_RUNS.value}, {dict(tally)}, {flaws}", file=sys.stderr, flush=True)
    return {
        "claim": "torture",
        "mode": mode,
        "runs": runs,
        "differing": len(differing),
        "needing_help": len(errors),
        "happened": dict(tally),
        "quiet_seconds": {driver: round(value, 2) for driver, value in seconds.items()},
        "seed": _SEED.value,
    }


def main(argv: Sequence[str]) -> None:
    """Disturbs runs in the modes that the flags select; exits with status 1 if any differed or needed help."""
    del argv
    deadline = time.monotonic() + 60 * _MINUTES.value
    flawed = False
    for mode in MODES if _MODE.value == "all" else (_MODE.value,):
        with tempfile.TemporaryDirectory() as folder:
            result = torture(mode, pathlib.Path(folder), deadline)
        flawed = flawed or bool(result["differing"] or result["needing_help"])
        print(json.dumps({**result, **provenance()}), flush=True)
    sys.exit(flawed)


if __name__ == "__main__":
    cli.run(main)
