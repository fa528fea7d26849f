"""The verb `python -m mnist_flax.predict`: what it reads, prints and returns."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mnist_flax import config as config_lib
from mnist_flax import predict, train
from mnist_flax.config import Config
from mnist_flax.data.embedded import embedded_digits
from mnist_flax.pictures.segment import PictureError, read_digits

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Model:
    """A small network trained on the embedded digits, and pictures it reads rightly."""

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
        """Runs the verb: exit status, standard output, standard error."""
        done = subprocess.run(
            [sys.executable, "-m", "mnist_flax.predict", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=cwd,
            input=stdin,
            capture_output=True,
            check=False,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def read(self, *names: str, **options: Any) -> tuple[int, list[dict[str, Any]]]:
        """Runs it with --json: exit status and objects."""
        status, out, err = self.run(f"--workdir={self.workdir}", "--json", *names, **options)
        assert "Traceback" not in err
        return status, [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Pictures 3.png, 7.jpg, below/1.gif, and what is not to be read: a text and a hidden file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    model.picture(3).save(folder / "3.png")
    model.picture(7).convert("RGB").save(folder / "7.JPG", "JPEG")
    model.picture(1).save(folder / "below" / "1.gif")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def test_json(model: Model, folder: pathlib.Path) -> None:
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


def test_good_and_bad_together(model: Model, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The others go on, in the order they were named, and the status is 1."""
    (tmp_path / "truncated.png").write_bytes((folder / "3.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "nothing").mkdir()
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    bad = {
        "missing.png": "does not exist", "truncated.png": "damaged", "text.png": "no picture", "empty.png": "is empty",
        "nothing": "folder without pictures", "blank.png": "is blank", "bomb.png": "pixels", "*.bmp": "matches no file",
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


def test_table_folder_and_saved_images(model: Model, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
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


def test_pattern_stdin_and_checkpoint(model: Model, folder: pathlib.Path) -> None:
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
    ],
)
def test_mistakes_of_the_user(model: Model, folder: pathlib.Path, arguments: list[str], message: str) -> None:
    replaced = [
        argument.replace("WORKDIR", str(model.workdir)).replace("PICTURE", str(folder / "3.png"))
        for argument in arguments
    ]
    status, _, err = model.run(*replaced)
    assert status == 2
    assert "Traceback" not in err
    assert re.search(f"error: .*{message}", err), err


def test_help_is_quick() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "mnist_flax.predict", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--save_preprocessed" in done.stdout
    assert time.monotonic() - started < 10  # under one second on an idle machine; importing JAX there would show


# Without a process of its own -----------------------------------------------------------------------------------------


def reading(probability: float) -> predict.Reading:
    top = [(7, probability), (1, 0.01), (2, 0.005)]
    image = np.zeros((28, 28), np.uint8)
    return predict.Reading(7, probability, top, (0, 0, 9, 9), probability < predict.CONFIDENT, image)


def test_doubtful() -> None:
    sure, unsure = reading(0.99), reading(0.4)
    assert not predict.is_doubtful([sure])
    assert not predict.is_doubtful([sure, unsure])
    assert predict.is_doubtful([unsure, unsure])
    assert json.loads(predict.as_json("a", [unsure]))["doubtful"] is True
    assert "7?" in predict.as_table("a", [unsure], 4)
    assert "doubtful: perhaps no digit" in predict.as_table("a", [unsure], 4)
    assert "?" not in predict.as_table("a", [sure], 4)
    assert "doubtful" not in predict.as_table("a", [sure, unsure], 4)


def test_doubt_follows_the_probability(model: Model) -> None:
    """Whatever the network is sure of is called a digit, and nothing else."""
    from mnist_flax.run.checkpoint import load_run
    from mnist_flax.step import eval_variables

    run = load_run(model.workdir)
    variables = eval_variables(run.state)
    buffer = io.BytesIO()
    model.picture(0).save(buffer, "PNG")
    (sure,) = predict.read_picture(run.config, variables, buffer.getvalue())
    assert (sure.digit, sure.doubtful) == (0, False)
    # The same picture shown to a network that knows nothing: all classes are equally likely.
    import jax

    (unsure,) = predict.read_picture(run.config, jax.tree.map(np.zeros_like, variables), buffer.getvalue())
    assert unsure.doubtful
    assert unsure.probability == pytest.approx(0.1)


def test_softmax() -> None:
    probs = predict.softmax(np.array([[0.0, np.log(3.0)], [1000.0, 0.0]], np.float32))
    np.testing.assert_allclose(probs, [[0.25, 0.75], [1.0, 0.0]], rtol=1e-6)


def test_find_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pictures = [str(folder / name) for name in ("3.png", "7.JPG", "below/1.gif")]
    assert list(predict.find_files([str(folder)])) == pictures
    assert list(predict.find_files([str(folder / "*")])) == [
        pictures[0],
        pictures[1],
        pictures[2],
        str(folder / "notes.txt"),
    ]
    assert list(predict.find_files([str(folder / "**" / "*.gif")])) == pictures[2:]
    assert list(predict.find_files(["-", "gone.png", str(tmp_path)])) == ["-", "gone.png", str(tmp_path)]
    odd = tmp_path / "scan[1].png"  # a name that looks like a pattern
    odd.touch()
    assert list(predict.find_files([str(odd)])) == [str(odd)]


def test_unreadable_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PictureError, match=r"cannot be read"):
        predict.read_file(str(tmp_path / ("a" * 300)))
    with pytest.raises(PictureError, match=r"cannot be read"):
        predict.read_file("a\0b")
