"""The demo page in a browser: drawing, stepping through the layers and inspecting values, as a user would."""

import base64
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import forked
import numpy as np
import pytest
import tiny_run
from browser import SEVEN, browser, draw_by_mouse, draw_by_touch, opened, settle

from mnist_flax.analysis.evaluation import load_predictor, predict_logits
from mnist_flax.config import replace
from mnist_flax.data.load import load_splits
from mnist_flax.exporting.demo import choose_examples, earlier_checkpoint, write_demo
from mnist_flax.exporting.inference import graph_of
from mnist_flax.exporting.textbook import textbook_order
from mnist_flax.run.checkpoint import steps_in
from mnist_flax.sections import DataConfig
from mnist_flax.train import fit

MINUS = "\N{MINUS SIGN}"
WIDTHS = (8, 12)
CONFIG = replace(tiny_run.CONFIG, train__epochs=12, model__widths=WIDTHS, checkpoint__every_epochs=6)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run with two checkpoints and a demo page, trained long enough to read a drawn digit."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    fit(CONFIG, folder)
    write_demo(folder)
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


@pytest.fixture
def page(workdir: pathlib.Path, chromium: Any) -> Iterator[Any]:
    """The page, just opened."""
    with opened(chromium, workdir / "demo.html") as page:
        yield page


def answer(page: Any) -> str:
    return str(page.inner_text("#digit"))


def probabilities_in_jax(workdir: pathlib.Path, page: Any) -> np.ndarray:
    """The run's probabilities for the 28x28 pixels that the page feeds to its network."""
    pixels = np.array(page.evaluate("Array.from(app.pixels)"), np.uint8).reshape(1, 28, 28, 1)
    logits = predict_logits(load_predictor(workdir)[0], pixels)[0]
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


@pytest.mark.parametrize(
    ("draw", "width", "scheme"),
    [(draw_by_mouse, 1280, "light"), (draw_by_mouse, 390, "dark"), (draw_by_touch, 390, "light")],
)
def test_demo_reads_a_drawn_seven(
    draw: Callable[..., None], width: int, scheme: str, workdir: pathlib.Path, chromium: Any
) -> None:
    options = {"width": width, "color_scheme": scheme, "has_touch": draw is draw_by_touch}
    with opened(chromium, workdir / "demo.html", **options) as page:
        draw(page, SEVEN)
        assert answer(page) == "7"
        assert page.inner_text("#live").startswith("7, ") or page.inner_text("#live").startswith("A guess: 7, ")
        found = page.evaluate("Array.from(app.network().values.get(app.network().outputs.probabilities).data)")
        np.testing.assert_allclose(found, probabilities_in_jax(workdir, page), atol=1e-5)
        assert page.evaluate("document.documentElement.scrollWidth") == width  # the page does not scroll sideways
        answer_end = page.locator("#bars").bounding_box()
        assert answer_end["y"] + answer_end["height"] < 844  # the answer is visible while drawing


def test_demo_undoes_and_clears_strokes(page: Any) -> None:
    draw_by_mouse(page, [(0.5, 0.2), (0.5, 0.8)])
    one = page.evaluate("Array.from(app.pixels)")
    draw_by_mouse(page, [(0.2, 0.5), (0.8, 0.5)])
    assert page.evaluate("Array.from(app.pixels)") != one
    page.click("#undo")
    settle(page)
    assert page.evaluate("Array.from(app.pixels)") == one
    page.keyboard.press("c")
    settle(page)
    assert not any(page.evaluate("Array.from(app.pixels)"))
    assert page.is_visible("#hint")
    assert page.is_disabled("#undo")
    assert page.inner_text("#live") == "The pad is empty."


@pytest.mark.parametrize(("key", "left"), [("u", 1), ("c", 0), ("Escape", 0)])
def test_demo_stops_a_stroke_that_is_undone_or_cleared(key: str, left: int, page: Any) -> None:
    draw_by_mouse(page, [(0.5, 0.2), (0.5, 0.8)])
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] + 20)
    page.keyboard.press(key)
    remaining = page.evaluate("JSON.stringify(app.pad.strokes)")
    assert len(json.loads(remaining)) == left
    page.mouse.move(box["x"] + 90, box["y"] + 90)
    page.mouse.up()
    assert page.evaluate("JSON.stringify(app.pad.strokes)") == remaining
    draw_by_mouse(page, [(0.2, 0.5), (0.8, 0.5)])
    assert page.evaluate("app.pad.strokes.length") == left + 1


def test_demo_keys_work_after_a_checkpoint_is_chosen(page: Any) -> None:
    draw_by_mouse(page, [(0.5, 0.2), (0.5, 0.8)])
    page.locator("#checkpoints label").nth(1).click()
    page.keyboard.press("c")
    assert page.evaluate("app.pad.isEmpty")
    draw_by_mouse(page, [(0.5, 0.2), (0.5, 0.8)])
    assert not page.evaluate("document.activeElement.matches(':focus-visible')")  # no outline while drawing
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[app.example, app.chosen]") == [0, 1]
    page.locator("#checkpoints input").nth(1).focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("[app.example, app.chosen]") == [0, 0]


