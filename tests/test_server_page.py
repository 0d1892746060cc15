"""The example server's page, in Chromium: what it shows, where the focus is, long texts, seeds, and the work of a picture."""

import asyncio
import importlib.util
import json
import re
import shutil
import threading

import pytest

if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "playwright")):
    pytest.skip("the server's packages are not installed (pip install kvcache[server,test])", allow_module_level=True)

import httpx
from playwright.sync_api import sync_playwright
from support.serving import TEXT, body, engine_of, server, server_load, serving
from support.waiting import until

from kvcache_chatterbox import SpeechScheduler

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.one_release,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]


class OneByOne:
    """An app whose audio leaves a piece at a time, each when the test lets it; then all that is left."""

    def __init__(self, app):
        self.app = app
        self.allowed = threading.Semaphore(0)
        self.all = False

    async def __call__(self, scope, receive, send):
        async def held(message):
            if message.get("body") and scope["path"] == "/v1/audio/speech" and not self.all:
                await asyncio.to_thread(self.allowed.acquire)
            await send(message)

        await self.app(scope, receive, held)


@pytest.fixture(scope="module")
def shown():
    """The URL of a server, the app before it that holds audio back, and a browser."""
    engine = engine_of(server_load.tiny())
    app = server.create_app(SpeechScheduler(engine), engine.voices, model="tiny", note=server.TONES)
    held = OneByOne(app)
    with serving(held, app.state.gate) as url, sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield url, held, browser
        held.all = True
        held.allowed.release(1000)
        browser.close()


@pytest.fixture
def page(shown):
    """The page, ready. What it is told in the console, a breach of its security policy too, fails the test."""
    url, held, browser = shown
    held.all = False
    page = browser.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(url)
    page.wait_for_selector("#voice option >> nth=2", state="attached")
    yield page
    page.close()
    assert wrong == []


def waits_for(page, expression):
    """Until this is true in the page; its own way to wait needs what the security policy forbids."""
    until(lambda: page.evaluate(expression), 60)


def status(page, wanted):
    waits_for(page, f"at('status').textContent === '{wanted}'")


def focused(page):
    return page.evaluate("document.activeElement.id")


def test_the_page_shows_chunks_as_they_come(shown, page, tmp_path):
    url, held, _ = shown
    assert page.inner_text("#note") == server.TONES
    page.select_option("#voice", "finn")
    page.fill("#seed", "1")
    page.fill("#text", " ".join([TEXT] * 12))
    page.click("#speak")
    for count in (1, 2, 3):
        held.allowed.release()
        waits_for(page, f"at('chunks').rows.length === {count}")
    held.all = True
    held.allowed.release()
    status(page, "done")
    rows = [row.split("\t") for row in page.inner_text("#chunks").splitlines()]
    assert len(rows) > 3
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    heard = httpx.post(
        f"{url}/v1/audio/speech", json=body(" ".join([TEXT] * 12), voice="finn", response_format="pcm"), timeout=60
    ).content
    assert sum(float(row[1]) for row in rows) == pytest.approx(len(heard) / 48000, abs=0.005 * len(rows))
    assert page.inner_text("#ttfa").endswith("ms") and float(page.inner_text("#rtf")) > 0
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.fill("#text", " . ")
    page.click("#speak")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#status") == "failed"


def test_s9_the_focus_stays_where_it_was(shown, page):
    _, held, _ = shown
    page.fill("#text", " ".join([TEXT] * 3))
    page.focus("#speak")
    page.keyboard.press("Enter")
    held.allowed.release()
    status(page, "speaking")
    assert focused(page) == "speak"
    page.keyboard.press("Enter")  # what cannot be used does nothing
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "stop"
    page.keyboard.press("Enter")
    held.all = True
    held.allowed.release()
    status(page, "stopped")
    assert focused(page) == "stop"
    page.focus("#seed")
    page.keyboard.type("7")
    page.keyboard.press("Enter")  # which speaks, too
    status(page, "done")
    assert focused(page) == "seed"
    assert page.inner_text("#used-seed") == "7"


