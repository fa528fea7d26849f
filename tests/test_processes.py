"""Several processes train one run; if one dies, all end, and the same commands continue the run."""

import pathlib
import shutil
import signal
import socket
import subprocess
import time

import forked
import jax
import numpy as np
import pytest
from small_run import SMALL, config_file, lines, outcome, run, start, steps, summary

from mnist_flax.config import replace
from mnist_flax.errors import ConfigError
from mnist_flax.run import checkpoint, processes
from mnist_flax.train import fit

# Plain SGD: Adam's first steps divide by the size of the gradient, which would magnify rounding errors.
RUN = replace(
    SMALL, optimizer__name="sgd", optimizer__learning_rate=0.05, checkpoint__every_steps=4, train__epochs_per_dispatch=1
)
Ended = subprocess.CompletedProcess[str]


def free_port() -> int:
    """Returns a port that no program listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_together(
    count: int, folder: pathlib.Path, *flags: str, deaths: dict[int, int] | None = None, last: str = ""
) -> list[subprocess.Popen[str]]:
    """Starts the processes of a run in `folder`/run.

    `deaths` maps the index of a process to its last step; `last` is a flag of the last process alone.
    """
    port = free_port()
    common = [f"--config={config_file(RUN, folder / 'config.py')}", f"--workdir={folder / 'run'}", "--distributed"]
    common += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", *flags]
    killed = str(pathlib.Path(__file__).parent / "killed_process.py")
    started = []
    for index in range(count):
        die_at = (deaths or {}).get(index)
        program = ["-m", "mnist_flax.main"] if die_at is None else [killed, str(die_at)]
        own = [last] if last and index == count - 1 else []
        started.append(start(*program, *common, *own, f"--process_index={index}"))
    return started


def end(started: list[subprocess.Popen[str]]) -> list[Ended]:
    """Waits for the processes, and returns how they ended."""
    ended = []
    for process in started:
        out, err = process.communicate(timeout=250)
        ended.append(Ended(process.args, process.returncode, out, err))
    return ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The run of a single process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    fit(RUN, workdir)
    return workdir


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[Ended]]:
    """The undisturbed run of two processes, and how they ended."""
    folder = tmp_path_factory.mktemp("pair")
    ended = end(start_together(2, folder))
    return folder / "run", ended


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Checks that two runs saw the same examples and ended alike, up to the rounding of sums over parts of a batch."""
    state, other_state = (checkpoint.load_run(folder).state for folder in (workdir, other))
    for one, another in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        # Errors in the last bits of f32 (6e-8) grow over 14 steps; one wrong example of 32 changes the second digit.
        np.testing.assert_allclose(one, another, rtol=1e-4, atol=1e-5)
    for line, other_line in zip(lines(workdir), lines(other), strict=True):
        assert line.keys() == other_line.keys()
        for name, value in line.items():
            assert value == (pytest.approx(other_line[name], rel=1e-4) if name == "loss" else other_line[name])


def test_two_processes_equal_one_process(pair: tuple[pathlib.Path, list[Ended]], alone: pathlib.Path) -> None:
    workdir, (primary, other) = pair
    assert primary.returncode == 0, primary.stderr
    assert other.returncode == 0, other.stderr
    assert_same_run(workdir, alone)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()}
    assert steps(workdir) == steps(alone)
    assert summary(workdir)["test_examples"] == 360
    assert "test accuracy" in primary.stderr
    assert "accuracy" not in other.stderr + other.stdout  # only the primary prints


def test_processes_with_different_configs_stop_before_training(tmp_path: pathlib.Path) -> None:
    for process in end(start_together(2, tmp_path, last="--config.seed=5")):
        assert process.returncode == 2, process.stderr
        assert "error: --distributed: the processes have different configs, data, forks or teachers" in process.stderr
        assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()


def test_processes_with_different_weights_to_fork_stop_before_training(tmp_path: pathlib.Path) -> None:
    for seed in (1, 2):
        fit(replace(RUN, seed=seed, train__epochs=1), tmp_path / f"seed-{seed}")
    forks = [f"--fork={tmp_path / f'seed-{seed}'}" for seed in (1, 2)]
    for process in end(start_together(2, tmp_path, forks[0], last=forks[1])):
        assert process.returncode == 2, process.stderr
        assert "different checkpoints in --workdir, or weights in --fork" in process.stderr


