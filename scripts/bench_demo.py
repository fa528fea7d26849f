"""Measures a demo page in Chromium: its speed, and whether it reads redrawn test digits as well as `predict` does.

    python scripts/bench_demo.py --workdir=runs/default

Requires the playwright package and Chromium. `first_answer_ms` is the time from opening the file to the first
prediction (median over fresh pages). `update_ms` is the time per pen movement (median): rasterising, framing, running
every checkpoint, and painting the feature maps visible in a window 900 pixels high. `update_cpu_ms` is the mean CPU
time per pen movement, which depends less on other work on the machine; `update_all_maps_ms` and
`update_all_maps_cpu_ms` are the same with all maps visible. `forward_ms` is one forward pass. The redrawn digits are
the skeletons of test images, drawn as strokes on the page: `page_accuracy` is the accuracy of the page,
`predict_accuracy` that of `mnist_flax.predict` on the same drawings saved as pictures. Prints one JSON line.
"""

import base64
import json
import pathlib
import shutil
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from mnist_flax import cli

ENLARGED = 10  # drawing-pad pixels per test-image pixel

Stroke = list[list[float]]


def strokes_of(image: np.ndarray) -> list[Stroke]:
    """Traces the skeleton of a digit as pen strokes: `u8[28,28]` -> points (x, y) on the pad, from 0 to 280."""
    from PIL import Image
    from skimage.morphology import skeletonize

    side = ENLARGED * len(image)
    large = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
    left = {(int(y), int(x)) for y, x in np.argwhere(skeletonize(large > 100))}
    skeleton = frozenset(left)
    strokes = []
    while left:
        ends = [place for place in left if len(_neighbours(place, left)) == 1]
        path = [min(ends or left)]
        left.remove(path[0])
        while found := _neighbours(path[-1], left):
            path.append(min(found, key=lambda place: _turn(path, place)))
            left.remove(path[-1])
        if joint := [place for place in _neighbours(path[0], skeleton) if place not in path[:3]]:
            path.insert(0, joint[0])  # a branch starts on the stroke it branches off
        if joint := [place for place in _neighbours(path[-1], skeleton) if place not in path[-3:]]:
            path.append(joint[0])  # a loop ends where it began
        strokes.append([[x + 0.5, y + 0.5] for y, x in [*path[:-1:3], path[-1]]])
    longest = max(map(len, strokes), default=0)
    return [stroke for stroke in strokes if len(stroke) > 2 or longest <= 2]


def _neighbours(place: tuple[int, int], places: Any) -> list[tuple[int, int]]:
    y, x = place
    around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    return [other for other in around if other in places]


def _turn(path: Sequence[tuple[int, int]], place: tuple[int, int]) -> float:
    """Returns the distance between a pixel and the straight continuation of the path."""
    (y, x), (old_y, old_x) = path[-1], path[max(0, len(path) - 4)]
    length = max(1.0, float(np.hypot(y - old_y, x - old_x)))
    return float(np.hypot(place[0] - y - (y - old_y) / length, place[1] - x - (x - old_x) / length))


def redrawn(page: Any, workdir: pathlib.Path, count: int) -> dict[str, Any]:
    """Compares the page with `predict` on redrawn test images, which are evenly spaced in the test set."""
    from mnist_flax.analysis.evaluation import load_predictor, predict_logits
    from mnist_flax.analysis.run_data import load_data
    from mnist_flax.pictures.segment import read_digits

    predictor, info = load_predictor(workdir)
    _, splits = load_data(info.config, info.fingerprint, {})
    rows = np.linspace(0, len(splits.test.label) - 1, count).astype(int)
    labels, images = splits.test.label[rows], splits.test.image[rows]
    answers, frames, is_found, differences = [], [], [], []
    for image in images[..., 0]:
        answer, pixels, picture = page.evaluate(
            """(strokes) => {
              app.pad.set(strokes);
              app.refresh();
              const answer = app.data.classes.indexOf($("#digit").textContent);
              return [answer, Array.from(app.pixels), app.pad.rasterContext.canvas.toDataURL()];
            }""",
            strokes_of(image),
        )
        digits = read_digits(base64.b64decode(picture.partition(",")[2]))
        answers.append(answer)
        is_found.append(len(digits) == 1)
        frames.append(digits[0].image if len(digits) == 1 else np.zeros((28, 28), np.uint8))
        differences.append(np.abs(frames[-1].ravel() - np.array(pixels, float)).mean())
    predicted = np.where(is_found, predict_logits(predictor, np.stack(frames)[..., None]).argmax(axis=-1), -1)
    original = predict_logits(predictor, images).argmax(axis=-1)
    return {
        "redrawn": count,
        "page_accuracy": round(float(np.mean(answers == labels)), 4),
        "predict_accuracy": round(float(np.mean(predicted == labels)), 4),
        "original_accuracy": round(float(np.mean(original == labels)), 4),
        "agree": round(float(np.mean(answers == predicted)), 4),
        "grey_difference_median": round(float(np.median(differences)), 2),
    }


