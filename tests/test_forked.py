"""Scripts that run in a fork end as they would in a process of their own."""

import pathlib

import forked
import pytest


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('done')", 0, "done\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
    ],
)
def test_a_script_ends_with_its_status_and_what_it_printed(
    code: str, status: int, said: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "script.py").write_text(code)
    done = forked.run("script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout + done.stderr) == (status, said)


def test_a_script_that_raises_an_error_fails_with_a_traceback(tmp_path: pathlib.Path) -> None:
    (tmp_path / "script.py").write_text("1 / 0")
    done = forked.run("script.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
