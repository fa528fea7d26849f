"""A workdir has one owner, its files are written atomically, and links are not followed."""

import ast
import json
import os
import pathlib
import shutil
import signal
import subprocess

import pytest
from small_run import ROOT, start

from mnist_flax.config import Config
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


def test_claim_makes_the_folder_and_removes_it_if_nothing_came_of_it(tmp_path: pathlib.Path) -> None:
    with workdirs.claim(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())


def test_claim_keeps_what_was_there_and_what_was_written(tmp_path: pathlib.Path) -> None:
    with workdirs.claim(tmp_path):
        pass
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
    with workdirs.claim(tmp_path / "new"):
        workdirs.write_text(tmp_path / "new" / workdirs.CONFIG, "{}")
    assert (tmp_path / "new" / workdirs.CONFIG).read_text() == "{}"
    with workdirs.claim(tmp_path / "new"):
        pass


def test_second_owner_is_told_who_the_first_is(tmp_path: pathlib.Path) -> None:
    with claimed_by_another(tmp_path) as process:
        with (
            pytest.raises(WorkdirError, match=rf"in use by process {process.pid} on .+ since 2\d\d\d-.+; wait for it"),
            workdirs.claim(tmp_path),
        ):
            pass
        process.communicate()
    with workdirs.claim(tmp_path):  # the first owner has ended
        pass


def test_one_process_cannot_claim_twice(tmp_path: pathlib.Path) -> None:
    with (
        workdirs.claim(tmp_path),
        pytest.raises(WorkdirError, match=f"process {os.getpid()} on"),
        workdirs.claim(tmp_path),
    ):
        pass


def test_dead_owner_does_not_block_a_claim_even_if_its_pid_is_reused(tmp_path: pathlib.Path) -> None:
    with claimed_by_another(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    owner = tmp_path / ".mnist_flax.owner.json"
    # Another process now has the PID of the dead one.
    owner.write_text(json.dumps(json.loads(owner.read_text()) | {"pid": os.getppid()}))
    with workdirs.claim(tmp_path):
        assert json.loads(owner.read_text())["pid"] == os.getpid()


def test_folder_with_leftovers_of_a_killed_claim_is_accepted(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".mnist_flax.lock").touch()
    (tmp_path / ".config.json.tmp").write_text('{"see')
    workdirs.check(tmp_path)


def foreign(path: pathlib.Path, config: str) -> None:
    """Makes a folder of another program, which also has a file called config.json."""
    (path / config).parent.mkdir(parents=True)
    (path / config).write_text('{"model_type": "vit", "seed": 1}')
    (path / ".x.tmp").touch()


@pytest.mark.parametrize("folder", [".", "members/seed-0"])
def test_run_or_population_copied_without_hidden_files_is_accepted(tmp_path: pathlib.Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / workdirs.CONFIG).write_text(Config().to_json())
    (tmp_path / "population.npz").touch()
    with workdirs.claim(tmp_path):
        pass
    assert (tmp_path / folder / workdirs.CONFIG).is_file()


def test_claim_of_a_folder_deleted_in_use_keeps_its_error_and_releases_the_lock(tmp_path: pathlib.Path) -> None:
    workdir, unlocked = tmp_path / "run", len(os.listdir("/proc/self/fd"))
    with pytest.raises(WorkdirError, match=r"metrics.jsonl: cannot be written \(No such file"), workdirs.claim(workdir):
        shutil.rmtree(workdir)
        workdirs.append_bytes(workdir / workdirs.METRICS, b"line")
    assert len(os.listdir("/proc/self/fd")) == unlocked  # the lock's file is closed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("text"), "is a file; name a folder"),
        (lambda path: (path.mkdir(), (path / "thesis.tex").touch()), "holds 'thesis.tex' but no config.json"),
        (lambda path: path.symlink_to("/proc/version"), "is a file; name a folder"),
        (lambda path: foreign(path, "config.json"), "holds '.x.tmp' but no config.json of a run; name another folder"),
        (lambda path: foreign(path, "members/alice/config.json"), "holds '.x.tmp' but no config.json of a run"),
    ],
)
def test_path_that_is_something_else_is_left_alone(tmp_path: pathlib.Path, make: object, message: str) -> None:
    path = tmp_path / "work"
    make(path)  # type: ignore[operator]
    before = sorted(path.iterdir()) if path.is_dir() else path.read_bytes()
    with pytest.raises(WorkdirError, match=message), workdirs.claim(path):
        pass
    assert (sorted(path.iterdir()) if path.is_dir() else path.read_bytes()) == before


@pytest.mark.parametrize(
    "path", ["/proc/no_folder_here", "/proc/version/below/a/file", "/tmp/" + "long" * 100, "zero\0byte"]
)
def test_path_that_cannot_be_written_gives_one_message(path: str) -> None:
    message = r"--workdir=.+: cannot be (written|read) \(.+\); name another folder"
    with pytest.raises(WorkdirError, match=message), workdirs.claim(pathlib.Path(path)):
        pass


