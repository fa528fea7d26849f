"""What verbs write and print: nothing through links in a run's folder, and a clear end if something is in the way."""

import pathlib
import shutil
import subprocess
import sys

import forked
import numpy as np
import pytest
import tiny_run
from PIL import Image
from small_run import ROOT, environment

# What each verb writes into the run's folder, and a part of what it prints even if that fails.
OUTPUTS = {
    "evaluate": (["evaluation-test-digits.json"], "of 360 right"),
    "report": (["report/index.html", "report/metrics.json", "report/config.py", "report/loss.svg"], "of 360 right"),
    "export": (["export/model.npz", "export/model.py", "export/MODEL_CARD.md"], ""),
    "demo": (["demo.html"], ""),
    "robustness": (["robustness.html", "robustness.json"], "mean of 15"),
}


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a finished run, without what other tests have written into it."""
    written = [name.partition("/")[0] for names, _ in OUTPUTS.values() for name in names]
    return pathlib.Path(shutil.copytree(tiny_run.workdir(), tmp_path / "run", ignore=shutil.ignore_patterns(*written)))


def use(verb: str, workdir: pathlib.Path) -> "subprocess.CompletedProcess[str]":
    return forked.run("-m", f"mnist_flax.{verb}", f"--workdir={workdir}", *["--format=npz"] * (verb == "export"))


@pytest.mark.parametrize("verb", OUTPUTS)
def test_verb_replaces_links_and_keeps_their_targets(verb: str, workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target, paths = tmp_path / "target", [workdir / name for name in OUTPUTS[verb][0]]
    target.write_text("precious")
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target)
    done = use(verb, workdir)
    assert done.returncode == 0, done.stderr
    assert target.read_text() == "precious"
    assert all(path.is_file() and not path.is_symlink() for path in paths)


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=[pytest.mark.slow] * (verb == "robustness")) for verb in OUTPUTS]
)
def test_verb_that_cannot_write_prints_first_and_names_output(
    verb: str, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (name, *_), printed = OUTPUTS[verb]
    folder = name.rpartition("/")[0]
    if folder:
        (tmp_path / "outside").mkdir()
        (workdir / folder).symlink_to(tmp_path / "outside")
    else:
        (workdir / name).mkdir()
    done = use(verb, workdir)
    *before, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert printed in done.stdout + "".join(before)
    assert error.startswith(f"error: {workdir / (folder or name)}: cannot be written (")
    assert "; name another " in error and "--output" in error
    assert not folder or not list((tmp_path / "outside").iterdir())


# `evaluate` prints its table at once, so only a reader that has already gone makes it fail.
@pytest.mark.parametrize(("verb", "reader", "read"), [("predict", "head -n 1", 1), ("evaluate", "head -n 0", 0)])
def test_verb_whose_reader_has_gone_ends_without_a_traceback(
    verb: str, reader: str, read: int, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pictures = [tmp_path / f"{number}.png" for number in range(9 * (verb == "predict"))]
    for path in pictures:
        drawn = np.full((60, 60), 255, np.uint8)
        drawn[10:50, 25:32] = 0
        Image.fromarray(drawn).save(path)
    command = ["bash", "-c", f'set -o pipefail; "$0" -m mnist_flax.{verb} "$@" | {reader}', sys.executable]
    done = subprocess.run(
        [*command, f"--workdir={workdir}", *map(str, pictures)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (141, "", read)
