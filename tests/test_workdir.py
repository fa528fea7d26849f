"""A workdir has one owner, holds one run, and gets its files whole."""

import json
import os
import pathlib
import signal
import subprocess

import pytest
from small_run import start

from mnist_flax.errors import WorkdirError
from mnist_flax.run import workdir as workdirs

CLAIM = """
import pathlib, sys
from mnist_flax.run import workdir
with workdir.claim(pathlib.Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def claimed_by_another(workdir: pathlib.Path) -> "subprocess.Popen[str]":
    process = start("-c", CLAIM, str(workdir))
    assert process.stdout
    assert process.stdout.readline() == "claimed\n"
    return process


def test_a_claim_makes_the_folder_and_removes_it_if_nothing_came_of_it(tmp_path: pathlib.Path) -> None:
    with workdirs.claim(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())


def test_a_claim_keeps_what_was_there_and_what_was_written(tmp_path: pathlib.Path) -> None:
    with workdirs.claim(tmp_path):
        pass
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
    with workdirs.claim(tmp_path / "new"):
        workdirs.write_text(tmp_path / "new" / workdirs.CONFIG, "{}")
    assert (tmp_path / "new" / workdirs.CONFIG).read_text() == "{}"
    with workdirs.claim(tmp_path / "new"):
        pass


def test_the_second_owner_is_told_who_the_first_is(tmp_path: pathlib.Path) -> None:
    with claimed_by_another(tmp_path) as process:
        with (
            pytest.raises(WorkdirError, match=rf"in use by process {process.pid} on .+ since 2\d\d\d-.+; wait for it"),
            workdirs.claim(tmp_path),
        ):
            pass
        process.communicate()
    with workdirs.claim(tmp_path):  # it has ended
        pass


def test_one_process_cannot_claim_twice(tmp_path: pathlib.Path) -> None:
    with (
        workdirs.claim(tmp_path),
        pytest.raises(WorkdirError, match=f"process {os.getpid()} on"),
        workdirs.claim(tmp_path),
    ):
        pass


def test_a_dead_owner_is_no_obstacle_even_if_its_number_is_used_again(tmp_path: pathlib.Path) -> None:
    with claimed_by_another(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    owner = tmp_path / ".mnist_flax.owner.json"
    # The dead one's number is now that of a process that lives.
    owner.write_text(json.dumps(json.loads(owner.read_text()) | {"pid": os.getppid()}))
    with workdirs.claim(tmp_path):
        assert json.loads(owner.read_text())["pid"] == os.getpid()


def test_what_a_killed_claim_leaves_is_no_strange_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".mnist_flax.lock").touch()
    (tmp_path / ".config.json.tmp").write_text('{"see')
    workdirs.check(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("text"), "is a file; name a folder"),
        (lambda path: (path.mkdir(), (path / "thesis.tex").touch()), "holds 'thesis.tex' but no config.json"),
        (lambda path: path.symlink_to("/proc/version"), "is a file; name a folder"),
    ],
)
def test_a_path_that_is_something_else_is_left_alone(tmp_path: pathlib.Path, make: object, message: str) -> None:
    path = tmp_path / "work"
    make(path)  # type: ignore[operator]
    before = sorted(path.iterdir()) if path.is_dir() else path.read_bytes()
    with pytest.raises(WorkdirError, match=message), workdirs.claim(path):
        pass
    assert (sorted(path.iterdir()) if path.is_dir() else path.read_bytes()) == before


@pytest.mark.parametrize(
    "path", ["/proc/no_folder_here", "/proc/version/below/a/file", "/tmp/" + "long" * 100, "zero\0byte"]
)
def test_a_path_that_cannot_be_written_is_one_message(path: str) -> None:
    message = r"--workdir=.+: cannot be (written|read) \(.+\); name another folder"
    with pytest.raises(WorkdirError, match=message), workdirs.claim(pathlib.Path(path)):
        pass


def test_a_failing_claim_removes_the_folders_that_it_made(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / ("long" * 100)
    with pytest.raises(WorkdirError), workdirs.claim(path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    workdirs.write_text(path, "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WorkdirError, match=r"file: cannot be written \(No space left on device\); mend that"):
        workdirs.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_one_message() -> None:
    with pytest.raises(WorkdirError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        workdirs.append_bytes(pathlib.Path("/dev/full"), b"line\n")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"\0\0\0\0"])
def test_damaged_json_is_no_json(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert workdirs.read_json(tmp_path / "file") is None
    assert workdirs.read_json(tmp_path / "missing") is None
