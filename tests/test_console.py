"""Standard streams that are lost, closed or full, and names that a locale cannot print."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from mnist_flax.errors import UserError
from mnist_flax.run import console

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Failing(io.StringIO):
    """A stream to which nothing can be written."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")])
def test_lost_console_raises_nothing_and_lost_output_ends_the_program(error: Exception) -> None:
    lost = console.Console(Failing(error), is_output=False)
    print("text", file=lost, flush=True)
    with pytest.raises(UserError) as ended:
        print("text", file=console.Console(Failing(error), is_output=True))
    assert ended.value.exit_status == (141 if isinstance(error, BrokenPipeError) else 2)
    assert str(ended.value) == (
        "" if isinstance(error, BrokenPipeError) else f"standard output cannot be written ({error.args[-1]})"
    )


PRINTS = """
import os, sys
from mnist_flax import cli
def main(argv):
    assert not {0, 1, 2} & {os.open("/dev/null", os.O_RDONLY)}, "a file must not get the number of a closed stream"
    for i in range(100_000):
        print(i)
    print("still there", file=sys.stderr)
cli.run(main)
"""


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("| head -1", 141, "0\n"),
        (">/dev/full", 2, "error: standard output cannot be written (No space left on device)\n"),
        (">&-", 0, "still there\n"),
        ("2>&- | tail -1", 0, "99999\n"),
        ("2>/dev/full | tail -1", 0, "99999\n"),
        ("<&- >&- 2>&-", 0, ""),
    ],
)
def test_closed_or_full_streams_give_an_exit_status_and_no_traceback(redirection: str, status: int, said: str) -> None:
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirection}', sys.executable, PRINTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout + done.stderr) == (status, said)


def test_any_name_can_be_printed_in_any_locale() -> None:
    code = "import os; from mnist_flax import cli; cli.run(lambda _: print('七', os.fsdecode(bytes([255]))))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u4e03 \\udcff\n", "")
