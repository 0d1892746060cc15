"""While nothing is evicted, a managed cache changes no token and no logit: the reference is transformers' own cache."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.families import FAMILIES, RELEASE, SEQ2SEQ, build, cases, dynamic_cache, encoded, logits, tiny, token_ids
from torch import Tensor
from transformers import GenerationConfig

from kvcache import KVCacheManager, KVLayer, MaxBytes, MaxTokens, Pinned, SlidingWindow
from kvcache import models as hf

NEW = 12
DECODERS = [name for name in FAMILIES if name not in SEQ2SEQ]

# Every kind of cache, with limits above the 20 + 12 tokens of these texts.
KINDS: dict[str, dict[str, Any]] = {
    "growing": {},
    "static": {"max_cache_length": 64, "static": True},
    "window": {"policy": SlidingWindow(60, sinks=4), "static": True},
    "max-tokens": {"policy": MaxTokens(64)},
    "max-bytes": {"policy": MaxBytes("1MiB")},
    "pinned": {"policy": Pinned(8, SlidingWindow(56))},
}
EVICTING_KINDS = ("window", "max-tokens", "max-bytes", "pinned")

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 40},
    "beams": {"do_sample": False, "num_beams": 3},
}


def manager(name: str, attention: str | None, kind: str) -> KVCacheManager:
    return KVCacheManager(tiny(name, attention), **KINDS[kind])


def run(generate: Callable[..., Any], ids: Tensor, mode: str = "greedy", **kwargs: Any) -> Tensor:
    torch.manual_seed(5)
    result: Tensor = generate(ids, max_new_tokens=NEW, **MODES[mode], **kwargs)
    return result


@cache
def plain(name: str, attention: str | None = None, mode: str = "greedy", rows: int = 2) -> Tensor:
    """What the model says by itself."""
    return run(tiny(name, attention).generate, token_ids(rows), mode)


def parity_cases() -> list[Any]:
    """Each family with every kind under its first attention; under the others, a kind that keeps and one that evicts."""
    return [
        pytest.param(name, attention, kind, id=f"{name}-{attention}-{kind}")
        for name, attention in cases()
        for kind in KINDS
        if attention == FAMILIES[name].attention[0] or kind in ("growing", "window")
        if FAMILIES[name].evicts or kind not in EVICTING_KINDS
    ]


@pytest.mark.grid(96)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "attention", "kind"), parity_cases())
def test_the_same_tokens_as_without_kvcache(name: str, attention: str, kind: str, mode: str) -> None:
    kv = manager(name, attention, kind)
    assert torch.equal(run(kv.generate, token_ids(), mode), plain(name, attention, mode))
    if name != "mistral-own-window":  # which keeps its own layers only
        assert kv.report().seen == (20 if name not in SEQ2SEQ else 1) + NEW - 1


@pytest.mark.grid(30)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_drops_into_the_models_own_generate(name: str, mode: str) -> None:
    kind = "window" if FAMILIES[name].evicts else "growing"
    rows = 2 * MODES[mode].get("num_beams", 1)
    dropped = manager(name, None, kind).new_cache(batch_size=rows)
    # By itself `generate` ignores a cache it is given where the config turns caches off, as MPT's does.
    ours = run(tiny(name).generate, token_ids(), mode, past_key_values=dropped, use_cache=True)
    assert torch.equal(ours, plain(name, None, mode))
    assert all(layer.get_seq_length() > 0 for layer in hf.cache_layers(dropped))


@cache
def plain_logits(name: str, attention: str, chunks: tuple[int, ...]) -> Tensor:
    model = tiny(name, attention)
    return logits(model, token_ids(), dynamic_cache(model), chunks)


@pytest.mark.grid(96)
@pytest.mark.parametrize("chunks", [(1,) * 20, (20,), (7, 1, 1, 5, 6)], ids=["token-by-token", "whole", "chunks"])
@pytest.mark.parametrize(("name", "attention", "kind"), parity_cases())
def test_logits_are_bit_identical(name: str, attention: str, kind: str, chunks: tuple[int, ...]) -> None:
    model, expected = tiny(name, attention), plain_logits(name, attention, chunks)
    kv = manager(name, attention, kind)
    assert torch.equal(logits(model, token_ids(), kv.new_cache(2), chunks), expected)
    if kind in EVICTING_KINDS:
        with hf.exact_windows(model):
            assert torch.equal(logits(model, token_ids(), kv.new_cache(2), chunks), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_cache_the_same_greedy_tokens(name: str) -> None:
    kv = KVCacheManager(tiny(name))
    kv.enabled = False
    assert torch.equal(run(kv.generate, token_ids()), plain(name))
    assert not kv.report().enabled
    assert kv.report().nbytes == 0
    kv.enabled = True
    assert torch.equal(run(kv.generate, token_ids()), plain(name))
    assert kv.report().enabled


@pytest.mark.parametrize("name", DECODERS)  # an encoder-decoder's mask is its encoder's
def test_left_padded_rows_say_what_they_say_without_kvcache(name: str) -> None:
    ids, mask = token_ids(3), torch.ones(3, 20, dtype=torch.long)
    for row, pads in enumerate((0, 5, 11)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    # With a cache, also where the config says otherwise: recomputing everything, MPT counts pads as distance.
    expected = run(tiny(name).generate, ids, attention_mask=mask, use_cache=True)
    for kind in ("growing", "window") if FAMILIES[name].evicts else ("growing",):
        assert torch.equal(run(manager(name, None, kind).generate, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefill_in_chunks_is_that_of_the_models_own_cache(name: str) -> None:
    # Not that of a whole prefill: in the first releases chunks give other tokens for some models, whatever the cache.
    model = tiny(name)
    expected = run(
        model.generate, token_ids(), prefill_chunk_size=7, past_key_values=dynamic_cache(model), use_cache=True
    )
    assert torch.equal(run(KVCacheManager(model).generate, token_ids(), prefill_chunk_size=7), expected)


@pytest.mark.parametrize("kind", ["growing", "window"])
@pytest.mark.parametrize("name", [name for name in DECODERS if FAMILIES[name].evicts])
def test_embeddings_instead_of_tokens(name: str, kind: str) -> None:
    model = tiny(name)
    embeddings = model.get_input_embeddings()(token_ids())
    given = {"inputs_embeds": embeddings, "max_new_tokens": NEW, "do_sample": False}
    new = KVCacheManager(model, **KINDS[kind]).generate(**given)
    assert torch.equal(new, model.generate(**given))
    assert new.shape == (2, NEW)


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mpt"])  # whose config turns caches off
def test_prompt_lookup_rolls_back(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessed tokens that turn out wrong are cropped from the cache."""
    model = tiny(name)
    ids = token_ids(1, 5).repeat(1, 6)  # a text that repeats, so that guesses are made
    # The first releases look a guess up against the end token, so there must be one.
    given = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2, "max_new_tokens": NEW, "do_sample": False}
    cut = []
    truncate = KVLayer.truncate

    def counting(layer: KVLayer, length: int) -> None:
        cut.append(layer.seen - length)
        truncate(layer, length)

    monkeypatch.setattr(KVLayer, "truncate", counting)
    expected = model.generate(ids, **{**given, "prompt_lookup_num_tokens": None})
    if RELEASE < (5, 14) and not guesses_are_supported(model, ids, given, expected):
        pytest.skip("this release cannot guess with this model, whatever the cache")
    assert torch.equal(KVCacheManager(model, **KINDS[kind]).generate(ids, **given), expected)
    if name != "mistral-own-window":
        assert max(cut) > 0