def test_path_that_is_not_utf8_gives_one_message_before_training(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "\udcff" / "run"
    with pytest.raises(WorkdirError, match="cannot be written to this path; name a folder whose path is valid UTF-8"):
        workdirs.check(workdir)


def test_failing_claim_removes_the_folders_that_it_made(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / ("long" * 100)
    with pytest.raises(WorkdirError), workdirs.claim(path):
        pass
    assert not list(tmp_path.iterdir())


def test_file_is_replaced_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    workdirs.write_text(path, "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WorkdirError, match=r"file: cannot be written \(No space left on device\); fix that"):
        workdirs.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk_gives_one_message() -> None:
    with pytest.raises(WorkdirError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        workdirs.append_bytes(pathlib.Path("/dev/full"), b"line\n")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"\0\0\0\0"])
def test_damaged_or_missing_json_reads_as_empty(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert workdirs.read_json(tmp_path / "file") == {}
    assert workdirs.read_json(tmp_path / "missing") == {}


def test_json_that_is_no_regular_file_is_not_read(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    assert workdirs.read_json(tmp_path / "pipe") == {}
    assert workdirs.read_json(tmp_path / "endless") == {}


# A stranger's folder --------------------------------------------------------------------------------------------------


def test_written_file_replaces_a_link_and_its_target_stays(tmp_path: pathlib.Path) -> None:
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_text("precious")
    path.symlink_to(target)
    (tmp_path / ".file.tmp").symlink_to(target)
    workdirs.write_text(path, "new")
    assert (target.read_text(), path.read_text()) == ("precious", "new")
    assert not path.is_symlink()


def test_nothing_is_appended_through_a_link(tmp_path: pathlib.Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "target")
    with pytest.raises(WorkdirError, match=r"file: cannot be written \(a symbolic link, which is not followed"):
        workdirs.append_bytes(tmp_path / "file", b"more")
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize("names", [("report",), ("members", "seed-0"), ("report", "below")])
def test_subfolder_is_never_a_link(tmp_path: pathlib.Path, names: tuple[str, ...]) -> None:
    inside, outside = tmp_path / "run", tmp_path / "outside"
    (inside / names[0]).parent.mkdir()
    outside.mkdir()
    (inside / names[0]).symlink_to(outside)
    with pytest.raises(WorkdirError, match="a symbolic link, which is not followed"):
        workdirs.subfolder(inside, *names)
    assert not list(outside.iterdir())
    (inside / names[0]).unlink()
    assert workdirs.subfolder(inside, *names).is_dir()
    (inside / "file").touch()
    with pytest.raises(WorkdirError, match=r"file: cannot be written \(File exists\)"):
        workdirs.subfolder(inside, "file")


def test_run_may_live_behind_a_link(tmp_path: pathlib.Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with workdirs.claim(tmp_path / "runs"):
        workdirs.write_text(workdirs.subfolder(tmp_path / "runs", "report") / "index.html", "page")
    assert (tmp_path / "disk" / "report" / "index.html").read_text() == "page"


def test_claim_follows_no_link(tmp_path: pathlib.Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (outside / ".precious.tmp").write_text("precious")
    (run / "report").symlink_to(outside)
    (run / workdirs.CONFIG).write_text(Config().to_json())
    (run / ".mnist_flax.owner.json").symlink_to(outside / "owner")
    link = run / ".summary.json.0000.tmp"
    link.symlink_to(outside / ".precious.tmp")
    with workdirs.claim(run):
        pass
    assert link.is_symlink()  # too new: another process may be writing it
    os.utime(link, (0, 0), follow_symlinks=False)
    with workdirs.claim(run):
        pass
    assert [path.name for path in outside.iterdir()] == [".precious.tmp"]
    assert not link.is_symlink()
    (run / ".mnist_flax.lock").unlink(missing_ok=True)
    (run / ".mnist_flax.lock").symlink_to(outside / ".precious.tmp")
    with pytest.raises(WorkdirError, match="a symbolic link"), workdirs.claim(run):
        pass
    assert (outside / ".precious.tmp").read_text() == "precious"


def test_removing_a_link_keeps_its_target(tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for path in (tmp_path / "link", tmp_path / "missing"):
        workdirs.remove(path)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
    workdirs.remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_shown_path_does_not_reveal_parent_folders(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert workdirs.shown(pathlib.Path("runs/default")) == "runs/default"
    assert workdirs.shown(pathlib.Path("/somewhere/else/runs/default")) == "default"
    assert workdirs.shown(pathlib.Path()) == tmp_path.name


def test_output_that_cannot_be_written_is_reported(tmp_path: pathlib.Path) -> None:
    assert workdirs.create_output(tmp_path / "a" / "b").is_dir()
    with pytest.raises(WorkdirError, match=r"--output=/proc/none: cannot be written \(.+\); name another folder"):
        workdirs.create_output(pathlib.Path("/proc/none"))
    with pytest.raises(WorkdirError, match=r"file: cannot be written \(.+\); name another folder with --output=DIR"):
        workdirs.write_text(pathlib.Path("/proc/none/file"), "", remedy=workdirs.REMEDY_OUTPUT)


# These write files directly: the module itself, the cache of programs, saved pictures, and temporary exports.
OTHER_WRITERS = {
    "run/workdir.py",
    "run/compilation.py",
    "pictures/files.py",
    "exporting/formats.py",
}


def test_files_of_a_run_are_written_by_one_module() -> None:
    for path in (ROOT / "mnist_flax").rglob("*.py"):
        name = path.relative_to(ROOT / "mnist_flax").as_posix()
        if name in OTHER_WRITERS or name.startswith("data/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                is_write = node.func.attr in {"mkdir", "write_text", "write_bytes", "touch", "makedirs"}
                assert not is_write or owner == "workdirs", f"{name}: {ast.unparse(node)}"
