"""Compares the training speed of this project with PyTorch, Keras and plain Flax, in turns on one machine.

    python scripts/bench_peers.py --config=configs/three_conv_adam.py --repeats=5       # one epoch, warmed up
    python scripts/bench_peers.py --config=configs/default.py --repeats=3 --whole       # the whole process

All programs train the network of the config, a `cnn` or a `resnet` with ReLU and max-pooling, with the same optimiser,
schedule, batch size and precision (f32) on the same rows. They are in scripts/peers/, and catalog.py there lists them.
Each peer has its own environment, which this script makes under .venv/peers/. The Flax peer supports only the network
of `three_conv_adam`, and only the PyTorch peer can rotate, scale and shear. The programs take turns, so that load on
the machine affects all alike; a ratio is our time divided by the peer's within one turn.

By default, all programs start and train an untimed epoch; then they take turns to train timed epochs. With `--whole`,
whole processes are timed, from start to exit, including evaluation on the test set; before that, ours makes an untimed
run, and each peer trains an untimed epoch. Ours is then `python -m mnist_flax.main`, which also saves checkpoints,
TensorBoard events and a report.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from absl import flags
from bench_process import run_process
from peers.catalog import PEERS, Peer, check

from mnist_flax import cli
from mnist_flax.checks import nearest
from mnist_flax.config import Config, replace
from mnist_flax.errors import ConfigError, UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv" / "peers"
OURS = "ours"


# Environment variables for the peers. By default, glibc returns the memory of each large array to the system, and
# faults in new pages for the next one. On a virtual machine, this takes a third of PyTorch's time; PyTorch's tuning
# guide suggests other allocators. Our program sets this itself, in mnist_flax/run/machine.py.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}


def interpreter(peer: Peer) -> pathlib.Path:
    """Returns a peer's interpreter; makes its environment if it is missing or has other versions.

    Raises:
      UserError: the environment cannot be made.
    """
    folder = ENVIRONMENTS / f"{peer.module}-{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / "bin" / "python"
    complete, wanted = folder / "complete", " ".join(peer.packages)
    if not complete.is_file() or complete.read_text() != wanted:
        print(f"making the environment {folder} ({wanted}) ...", file=sys.stderr, flush=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{' '.join(command)} failed; it needs a package index:\n{done.stderr}")
        complete.write_text(wanted)
    return python


def command(name: str, config: Config, data: pathlib.Path) -> list[str]:
    """Returns the command line of our program or of a peer."""
    peer = PEERS.get(name, Peer("ours"))
    python = str(interpreter(peer)) if peer.packages else sys.executable
    arguments = [f"--config={config.to_json()}", f"--data={data}", f"--variant={peer.variant}"]
    return [python, "-m", f"scripts.peers.{peer.module}", *arguments]


def write_data(config: Config, path: pathlib.Path) -> None:
    """Writes the training, hold-out and test rows of a config to an .npz file."""
    from mnist_flax.data import batches
    from mnist_flax.data.load import load_splits

    splits = load_splits(replace(config, data__on_missing="error").data)
    rows, holdout = batches.rows_of(splits.train.label, config.data)
    parts = {
        "train": (splits.train.image[rows], splits.train.label[rows]),
        "holdout": (splits.train.image[holdout], splits.train.label[holdout]),
        "test": tuple(splits.test),
    }
    np.savez(path, **{f"{part}_{field}": array for part, pair in parts.items()
                      for field, array in zip(("image", "label"), pair, strict=True)})  # fmt: skip


# Measuring ------------------------------------------------------------------------------------------------------------


class Worker:
    """A running program that trains an epoch on each request."""

    def __init__(self, command: Sequence[str]) -> None:
        """Starts the program."""
        environment = os.environ | ({} if command[0] == sys.executable else TUNED)
        self._command = command
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the program lives)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, bufsize=1
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._process, self._errors:
            self._process.kill()

    def epoch(self) -> dict[str, Any]:
        """Requests an epoch, and returns the answer: seconds and loss.

        Raises:
          UserError: the program ended instead.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("epoch\n")
        return self._answer()

    def finish(self) -> dict[str, Any]:
        """Lets the program evaluate the test set and exit, and returns the answer: accuracy and versions.

        Raises:
          UserError: the program failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self._answer()
        self._process.wait()
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            self._process.wait()
            self._errors.seek(0)
            raise UserError(f"{' '.join(self._command[:3])} failed:\n{line}{self._errors.read()}") from error
        return answer


def in_turns(names: Sequence[str], turn: int) -> Sequence[str]:
    """Returns the order of the programs in a turn, reversed every other turn so that none always comes first."""
    return names if turn % 2 else names[::-1]


def time_epochs(
    commands: Mapping[str, Sequence[str]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Trains an epoch with each program in turn; returns their seconds and their final answers."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(command)) for name, command in commands.items()}
        for turn in range(repeats + 1):
            for name in in_turns(list(workers), turn):
                answer = workers[name].epoch()
                tell(name, turn, answer["seconds"])
                if turn:
                    seconds[name].append(answer["seconds"])
        return seconds, {name: worker.finish() for name, worker in workers.items()}


def time_processes(
    commands: Mapping[str, Sequence[str]], config: Config, repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Runs the whole recipe with each program in turn; returns their seconds and their answers in the last turn."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    told: dict[str, dict[str, Any]] = {}
    for turn in range(repeats + 1):
        for name in in_turns(list(commands), turn):
            began = time.perf_counter()
            if name == OURS:
                summary, _, _ = run_process(config)
                told[name] = {"test_accuracy": summary["test_accuracy"], **summary["versions"]}
            else:  # one epoch is enough to warm up
                told[name] = peer_process(commands[name], config.train.epochs if turn else 1)
            span = time.perf_counter() - began
            tell(name, turn, span)
            if turn:
                seconds[name].append(span)
    return seconds, told


def peer_process(command: Sequence[str], epochs: int) -> dict[str, Any]:
    """Runs a peer from start to exit, and returns its final answer."""
    with Worker(command) as worker:
        for _ in range(epochs):
            worker.epoch()
        return worker.finish()


def tell(name: str, turn: int, seconds: float) -> None:
    """Prints the progress."""
    print(f"{name}: {seconds:.2f} s{'' if turn else ' (warming up)'}", file=sys.stderr, flush=True)


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Computes each program's median, the ratio of our time to its time in each turn, and the fastest peer."""
    ratios = {
        name: [our / its for our, its in zip(seconds[OURS], spans, strict=True)] for name, spans in seconds.items()
    }
    medians = {name: statistics.median(spans) for name, spans in seconds.items()}
    best = min((name for name in seconds if name != OURS), key=lambda name: medians[name])
    return {
        "best_peer": best,
        "ratio_to_best_peer": round(statistics.median(ratios[best]), 3),
        "programs": {
            name: {
                "seconds_median": round(medians[name], 3),
                "seconds": [round(span, 3) for span in spans],
                "ratio_median": round(statistics.median(ratios[name]), 3),
                "ratio_range": [round(min(ratios[name]), 3), round(max(ratios[name]), 3)],
            }
            for name, spans in seconds.items()
        },
    }


