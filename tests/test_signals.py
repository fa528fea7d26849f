"""The first signal requests a stop; the second ends the process immediately, whatever the main thread is doing."""

import os
import signal
import threading
import time

import pytest
from small_run import start

from mnist_flax.run import signals
from mnist_flax.run.signals import SIGNALS, Interrupted, StopRequest, stop_request

# Keeps the main thread inside a library, as XLA does while it compiles.
BUSY = """
import hashlib
from mnist_flax.run.signals import stop_request
with stop_request() as request:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
print(request.signum)
"""


@pytest.mark.parametrize("signum", SIGNALS)
def test_first_signal_requests_a_stop(signum: int) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_request() as request:
        assert not request.signum
        os.kill(os.getpid(), signum)
        for _ in range(100):
            time.sleep(0.01)
            if request.signum:
                break
        assert request.signum == signum
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert Interrupted("", signum).exit_status == 128 + signum


def test_no_thread_or_file_descriptor_is_left() -> None:
    def left() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/dev/fd"))

    before = left()
    for _ in range(3):
        with stop_request():
            assert left() > before
    assert left() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_stop_request_does_nothing_in_another_thread() -> None:
    signums = []

    def work() -> None:
        with stop_request() as request:
            signums.append(request.signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signums == [0]


def test_busy_process_says_at_once_that_it_will_stop() -> None:
    process = start("-c", BUSY.format(rounds=3_000_000))
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "stopping soon, after a checkpoint; a second signal ends the program at once" in err
    assert (process.returncode, out) == (0, "15\n")


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_ends_the_process_at_once(second: int, status: int) -> None:
    process = start("-c", BUSY.format(rounds=2**31 - 1))
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline().startswith("stopping soon")
    process.send_signal(second)
    process.communicate(timeout=10)
    assert process.returncode == status


def test_second_sighup_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(signals, "end_process", left.append)
    request = StopRequest()
    for signum in (signal.SIGHUP, signal.SIGHUP):  # a closed terminal and its shell each send one
        request.receive(signum)
    assert (request.signum, left) == (signal.SIGHUP, [])
    request.receive(signal.SIGTERM)
    assert left == [143]


def test_signal_that_the_parent_ignores_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert not request.signum
    finally:
        signal.signal(signal.SIGHUP, previous)


WAITS = """
import hashlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from mnist_flax import cli
def main(argv):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
cli.run(main)
"""


@pytest.mark.parametrize("signum", SIGNALS)
def test_signal_ends_a_command_at_once_even_inside_a_library(signum: int) -> None:
    process = start("-c", WAITS)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + signum, "", "stopped\n")
