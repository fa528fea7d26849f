"""The verb `python -m mnist_flax.predict`: what it reads, prints and returns."""

import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import forked
import numpy as np
import pytest
from PIL import Image

from mnist_flax import config as config_lib
from mnist_flax import train
from mnist_flax.config import Config
from mnist_flax.data.embedded import embedded_digits
from mnist_flax.metrics import log_probabilities
from mnist_flax.pictures import files, parallel, segment
from mnist_flax.pictures import reading as readings_lib
from mnist_flax.pictures.decode import PictureError
from mnist_flax.pictures.segment import read_digits

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Model:
    """A small network trained on the embedded digits, and pictures that it reads correctly."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.workdir = folder / "run"
        config = config_lib.replace(
            Config(), data__name="digits", model__widths=(8, 16), model__pools=(2,), train__epochs=4,
            train__batch_size=32, optimizer__learning_rate=3e-3, train__tensorboard=False, train__report=False,
        )  # fmt: skip
        train.fit(config, self.workdir)
        images, labels = embedded_digits()[1]
        self.images = [images[list(labels).index(digit)][..., 0] for digit in range(10)]

    def picture(self, digit: int, side: int = 120) -> Image.Image:
        """A digit in black on white, with a margin."""
        image = Image.fromarray(255 - self.images[digit]).resize((side, side), Image.Resampling.BICUBIC)
        sheet = Image.new("L", (side + 80, side + 80), 255)
        sheet.paste(image, (40, 40))
        return sheet

    def run(self, *arguments: str, stdin: bytes = b"", cwd: pathlib.Path = ROOT) -> tuple[int, str, str]:
        """Runs the verb; returns exit status, standard output and standard error."""
        done = forked.run("-m", "mnist_flax.predict", *arguments, cwd=cwd, stdin=stdin)
        return done.returncode, done.stdout, done.stderr

    def read(self, *names: str, **options: Any) -> tuple[int, list[dict[str, Any]]]:
        """Runs the verb with --json; returns exit status and objects."""
        status, out, err = self.run(f"--workdir={self.workdir}", "--json", *names, **options)
        assert "Traceback" not in err
        return status, [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pictures 3.png, 7.JPG and below/1.gif, and two files that must not be read: a text and a hidden file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    model.picture(3).save(folder / "3.png")
    model.picture(7).convert("RGB").save(folder / "7.JPG", "JPEG")
    model.picture(1).save(folder / "below" / "1.gif")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def test_json_lines_hold_digits_probabilities_and_boxes(model: Model, folder: pathlib.Path) -> None:
    row = np.concatenate([np.asarray(model.picture(digit)) for digit in (4, 0, 7)], axis=1)
    Image.fromarray(row).save(folder / "below" / "row.png")
    status, (line,) = model.read(str(folder / "below" / "row.png"))
    assert status == 0
    assert list(line) == ["file", "digits", "doubtful"]
    assert line["file"] == str(folder / "below" / "row.png")
    assert [digit["digit"] for digit in line["digits"]] == [4, 0, 7]
    assert line["doubtful"] is False
    for i, digit in enumerate(line["digits"]):
        assert list(digit) == ["digit", "probability", "top", "box", "doubtful"]
        assert digit["top"][0] == [digit["digit"], digit["probability"]]
        probabilities = [probability for _, probability in digit["top"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1.00001
        left, top, right, bottom = digit["box"]
        assert 200 * i <= left < right <= 200 * (i + 1)
        assert 0 <= top < bottom <= 200
    (folder / "below" / "row.png").unlink()


def test_good_pictures_are_read_between_bad_ones(model: Model, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Bad files do not stop the others, the output keeps the order of the arguments, and the status is 1."""
    (tmp_path / "truncated.png").write_bytes((folder / "3.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "nothing").mkdir()
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    bad = {
        "missing.png": "does not exist", "truncated.png": "damaged", "text.png": "not a picture",
        "empty.png": "is empty", "nothing": "folder without pictures", "blank.png": "is blank", "bomb.png": "pixels",
        "*.bmp": "matches no file",
    }  # fmt: skip
    names = [str(folder / "3.png"), *(str(tmp_path / name) for name in bad), str(folder / "7.JPG")]
    status, lines = model.read(*names)
    assert status == 1
    assert [line["file"] for line in lines] == names
    assert [lines[i]["digits"][0]["digit"] for i in (0, -1)] == [3, 7]
    for line, reason in zip(lines[1:-1], bad.values(), strict=True):
        assert list(line) == ["file", "error"]
        assert reason in line["error"]
        assert "\n" not in line["error"]


def test_table_lists_a_folder_and_framed_images_are_saved(
    model: Model, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    saved = tmp_path / "saved"
    status, out, err = model.run(
        f"--workdir={model.workdir}", f"--save_preprocessed={saved}", str(folder), str(folder / "gone.png")
    )
    lines = out.splitlines()
    assert status == 1
    assert lines[0].split() == ["file", "digit", "probability", "top", "3"]
    for line, (name, digit) in zip(lines[1:], {"3.png": 3, "7.JPG": 7, "below/1.gif": 1}.items(), strict=True):
        assert re.match(rf"{re.escape(str(folder / name))} +{digit}[? ] +\d+\.\d%  {digit} +\d+\.\d%  ", line), line
    assert "gone.png: does not exist" in err
    assert err.endswith("error: 1 of 4 pictures could not be read\n")
    assert sorted(path.name for path in saved.iterdir()) == ["0001-3-1.png", "0002-7-1.png", "0003-1-1.png"]
    (seen,) = read_digits((folder / "3.png").read_bytes())
    np.testing.assert_array_equal(np.asarray(Image.open(saved / "0001-3-1.png")), seen.image)


def test_pictures_are_classified_as_they_are(model: Model, tmp_path: pathlib.Path) -> None:
    """Blank or grey images too, in which no digit is found: datasets of a user's own look like this."""
    images = [np.zeros((28, 28), np.uint8), np.full((28, 28), 90, np.uint8), model.images[5]]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    model.picture(5).save(tmp_path / "3.png")
    seen = tmp_path / "seen"
    status, lines = model.read("--as_is", f"--save_preprocessed={seen}", *(f"{tmp_path}/{i}.png" for i in range(4)))
    assert status == 1
    assert [len(line["digits"]) for line in lines[:3]] == [1, 1, 1]
    assert lines[2]["digits"][0]["digit"] == 5
    assert lines[3]["error"] == "has 200x200 pixels; --as_is needs 28x28"
    for number, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(seen / f"{number + 1:04}-{number}-1.png")), image)


def test_pattern_and_stdin_are_read_with_a_chosen_checkpoint(model: Model, folder: pathlib.Path) -> None:
    content = (folder / "7.JPG").read_bytes()
    status, lines = model.read("--checkpoint=latest", str(folder / "*.png"), "-", stdin=content)
    assert status == 0
    assert [(line["file"], line["digits"][0]["digit"]) for line in lines] == [(str(folder / "3.png"), 3), ("-", 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=WORKDIR"], "no picture is named"),
        (["a.png"], "--workdir is missing"),
        (["--workdir=WORKDIR/nowhere", "a.png"], "nowhere"),
        (["--workdir=WORKDIR", "--checkpoint=999999", "a.png"], "999999"),
        (["--workdir=WORKDIR", "--save_preprocessed=WORKDIR/config.json", "PICTURE"], "name another folder"),
        (["--workdir=WORKDIR", "--save_preprocessed=", "PICTURE"], "--save_preprocessed: is empty"),
    ],
)
def test_mistakes_get_a_message_and_status_2(
    model: Model, folder: pathlib.Path, arguments: list[str], message: str
) -> None:
    replaced = [
        argument.replace("WORKDIR", str(model.workdir)).replace("PICTURE", str(folder / "3.png"))
        for argument in arguments
    ]
    status, _, err = model.run(*replaced)
    assert status == 2
    assert "Traceback" not in err
    assert re.search(f"error: .*{message}", err), err


def test_help_names_the_flags() -> None:
    done = forked.run("-m", "mnist_flax.predict", "--help")
    assert done.returncode == 0
    assert "--save_preprocessed" in done.stdout


# In this process ------------------------------------------------------------------------------------------------------


def reading(probability: float) -> readings_lib.Reading:
    top = [(7, probability), (1, 0.01), (2, 0.005)]
    image = np.zeros((28, 28), np.uint8)
    doubtful = probability < 0.95
    return readings_lib.Reading(7, probability, top, (0, 0, 9, 9), doubtful, image)


DIGITS = tuple("0123456789")


def test_doubt_marks_a_picture_without_a_sure_digit() -> None:
    sure, unsure = reading(0.99), reading(0.4)
    assert not readings_lib.is_doubtful([sure])
    assert not readings_lib.is_doubtful([sure, unsure])
    assert readings_lib.is_doubtful([unsure, unsure])
    assert json.loads(readings_lib.as_json("a", [unsure], DIGITS))["doubtful"] is True
    assert "7?" in readings_lib.as_table("a", [unsure], 4, DIGITS)
    assert "doubtful: may not be a digit" in readings_lib.as_table("a", [unsure], 4, DIGITS)
    assert "?" not in readings_lib.as_table("a", [sure], 4, DIGITS)
    assert "doubtful" not in readings_lib.as_table("a", [sure, unsure], 4, DIGITS)


def test_letters_are_printed_by_name() -> None:
    letters = tuple("ABCDEFGHIJ")
    (digit,) = json.loads(readings_lib.as_json("a", [reading(0.99)], letters))["digits"]
    assert (digit["digit"], digit["label"]) == (7, "H")
    assert re.search(r"H +99.0%  H  99.0%  B", readings_lib.as_table("a", [reading(0.99)], 4, letters))


def digit(value: int, suspect: bool = False) -> segment.Digit:
    return segment.Digit(np.full((28, 28), value, np.uint8), (0, 0, 9, 9), suspect)


def answer(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predicts the brightness as the class; from 10 on, all classes are equally probable and the answer is doubtful."""
    logits = 20.0 * (np.arange(10) == images[:, :1, 0, 0]).astype(np.float32)
    return log_probabilities(logits), images[:, 0, 0, 0] >= 10


def test_doubt_follows_the_probability_and_the_shape() -> None:
    found = readings_lib.classify([digit(3), digit(30), digit(4, suspect=True)], answer)
    assert [r.doubtful for r in found] == [False, True, True]
    assert [r.digit for r in found] == [3, 0, 4]
    assert found[1].probability == pytest.approx(0.1)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_span_pictures_and_keep_their_order(batch_size: int) -> None:
    wrong = PictureError("is blank")
    pictures: list[tuple[str, Any]] = [
        ("a", [digit(1), digit(2)]),
        ("b", wrong),
        ("c", [digit(3)]),
        ("d", [digit(4), digit(5), digit(6)]),
    ]
    found = dict(readings_lib.classify_all(pictures, answer, batch_size))
    assert list(found) == ["a", "b", "c", "d"]
    assert found.pop("b") is wrong
    assert {name: [r.digit for r in answer] for name, answer in found.items() if isinstance(answer, list)} == {
        "a": [1, 2], "c": [3], "d": [4, 5, 6],
    }  # fmt: skip


def test_pool_agrees_with_one_process_and_survives_bad_pictures(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    names = [str(folder / "3.png"), str(tmp_path / "text.png"), "gone.png", str(folder / "7.JPG")] * 3
    alone = [parallel.read_one(name, read_digits) for name in names]
    with parallel.read_ahead(names, read_digits, 2) as outcomes:
        found = list(outcomes)
    for (name, outcome), wanted, given in zip(found, alone, names, strict=True):
        assert name == given
        if isinstance(wanted, list):
            assert isinstance(outcome, list)
            np.testing.assert_array_equal(outcome[0].image, wanted[0].image)
        else:
            assert str(outcome) == str(wanted)


def test_an_error_ends_the_processes_of_the_pool(folder: pathlib.Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        parallel.read_ahead([str(folder / "3.png")] * 20, read_digits, 1) as outcomes,
    ):
        next(outcomes)
        assert multiprocessing.active_children()
        1 / 0  # noqa: B018
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "locale",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "ASCII"],
)
def test_names_of_any_script_are_printed_in_any_locale(
    model: Model, tmp_path: pathlib.Path, locale: dict[str, str]
) -> None:
    model.picture(3).save(tmp_path / "\u4e09.png")
    model.picture(3).save(tmp_path / "\udcff.png")
    done = subprocess.run(
        [sys.executable, "-m", "mnist_flax.predict", f"--workdir={model.workdir}", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **locale}, capture_output=True, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0


def test_find_files_expands_folders_and_patterns(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pictures = [str(folder / name) for name in ("3.png", "7.JPG", "below/1.gif")]
    assert list(files.find_files([str(folder)])) == pictures
    assert list(files.find_files([str(folder / "*")])) == [
        pictures[0],
        pictures[1],
        pictures[2],
        str(folder / "notes.txt"),
    ]
    assert list(files.find_files([str(folder / "**" / "*.gif")])) == pictures[2:]
    for pattern in ("**", "**/*"):  # also matches the folders that hold the pictures
        found = list(files.find_files([str(folder / pattern)]))
        assert sorted(name for name in found if not name.endswith(".txt")) == pictures
    assert list(files.find_files(["-", "gone.png", str(tmp_path)])) == ["-", "gone.png", str(tmp_path)]
    assert list(files.find_files([str(tmp_path / "*"), str(tmp_path.parent / f"{tmp_path.name}*")])) == [
        str(tmp_path / "*"),
        str(tmp_path),
    ]
    odd = tmp_path / "scan[1].png"  # a name that looks like a pattern
    odd.touch()
    assert list(files.find_files([str(odd)])) == [str(odd)]