@pytest.mark.slow
def test_four_processes_that_stream_their_rows_equal_one_process(tmp_path: pathlib.Path, alone: pathlib.Path) -> None:
    ended = end(start_together(4, tmp_path, "--config.train.driver=stream"))
    assert [process.returncode for process in ended] == [0] * 4, ended
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_killed_process_ends_the_others_and_the_restart_equals_an_undisturbed_run(
    pair: tuple[pathlib.Path, list[Ended]], alone: pathlib.Path, tmp_path: pathlib.Path, dead: int
) -> None:
    started = start_together(2, tmp_path, deaths={dead: 9})
    started[dead].wait(timeout=250)
    since = time.monotonic()
    ended = end(started)
    assert time.monotonic() - since < 60
    assert ended[dead].returncode == -signal.SIGKILL
    survivor = ended[1 - dead]
    assert survivor.returncode not in (0, -signal.SIGKILL)
    if dead:  # if the primary dies, and with it JAX's coordinator, JAX may report that itself
        assert survivor.returncode == 4
        assert "error: another of the 2 processes is gone or out of reach" in survivor.stderr
        assert "the same commands continue from the newest checkpoint" in survivor.stderr
        assert "Traceback" not in survivor.stderr
    else:
        assert "another task died" in survivor.stderr or "another of the 2 processes is gone" in survivor.stderr
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints")[-1] in (4, 7, 8)

    # The run continues with one process, and with two.
    shutil.copytree(tmp_path / "run", tmp_path / "single")
    fit(RUN, tmp_path / "single")
    assert_same_run(tmp_path / "single", alone)
    assert [process.returncode for process in end(start_together(2, tmp_path))] == [0, 0]
    assert outcome(tmp_path / "run") == outcome(pair[0])


@pytest.mark.slow
def test_signal_to_one_stops_all_at_the_same_step(tmp_path: pathlib.Path) -> None:
    started = start_together(2, tmp_path, "--config.train.epochs=100000")
    deadline = time.monotonic() + 120
    while not checkpoint.steps_in(tmp_path / "run" / "checkpoints"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    ended = end(started)
    assert [process.returncode for process in ended] == [143, 143], ended
    last_lines = [process.stderr.strip().splitlines()[-1] for process in ended]
    assert last_lines[0] == last_lines[1]
    step = int(last_lines[0].split()[3])
    assert last_lines[0].startswith(f"stopped at step {step} of")
    assert steps(tmp_path / "run")[-1] == step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--num_processes: is used only with --distributed"),
        (["--distributed", "--num_processes=2", "--process_index=0"], "--coordinator is missing: give all of"),
        (
            ["--distributed", "--coordinator=127.0.0.1:1", "--num_processes=2", "--process_index=2"],
            "--process_index=2: must be from 0 to 1",
        ),
        (
            ["--distributed", "--coordinator=here", "--num_processes=2", "--process_index=0"],
            "--coordinator=here: must be HOST:PORT",
        ),
        (
            ["--distributed", "--coordinator=127.0.0.1:65536", "--num_processes=2", "--process_index=0"],
            "--coordinator=127.0.0.1:65536: must be HOST:PORT",
        ),
        (["--distributed"], "--distributed: found no cluster to join"),
    ],
)
def test_contradicting_flags_give_one_message(tmp_path: pathlib.Path, flags: list[str], message: str) -> None:
    ended = forked.run("-m", "mnist_flax.main", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *flags)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}"), ended.stderr
    assert not (tmp_path / "run").exists()


def test_primary_that_waits_for_others_ends_at_once_on_a_signal(tmp_path: pathlib.Path) -> None:
    process, other = start_together(2, tmp_path, deaths={1: 0})
    other.kill()
    other.communicate()
    assert process.stderr
    while "waiting for the other processes" not in (line := process.stderr.readline()):
        assert line, "it ended before it waited"
    time.sleep(1)  # until it waits inside JAX
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "stopped\n")


def join(port: int, process_index: int) -> Ended:
    """Joins a run of two processes as one of them, waiting for a second at most."""
    code = (
        "from mnist_flax import cli\n"
        "from mnist_flax.run import processes\n"
        "processes.JOIN_SECONDS = 1\n"
        f"cli.run(lambda _: processes.join('127.0.0.1:{port}', 2, {process_index}))"
    )
    return run("-c", code)


def test_process_that_finds_no_coordinator_gives_one_message() -> None:
    ended = join(1, 1)
    expected = "error: --coordinator=127.0.0.1:1: cannot be reached (Connection refused)"
    waiting = "waiting for the other processes at 127.0.0.1:1, up to 1 s\n"
    assert (ended.returncode, ended.stderr[: len(waiting + expected)]) == (2, waiting + expected)


def test_a_host_that_does_not_exist_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", fail)
    for coordinator in ("nowhere:1234", "[::1]:1234"):
        with pytest.raises(ConfigError, match=r"cannot be reached \(Name or service not known\)"):
            processes._wait_for(coordinator, is_first=False)
    assert asked == [("nowhere", 1234), ("::1", 1234)]  # once each; an address of IPv6 without its brackets


def test_primary_whose_port_is_taken_gives_one_message() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ended = join(port := other.getsockname()[1], 0)
    expected = f"error: --coordinator=127.0.0.1:{port}: cannot listen at this port (Address already in use"
    assert (ended.returncode, ended.stderr[: len(expected)]) == (2, expected)


def test_primary_that_no_other_process_joins_gives_one_message() -> None:
    ended = join(free_port(), 0)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: --distributed: some processes have not started within 1 s")


def test_single_process_agrees_with_itself() -> None:
    assert processes.is_primary()
    assert processes.agree(3, 0, 1) == (3, 0, 1)
    with pytest.raises(ConfigError, match="as it is"), processes.bound_together():
        raise ConfigError("as it is")