def test_demo_steps_through_examples_by_keys(page: Any, workdir: pathlib.Path) -> None:
    kinds = page.evaluate("app.data.examples.map((example) => example.kind)")
    assert {"right", "mistake", "corrupted"} == set(kinds)
    for i, kind in enumerate(kinds):
        label = page.evaluate(f"app.data.classes[app.data.examples[{i}].label]")
        probabilities = probabilities_in_jax(workdir, page)
        assert answer(page) == str(probabilities.argmax())
        if kind != "corrupted":
            assert (answer(page) == label) == (kind == "right")
            assert ("read correctly" in page.inner_text("#caption")) == (kind == "right")
        page.keyboard.press("ArrowRight")
        settle(page)
    assert page.evaluate("app.example") == 0  # the first example follows the last
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.evaluate("app.example") == len(kinds) - 1


def test_demo_explains_the_value_under_the_pointer(page: Any) -> None:
    maps = page.locator("canvas.maps").first
    maps.scroll_into_view_if_needed()
    maps.hover(position={"x": 30, "y": 30})
    settle(page)
    assert page.inner_text("#inspector h3").startswith("Convolution 1: map 1, row ")
    assert page.locator("#inspector .tables table").count() == 3
    kernel = page.locator("#inspector .tables table").nth(1).locator("td").all_inner_texts()
    weights = page.evaluate("Array.from(app.network().values.get('params/Conv_0/kernel').data)")[:: WIDTHS[0]]
    assert [float(text.replace(MINUS, "-")) for text in kernel] == pytest.approx(weights, abs=0.0051)
    lines = page.locator("#inspector .arithmetic tr").all_inner_texts()
    assert lines[0].startswith("sum of 9 products")
    assert "bias" in lines[1]
    assert lines[2].startswith("ReLU")
    assert page.is_visible("#field")


def test_demo_explains_values_by_keys(page: Any) -> None:
    maps = page.locator("canvas.maps").nth(1)
    maps.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    assert page.inner_text("#inspector h3") == "Max pooling: map 2, row 2, column 2"
    assert "Max pooling: map 2, row 2, column 2" in page.inner_text("#live")
    assert page.evaluate("app.example") == 0  # the keys did not step through the examples as well


@pytest.mark.parametrize("width", [1280, 390])
def test_demo_paints_every_value_where_the_pointer_finds_it(width: int, workdir: pathlib.Path, chromium: Any) -> None:
    with opened(chromium, workdir / "demo.html", width=width) as page:
        draw_by_mouse(page, SEVEN)
        stages = page.evaluate(
            """app.maps.map((maps) => {
                 const { stage, canvas, cells, marker, height, width, channels } = maps;
                 const { data } = app.network().values.get(stage.node.name);
                 const most = Math.max(...data.map(Math.abs));
                 app.paint(maps);
                 return [0, 1, channels - 1].flatMap((channel) => [0, height - 1].map((y) => {
                   const place = { y, x: width >> 1, channel };
                   maps.mark(place);
                   const inside = marker.getBoundingClientRect(), box = canvas.getBoundingClientRect();
                   const [x, top] = [inside.x + inside.width / 2, inside.y + inside.height / 2];
                   const share = canvas.width / box.width;
                   const [row, column] = [top - box.y, x - box.x].map((at) => Math.floor(at * share));
                   const wanted = app.theme.scale[level(data[indexOf(stage.node.shape, place)], most)];
                   return [place, maps.placeAt(x, top), wanted, cells[row * canvas.width + column]];
                 }));
               })"""
        )
        assert len(stages) >= 5
        for place, pointed_at, wanted, painted in [value for stage in stages for value in stage]:
            assert pointed_at == place
            assert painted == wanted
        assert len({painted for stage in stages for *_, painted in stage}) > 5


def test_demo_bars_follow_a_stroke_at_once(page: Any) -> None:
    durations = []
    for act in (page.mouse.down, page.mouse.up):
        page.locator("#pad").hover()
        act()
        settle(page)
        durations.append(page.evaluate("getComputedStyle(document.querySelector('.bar')).transitionDuration"))
    assert durations == ["0s", "0.09s"]


def test_demo_shows_the_explanation_below_the_maps_on_a_phone(workdir: pathlib.Path, chromium: Any) -> None:
    with opened(chromium, workdir / "demo.html", width=390, has_touch=True) as page:
        page.locator("canvas.maps").nth(2).tap(position={"x": 60, "y": 20})
        settle(page)
        assert page.locator(".stage").nth(2).locator("#inspector").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_demo_compares_two_checkpoints(page: Any, workdir: pathlib.Path) -> None:
    early, late = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert page.locator("#checkpoints label").all_inner_texts() == [f"step {late:,} (end)", f"step {early:,}"]
    settle(page)  # the first answer does not wait for the other checkpoint
    assert page.inner_text("#legend").startswith(f"Thin bars: step {early:,}, which reads ")
    draw_by_mouse(page, SEVEN)
    page.locator("#checkpoints label").nth(1).click()
    settle(page)
    found = page.evaluate("Array.from(app.network().values.get(app.network().outputs.logits).data)")
    pixels = np.array(page.evaluate("Array.from(app.pixels)"), np.uint8).reshape(1, 28, 28, 1)
    wanted = predict_logits(load_predictor(workdir, str(early))[0], pixels)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_demo_doubts_by_the_threshold_of_the_chosen_checkpoint(page: Any) -> None:
    page.evaluate("app.data.checkpoints.forEach((checkpoint, i) => (checkpoint.doubtful_below = 2 * i))")
    doubts = []
    for label in page.locator("#checkpoints label").all():
        label.click()
        settle(page)
        doubts.append(page.inner_text("#confidence").startswith("a guess"))
    assert doubts == [False, True]


