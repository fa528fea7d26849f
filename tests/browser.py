"""A headless Chromium for tests of pages; without Chromium these tests are skipped."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

Point = tuple[float, float]

# Points of a stroke on the pad, as fractions of its side.
SEVEN: tuple[Point, ...] = ((0.25, 0.22), (0.5, 0.21), (0.76, 0.22), (0.6, 0.52), (0.46, 0.82))


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Starts Chromium, or skips the test and says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(chromium: Any, path: pathlib.Path, *, width: int = 1280, **options: Any) -> Iterator[Any]:
    """Opens a demo page, waits for its first answer, and checks at the end that it loaded and logged nothing else."""
    context = chromium.new_context(viewport={"width": width, "height": 844}, **options)
    page = context.new_page()
    requests: list[str] = []
    messages: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("[data-ready]")
    yield page
    assert requests == [path.as_uri()]
    assert messages == []
    context.close()


def settle(page: Any) -> None:
    """Waits for two frames, so that all changes are drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def draw_by_mouse(page: Any, points: Sequence[Point]) -> None:
    """Draws one stroke on the pad."""
    places = _on_screen(page, points)
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()
    settle(page)


def draw_by_touch(page: Any, points: Sequence[Point]) -> None:
    """Draws one stroke on the pad with a finger."""
    session = page.context.new_cdp_session(page)
    places = [{"x": x, "y": y} for x, y in _on_screen(page, points)]
    for kind, touches in [("Start", places[:1]), *(("Move", [place]) for place in places[1:]), ("End", [])]:
        session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touches})
    settle(page)


def _on_screen(page: Any, points: Sequence[Point]) -> list[Point]:
    box = page.locator("#pad").bounding_box()
    return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
