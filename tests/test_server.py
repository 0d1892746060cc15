"""The example's HTTP server, on a real port: what it streams and refuses, clients that leave, a short load."""

import asyncio
import importlib.util
import io
import json
import re
import wave
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "httpx")):
    pytest.skip("the server's packages are not installed (pip install kvcache[server,test])", allow_module_level=True)

import httpx
from support.clocks import Ticking
from support.inside.speech import ToneVocoder
from support.serving import body, engine_of, server, server_load, serving
from support.t3_models import tiny_t3
from support.waiting import until, until_async

from server_errors import for_clients  # isort: skip

from kvcache.decoding import Batch
from kvcache_chatterbox import Chunking, SpeechScheduler

pytestmark = pytest.mark.one_release

JSON = {"Content-Type": "application/json"}


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


def test_how_much_comes_at_once_is_the_requests_or_the_servers():
    engine, asked = engine_of(server_load.tiny()), []
    scheduler = SpeechScheduler(engine, max_rows=1)
    submit = scheduler.submit

    def told(request):
        asked.append(request.chunking)
        return submit(request)

    scheduler.submit = told
    chunks = {"chunking": "fixed", "first_chunk": 5, "max_chunk": None}
    with serving(server.create_app(scheduler, engine.voices, chunks=chunks)) as url:
        sounds = [say(url, **more).content for more in ({}, {"chunking": "auto"}, {"first_chunk": 7, "max_chunk": 9})]
    assert asked == [Chunking((5,)), Chunking(), Chunking(first=7, most=9)]
    assert len(sounds[0]) > 44 and {len(sound) for sound in sounds} == {len(sounds[0])}


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
        ({"voice": {"name": "sarah"}}, 400, 'voice: Value error, give the name of a voice, or {"id": name}'),
        ({"input": "🎉🎉 !"}, 400, "no letter or digit"),
        ({"speed": 1.5}, 400, "only 1.0"),
        ({"response_format": "mp3"}, 400, "'wav' or 'pcm'"),
        ({"stream_format": "sse"}, 400, "stream_format"),
        ({"seed": -1}, 400, "seed"),
        ({"exaggeration": 1e9}, 400, "exaggeration"),
        ({"seed": True}, 400, "seed: Input should be a valid integer"),
        ({"seed": "7"}, 400, "seed: Input should be a valid integer"),
        ({"seed": 1.5}, 400, "seed: Input should be a valid integer"),
        ({"exaggeration": True}, 400, "exaggeration: Input should be a valid number"),
        ({"exaggeration": "0.5"}, 400, "exaggeration: Input should be a valid number"),
        ({"speed": True}, 400, "speed: Input should be a valid number"),
        ({"speed": "1"}, 400, "speed: Input should be a valid number"),
        ({"chunking": "slow"}, 400, "chunking: Input should be 'auto' or 'fixed'"),
        ({"chunking": [25]}, 400, "chunking: Input should be 'auto' or 'fixed'"),
        ({"first_chunk": 0}, 400, "first_chunk: Input should be greater than or equal to 1"),
        ({"max_chunk": 1001}, 400, "max_chunk: Input should be less than or equal to 1000"),
        ({"first_chunk": 2.5}, 400, "first_chunk: Input should be a valid integer"),
        ({"first_chunk": 30, "max_chunk": 20}, 400, "first_chunk=30 is more than max_chunk=20"),
        ({"chunking": "fixed", "max_chunk": 20}, 400, "leave them out"),
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


def test_whole_numbers_are_numbers_where_fractions_may_be(url):
    assert say(url, speed=1, exaggeration=1).content == say(url, speed=1.0, exaggeration=1.0).content


@pytest.mark.parametrize("given", ["bytes=0-3", "bytes=abc", "bytes=9999999-", "bytes=5-1", "lines=1", "bytes=\xff-"])
@pytest.mark.parametrize("path", ["", "server_page.css", "health"])
def test_no_part_of_a_page_is_had_and_no_range_is_an_error(url, path, given):
    answer = httpx.get(f"{url}/{path}", headers={"Range": given.encode("latin-1")})
    assert answer.status_code == 200 and answer.content == httpx.get(f"{url}/{path}").content