def bench(config: Config, commands: Mapping[str, Sequence[str]], *, repeats: int, whole: bool) -> dict[str, Any]:
    """Compares the programs.

    Args:
      config: the recipe.
      commands: the command lines of ours and of the peers.
      repeats: the number of timed turns.
      whole: whether to time whole processes instead of epochs.
    """
    seconds, told = time_processes(commands, config, repeats) if whole else time_epochs(commands, repeats)
    result = {"benchmark": "peers, whole process" if whole else "peers, one epoch", **compared(seconds)}
    for name, answer in told.items():
        accuracy = answer.pop("test_accuracy")
        epochs = config.train.epochs if whole else repeats + 1
        result["programs"][name] |= {"test_accuracy": accuracy, "epochs_trained": epochs, "versions": answer}
    return result


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints the result."""
    del argv
    config = cli.config()
    if not flags.FLAGS.peers:
        raise ConfigError(f"--peers: is empty; name some of {', '.join(PEERS)}")
    for name in flags.FLAGS.peers:
        if name not in PEERS:
            raise ConfigError(f"--peers={name}: {nearest(name, PEERS)}")
    check(config, flags.FLAGS.peers)
    from mnist_flax.run.provenance import provenance

    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "data.npz")
        write_data(config, data)
        commands = {name: command(name, config, data) for name in (OURS, *flags.FLAGS.peers)}
        result = bench(config, commands, repeats=flags.FLAGS.repeats, whole=flags.FLAGS.whole)
    made = {**cli.config_facts(), "train_rows": config.num_train_rows}
    print(json.dumps({**result, **made, **provenance()}))


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_list("peers", list(PEERS), "the peers to compare with")
    flags.DEFINE_integer("repeats", 5, "how many turns are timed", lower_bound=1)
    flags.DEFINE_boolean("whole", False, "time whole processes that train the whole recipe")
    cli.run(main)
