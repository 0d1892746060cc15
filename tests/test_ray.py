"""The fleet of `examples/ray_serve.py` on a real local Ray: where voices go, and what happens when a replica dies."""

import asyncio
import importlib.util
import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

if any(importlib.util.find_spec(name) is None for name in ("ray", "fastapi", "httpx")):
    pytest.skip("Ray Serve or httpx is not installed (pip install 'kvcache[ray,test]')", allow_module_level=True)

import httpx
import numpy as np
import torch
from support.snapshots import running_redis
from support.t3_models import tiny_t3
from support.waiting import until_async

from kvcache import BusyError, InputError, MemoryStore, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine, stand_in

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / "examples"), str(ROOT / "tests")]
sys.path[:0] = PATHS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),  # Ray's own
]

VOICES = [f"voice-{i}" for i in range(8)]
TEXT = "The birch canoe slid on the smooth planks."
APP = "speech"
URL = "http://127.0.0.1:8000/v1/audio/speech"


def tiny():
    """A whole model around a tiny T3, the same in every process."""
    torch.set_num_threads(1)
    return stand_in(tiny_t3("gpt"))


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """A folder of voices, without what T3 computes of them."""
    folder = tmp_path_factory.mktemp("voices")
    engine = ChatterboxEngine(tiny(), reuse="none")
    for seed, name in enumerate(VOICES):
        engine.add_voice(name, conditionals=stand_in(engine.t3, seed).conds)
        engine.voices.export(name, folder / f"{name}.safetensors", computed=False)
    return folder


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    import ray

    paths = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])  # of this module and the example's
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def fleet(ray, voices, tmp_path):
    """Starts replicas, and stops them at the end of the test."""
    import ray_serve
    from ray import serve

    with running_redis(tmp_path) as redis:

        def start(**options):
            return serve.run(ray_serve.fleet(tiny, str(voices), redis.url, cpus=0.5, **options), name=APP)

        yield start
        serve.delete(APP)


async def hear(handle, voice, tokens=5, seed=0, heard=None):
    """The chunks that a request got, and the error that it ended in."""
    heard = [] if heard is None else heard
    answer = handle.options(stream=True).speak.remote(TEXT, voice, max_new_tokens=tokens, seed=seed, chunking=[5])
    try:
        async for chunk in answer:
            heard.append(chunk)
    except Exception as error:
        return heard, error
    finally:
        answer.cancel()
    return heard, None


def sound(chunks):
    return np.concatenate([chunk["audio"] for chunk in chunks])


def reference(voices):
    """What an engine of its own says: a function of voice, tokens and seed."""
    engine = ChatterboxEngine(tiny(), prefix_cache=SpeakerCache(MemoryStore()))
    for name in VOICES:
        engine.voices.load(voices / f"{name}.safetensors")

    def speak(voice, tokens, seed):
        chunks = engine.generate_stream(TEXT, voice=voice, max_new_tokens=tokens, chunking=[5], seed=seed)
        return torch.cat(list(chunks), 1)[0].numpy()

    return speak


def kill(ray, replica):
    ray.kill(ray.get_actor(f"SERVE_REPLICA::{APP}#Replica#{replica}", namespace="serve"))


def test_a_voice_goes_to_where_it_is_warm(fleet, voices, capsys):
    handle, speak = fleet(), reference(voices)
    chosen = random.Random(0)
    asked = [*VOICES, *chosen.choices(VOICES, k=192)]
    chosen.shuffle(asked)
    turns = asyncio.Semaphore(12)

    async def one(i, voice):
        async with turns:
            return await hear(handle, voice, seed=i)

    async def main():
        return await asyncio.gather(*(one(i, voice) for i, voice in enumerate(asked)))

    answers = asyncio.run(main())
    assert [error for _, error in answers if error is not None] == []
    prefixes = []
    for i, (voice, (chunks, _)) in enumerate(zip(asked, answers, strict=True)):
        np.testing.assert_allclose(sound(chunks), speak(voice, 5, i), atol=1e-5)
        prefixes.append(chunks[0]["prefix"])
    later = len(asked) - len(VOICES)  # a voice's first request, whichever that was, finds nothing in memory
    share = prefixes.count("memory") / later
    with capsys.disabled():
        replicas = {chunks[0]["replica"] for chunks, _ in answers}
        print(
            f"\n{share:.1%} of {later} landed where their voice was warm, on {len(replicas)} replicas; "
            f"{prefixes.count('computed')} prefixes were computed"
        )
    assert 0.95 <= share <= 1
    assert prefixes.count("computed") < 2 * len(VOICES)  # a second replica finds in Redis what the first computed


