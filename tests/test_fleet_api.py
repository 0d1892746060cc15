"""What the fleet of `examples/ray_serve.py` answers over HTTP, without Ray: its requests, errors and streams."""

import argparse
import asyncio
import importlib.util
import json

import pytest

if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "httpx")):
    pytest.skip("the server's packages are not installed (pip install kvcache[server,test])", allow_module_level=True)

import httpx
import numpy as np
import support.serving  # puts the examples on the path

import fleet_api  # isort: skip
import server_options  # isort: skip

pytestmark = pytest.mark.one_release

assert support.serving
CHUNK = {"audio": np.linspace(-1, 1, 480, dtype=np.float32), "replica": "r1", "prefix": "memory", "retried": 0}
REFUSALS = (
    (404, "there is no voice 'x'; export one to the folder of voices"),
    (
        400,
        "segment 0 may need 3000 slots of cache, there are 2048; lower segment_characters, or raise max_cache_length",
    ),
    (429, "all replicas are full and too many requests wait; try again later"),
    (503, "3 replicas died of this request, or while it was there"),
)


def ask(content, chunks=(CHUNK, CHUNK), headers=(("Content-Type", "application/json"),)):
    """The answer to a body, where replicas say these chunks; and what they were asked."""
    api, asked_of = fleet_api.new_api(), []

    @api.post("/v1/audio/speech")
    async def speech(asked: fleet_api.SpeechBody):
        asked_of.append(asked)

        async def said():
            for chunk in chunks:
                yield chunk

        return await fleet_api.answer(asked, said())

    async def post():
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post("/v1/audio/speech", content=content, headers=dict(headers))

    return asyncio.run(post()), asked_of


def test_audio_is_what_the_replicas_said():
    answer, (asked,) = ask('{"input": "Hi.", "voice": "x", "temperature": 0.5, "response_format": "pcm"}')
    assert answer.status_code == 200 and answer.headers["x-replica"] == "r1" and answer.headers["x-prefix"] == "memory"
    np.testing.assert_allclose(np.frombuffer(answer.content, "<i2") / 32767, np.tile(CHUNK["audio"], 2), atol=1 / 32767)
    assert asked.options() == {"temperature": 0.5}
    assert ask('{"input": "Hi."}')[0].content[44:] == answer.content
    assert ask('{"input": "Hi.", "response_format": "pcm"}', ())[0].content == b""


NUMBERS = (
    "exaggeration",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "cfg_weight",
    "seed",
    "max_new_tokens",
    "top_k",
    "first_chunk",
    "max_chunk",
)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", NUMBERS)
def test_s12_a_number_that_is_none_is_refused(name, value):
    answer, asked = ask(f'{{"input": "Hi.", "{name}": {value}}}')
    assert answer.status_code == 400 and not asked
    error = answer.json()["error"]
    assert error["message"].startswith(f"{name}: ") and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", ["true", '"1"', "[1]"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_a_number_of_json(name, value):
    answer, asked = ask(f'{{"input": "Hi.", "{name}": {value}}}')
    assert answer.status_code == 400 and not asked
    assert answer.json()["error"]["message"].startswith(f"{name}: ")
    answer, (asked,) = ask(f'{{"input": "Hi.", "{name}": 1}}')
    assert answer.status_code == 200 and asked.options() == {name: 1}


@pytest.mark.parametrize(
    "content",
    [json.dumps({"input": "a secret", "voice": ["a secret"]}), json.dumps({"input": "a secret", "speed": "a secret"}),
     json.dumps({"input": "a secret " * 10_000}), json.dumps(["a secret"]), '{"input": "a secret', '{"input": "Hi.", "model": NaN}',
     json.dumps({"input": "a secret", "language_id": "a secret" * 10_000}), json.dumps({"input": "Hi.", "a secret " * 1000: 1})],
)  # fmt: skip
def test_s12_nothing_of_a_body_is_sent_back(content):
    answer, asked = ask(content)
    assert answer.status_code == 400 and not asked
    assert answer.text.count("a secret") <= 12  # the name of a field that there is not, shortened
    assert len(answer.content) < 800 and answer.json()["error"]["code"]


def test_s12_a_body_without_its_content_type_is_told_what_to_send():
    answer, asked = ask('{"input": "Hi."}', headers=())
    assert answer.status_code == 415 and not asked
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("status", "reason"), REFUSALS)
def test_what_replicas_refuse_is_an_error_object(status, reason):
    answer, _ = ask('{"input": "Hi."}', [{"status": status, "reason": reason}])
    error = answer.json()["error"]
    assert answer.status_code == status and error["message"].startswith(reason.partition(";")[0])
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert "max_cache_length" not in answer.text


def test_a_failure_is_an_error_object_without_its_reason():
    def breaks():
        raise RuntimeError("a secret")
        yield

    answer, _ = ask('{"input": "Hi."}', breaks())
    assert (answer.status_code, answer.headers["connection"]) == (500, "close")
    assert answer.json()["error"]["code"] == "internal_error" and "secret" not in answer.text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"voices": "/no/such"}, "--voices /no/such: is no folder"),
        ({"voices": __file__, "made_up": 2}, "is a file"),
        ({"redis": "localhost"}, "redis://"),
        ({"device": "gpu"}, "--device gpu"),
        ({"host": "203.0.113.1"}, "--host 203.0.113.1"),
        ({"chunking": "fixed", "max_chunk": 9}, "leave them out"),
        ({"vocoder": "/no/such"}, "weights='/no/such' must be"),
    ],
)
def test_misuse_of_the_fleets_command_is_one_line(changed, words, tmp_path, capsys):
    parser = server_options.parser_of(None)
    given = {"device": "cpu", "voices": tmp_path, "made_up": 0, "redis": None, "address": None, "port": 0}
    options = argparse.Namespace(**vars(parser.parse_args([])) | given | changed)
    options.voices = tmp_path / options.voices
    with pytest.raises(SystemExit) as ended:
        server_options.check_fleet(parser, options)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1
