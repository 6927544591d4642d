"""The page in a real browser: Debian's Chromium, or the one that SFRT_CHROMIUM names."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sfrt.server.limits import Limits
from tests.servers import BLUE, Running, runtime_at, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

_ARGUMENTS = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
"""The last two: a camera that shows a green test picture, and a viewer who allows it."""
PIXEL = "([x, y]) => [...document.getElementById('canvas').getContext('2d').getImageData(x, y, 1, 1).data.slice(0, 3)]"
PIXELS = """() => {
  const canvas = document.getElementById('canvas');
  return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data];
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(runtime_at(fps=16), tmp_path_factory.mktemp("recordings"), Limits(sessions=2)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("SFRT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium here; apt-get install chromium, or name one in SFRT_CHROMIUM")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=_ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def open_page(server: Running, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Callable[..., Page]]:
    """Opens the page with a context's options; whatever it complains of fails the test."""
    contexts, complaints = [], []

    def opened(query: str = "", *, url: str = "", before: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        if before:
            page.add_init_script(before)
        page.goto((url or server.url) + query)
        wait_for(page, "document.getElementById('corner').textContent !== ''")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    end = time.monotonic() + 20
    while server.service.viewers:
        assert time.monotonic() < end, "the page was closed and its place is still taken"
        time.sleep(0.05)


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go: SFRT_SCREENSHOTS, else pytest's temporary folder."""
    folder = Path(os.environ.get("SFRT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wait_for(page: Page, expression: str, seconds: float = 30.0) -> None:
    """Until it is true; Playwright's own wait would need a page that may evaluate text."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(50)


def background(page: Page) -> list[int]:
    """A corner of the picture, where no shape goes."""
    found: list[int] = page.evaluate(PIXEL, [1, 1])
    return found


def chunk(page: Page) -> int:
    return int(page.inner_text("#corner").split(" · ")[0])


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("h264", {"color_scheme": "dark"}),
        ("jpeg", {"color_scheme": "light"}),
        (
            "jpeg-phone",
            {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2},
        ),
    ],
)
def test_frames_move_and_a_new_prompt_changes_their_colour(
    open_page: Callable[..., Page], shots: Path, codec: str, options: dict[str, Any]
) -> None:
    page = open_page("?codec=jpeg" if codec.startswith("jpeg") else "", **options)
    assert page.inner_text("#link") == {"h264": "H.264"}.get(codec, "JPEG")
    page.wait_for_timeout(1500)
    assert min(background(page)) > 180  # on white
    first = page.evaluate(PIXELS)
    page.wait_for_timeout(1000)
    moved = page.evaluate(PIXELS)
    assert sum(abs(a - b) > 40 for a, b in zip(first, moved, strict=True)) > 100

    page.fill("#prompt", BLUE)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#receipts li")
    said = page.inner_text("#receipts li")
    assert said.startswith("chunk ") and BLUE in said and "recache" in said
    page.wait_for_timeout(2500)
    assert max(background(page)) < 70  # on black
    seen = page.evaluate(PIXELS)
    assert any(seen[at + 2] > 120 and seen[at] < 100 for at in range(0, len(seen), 4))  # something blue
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=shots / f"serve-{codec}.png", full_page=codec.endswith("phone"))


def test_the_inspector_shows_the_ring_and_the_figures(open_page: Callable[..., Page]) -> None:
    page = open_page()
    wait_for(page, "document.querySelectorAll('#ring .slot.seen').length === 6")
    assert page.locator("#ring .slot.written").count() == 3
    assert page.locator("#steps .removed").count() == 4
    assert page.locator("#latency .denoise").count() >= 3
    assert page.inner_text("#attained").endswith("%")
    assert "MiB" in page.inner_text("#memory") or "GiB" in page.inner_text("#memory")


def test_it_can_be_used_by_keyboard_alone(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.keyboard.press("Space")
    page.wait_for_selector("body[data-playing=paused]")
    page.wait_for_timeout(200)
    held = page.evaluate(PIXELS)
    page.wait_for_timeout(700)
    assert page.evaluate(PIXELS) == held
    page.keyboard.press("Space")
    page.wait_for_selector("body[data-playing=playing]")
    wait_for(page, "document.getElementById('corner').textContent.split(' · ')[0] >= 3")
    before = chunk(page)
    page.keyboard.press("ArrowLeft")
    wait_for(page, f"document.getElementById('corner').textContent.split(' · ')[0] < {before}")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type(BLUE)
    page.keyboard.press("Enter")
    page.wait_for_selector("#receipts li")
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") in ("dark", "light")
    seed = page.input_value("#seed")
    page.keyboard.press("n")
    wait_for(page, f"document.getElementById('seed').value !== '{seed}'")


def test_a_recording_is_offered_for_download(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    page.click("#record")
    page.wait_for_selector("#tape", state="visible")
    page.wait_for_timeout(2000)
    with page.expect_download() as download:
        page.click("#record")
        page.click("#receipts a")
    path = tmp_path / "recorded.mp4"
    download.value.save_as(path)
    import av

    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 12


def test_a_viewer_that_is_sent_away_can_come_back(open_page: Callable[..., Page], tmp_path: Path) -> None:
    with serving(runtime_at(fps=16), tmp_path, Limits(idle_s=4.0, rewind_chunks=2)) as other:
        other.service.engine.measure(history=other.service.limits.history)  # as `serve` does: it takes its time
        page = open_page(url=other.url)
        page.wait_for_selector("#notice button")
        assert "nothing was asked for in 4 s" in page.inner_text("#notice")
        page.click("#notice button")
        page.wait_for_selector("body[data-playing=playing]")
        page.context.close()


def green(page: Page) -> bool:
    """Whether a corner is the green of Chromium's own camera picture, or of the clip."""
    red, green, blue = background(page)
    return green > 1.4 * red and green > 1.4 * blue


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("camera", {"color_scheme": "light"}),
        (
            "camera-phone",
            {
                "color_scheme": "dark",
                "viewport": {"width": 390, "height": 844},
                "is_mobile": True,
                "has_touch": True,
                "device_scale_factor": 2,
            },
        ),
    ],
)
def test_a_stream_goes_by_the_camera_and_leaves_it(
    open_page: Callable[..., Page], shots: Path, name: str, options: dict[str, Any]
) -> None:
    page = open_page(**options)
    assert not green(page)
    page.fill("#prompt", "a yellow circle moving left on a green background")
    page.click("#camera")
    page.wait_for_selector("#self", state="visible")
    wait_for(page, "document.getElementById('corner').textContent.split(' · ')[0] >= 2", 60)
    assert green(page)
    assert page.is_visible("#strength") and page.is_disabled("#back") and page.is_disabled("#keep")
    first = page.evaluate(PIXELS)
    page.wait_for_timeout(1000)
    assert page.evaluate(PIXELS) != first
    page.screenshot(path=shots / f"serve-{name}.png", full_page="phone" in name)
    page.fill("#strength", "0.3")
    wait_for(page, "document.querySelectorAll('#steps .removed').length <= 2")
    page.click("#words")
    page.wait_for_selector("#self", state="hidden")
    wait_for(page, "document.getElementById('corner').textContent !== ''")
    assert page.is_enabled("#back")


def test_a_stream_goes_by_a_clip_and_says_when_it_has_ended(open_page: Callable[..., Page], tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=40)
    page = open_page()
    page.fill("#prompt", "a red square moving right on a green background")
    page.set_input_files("#clip", path)
    wait_for(page, "document.getElementById('clip-label').dataset.on === 'true'")
    page.wait_for_selector("#notice button", timeout=60_000)
    assert "The clip has ended" in page.inner_text("#notice")
    assert green(page)
    page.click("#notice button")
    page.wait_for_selector("body[data-playing=playing]")


def test_where_browsers_keep_the_camera_a_clip_can_be_filmed(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page(before="Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    assert page.is_hidden("#camera")
    assert "https" in str(page.get_attribute("#film-label", "title"))
    assert page.get_attribute("#film", "capture") == "environment"
    page.set_input_files("#film", write_clip(tmp_path / "filmed.mp4", frames=60))
    wait_for(page, "document.getElementById('clip-label').dataset.on === 'true'")
    wait_for(page, "document.querySelectorAll('#steps .removed').length < 8", 60)


def test_the_steps_are_previewed_while_they_can_be_seen(open_page: Callable[..., Page], shots: Path) -> None:
    page = open_page()
    wait_for(page, "document.querySelectorAll('#previews canvas').length === 4")
    page.locator("#steps-panel").screenshot(path=shots / "serve-steps.png")
    page.context.close()
    phone = open_page(viewport={"width": 390, "height": 600}, is_mobile=True)
    phone.wait_for_timeout(1500)
    assert phone.locator("#previews canvas").count() == 0
    phone.locator("#steps-panel").scroll_into_view_if_needed()
    wait_for(phone, "document.querySelectorAll('#previews canvas').length === 4")


def test_a_moment_is_kept_and_come_back_to(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.keyboard.press("k")
    page.wait_for_selector("#kept button")
    kept = int(page.inner_text("#kept b").removeprefix("chunk "))
    page.fill("#prompt", BLUE)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#receipts li")
    page.click("#kept button")
    wait_for(page, f"document.getElementById('prompt').value !== {BLUE!r}")
    wait_for(page, f"document.getElementById('corner').textContent.startsWith('{kept} ')")
    page.wait_for_timeout(500)
    assert min(background(page)) > 180  # on white again


def write_clip(path: Path, frames: int) -> Path:
    """Green, and what moves in it."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(frames):
            array = np.full((64, 96, 3), (20, 160, 60), np.uint8)
            array[20:40, number : number + 20] = (230, 60, 20)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    return path