@pytest.mark.parametrize("path", ["", "health", "server_page.js"])
def test_head_is_answered_as_get_without_its_body(url, path):
    whole, head = httpx.get(f"{url}/{path}"), httpx.head(f"{url}/{path}")
    assert head.status_code == 200 and head.content == b""
    assert {**head.headers, "date": ""} == {**whole.headers, "date": ""}


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


def test_s10_health_says_by_what_kind_of_error_it_was_ended(monkeypatch):
    engine = engine_of(server_load.tiny())

    def breaks(*given):
        raise RuntimeError("a secret of the device")

    with serving(server.create_app(SpeechScheduler(engine), engine.voices)) as url:
        say(url)
        monkeypatch.setattr(Batch, "step", breaks)
        monkeypatch.setattr(Batch, "cancel", breaks)
        assert httpx.post(f"{url}/v1/audio/speech", json=body()).status_code == 500
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        found = httpx.get(f"{url}/health")
        assert (found.json()["status"], found.json()["reason"]) == ("closed", "RuntimeError")
        assert "secret" not in found.text
        refused = httpx.post(f"{url}/v1/audio/speech", json=body())
        assert refused.status_code == 503 and "secret" not in refused.text


def test_eight_clients_for_some_requests(url, monkeypatch):
    # Seconds are looks at the clock, two or three a request: as many requests on any machine.
    monkeypatch.setattr(server_load, "time", SimpleNamespace(perf_counter=Ticking(0.1)))
    found = asyncio.run(server_load.load(url, clients=8, seconds=3, again=4))
    assert found["first errors"] == []
    assert found["complete"] > 0 and found["left midway"] > 0
    assert found["same length"] == found["asked again"] > 0
    assert found["rows busy after"] == found["waiting after"] == 0


# ---------------------------------------------------------------------- S8: small ones


def observed(url, outcome):
    """How many requests ended so, by the histogram."""
    found = re.search(rf'kvcache_request_seconds_count{{outcome="{outcome}"}} (\d+)', httpx.get(f"{url}/metrics").text)
    return int(found[1]) if found else 0


def test_s8_failures_before_the_first_audio_are_counted_and_close_as_they_say(monkeypatch):
    monkeypatch.setattr(ToneVocoder, "inference", failing)
    engine = engine_of(server_load.tiny())
    with serving(server.create_app(SpeechScheduler(engine), engine.voices)) as url, httpx.Client() as http:
        for count in (1, 2):  # the connection closes, and the client knows it: the next request has another
            answer = http.post(f"{url}/v1/audio/speech", json=body())
            assert answer.status_code == 500 and answer.headers["connection"] == "close"
            assert answer.json()["error"] == {
                "message": "the server failed; its log says why", "type": "server_error", "code": "internal_error",
            }  # fmt: skip
            assert observed(url, "failed") == count
        assert http.post(f"{url}/v1/audio/speech", json=body(" ")).status_code == 400
        assert (observed(url, "refused"), observed(url, "finished")) == (1, 0)


def failing(*args, **more):
    raise RuntimeError("the vocoder is broken")


@pytest.mark.parametrize("how", ["all at once", "in pieces"])
def test_s8_a_body_that_is_too_large_is_told_in_the_same_form(url, how):
    large = json.dumps(body("x" * 1_000_000)).encode()
    pieces = large if how == "all at once" else (large[i : i + 50_000] for i in range(0, len(large), 50_000))
    with httpx.Client() as http:
        answer = http.post(f"{url}/v1/audio/speech", content=pieces, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error" and answer.json()["error"]["code"]
        assert http.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "x" * 5000])
def test_s8_a_body_without_its_content_type_is_told_what_to_send(url, kind):
    answer = httpx.post(
        f"{url}/v1/audio/speech", content=json.dumps(body()), headers={"Content-Type": kind} if kind else {}
    )
    assert answer.status_code == 415
    message = answer.json()["error"]["message"]
    assert "Content-Type: application/json" in message and ("missing" in message) == (kind is None)
    assert len(message) < 300


def test_s8_a_voice_may_be_an_object(url):
    assert say(url, "Hello.", voice={"id": "alba"}).content == say(url, "Hello.", voice="alba").content
    for wrong in ({"id": 3}, {"id": "alba", "x": 1}, {}, [], 3, None):
        answer = say(url, voice=wrong)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("voice: ")


