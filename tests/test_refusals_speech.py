"""What `ChatterboxEngine` cannot do is refused where it is asked for."""

import asyncio
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.t3_models import tiny_t3

from kvcache import InputError, MemoryStore, PolicyError, SlidingWindow, SnapKV, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, byte_tokens, random_conditionals, stand_in

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"policy": [SlidingWindow(3)] * 4}, PolicyError, r"all layers; give one SizePolicy, such as SlidingWindow\(500\)"),
    ({"policy": SnapKV(128)}, PolicyError, r"SnapKV.*chooses tokens by head, which the engine does not.*SlidingWindow"),
    ({"policy": "window"}, PolicyError, "policy='window'"),
    ({"prefix_cache": "redis://localhost"}, InputError, "must be a PrefixCache"),
    ({"kv_dtype": "bf16"}, InputError, "kv_dtype='bf16'"),
]


@pytest.fixture(scope="module")
def t3() -> Any:
    return tiny_t3("english")


@pytest.mark.parametrize(("given", "error", "said"), REFUSED, ids=lambda value: str(value)[:24])
def test_d11_the_engine_refuses_at_construction(
    t3: Any, given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ChatterboxEngine(t3, **{"prefix_cache": SpeakerCache(MemoryStore("1MiB")), **given})


def test_d11_a_budget_is_a_size_in_words_too(t3: Any) -> None:
    engine = ChatterboxEngine(t3, prefix_cache=SpeakerCache(MemoryStore("1MiB")))
    assert engine.room(64, 64, "2MiB") == engine.room(64, 64, 2 * 2**20)
    assert engine.room(64, 64, "2MiB")[1] < 64
    with pytest.raises(PolicyError, match="cannot read 'much' as a size"):
        engine.room(64, 64, "much")
    assert "SlidingWindow" in repr(
        ChatterboxEngine(t3, SlidingWindow(9), prefix_cache=SpeakerCache(MemoryStore("1MiB")))
    )


class Anything:
    """What a restricted unpickler does not read."""


def test_d11_a_bad_file_of_conditionals_hands_on_no_advice_to_run_it(t3: Any, tmp_path: Path) -> None:
    engine = ChatterboxEngine(t3, prefix_cache=SpeakerCache(MemoryStore("1MiB")))
    torch.save({"t3": Anything()}, tmp_path / "more.pt")
    torch.save({"gen": {}}, tmp_path / "less.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 no more")
    for name, said in (("more.pt", "more than tensors"), ("torn.pt", "damaged"), ("less.pt", "'t3' is missing")):
        with pytest.raises(InputError, match=said) as raised:
            engine.add_voice("a", conditionals=tmp_path / name)
        assert "weights_only" not in str(raised.value)
        assert name != "more.pt" or raised.value.__suppress_context__


NAN, INF = math.nan, math.inf
NO_NUMBERS: list[tuple[str, list[Any]]] = [
    ("exaggeration", [NAN, INF, -INF, "high", True, 1e39]),
    ("cfg_weight", [NAN, INF, "0.5", False, -0.1, 1e300]),
    ("temperature", [NAN, INF, None, "hot", True, -1.0, 1e-300, 1e300]),
    ("top_p", [NAN, INF, None, 1.5, -0.1, True]),
    ("min_p", [NAN, INF, None, 1.5, -0.1]),
    ("repetition_penalty", [NAN, INF, None, 0.0, -1.0, 1e-300, 1e300]),
    ("top_k", [NAN, 5.0, None, -1, True, 2**63]),
    ("seed", [1.0, "1", True, 2**64, -(2**63) - 1, NAN]),
    ("max_new_tokens", [0, -1, 2.5, True, NAN, "5"]),
]
OF_TOKENS: list[tuple[str, list[Any]]] = [("chunk_size", [0, 2.5, True, NAN, None])]
OF_TEXTS: list[tuple[str, list[Any]]] = [
    ("pause", [NAN, INF, -0.1, "long", True, 1e9]),
    ("segment_characters", [19, 0, 200.5, True, NAN, "200"]),
    ("max_rows", [0, -1, 2.5, True, None]),
    ("memory_budget", [NAN, 1.5, True]),
    ("carry", ["head", True]),
]
OF_CHUNKS: list[tuple[str, list[Any]]] = [
    ("chunking", ["slow", "", None, 25, NAN, True, [], [0], [25, 2.5], (True,), [NAN], ["25"]]),
    ("first_chunk", [0, -1, 2.5, True, NAN, "5"]),
    ("max_chunk", [0, -1, 2.5, True, NAN, "5", 9]),
]


def each(*lists: list[tuple[str, list[Any]]]) -> list[tuple[str, Any]]:
    return [(name, value) for some in lists for name, values in some for value in values]


@pytest.fixture(scope="module")
def speaking(t3: Any) -> Any:
    engine = ChatterboxEngine(stand_in(t3), prefix_cache=SpeakerCache(MemoryStore("1MiB")))
    engine.add_voice("v", conditionals=random_conditionals(t3))
    return engine


@pytest.fixture
def still(speaking: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine, whose model may not run."""

    def run(*args: Any, **given: Any) -> None:
        raise AssertionError("the model has run")

    monkeypatch.setattr(speaking.t3.tfmr, "forward", run)
    monkeypatch.setattr(speaking.t3, "prepare_conditioning", run)
    return speaking


@pytest.mark.parametrize(("name", "value"), each(NO_NUMBERS, OF_TOKENS))
def test_what_is_no_number_is_refused_before_tokens_are_made(still: Any, name: str, value: Any) -> None:
    given = {"text_tokens": byte_tokens(still.t3, "Hi."), "voice": "v", name: value}
    with pytest.raises(InputError, match=rf"{name}\b.*"):
        still.inference_stream(**given)


@pytest.mark.parametrize(("name", "value"), each(NO_NUMBERS, OF_TEXTS, OF_CHUNKS))
def test_what_is_no_number_is_refused_before_a_text_is_spoken(still: Any, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{name}\b.*"):
        still.generate_stream("Hello.", **{"voice": "v", name: value})
    if name not in dict(OF_CHUNKS):
        with pytest.raises(InputError, match=rf"{name}\b.*"):
            still.generate("Hello.", **{"voice": "v", name: value})


def test_what_is_no_number_is_refused_where_it_is_submitted(speaking: Any) -> None:
    async def submit() -> None:
        async with SpeechScheduler(speaking, max_rows=1) as scheduler:
            for name, value in each(NO_NUMBERS, OF_TEXTS, OF_CHUNKS):
                if name in ("max_rows", "memory_budget"):
                    continue
                with pytest.raises(InputError, match=name):
                    await anext(scheduler.submit("Hello.", **{"voice": "v", name: value}))

    asyncio.run(submit())


@pytest.mark.parametrize("value", NO_NUMBERS[0][1])
def test_an_emotion_that_is_no_number_is_refused_with_its_voice(still: Any, value: Any, tmp_path: Path) -> None:
    voice = still.voices["v"]
    with pytest.raises(InputError, match="exaggeration"):
        voice.with_emotion(value)
    for clip in ({"conditionals": voice}, {"audio_prompt_path": tmp_path / "none.wav"}):
        with pytest.raises(InputError, match="exaggeration"):
            still.add_voice("w", exaggeration=value, **clip)
    bad = random_conditionals(still.t3)
    bad.emotion_adv = NAN * torch.ones(1, 1, 1)
    with pytest.raises(InputError, match="emotion_adv is not finite"):
        still.inference_stream(text_tokens=byte_tokens(still.t3, "Hi."), t3_cond=bad)


def test_numbers_of_other_kinds_are_the_numbers_that_they_are(speaking: Any) -> None:
    half: dict[str, Any] = {"seed": 0, "max_new_tokens": 4}
    names = ("exaggeration", "temperature", "top_p", "min_p", "cfg_weight", "repetition_penalty", "pause")
    for kind in (Fraction, np.float32, np.float64):
        given = {name: kind(0.5) for name in names}
        expected = speaking.generate("Hello.", **half, **dict.fromkeys(names, 0.5))
        assert torch.equal(speaking.generate("Hello.", top_k=2**63 - 1, **half, **given), expected)
    assert speaking.add_voice("half", conditionals=speaking.voices["v"], exaggeration=Fraction(1, 2)).emotion == 0.5


@pytest.mark.parametrize("value", [5, True, b"v", ["v"], [], {}, 0.5])
def test_what_is_no_name_is_refused_wherever_a_voice_is_named(still: Any, value: Any, tmp_path: Path) -> None:
    tokens = byte_tokens(still.t3, "Hi.")
    calls: list[Callable[[], Any]] = [
        lambda: still.generate("Hello.", voice=value),
        lambda: still.generate_stream("Hello.", voice=value),
        lambda: still.plan("Hello.", voice=value),
        lambda: still.audio(value),
        lambda: still.voice_of(value),
        lambda: still.inference_stream(text_tokens=tokens, voice=value),
        lambda: still.inference_segments(texts=[tokens], voice=value),
        lambda: still.voices[value],
        lambda: still.voices.remove(value),
        lambda: still.voices.export(value, tmp_path / "none"),
    ]
    for call in calls:
        with pytest.raises(InputError, match="is no name of a voice: give the name"):
            call()
    with pytest.raises(InputError, match="printable characters"):
        still.add_voice(value, "clip.wav")
    assert value not in still.voices and still.voices.get(value, 1) == 1


@pytest.mark.parametrize("value", [5, True, b"en", ["en"]])
def test_what_is_no_language_is_refused(still: Any, value: Any) -> None:
    for call in (still.generate, still.generate_stream, still.plan):
        with pytest.raises(InputError, match=r"language_id=.* must be a language's code, such as 'en'"):
            call("Hello.", voice="v", language_id=value)


def test_what_is_of_another_kind_is_refused_with_what_is_wanted(still: Any) -> None:
    conds, tokens = stand_in(still.t3).conds, byte_tokens(still.t3, "Hi.")
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("a Conditionals is no name", lambda: still.generate("Hello.", voice=conds)),
        (
            r"t3_cond is a Conditionals .* give its t3",
            lambda: still.inference_stream(text_tokens=tokens, t3_cond=conds),
        ),
        ("t3_cond is a int", lambda: still.inference_segments(texts=[tokens], t3_cond=5)),
        ("must be a list of at least one", lambda: still.inference_segments(texts=5, voice="v")),
        ("must be a list of at least one", lambda: still.inference_segments(texts=tokens, voice="v")),
        ("audio_prompt_path=5 must be the path", lambda: still.generate("Hello.", audio_prompt_path=5)),
        ("audio_prompt_path=b'a' must be the path", lambda: still.add_voice("w", b"a")),
        ("a Conditionals is no Voice", lambda: still.voices.add("w", conds)),
        ("path=5 must be the path", lambda: still.voices.load(5)),
        ("path=5 must be the path", lambda: still.voices.export("v", 5)),
        ("memory_budget=True", lambda: still.room(1, None, True)),
        ("the text", lambda: still.generate(5, voice="v")),
    ]
    for said, call in refused:
        with pytest.raises(InputError, match=said):
            call()


@pytest.mark.parametrize(
    "name", ["max_rows", "max_waiting", "max_running", "max_characters", "slots", "ahead", "prefills", "reserved"]
)
def test_limits_of_a_scheduler_are_whole_numbers(still: Any, name: str) -> None:
    for value in (NAN, INF, True, 2.5, "3", -1):
        with pytest.raises(InputError, match=f"{name}="):
            SpeechScheduler(still, **{name: value})