def guesses_are_supported(model: Any, ids: Tensor, given: dict[str, Any], expected: Tensor) -> bool:
    try:
        return torch.equal(model.generate(ids, past_key_values=dynamic_cache(model), **given), expected)
    except ValueError:  # "Cannot `crop` a `DynamicSlidingWindowLayer` …"
        return False


def test_a_config_that_turns_caches_off_changes_nothing() -> None:
    """Models saved after training often do. A cache that is passed and then not used would give other tokens."""
    model = build("llama", use_cache=False)
    kv = KVCacheManager(model)
    assert torch.equal(run(kv.generate, token_ids()), plain("llama"))
    assert kv.report().seen == 20 + NEW - 1


def test_a_request_may_turn_the_cache_off() -> None:
    kv = KVCacheManager(tiny("llama"))
    assert torch.equal(run(kv.generate, token_ids(), use_cache=False), plain("llama"))


def test_several_sequences_for_each_prompt() -> None:
    model = tiny("llama")
    given = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(3)
    expected = model.generate(token_ids(), max_new_tokens=NEW, **given)
    torch.manual_seed(3)
    assert torch.equal(KVCacheManager(model).generate(token_ids(), max_new_tokens=NEW, **given), expected)


@pytest.mark.parametrize("kind", ["growing", "window", "max-bytes"])
def test_settings_may_come_in_a_generation_config(kind: str) -> None:
    model = tiny("llama")
    config = GenerationConfig(num_beams=3, num_return_sequences=2, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    expected = model.generate(token_ids(), generation_config=config)
    assert torch.equal(manager("llama", None, kind).generate(token_ids(), generation_config=config), expected)


@pytest.mark.parametrize("kind", ["growing", "static", "window"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_a_conversation_goes_on_with_its_cache(name: str, kind: str) -> None:
    """A second turn with the first one's cache runs the new tokens only, and says what one long prompt says."""
    model, kv = tiny(name), manager(name, None, kind)
    held = kv.new_cache(1)
    first = run(kv.generate, token_ids(1), past_key_values=held)
    assert torch.equal(first, run(model.generate, token_ids(1)))
    follow_up = torch.cat((first, token_ids(1, 6, seed=1)), 1)
    assert torch.equal(run(kv.generate, follow_up, past_key_values=held), run(model.generate, follow_up))
    assert kv.report().seen == 20 + NEW + 6 + NEW - 1


# ---------------------------------------------------------------------- streams


@pytest.mark.grid(25)
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [*((name, 5) for name in FAMILIES), *(("llama", size) for size in (1, 12, 100)), ("bart", 1), ("gpt2", 100)],
)
def test_a_stream_is_what_generate_says(name: str, mode: str, chunk_size: int) -> None:
    torch.manual_seed(5)
    stream = KVCacheManager(tiny(name)).stream(token_ids(), max_new_tokens=NEW, chunk_size=chunk_size, **MODES[mode])
    chunks = list(stream)
    assert torch.equal(torch.cat(chunks, 1), plain(name, None, mode)[:, -NEW:])
    full, rest = divmod(NEW, chunk_size)
    assert [chunk.shape for chunk in chunks] == [(2, chunk_size)] * full + [(2, rest)] * (rest > 0)


def ending_early() -> tuple[dict[str, Any], Tensor]:
    """A run in which one row ends before the other, and how it goes without a stream."""
    model = tiny("llama")
    for end in plain("llama")[0, 22:].tolist():
        given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        expected = model.generate(token_ids(), **given)[:, 20:]
        if (expected == 0).any():
            return given, expected
    raise AssertionError("no row of this model ends before the other")


def test_a_row_that_has_ended_is_filled_with_pads() -> None:
    given, expected = ending_early()
    assert torch.equal(
        torch.cat(list(KVCacheManager(tiny("llama")).stream(token_ids(), chunk_size=5, **given)), 1), expected
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "bart", "bloom"])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_an_async_stream_is_the_same_stream(name: str, chunk_size: int) -> None:
    kv = KVCacheManager(tiny(name))
    given = {"max_new_tokens": NEW, "do_sample": False, "chunk_size": chunk_size}

    async def collect() -> list[Tensor]:
        return [chunk async for chunk in kv.astream(token_ids(), **given)]

    chunks, expected = asyncio.run(collect()), list(kv.stream(token_ids(), **given))
    assert len(chunks) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(chunks, expected, strict=True))
    assert torch.equal(torch.cat(chunks, 1), plain(name)[:, -NEW:])