def test_training_writes_a_page_that_compares_the_first_checkpoint_with_the_last(tmp_path: pathlib.Path) -> None:
    config = replace(tiny_run.CONFIG, train__demo=True, checkpoint__keep_latest=3, eval__views=5)
    fit(config, tmp_path / "run")
    page = (tmp_path / "run" / "demo.html").read_text()
    assert "averages 5 shifted views of the image" in page
    assert f"The probabilities of step {config.num_steps} (end) are calibrated on images held out" in page
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    steps = [config.num_steps, config.steps_per_epoch]
    assert [entry["title"] for entry in data["checkpoints"]] == [f"step {steps[0]} (end)", f"step {steps[1]}"]
    early, late = (load_predictor(tmp_path / "run", str(step))[0] for step in reversed(steps))
    for entry, predictor in zip(data["checkpoints"], (late, early), strict=True):
        assert base64.b64decode(entry["weights"]) == textbook_order(graph_of(predictor)).weights()
        assert entry["doubtful_below"] == predictor.doubtful_below
    assert late.doubtful_below != early.doubtful_below


def test_a_damaged_checkpoint_is_not_compared(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "run"))
    first = min(copy.joinpath("checkpoints").iterdir(), key=lambda path: int(path.name))
    assert len(earlier_checkpoint(copy, CONFIG.num_steps)) == 1
    for file in filter(pathlib.Path.is_file, first.rglob("*")):
        file.write_bytes(b"")
    assert earlier_checkpoint(copy, CONFIG.num_steps) == []


def test_demo_labels_everything_that_can_be_focused(page: Any) -> None:
    names = page.evaluate(
        """Array.from(document.querySelectorAll("button, input, canvas[tabindex]"), (element) =>
             element.getAttribute("aria-label") || element.labels?.[0]?.innerText || element.innerText)"""
    )
    assert len(names) > 30
    assert all(names)


def test_demo_has_no_transitions_with_reduced_motion(workdir: pathlib.Path, chromium: Any) -> None:
    for motion, duration in (("no-preference", "0.09s"), ("reduce", "0s")):
        with opened(chromium, workdir / "demo.html", reduced_motion=motion) as page:
            assert page.evaluate("getComputedStyle(document.querySelector('.bar')).transitionDuration") == duration


def test_demo_shows_a_digit_of_every_class_that_is_ever_right() -> None:
    """Even if the class is right only in rows that the report's gallery does not show."""
    splits = load_splits(DataConfig(name="digits"))
    labels = splits.test.label
    probs = np.eye(10, dtype=np.float32)[np.where(labels == 9, 0, labels)] * 0.9 + 0.01
    probs[np.flatnonzero(labels == 9)[-1]] = np.eye(10)[9]
    shown = [example["label"] for example in choose_examples(splits, probs) if example["kind"] == "right"]
    assert shown == list(range(10))


def test_demo_verb_writes_where_it_is_told(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = shutil.copytree(workdir, tmp_path / "<b>run")
    done = forked.run("-m", "mnist_flax.demo", f"--workdir={copy}", f"--output={tmp_path / 'page.html'}")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'page.html'}\n"), done.stderr
    assert (tmp_path / "page.html").stat().st_size < 400_000
    assert "<b>run" not in (tmp_path / "page.html").read_text()  # the name is escaped
    done = forked.run("-m", "mnist_flax.demo", f"--workdir={copy}", f"--output={tmp_path / 'new' / 'page.html'}")
    assert (tmp_path / "new" / "page.html").exists(), done.stderr
    done = forked.run("-m", "mnist_flax.demo", f"--workdir={copy}", f"--output={tmp_path}")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --output={tmp_path}: is a folder; name a file, such as {tmp_path / 'demo.html'}\n",
    )


def test_demo_of_another_checkpoint_has_a_file_of_its_own(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = shutil.copytree(workdir, tmp_path / "run")
    before = (copy / "demo.html").read_bytes()
    step = steps_in(copy / "checkpoints")[0]
    assert write_demo(copy, str(step)) == copy / f"demo-{step}.html"
    assert (copy / "demo.html").read_bytes() == before != (copy / f"demo-{step}.html").read_bytes()


def test_demo_without_a_workdir_is_refused() -> None:
    done = forked.run("-m", "mnist_flax.demo")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --workdir is missing: name the folder of a run, such as --workdir=runs/default\n",
    )