def test_a_replica_that_dies_loses_only_what_was_streaming(fleet, ray, voices, capsys):
    handle, speak, tokens = fleet(max_rows=2, max_waiting=14), reference(voices), 400
    seeds = range(12)

    async def over_http(begun):
        body = {"input": TEXT, "voice": VOICES[0], "seed": 99, "max_new_tokens": tokens, "response_format": "pcm"}
        sound, error = b"", None
        async with httpx.AsyncClient(timeout=60) as http, http.stream("POST", URL, json=body) as answer:
            try:
                async for part in answer.aiter_raw():
                    sound += part
                    begun.set()
            except httpx.RemoteProtocolError as problem:
                error = problem
        return answer.headers["x-replica"], sound, error

    async def main():
        begun, heard = asyncio.Event(), [[] for _ in seeds]
        http = asyncio.ensure_future(over_http(begun))
        await begun.wait()
        tasks = [asyncio.ensure_future(hear(handle, VOICES[0], tokens, seed, heard[seed])) for seed in seeds]
        await until_async(lambda: any(len(chunks) >= 2 for chunks in heard))
        home = next(chunks[0]["replica"] for chunks in heard if chunks)
        kill(ray, home)
        return home, await asyncio.gather(*tasks), await http

    home, answers, (first_home, pcm, error) = asyncio.run(main())
    assert first_home == home
    assert "incomplete" in str(error)  # the body has no end, which no client takes for the end
    expected = speak(VOICES[0], tokens, 99)
    heard = np.frombuffer(pcm[: len(pcm) // 2 * 2], "<i2") / 32767
    assert 0 < heard.size < expected.size
    np.testing.assert_allclose(heard, expected[: heard.size].clip(-1, 1), atol=1e-4)

    cut = retried = 0
    for seed, (chunks, error) in zip(seeds, answers, strict=True):
        expected = speak(VOICES[0], tokens, seed)
        assert len({chunk["replica"] for chunk in chunks}) == 1  # no stream is of two, and none is empty
        np.testing.assert_allclose(sound(chunks), expected[: sound(chunks).size], atol=1e-5)
        if error is None:
            retried += chunks[0]["retried"]
            assert sound(chunks).size == expected.size
            assert chunks[0]["replica"] != home or not chunks[0]["retried"]
        else:
            cut += 1
            assert "died while it streamed" in str(error)
            assert chunks[0]["replica"] == home and sound(chunks).size < expected.size
    with capsys.disabled():
        print(f"\na replica died: of {len(answers)} requests there, {cut} had begun and failed, {retried} were retried")
    assert cut <= 2 and retried == len(answers) - cut


def test_a_fresh_replica_finds_prefixes_in_redis(fleet, ray):
    handle = fleet()

    async def say_all():
        return {voice: (await hear(handle, voice))[0][0] for voice in VOICES}

    before = asyncio.run(say_all())
    assert {chunk["prefix"] for chunk in before.values()} == {"computed"}
    for replica in {chunk["replica"] for chunk in before.values()}:
        kill(ray, replica)
    after = asyncio.run(say_all())  # waits for those that Serve starts in their place
    assert {chunk["prefix"] for chunk in after.values()} == {"redis"}
    assert {c["replica"] for c in before.values()}.isdisjoint(c["replica"] for c in after.values())
    # The first of them may have got all voices, and the second takes its own from there.
    assert {chunk["prefix"] for chunk in asyncio.run(say_all()).values()} <= {"memory", "redis"}


def test_what_cannot_be_served_is_refused_and_who_leaves_makes_room(fleet, voices):
    handle = fleet(replicas=1, max_rows=1, max_waiting=1, max_queued=1)
    speak = reference(voices)
    body = {"input": TEXT, "voice": VOICES[0], "seed": 3, "response_format": "pcm", "max_new_tokens": 5}

    def ask(**changed):
        content = json.dumps(body | changed)  # NaN too, which httpx itself would not send
        return httpx.post(URL, content=content, headers={"Content-Type": "application/json"}, timeout=60)

    answer = ask()
    assert answer.status_code == 200 and answer.headers["x-prefix"] == "computed"
    expected = speak(VOICES[0], 5, 3)
    np.testing.assert_allclose(np.frombuffer(answer.content, "<i2") / 32767, expected.clip(-1, 1), atol=1e-4)
    assert ask(response_format="wav").content[44:] == answer.content
    for changed, status, words in (
        ({"voice": "nobody"}, 404, "there is no voice 'nobody'"),
        ({"voice": "../voices/voice-0"}, 404, "there is no voice"),
        ({"input": " "}, 400, "empty"),
        ({"max_new_tokens": 0}, 400, "max_new_tokens"),
        ({"cfg_weight": 0.5}, 400, "no guidance"),
        ({"speed": 2}, 400, "speed"),
        ({"temperature": float("nan")}, 400, "temperature"),
    ):
        refused = ask(**changed)
        assert (refused.status_code, words in refused.text) == (status, True), refused.text[:200]

    async def main():
        assert isinstance((await hear(handle, "nobody"))[1], InputError)
        crowd = [asyncio.ensure_future(hear(handle, VOICES[0], 800)) for _ in range(8)]
        done, waiting = await asyncio.wait(crowd, timeout=3)
        errors = [task.result()[1] for task in done]
        assert errors and all(isinstance(error, BusyError) for error in errors)
        assert len(waiting) >= 2  # one speaks, one waits with the replica, the others with the ingress
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        begin = time.monotonic()
        assert (await hear(handle, VOICES[0]))[1] is None
        assert time.monotonic() - begin < 5  # those that left are not spoken to their end

    asyncio.run(main())