def test_two_async_streams_at_once_do_not_mix() -> None:
    async def collect(name: str, seed: int) -> Tensor:
        stream = KVCacheManager(tiny(name)).astream(
            token_ids(seed=seed), chunk_size=2, max_new_tokens=NEW, do_sample=False
        )
        return torch.cat([chunk async for chunk in stream], 1)

    async def both() -> list[Tensor]:
        return list(await asyncio.gather(collect("llama", 0), collect("llama", 1)))

    first, second = asyncio.run(both())
    assert torch.equal(first, plain("llama")[:, -NEW:])
    assert torch.equal(second, run(tiny("llama").generate, token_ids(seed=1))[:, -NEW:])


LONGER: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}


def collected(stream: AsyncIterator[Tensor]) -> Tensor:
    async def collect() -> Tensor:
        return torch.cat([chunk async for chunk in stream], 1)

    return asyncio.run(collect())


@pytest.mark.parametrize("backend", ["off", "eager", "graph"])
def test_a_stream_is_asked_for_and_read_under_one_autocast(backend: Any) -> None:
    model = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(token_ids(), **LONGER)[:, 20:]
        kv = KVCacheManager(model)
        assert torch.equal(torch.cat(list(kv.stream(token_ids(), backend=backend, **LONGER)), 1), expected)
        assert (kv.report().fallback is None) == (backend == "off")
        assert torch.equal(collected(kv.astream(token_ids(), backend=backend, **LONGER)), expected)
        asked = kv.stream(token_ids(), backend=backend, **LONGER)
    assert torch.equal(torch.cat(list(asked), 1), expected)
    exact = model.generate(token_ids(), **LONGER)[:, 20:]
    assert not torch.equal(exact, expected)  # else this would show nothing
    asked = kv.stream(token_ids(), backend=backend, chunk_size=7, **LONGER)
    with torch.autocast("cpu", torch.bfloat16):
        read = [next(asked)]
    assert torch.equal(torch.cat([*read, *asked], 1), exact)
    assert torch.equal(torch.cat(list(kv.stream(token_ids(), backend=backend, **LONGER)), 1), exact)
    assert kv.report().fallback is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_stream_of_embeddings(name: str) -> None:
    model = tiny(name)
    given = {"inputs_embeds": model.get_input_embeddings()(token_ids()), "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(torch.cat(list(KVCacheManager(model).stream(chunk_size=5, **given)), 1), model.generate(**given))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_a_stream_without_a_cache(name: str) -> None:
    kv = KVCacheManager(tiny(name))
    kv.enabled = False
    chunks = list(kv.stream(token_ids(), chunk_size=5, max_new_tokens=NEW, do_sample=False))
    assert torch.equal(torch.cat(chunks, 1), plain(name)[:, -NEW:])


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoders_output_may_be_given(name: str) -> None:
    model = tiny(name)
    given = {"encoder_outputs": encoded(model, 2), "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(KVCacheManager(model).generate(**given), model.generate(**given))
