"""The example's HTTP server, on a real port: what it streams and refuses, clients that leave, its page, a short load."""

import asyncio
import importlib.util
import io
import json
import shutil
import socket
import sys
import threading
import wave
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "httpx")):
    pytest.skip("the server's packages are not installed (pip install kvcache[server,test])", allow_module_level=True)

import httpx
import uvicorn
from support.clocks import Ticking
from support.waiting import until, until_async
from t3_models import tiny_t3

from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, stand_in
from kvcache_chatterbox.standin import ToneVocoder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import server
import server_load

pytestmark = pytest.mark.one_release

TEXT = "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. Rice is served in bowls."
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(app):
    """The URL of an app, served by uvicorn in a thread."""
    runner = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: runner.started or not thread.is_alive())
            assert runner.started
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            runner.should_exit = True
            thread.join()


def engine_of(t3):
    engine = ChatterboxEngine(stand_in(t3))
    server.make_up_voices(engine)
    return engine


@pytest.fixture(scope="module")
def url():
    """Of a server whose texts end by themselves."""
    engine = engine_of(server_load.tiny())
    app = server.create_app(
        SpeechScheduler(engine, max_rows=4, max_waiting=32), engine.voices, model="tiny", note=server.TONES
    )
    with serving(app) as url:
        yield url


@pytest.fixture
def full():
    """Of a server with one row, one place to wait, and texts that hardly ever end."""
    engine = engine_of(tiny_t3("english"))
    with serving(server.create_app(SpeechScheduler(engine, max_rows=1, max_waiting=1), engine.voices)) as url:
        yield url


def body(text=TEXT, **more):
    return {"model": "chatterbox", "input": text, "voice": "sarah", "seed": 1, **more}


def say(url, *args, **more):
    return httpx.post(f"{url}/v1/audio/speech", json=body(*args, **more), timeout=60)


def figures(url):
    async def ask():
        async with httpx.AsyncClient(base_url=url) as http:
            return await server_load.at_rest(http)

    return asyncio.run(ask())