def test_s8_models_are_listed_and_nothing_is_loaded_from_elsewhere(url):
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("chatterbox", "model") and isinstance(model["created"], int)
    assert {httpx.get(f"{url}/{path}").status_code for path in ("docs", "redoc")} == {404}
    page = httpx.get(url)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["script-src"] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"(?:src|href)=.(?:https?:)?//", page.text)
    for part, kind in (("css", "text/css"), ("js", "javascript")):
        assert kind in httpx.get(f"{url}/server_page.{part}").headers["content-type"]
    assert httpx.get(f"{url}/server_page.py").status_code in (400, 404)


LONG = "long " * 60_000


@pytest.mark.parametrize(
    "changed",
    [
        {name: LONG}
        for name in ("voice", "model", "language", "response_format", "stream_format", "seed", "speed", "exaggeration", LONG[:100_000])
    ]
    + [{"voice": {"id": LONG}}, {"voice": "🎉" * 200}, {"voice": {LONG: 1}}, {"seed": 10**4000}, {"input": LONG, LONG: LONG}],
)  # fmt: skip
def test_s8_nothing_long_is_sent_back(url, changed):
    answer = httpx.post(
        f"{url}/v1/audio/speech", content=json.dumps(body("Hello.") | changed), headers=JSON, timeout=60
    )
    if answer.status_code == 200:
        assert not set(changed) & set(
            server.SpeechBody.model_fields
        )  # a field that nobody knows is let be, as OpenAI's
    else:
        assert answer.status_code in (400, 404, 413)
        assert len(answer.json()["error"]["message"]) <= 500 and len(answer.content) < 8_000
        assert "long long" not in answer.text


@pytest.mark.parametrize(
    "said",
    ['{"input": "Hi.", "voice": "sarah", "exaggeration": NaN}', '{"input": "Hi.", "voice": "sarah", "speed": Infinity}',
     '{"input": "Hi.", "voice": "sarah", "seed": 1e400}', "[" * 50_000, '"text"', "null", "NaN", '{"input": "Hi.", "voice": "\\ud800"}',
     '{"input": "Hi.", "voice": "sarah", "seed": ' + "9" * 5000 + "}", "\xff\xfe"],
)  # fmt: skip
def test_s8_what_is_no_sane_json_is_refused(url, said):
    answer = httpx.post(f"{url}/v1/audio/speech", content=said.encode("latin-1"), headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


ENDLESS = (
    "9" * 3000, "1234567890 " * 1500, "3.14159265358979 " * 600, "é" * 5000, "字" * 5000, "a" * 19_000, "£1,234,567.89 " * 1000,
)  # fmt: skip


def test_s8_advice_can_be_followed_by_a_request():
    """Figures and words without end are refused, if they are, in words of a request: no settings that only the server has."""
    engine, refused = engine_of(tiny_t3("english")), []
    with serving(server.create_app(SpeechScheduler(engine), engine.voices)) as url:
        for text in ENDLESS:
            with httpx.stream("POST", f"{url}/v1/audio/speech", json=body(text), timeout=60) as answer:
                if answer.status_code != 200:
                    answer.read()
                    assert answer.status_code == 400
                    refused.append(answer.json()["error"]["message"])
    assert refused
    for message in (*refused, *map(for_clients_of_speech, ADVICE)):
        assert set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", message)) <= set(server.SpeechBody.model_fields), message


# As the library says it to whoever has its settings at hand.
ADVICE = (
    "the request may need 3000 tokens (34 of voice and text, 2967 of speech), there are 2048; lower max_new_tokens, raise max_cache_length",
    "segment 0 ('9') is predicted to take 4000 speech tokens, 2000 is the most; lower segment_characters, or give max_new_tokens",
    "lower segment_characters",
)


def for_clients_of_speech(message):
    return for_clients(message, server.SpeechBody.model_fields)


def test_s8_advice_that_can_be_followed_is_left():
    one_word = "segment 0 ('aaa') takes too long, and one word cannot be divided; put spaces or punctuation into it"
    assert for_clients_of_speech(one_word) == one_word
    assert for_clients_of_speech("language_id='xx' is none; name the text's language").startswith("language='xx'")
    assert for_clients_of_speech(ADVICE[1]).startswith(
        "segment 0 ('9') is predicted to take 4000 speech tokens, 2000 is the most; use shorter"
    )
