"""What is asked for and how an engine is made, as values: they check themselves, and keywords are only another way to write them."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.searching import search
from support.t3_models import tiny_t3
from typing_extensions import get_type_hints

from kvcache import InputError, KeepAll, MemoryStore, PolicyError, SlidingWindow, SpeakerCache
from kvcache_chatterbox import (
    ChatterboxEngine,
    Chunking,
    EngineOptions,
    RowLimits,
    SchedulerOptions,
    Segmenting,
    SpeechRequest,
    SpeechScheduler,
    UtteranceOptions,
    VocoderOptions,
    Voice,
    byte_tokens,
    random_conditionals,
    stand_in,
)
from kvcache_chatterbox.engine import EngineFields, RequestFields, TextFields
from kvcache_chatterbox.scheduler import SchedulerFields
from kvcache_chatterbox.speech import SamplingOptions, UtteranceFields

pytestmark = pytest.mark.one_release

TEXT = "Hello there. How are you?"


@pytest.fixture(scope="module")
def speaking() -> ChatterboxEngine:
    engine = ChatterboxEngine(stand_in(tiny_t3("english")), prefix_cache=SpeakerCache(MemoryStore("8MiB")))
    engine.add_voice("v", conditionals=stand_in(engine.t3, seed=4).conds)
    return engine


@pytest.fixture
def still(speaking: ChatterboxEngine, monkeypatch: pytest.MonkeyPatch) -> ChatterboxEngine:
    """The engine, whose model may not run."""

    def run(*args: Any, **given: Any) -> None:
        raise AssertionError("the model has run")

    monkeypatch.setattr(speaking.t3.tfmr, "forward", run)
    monkeypatch.setattr(speaking.t3, "prepare_conditioning", run)
    return speaking


# ---------------------------------------------------------------------- defaults


def test_a_request_for_nothing_but_a_text_is_as_it_always_was() -> None:
    request = SpeechRequest(TEXT)
    assert request == SpeechRequest.of(TEXT) and hash(request) == hash(SpeechRequest.of(TEXT))
    assert (request.text, request.voice, request.audio_prompt_path, request.language_id) == (TEXT, None, None, None)
    assert request.watermark is True
    made = request.utterance
    assert (made.max_new_tokens, made.exaggeration, made.seed, made.sampling) == (None, None, None, {})
    assert (request.chunking.sizes, request.chunking.first, request.chunking.most) == (None, 10, 250)
    segmenting = request.segmenting
    assert (segmenting.segment_characters, segmenting.pause, segmenting.carry) == (200, 0.2, None)
    assert (RowLimits().max_rows, RowLimits().memory_budget, RowLimits().bytes) == (8, None, None)


def test_an_engine_that_is_told_nothing_is_as_it_always_was() -> None:
    options = EngineOptions()
    assert [getattr(options, one.name) for one in fields(options)] == [
        None, 2048, "absolute", True, "all", True, "auto", None, None, False, 256, None,
    ]  # fmt: skip
    assert options.kept == KeepAll() and replace(options, policy=SlidingWindow(9)).kept == SlidingWindow(9)
    served = SchedulerOptions()
    assert [getattr(served, one.name) for one in fields(served)] == [
        8, None, 64, None, 20_000, None, 32, 8, None, None,
    ]  # fmt: skip


# ---------------------------------------------------------------------- keywords and values

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "voice": st.sampled_from([None, "v", "nobody"]),
    "language_id": st.sampled_from([None, "en", "fr"]),
    "watermark": st.booleans(),
    "max_new_tokens": st.none() | st.integers(1, 4000),
    "exaggeration": st.none() | st.floats(-5, 5),
    "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
    "temperature": st.floats(0.1, 5) | st.just(0),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(0, 2000),
    "repetition_penalty": st.floats(0.5, 3),
    "cfg_weight": st.floats(0, 3),
    "segment_characters": st.none() | st.integers(20, 400),
    "pause": st.floats(0, 600) | st.integers(0, 600),
    "carry": st.sampled_from([None, "tail"]),
}
CHUNKINGS = [
    ({}, Chunking()),
    ({"chunking": "auto", "first_chunk": 7}, Chunking(first=7)),
    ({"max_chunk": 40}, Chunking(most=40)),
    ({"chunking": "fixed"}, Chunking((25,))),
    ({"chunking": "fixed", "first_chunk": 9}, Chunking((9,))),
    ({"chunking": [5, 10]}, Chunking((5, 10))),
    ({"chunking": Chunking((3,))}, Chunking((3,))),
]
SAMPLING = set(get_type_hints(SamplingOptions))


@search(200)
@given(fields=st.fixed_dictionaries({}, optional=FIELDS), chunks=st.sampled_from(CHUNKINGS))
def test_keywords_are_the_value_that_they_are_put_into(fields: dict[str, Any], chunks: Any) -> None:
    def part(*names: str) -> dict[str, Any]:
        return {name: fields[name] for name in names if name in fields}

    written, chunking = chunks
    utterance = UtteranceOptions(**part("max_new_tokens", "exaggeration", "seed"), sampling=part(*SAMPLING))  # type: ignore[arg-type]
    segmenting = Segmenting(**part("segment_characters", "pause", "carry"))
    plain = part("voice", "language_id", "watermark")
    value = SpeechRequest(TEXT, **plain, utterance=utterance, chunking=chunking, segmenting=segmenting)
    assert SpeechRequest.of(TEXT, **fields, **written) == value
    assert SpeechRequest.of(value) is value


def test_the_keywords_are_the_fields_and_have_their_types() -> None:
    for value, keywords in ((EngineOptions, EngineFields), (SchedulerOptions, SchedulerFields)):
        assert get_type_hints(value) == get_type_hints(keywords)
    own, drawn = get_type_hints(UtteranceOptions), get_type_hints(SamplingOptions)
    assert own.pop("sampling") == SamplingOptions
    assert get_type_hints(UtteranceFields) == own | drawn
    request = get_type_hints(SpeechRequest)
    parts = {request.pop(name) for name in ("utterance", "chunking", "segmenting")}
    assert parts == {UtteranceOptions, Chunking, Segmenting} and request.pop("text") is str
    keywords = get_type_hints(RequestFields)
    chunks = {name: keywords.pop(name) for name in ("chunking", "first_chunk", "max_chunk")}
    assert keywords == request | own | drawn | get_type_hints(Segmenting)
    assert get_type_hints(TextFields) == keywords | chunks | get_type_hints(RowLimits)
    assert set(FIELDS) == set(keywords) - {"audio_prompt_path"}


def test_a_value_and_its_keywords_say_the_same(speaking: ChatterboxEngine) -> None:
    written: dict[str, Any] = {
        "voice": "v",
        "seed": 3,
        "max_new_tokens": 8,
        "temperature": 0.5,
        "segment_characters": 20,
        "exaggeration": 0.7,
        "pause": 0.1,
        "chunking": [4],
    }
    request = SpeechRequest.of(TEXT, **written)
    whole = speaking.generate(request)
    assert whole.shape[1] > 0
    assert torch.equal(speaking.generate(TEXT, **written), whole)
    streamed = torch.cat(list(speaking.generate_stream(request)), 1)
    assert torch.equal(torch.cat(list(speaking.generate_stream(TEXT, **written)), 1), streamed)
    assert speaking.plan(request, max_rows=1) == speaking.plan(TEXT, max_rows=1, **written)
    assert speaking.plan(request).rows == 2

    async def heard() -> list[torch.Tensor]:
        async with SpeechScheduler(speaking, max_rows=2, slots=200) as scheduler:
            parts: list[list[torch.Tensor]] = [[], []]
            for held, stream in zip(parts, [scheduler.submit(request), scheduler.submit(TEXT, **written)], strict=True):
                async for part in stream:
                    held.append(part)
            return [torch.cat(held, 1) for held in parts]

    first, second = asyncio.run(heard())
    assert torch.equal(first, second)
    torch.testing.assert_close(first, streamed, atol=1e-6, rtol=0)  # rows decode beside others: fp32 rounding


def test_tokens_are_asked_for_by_options_or_by_their_fields(speaking: ChatterboxEngine) -> None:
    voice, text = speaking.voices["v"], byte_tokens(speaking.t3, "Hi.")
    options = UtteranceOptions(max_new_tokens=5, seed=1, sampling={"top_p": 0.5})
    one = speaking.utterance(voice, text, options)
    other = speaking.utterance(voice, text, max_new_tokens=5, seed=1, top_p=0.5)
    assert (one.sampling, one.max_new_tokens, one.seed) == (other.sampling, other.max_new_tokens, other.seed)
    assert speaking.utterance(voice, text).max_new_tokens == 1000
    with pytest.raises(InputError, match="options and seed are given"):
        speaking.utterance(voice, text, options, seed=2)


def test_an_engine_is_made_of_options_or_of_their_fields() -> None:
    t3, written = tiny_t3("english"), {"max_cache_length": 300, "backend": "off", "onednn": False}
    options = EngineOptions(policy=SlidingWindow(9), **written)  # type: ignore[arg-type]
    store: dict[str, Any] = {"prefix_cache": SpeakerCache(MemoryStore("1MiB"))}
    for engine in (
        ChatterboxEngine(t3, options, **store),
        ChatterboxEngine(t3, SlidingWindow(9), **written, **store),
        ChatterboxEngine(t3, policy=SlidingWindow(9), **written, **store),
    ):
        assert engine.options == options and engine.policy == SlidingWindow(9)
    with pytest.raises(InputError, match=r"EngineOptions and backend are given.*replace"):
        ChatterboxEngine(t3, options, backend="eager", **store)
    with pytest.raises(InputError, match="two policies are given"):
        ChatterboxEngine(t3, SlidingWindow(9), policy=KeepAll(), **store)


def test_a_scheduler_is_made_of_options_or_of_their_fields(speaking: ChatterboxEngine) -> None:
    options = SchedulerOptions(max_rows=3, slots=200)
    assert SpeechScheduler(speaking, options).rows == SpeechScheduler(speaking, max_rows=3, slots=200).rows == 3
    with pytest.raises(InputError, match="SchedulerOptions and ahead are given"):
        SpeechScheduler(speaking, options, ahead=1)


def test_values_do_not_change() -> None:
    sampling: SamplingOptions = {"top_p": 0.5}
    options = UtteranceOptions(sampling=sampling)
    sampling["top_p"] = 7.0
    assert options.sampling == {"top_p": 0.5}
    with pytest.raises(FrozenInstanceError):
        SpeechRequest(TEXT).text = "Bye."  # type: ignore[misc]


# ---------------------------------------------------------------------- what is refused


def test_an_unknown_keyword_is_named_with_the_closest_that_there_is(still: ChatterboxEngine, tmp_path: Path) -> None:
    tokens = byte_tokens(still.t3, "Hi.")
    wrong: dict[str, Any] = {"temprature": 0.5}
    calls: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: SpeechRequest.of(TEXT, **wrong), "temprature", "temperature"),
        (lambda: still.generate(TEXT, **wrong), "temprature", "temperature"),
        (lambda: still.generate_stream(TEXT, **wrong), "temprature", "temperature"),
        (lambda: still.generate_stream(TEXT, wach=print), "wach", "watch"),  # type: ignore[call-arg]
        (lambda: still.generate(TEXT, max_row=3), "max_row", "max_rows"),  # type: ignore[call-arg]
        (lambda: still.plan(TEXT, **wrong), "temprature", "temperature"),
        (lambda: still.warm_up(**wrong), "temprature", "temperature"),
        (lambda: still.long_text(TEXT, still.voices["v"], **wrong), "temprature", "temperature"),
        (lambda: still.inference_stream(text_tokens=tokens, voice="v", **wrong), "temprature", "temperature"),
        (lambda: still.inference_segments(texts=[tokens], voice="v", **wrong), "temprature", "temperature"),
        (lambda: still.utterance(still.voices["v"], tokens, **wrong), "temprature", "temperature"),
        (lambda: UtteranceOptions(sampling={"topk": 5}), "topk", "top_k"),  # type: ignore[typeddict-unknown-key]
        (lambda: ChatterboxEngine(still.t3, back_end="off"), "back_end", "backend"),  # type: ignore[call-arg]
        (lambda: ChatterboxEngine(still.t3, prefix_cach=None), "prefix_cach", "prefix_cache"),  # type: ignore[call-arg]
        (lambda: ChatterboxEngine.from_profile(still.t3, tmp_path, bucked=1), "bucked", "bucket"),  # type: ignore[call-arg]
        (lambda: SpeechScheduler(still, maxrows=1), "maxrows", "max_rows"),  # type: ignore[call-arg]
    ]
    for call, name, closest in calls:
        with pytest.raises(InputError, match=rf"no argument '{name}'; the closest is '{closest}'"):
            call()


def test_a_scheduler_knows_no_rows_of_a_request(still: ChatterboxEngine) -> None:
    async def submit() -> None:
        async with SpeechScheduler(still, max_rows=1) as scheduler:
            for name in ("max_rows", "temprature"):
                with pytest.raises(InputError, match=f"no argument '{name}'"):
                    scheduler.submit(TEXT, **{name: 1})  # type: ignore[arg-type]
            with pytest.raises(InputError, match="a SpeechRequest and seed are given"):
                scheduler.submit(SpeechRequest(TEXT), seed=1)
            assert scheduler.metrics().refused == 0

    asyncio.run(submit())


NAN = math.nan
BAD: dict[str, list[Any]] = {
    "text": [None, 5, b"Hello.", "", " \n", "...", ["Hello."]],
    "voice": [5, True, b"v", ["v"], 0.5],
    "audio_prompt_path": [5, b"a.wav", True],
    "language_id": [5, b"en", ["en"], True],
    "watermark": [None, 1, "yes"],
    "utterance": [None, {}, {"seed": 3}, Segmenting()],
    "chunking": [None, "auto", [25], 25],
    "segmenting": [None, 200, UtteranceOptions()],
}
BAD_UTTERANCES: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 2.5, True, NAN, "5"],
    "exaggeration": [NAN, math.inf, "high", True, 1e39],
    "seed": [1.0, "1", True, 2**64, -(2**63) - 1, NAN],
    "sampling": [None, 5, "greedy", [("top_p", 0.5)]],
}
BAD_SAMPLING: dict[str, list[Any]] = {
    "temperature": [NAN, math.inf, None, "hot", True, -1.0, 1e-300, 1e300],
    "top_p": [NAN, None, 1.5, -0.1, True],
    "min_p": [NAN, None, 1.5, -0.1],
    "top_k": [NAN, 5.0, None, -1, True, 2**63],
    "repetition_penalty": [NAN, None, 0.0, -1.0, 1e-300, 1e300],
    "cfg_weight": [NAN, "0.5", False, -0.1, 1e300],
}
BAD_SEGMENTING: dict[str, list[Any]] = {
    "segment_characters": [19, 0, 200.5, True, NAN, "200"],
    "pause": [NAN, math.inf, -0.1, None, "long", True, 1e9],
    "carry": ["head", True, 1],
}
BAD_LIMITS: dict[str, list[Any]] = {"max_rows": [0, -1, 2.5, True, None], "memory_budget": [NAN, 1.5, True]}
BAD_ENGINES: dict[str, list[Any]] = {
    "max_cache_length": [0, -1, None, 2.5, True],
    "policy": ["window", [SlidingWindow(3)] * 4],
    "reuse": ["some", None],
    "double_bos": [None, 2],
    "onednn": [None, "yes"],
    "tf32": [1],
    "kv_dtype": ["bf16", torch.int8],
    "bucket": [0, None, 2.5, True],
    "vocoder": ["own", {"steps": 2}],
}
BAD_SCHEDULERS: dict[str, list[Any]] = {
    **BAD_LIMITS,
    **{name: [0, -1, 2.5, True, NAN, None] for name in ("max_waiting", "max_characters", "ahead", "prefills")},
    **{name: [0, -1, 2.5, True, NAN] for name in ("max_running", "slots")},
    "reserved": [-1, 2.5, True],
    "one_at_a_time": [1, "yes"],
}


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (lambda **given: SpeechRequest(**{"text": TEXT, **given}), BAD),
        (UtteranceOptions, BAD_UTTERANCES),
        (lambda **given: UtteranceOptions(sampling=given), BAD_SAMPLING),  # type: ignore[arg-type]
        (Segmenting, BAD_SEGMENTING),
        (RowLimits, BAD_LIMITS),
        (EngineOptions, BAD_ENGINES),
        (SchedulerOptions, BAD_SCHEDULERS),
    ],
    ids=["request", "utterance", "sampling", "segmenting", "limits", "engine", "scheduler"],
)
def test_every_bad_value_is_refused_by_its_name(make: Callable[..., Any], bad: dict[str, list[Any]]) -> None:
    for name, values in bad.items():
        said = {"audio_prompt_path": "audio_prompt_path", "voice": "name of a voice"}.get(name, name)
        for value in values:
            with pytest.raises((InputError, PolicyError), match=said):
                make(**{name: value})


def test_every_field_has_a_value_that_is_refused() -> None:
    for value, bad in (
        (SpeechRequest, BAD),
        (UtteranceOptions, BAD_UTTERANCES),
        (Segmenting, BAD_SEGMENTING),
        (RowLimits, BAD_LIMITS),
        (SchedulerOptions, BAD_SCHEDULERS),
    ):
        assert {one.name for one in fields(value)} == set(bad)
    assert set(BAD_SAMPLING) == SAMPLING
    # What these may be depends on the model and its device: the engine says it.
    assert {one.name for one in fields(EngineOptions)} - set(BAD_ENGINES) == {"positions", "backend", "precision"}


def test_what_depends_on_model_and_device_is_refused_by_the_engine() -> None:
    t3 = tiny_t3("english")
    for wrong in ({"positions": "sideways"}, {"backend": "fast"}, {"precision": "int4"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ChatterboxEngine(t3, prefix_cache=SpeakerCache(MemoryStore("1MiB")), **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a bare T3 has no vocoder"):
        ChatterboxEngine(t3, EngineOptions(vocoder=VocoderOptions(steps=2)))


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=3), st.binary(max_size=3),
    st.just([]), st.just(()), st.just({}), st.just(object()), st.just(Chunking()), st.just([5]),
)  # fmt: skip


@search(300)
@given(name=st.sampled_from(sorted(get_type_hints(TextFields))), value=ANYTHING)
def test_whatever_is_given_is_a_request_or_a_clear_refusal(name: str, value: Any) -> None:
    """No other error comes of it, and what is taken is kept."""
    limit = name in get_type_hints(RowLimits)
    try:
        made: Any = RowLimits(**{name: value}) if limit else SpeechRequest.of(TEXT, **{name: value})
    except (InputError, PolicyError) as error:
        words = str(error)
        assert name in words or (name == "voice" and "name of a voice" in words) or "as a size" in words
        return
    if limit:
        assert getattr(made, name) == value
        return
    homes = [made, made.utterance, made.segmenting, made.utterance.sampling]
    kept = [home[name] if isinstance(home, dict) else getattr(home, name) for home in homes
            if (name in home if isinstance(home, dict) else hasattr(home, name))]  # fmt: skip
    if name not in ("chunking", "first_chunk", "max_chunk"):
        assert kept == [value]


def test_a_voice_and_a_clip_are_not_both_who_speaks(still: ChatterboxEngine) -> None:
    voice = Voice.of(still.t3, random_conditionals(still.t3))
    for who in ("v", voice):
        with pytest.raises(InputError, match=r"give voice=.* or audio_prompt_path='a\.wav', not both"):
            SpeechRequest(TEXT, voice=who, audio_prompt_path="a.wav")
    with pytest.raises(InputError, match="there is no voice 'nobody'"):
        still.generate(SpeechRequest(TEXT, voice="nobody"))