def test_pcm_and_wav_are_the_same_sound(url):
    pcm, wav = say(url, response_format="pcm"), say(url)
    assert (pcm.status_code, pcm.headers["content-type"]) == (200, "audio/pcm")
    assert (wav.status_code, wav.headers["content-type"]) == (200, "audio/wav")
    assert len(pcm.content) % 2 == 0 and len(pcm.content) > 24000
    assert wav.content[44:] == pcm.content
    with wave.open(io.BytesIO(wav.content)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        assert (
            file.readframes(len(pcm.content)) == pcm.content
        )  # a reader takes what is there, whatever the header says


def test_voices_and_seeds_are_heard(url):
    plain = say(url).content
    assert say(url).content == plain
    assert say(url, voice="alba").content != plain
    assert say(url, seed=2).content != plain
    unseeded = say(url, seed=None)
    assert say(url, seed=int(unseeded.headers["x-seed"])).content == unseeded.content
    assert [voice["id"] for voice in httpx.get(f"{url}/v1/voices").json()["data"]] == ["alba", "finn", "sarah"]


@pytest.mark.parametrize(
    ("changed", "status", "words"),
    [
        ({"voice": "nobody"}, 404, "there is no voice 'nobody'; there are 'alba', 'finn', 'sarah'"),
        ({"input": "  \n"}, 400, "empty"),
        ({"input": "x" * 20_001}, 400, "input: String should have at most 20000 characters"),
        ({"input": None}, 400, "input"),
        ({"input": "\ud800"}, 400, "unicode"),
        ({"voice": {"id": "sarah"}}, 400, "voice"),
        ({"input": "🎉🎉 !"}, 400, "no letter or digit"),
        ({"speed": 1.5}, 400, "only 1.0"),
        ({"response_format": "mp3"}, 400, "'wav' or 'pcm'"),
        ({"stream_format": "sse"}, 400, "stream_format"),
        ({"seed": -1}, 400, "seed"),
        ({"exaggeration": 1e9}, 400, "exaggeration"),
    ],
)
def test_what_cannot_be_spoken_is_refused(url, changed, status, words):
    answer = httpx.post(f"{url}/v1/audio/speech", content=json.dumps(body() | changed), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert words in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]


def test_every_error_is_an_error_object(url):
    for answer in (
        httpx.post(f"{url}/v1/audio/speech", content="{", headers=JSON),
        httpx.get(f"{url}/v1/audio/speech"),
        httpx.get(f"{url}/nothing"),
    ):
        assert answer.status_code in (400, 404, 405)
        assert answer.json()["error"]["message"]
    assert say(url, "x" * 1_000_000).status_code == 413  # from below us, in its own words


@asynccontextmanager
async def speaking(http, **more):
    """A request whose first audio has come."""
    async with http.stream("POST", "/v1/audio/speech", json=body(response_format="pcm", **more)) as answer:
        assert answer.status_code == 200, await answer.aread()
        pieces = answer.aiter_raw()
        await anext(pieces)
        yield pieces


def test_too_many_are_refused_and_who_leaves_makes_room(full):
    async def run():
        async with httpx.AsyncClient(base_url=full, timeout=60) as http:
            async with speaking(http):
                assert (await server_load.gauges(http))["kvcache_busy"] == 1
                waits = asyncio.ensure_future(http.post("/v1/audio/speech", json=body()))

                async def waiting():
                    return (await server_load.gauges(http))["kvcache_waiting"]

                async def none_waiting():
                    return not await waiting()

                await until_async(waiting)
                refused = await http.post("/v1/audio/speech", json=body())
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "busy" and "wait" in refused.json()["error"]["message"]
                waits.cancel()  # one that leaves before its first audio
                await until_async(none_waiting)
                assert (await server_load.gauges(http))["kvcache_busy"] == 1
            found = await server_load.at_rest(http)
            assert found["kvcache_busy"] == found["kvcache_waiting"] == found["kvcache_running"] == 0
            assert (found["kvcache_cancelled_total"], found["kvcache_refused_total"]) == (2, 1)
            async with speaking(http):  # there is room again
                pass
            return await server_load.at_rest(http)

    assert asyncio.run(run())["kvcache_cancelled_total"] == 3


@pytest.mark.parametrize("works", [0, 1], ids=["at once", "midway"])
def test_a_vocoder_that_fails_is_an_error_or_a_response_cut_short(works, monkeypatch):
    engine = engine_of(tiny_t3("english"))
    calls, vocode = [], ToneVocoder.inference

    def fails(self, *args, **more):
        calls.append(args)
        if len(calls) > works:
            raise RuntimeError("the vocoder is broken")
        return vocode(self, *args, **more)

    monkeypatch.setattr(ToneVocoder, "inference", fails)
    with serving(server.create_app(SpeechScheduler(engine), engine.voices)) as url:
        if works:
            with pytest.raises(httpx.RemoteProtocolError):
                say(url)
        else:
            answer = say(url)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
            assert "broken" not in answer.text
        found = figures(url)
        assert found["kvcache_busy"] == found["kvcache_running"] == 0


def test_the_figures_count_what_was_spoken(url):
    before = figures(url)
    say(url)
    after = figures(url)
    for name in ("finished_total", "ttfa_seconds_count"):
        assert after[f"kvcache_{name}"] == before[f"kvcache_{name}"] + 1
    assert after["kvcache_tokens_total"] > before["kvcache_tokens_total"]
    assert after["kvcache_rows"] == 4
    assert after["kvcache_request_seconds_sum"] > 0
    assert httpx.get(f"{url}/health").json() == {
        "status": "ready", "model": "tiny", "note": server.TONES, "languages": [],
    }  # fmt: skip


def test_it_ends_in_order_and_then_is_not_healthy():
    engine = engine_of(server_load.tiny())
    app = server.create_app(SpeechScheduler(engine), engine.voices)

    def status(method, path, **how):
        async def ask():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
                return (await http.request(method, path, **how)).status_code

        return asyncio.run(ask())

    assert status("GET", "/health") == 503
    with serving(app) as url:
        assert httpx.get(f"{url}/health").status_code == 200
    assert status("GET", "/health") == 503
    assert status("POST", "/v1/audio/speech", json=body()) == 503


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


def test_the_page_shows_chunks_as_they_come(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    engine = engine_of(server_load.tiny())
    app = OneByOne(server.create_app(SpeechScheduler(engine), engine.voices, model="tiny", note=server.TONES))
    with serving(app) as url, playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#voice option >> nth=2", state="attached")
        assert page.inner_text("#note") == server.TONES
        page.select_option("#voice", "finn")
        page.fill("#seed", "1")
        page.fill("#text", " ".join([TEXT] * 12))
        page.click("#speak")
        for shown in (1, 2, 3):
            app.allowed.release()
            page.wait_for_function(f"document.getElementById('chunks').rows.length === {shown}", timeout=60_000)
        app.all = True
        app.allowed.release()
        page.wait_for_function("document.getElementById('status').textContent === 'done'", timeout=60_000)
        rows = [row.split("\t") for row in page.inner_text("#chunks").splitlines()]
        assert len(rows) > 3
        assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
        heard = say(url, " ".join([TEXT] * 12), voice="finn", response_format="pcm").content
        assert sum(float(row[1]) for row in rows) == pytest.approx(len(heard) / 48000, abs=0.005 * len(rows))
        assert page.inner_text("#ttfa").endswith("ms") and float(page.inner_text("#rtf")) > 0
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.fill("#text", " . ")
        page.click("#speak")
        page.wait_for_selector("#error:not([hidden])")
        assert page.inner_text("#status") == "failed"
        browser.close()
    assert wrong == []


def test_eight_clients_for_some_requests(url, monkeypatch):
    # Seconds are looks at the clock, two or three a request: as many requests on any machine.
    monkeypatch.setattr(server_load, "time", SimpleNamespace(perf_counter=Ticking(0.1)))
    found = asyncio.run(server_load.load(url, clients=8, seconds=3, again=4))
    assert found["first errors"] == []
    assert found["complete"] > 0 and found["left midway"] > 0
    assert found["same length"] == found["asked again"] > 0
    assert found["rows busy after"] == found["waiting after"] == 0