def test_s9_a_long_text_is_told_and_not_cut(page):
    long = "🎉 word " * 3125  # two units of JavaScript's in each first character
    page.focus("#text")
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(long)  # as a paste does it
    assert page.input_value("#text") == long
    assert len(long) == 21_875 and page.inner_text("#room") == "21,875 of 20,000 characters"
    assert "longer than 20,000 characters" in page.inner_text("#error")
    page.click("#speak")
    assert page.inner_text("#status") == "idle" and page.is_visible("#error")
    page.fill("#text", long[:20_000])
    assert page.inner_text("#room") == "20,000 of 20,000 characters" and not page.is_visible("#error")
    assert page.evaluate("Number(at('text').dataset.longest)") == server.LONGEST_TEXT


def test_s9_seeds_are_shown_and_exact(shown, page):
    _, held, _ = shown
    held.all = True
    sent = []
    page.on("request", lambda request: sent.append(request.post_data) if request.method == "POST" else None)
    for seed in (str(2**53 + 1), str(2**63 - 1), ""):
        page.fill("#seed", seed)
        page.fill("#text", "Four hours of steady work faced us.")
        page.click("#speak")
        waits_for(page, "at('status').textContent === 'done' && at('used-seed').textContent !== '–'")
        shown_seed = page.inner_text("#used-seed")
        if seed:
            assert shown_seed == seed and json.loads(sent[-1])["seed"] == int(seed)
        else:
            assert re.fullmatch("[0-9]+", shown_seed) and "seed" not in json.loads(sent[-1])
    page.fill("#seed", str(2**63))
    page.click("#speak")
    status(page, "failed")
    assert "seed" in page.inner_text("#error")


TWENTY_MINUTES = """() => {
    run = new Run();
    const sound = new Float32Array(RATE);
    for (let i = 0; i < sound.length; i++) sound[i] = Math.sin(i / 20) * (i % 4800) / 4800;
    for (let second = 0; second < 20 * 60; second++) { run.wave.push(sound, second); run.samples += RATE; }
    const paint = CanvasRenderingContext2D.prototype, fill = paint.fillRect;
    let rectangles = 0;
    paint.fillRect = function (...where) { rectangles += 1; fill.apply(this, where); };
    draw();
    paint.fillRect = fill;
    const begin = performance.now();
    for (let i = 0; i < 50; i++) draw();
    return {rectangles, stretches: run.wave.values.length, ms: (performance.now() - begin) / 50,
            loudest: run.wave.loudest, least: Math.min(...run.wave.values), seconds: run.wave.values.length * run.wave.per / RATE};
}"""


def test_s9_a_picture_of_twenty_minutes_is_little_work(page):
    page.uncheck("#sound")
    found = page.evaluate(TWENTY_MINUTES)
    print(f"a picture of twenty minutes: {found['rectangles']} rectangles, {found['ms']:.2f} ms")
    assert found["rectangles"] <= 1024 + 2 and found["stretches"] > 512
    assert found["seconds"] == pytest.approx(1200, rel=0.01)
    assert (
        found["loudest"] == pytest.approx(1, abs=0.01) and found["least"] > 0.9
    )  # the loudest of each stretch of a second


def test_s9_the_picture_holds_the_loudest_of_each_stretch(page):
    """Against a plain maximum over the same samples, pushed in pieces of all sizes."""
    page.uncheck("#sound")
    assert page.evaluate("""() => {
        let state = 1;
        const random = () => (state = state * 48271 % 2147483647) / 2147483647;
        const all = new Float32Array(1300 * PEAK + 77).map(() => random() * 2 - 1), wave = new Wave();
        for (let i = 0, n = 0; i < all.length; n++) {
            const piece = all.subarray(i, i + 1 + Math.floor(random() * 3 * PEAK));
            wave.push(piece, n);
            i += piece.length;
        }
        const plain = [];
        for (let i = 0; i < all.length; i += wave.per) plain.push(all.subarray(i, i + wave.per).reduce((most, one) => Math.max(most, Math.abs(one)), 0));
        return wave.per === 2 * PEAK && plain.length === wave.values.length && plain.every((value, i) => value === wave.values[i]);
    }""")