def speeds(chromium: Any, address: str, pages: int, updates: int) -> dict[str, Any]:
    """Times the first prediction of fresh pages, and the updates along a stroke."""
    first = []
    for _ in range(pages):
        context = chromium.new_context()
        page = context.new_page()
        page.add_init_script(
            """new MutationObserver(() => window.answered ??= performance.now())
                 .observe(document, { attributes: true, attributeFilter: ["data-ready"], subtree: true })"""
        )
        page.goto(address)
        page.wait_for_selector("[data-ready]")
        first.append(page.evaluate("window.answered"))
        context.close()
    visible = _update_times(chromium, address, updates, height=900)
    whole = _update_times(chromium, address, updates, height=3000)
    return {
        "first_answer_ms": round(statistics.median(first), 1),
        "update_ms": visible["wall"],
        "update_cpu_ms": visible["cpu"],
        "update_all_maps_ms": whole["wall"],
        "update_all_maps_cpu_ms": whole["cpu"],
        "forward_ms": visible["forward"],
    }


def _update_times(chromium: Any, address: str, updates: int, height: int) -> dict[str, float]:
    """Returns the milliseconds of an update after a pen movement, and of one forward pass."""
    page = chromium.new_page(viewport={"width": 1280, "height": height})
    page.goto(address)
    page.wait_for_selector("[data-ready]")
    page.wait_for_timeout(500)
    page.evaluate(
        """() => {
          window.times = (count, f) => Array.from({ length: count }, (_, i) => {
            const start = performance.now();
            f(i);
            return performance.now() - start;
          });
          window.move = (count) => (i) => {
            const share = i / count;
            const [x, y] = share < 0.5 ? [60 + 300 * share, 60] : [290 - 160 * share, 320 * share - 100];
            app.pad.strokes[0].push([x, y]);
            app.refresh();
          };
        }"""
    )
    # While a pointer is set, as during a stroke, the page has no transitions.
    draw = "(count) => { app.pad.set([[[60, 60]]]); app.pad.pointer = 0; return times(count, move(count)); }"
    page.evaluate(draw, updates)  # the first updates compile the code
    started = _cpu_seconds(chromium)
    update = page.evaluate(draw, updates)
    cpu = (_cpu_seconds(chromium) - started) / updates
    forward = page.evaluate("(count) => times(count, () => app.network().run(app.pixels))", updates)
    page.close()
    medians = {"wall": statistics.median(update), "cpu": 1000 * cpu, "forward": statistics.median(forward)}
    return {name: round(value, 2) for name, value in medians.items()}


def _cpu_seconds(chromium: Any) -> float:
    """Returns the CPU time that all open pages have used, in seconds."""
    processes = chromium.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return float(sum(process["cpuTime"] for process in processes if process["type"] == "renderer"))


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints the result."""
    del argv
    from playwright.sync_api import sync_playwright

    from mnist_flax.exporting.demo import write_demo
    from mnist_flax.run.provenance import provenance

    values = flags.FLAGS
    workdir = pathlib.Path(values.workdir)
    path = write_demo(workdir).absolute()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        print("speed ...", file=sys.stderr)
        result = {"bytes": path.stat().st_size, **speeds(chromium, path.as_uri(), values.pages, values.updates)}
        page = chromium.new_page()
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready]")
        result["checkpoints"] = page.evaluate("app.data.checkpoints.length")
        print("redrawn digits ...", file=sys.stderr)
        result |= redrawn(page, workdir, values.digits)
        result["browser"] = chromium.version
        chromium.close()
    print(json.dumps({**result, **provenance()}))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the folder of a trained run", required=True)
    flags.DEFINE_integer("digits", 500, "test images that are redrawn", lower_bound=1)
    flags.DEFINE_integer("pages", 15, "pages that are opened anew", lower_bound=1)
    flags.DEFINE_integer("updates", 200, "movements of the pen", lower_bound=1)
    cli.run(main)
