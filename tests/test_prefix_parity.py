"""Behind a prefix, every family says what it says to the whole prompt, in each way to generate, streams included."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from support.families import FAMILIES, ROPE_BY_LENGTH, build, cases, dynamic_cache, logits, tiny, token_ids
from support.prefixes import (
    CLOSE,
    DECODERS,
    FEW,
    GREEDY,
    MODES,
    NEW,
    PREFIX,
    TEXT,
    after,
    all_bits,
    embedded,
    forwarded,
    in_memory,
    manager,
    plain,
    snapshot_of,
    voice,
)
from torch import Tensor
from transformers import GenerationConfig

from kvcache import GeometryError, InputError, KVCacheManager, PositionsError, SlidingWindow

# ---------------------------------------------------------------------- parity: every family


KINDS_ABOVE: dict[str, dict[str, Any]] = {  # with limits above the 9 + 12 tokens that follow the prefix
    "growing": {},
    "static": {"max_cache_length": 40, "static": True},
    "window": {"policy": SlidingWindow(24, sinks=2)},
}


def parity_cases() -> list[Any]:
    """Each family with every kind under its first attention; under the others, in a growing cache."""
    return [
        pytest.param(name, attention, kind, id=f"{name}-{attention}-{kind}")
        for name, attention in cases(DECODERS)
        for kind in KINDS_ABOVE
        if attention == FAMILIES[name].attention[0] or kind == "growing"
        if FAMILIES[name].evicts or kind != "window"
    ]


@pytest.mark.grid(32)
@pytest.mark.parametrize(("name", "attention", "kind"), parity_cases())
def test_the_same_tokens_as_of_the_whole_prompt(name: str, attention: str, kind: str) -> None:
    model = tiny(name, attention)
    kv, expected = manager(model, **KINDS_ABOVE[kind]), plain(name, attention)
    with forwarded(model) as counts:
        assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), expected)
    assert counts == [TEXT.shape[1]] + [1] * (NEW - 1)  # the prefix is not run again
    if name != "mistral-own-window":  # which keeps its own layers only
        assert kv.report().seen == len(PREFIX) + TEXT.shape[1] + NEW - 1


@pytest.mark.grid(27)
@pytest.mark.parametrize("kind", KINDS_ABOVE)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_after_a_prefix_are_those_of_a_full_prefill(name: str, kind: str) -> None:
    if kind == "window" and not FAMILIES[name].evicts:
        pytest.skip("nothing may be evicted")
    model = tiny(name)
    kv, expected = manager(model, **KINDS_ABOVE[kind]), logits(model, after(PREFIX))[:, len(PREFIX) :]
    for chunks in ((9,), (1,) * 9, (2, 1, 6)):
        got = logits(model, TEXT, kv.new_cache(2, prefix="p"), chunks)
        assert (got - expected).abs().max() < CLOSE


@pytest.mark.grid(20)
@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in DECODERS for mode in MODES if mode in ("sampled", "beams") or name in FEW],
)
def test_every_way_to_generate(name: str, mode: str) -> None:
    model, given_ = tiny(name), {"max_new_tokens": NEW, **MODES[mode]}
    kind = "window" if FAMILIES[name].evicts else "growing"
    torch.manual_seed(5)
    expected = model.generate(after(PREFIX), **given_)
    kv = manager(model, **KINDS_ABOVE[kind])
    torch.manual_seed(5)
    assert torch.equal(kv.generate(TEXT, prefix="p", **given_), expected)


def test_scores_of_each_step_are_the_same() -> None:
    model, given_ = tiny("llama"), {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    expected, got = (
        model.generate(after(PREFIX), **given_),
        manager(model).generate(input_ids=TEXT, prefix="p", **given_),
    )
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() < CLOSE


@pytest.mark.parametrize("name", [name for name in DECODERS if FAMILIES[name].padded])
def test_rows_padded_on_the_left_behind_a_prefix(name: str) -> None:
    model, kv = tiny(name), manager(tiny(name))
    padded = TEXT.clone()
    padded[0, :4] = 0
    mask = (padded != 0).long()
    ones = torch.ones(2, len(PREFIX), dtype=torch.long)
    expected = model.generate(after(PREFIX, padded), attention_mask=torch.cat((ones, mask), 1), **GREEDY)
    assert torch.equal(kv.generate(padded, prefix="p", attention_mask=mask, **GREEDY), expected)
    assert torch.equal(kv.generate(padded, prefix="p", **GREEDY), expected)  # pads are found as `generate` finds them
    beams = {**GREEDY, "num_beams": 2}
    assert torch.equal(
        kv.generate(padded, prefix="p", **beams),
        model.generate(after(PREFIX, padded), attention_mask=torch.cat((ones, mask), 1), **beams),
    )
    if not FAMILIES[name].hybrid and name != "mpt":  # which count pads as tokens of their window, or of the distance
        alone = model.generate(after(PREFIX, TEXT[:1, 4:]), **GREEDY)
        assert torch.equal(expected[:1, -NEW:], alone[:, -NEW:])


@pytest.mark.grid(13)
@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in DECODERS for mode in ("greedy", "beams", "several") if mode == "greedy" or name in FEW],
)
def test_embeddings_before_and_behind(name: str, mode: str) -> None:
    model = tiny(name)
    kv, spoken = manager(model), voice(model)
    kv.add_prefix("voice", spoken[None])
    texts = embedded(model, TEXT)
    given_ = {**GREEDY, **MODES.get(mode, {})}
    for prefix, before in (("p", embedded(model, PREFIX)), ("voice", spoken)):
        whole = after(before, texts)
        torch.manual_seed(5)
        expected = model.generate(inputs_embeds=whole, **given_)
        asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {"inputs_embeds": texts})]
        if prefix == "voice":
            asked.append(((TEXT,), {}))
        for args, kwargs in asked:
            torch.manual_seed(5)
            assert torch.equal(kv.generate(*args, prefix=prefix, **kwargs, **given_), expected)
        reference = logits(model, TEXT, primed(model, before))
        assert (logits(model, TEXT, kv.new_cache(2, prefix=prefix)) - reference).abs().max() < CLOSE
    kv.enabled = False
    torch.manual_seed(5)
    assert torch.equal(kv.generate(TEXT, prefix="voice", **given_), expected)


@torch.no_grad()
def primed(model: Any, embeddings: Tensor) -> Any:
    """transformers' own cache after these embeddings, in two rows."""
    held = dynamic_cache(model)
    model(inputs_embeds=embeddings.expand(2, -1, -1), past_key_values=held, use_cache=True)
    return held


def test_embeddings_of_another_dtype_are_those_of_the_models() -> None:
    model = tiny("llama")
    kv, spoken = manager(model), voice(model)
    kv.add_prefix("double", spoken.double())
    kv.add_prefix("float", spoken)
    assert kv.prefix_cache.stats().hits == {"memory": 1}
    got = kv.generate(inputs_embeds=embedded(model, TEXT).double(), prefix="double", **GREEDY)
    assert torch.equal(got, model.generate(inputs_embeds=after(spoken, embedded(model, TEXT)), **GREEDY))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_decoder_says_that_its_decoder_depends_on_the_encoder(name: str) -> None:
    kv = KVCacheManager(tiny(name), prefix_cache=in_memory())
    with pytest.raises(InputError, match=r"is an encoder-decoder: .* keep the encoder's output"):
        kv.add_prefix("p", PREFIX)
    assert kv.prefixes == ()


@pytest.mark.parametrize("rope", ROPE_BY_LENGTH, ids=lambda rope: rope["rope_type"])
def test_a_rotation_that_depends_on_what_follows_is_refused(rope: dict[str, Any]) -> None:
    kv = KVCacheManager(build("llama", rope_parameters=rope, max_position_embeddings=256), prefix_cache=in_memory())
    with pytest.raises(PositionsError, match=f"'{rope['rope_type']}' RoPE .* use a model with another rope_type"):
        kv.add_prefix("p", PREFIX)
    assert kv.prefixes == ()


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_rotations_that_do_not_are_not(rope: dict[str, Any]) -> None:
    parameters = {"rope_theta": 10000.0, **rope}
    if rope["rope_type"] == "yarn":
        parameters["original_max_position_embeddings"] = 16  # the prompt is longer
    model = build("llama", rope_parameters=parameters, max_position_embeddings=64)
    assert torch.equal(manager(model).generate(TEXT, prefix="p", **GREEDY), model.generate(after(PREFIX), **GREEDY))


def state_space(name: str) -> Any:
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    layers = {"layer_types": ["conv", "full_attention"]}
    if name == "Jamba":
        layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2}
    if name == "Qwen3Next":
        layers = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "head_dim": 16}
    config = getattr(transformers, f"{name}Config")(**settings, **layers)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["Jamba", "Lfm2", "Qwen3Next"])
def test_layers_that_keep_a_state_are_refused(name: str) -> None:
    kv = KVCacheManager(state_space(name), prefix_cache=in_memory())
    with pytest.raises(
        GeometryError, match="keeps no keys and values to reuse; prefixes need attention in every layer"
    ):
        kv.add_prefix("p", PREFIX)
    assert kv.prefixes == ()


# ---------------------------------------------------------------------- streams, and the cache turned off


def collected(stream: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(stream), 1)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("name", FEW)
def test_a_stream_and_an_async_stream_say_the_same(name: str, mode: str) -> None:
    model, given_ = tiny(name), {**GREEDY, **MODES.get(mode, {})}
    kv, texts = manager(model), embedded(tiny(name), TEXT)
    kv.add_prefix("voice", voice(model))
    torch.manual_seed(5)
    expected = model.generate(after(PREFIX), **given_)[:, -NEW:]
    torch.manual_seed(5)
    chunks = list(kv.stream(TEXT, prefix="p", chunk_size=5, **given_))
    assert [chunk.shape[1] for chunk in chunks] == [5, 5, 2]
    assert torch.equal(torch.cat(chunks, 1), expected)

    async def gather() -> Tensor:
        return torch.cat([chunk async for chunk in kv.astream(TEXT, prefix="p", chunk_size=5, **given_)], 1)

    torch.manual_seed(5)
    assert torch.equal(asyncio.run(gather()), expected)
    torch.manual_seed(5)
    expected = model.generate(inputs_embeds=after(voice(model), texts), **given_)
    torch.manual_seed(5)
    assert torch.equal(collected(kv.stream(inputs_embeds=texts, prefix="voice", **given_)), expected)


def test_streams_of_one_prefix_at_once_do_not_mix() -> None:
    model, texts = tiny("llama"), [token_ids(2, 9, seed=seed) for seed in range(4)]
    kv = manager(model, SlidingWindow(6, sinks=2))
    expected = [kv.generate(text, prefix="p", **GREEDY)[:, -NEW:] for text in texts]
    before = all_bits(snapshot_of(kv))

    async def collect(text: Tensor) -> Tensor:
        return torch.cat([chunk async for chunk in kv.astream(text, prefix="p", chunk_size=2, **GREEDY)], 1)

    async def together() -> list[Tensor]:
        return list(await asyncio.gather(*map(collect, texts)))

    for ours, alone in zip(asyncio.run(together()), expected, strict=True):
        assert torch.equal(ours, alone)
    left = kv.stream(texts[0], prefix="p", chunk_size=2, **GREEDY)
    next(left)
    left.close()
    assert torch.equal(kv.generate(texts[0], prefix="p", **GREEDY)[:, -NEW:], expected[0])
    assert all_bits(snapshot_of(kv)) == before


@pytest.mark.parametrize("name", DECODERS)
def test_without_a_cache_the_prefix_is_computed_with_the_rest(name: str) -> None:
    model, kv, expected = tiny(name), manager(tiny(name)), plain(name)
    kv.enabled = False
    with forwarded(model) as counts:
        assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), expected)
    assert counts == list(range(22, 22 + NEW))
    assert not kv.report().enabled
    assert torch.equal(collected(kv.stream(TEXT, prefix="p", **GREEDY)), plain(name)[:, -NEW:])
    kv.enabled = True
    assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), plain(name))


def test_a_config_that_turns_caches_off_has_prefixes() -> None:
    model = build("llama", use_cache=False)
    assert torch.equal(manager(model).generate(TEXT, prefix="p", **GREEDY), plain("llama"))


@pytest.mark.parametrize("asked", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_ways_to_run_a_prompt_that_would_run_the_prefix_again_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"give prefix or {next(iter(asked))}, not both"):
        manager(tiny("llama")).generate(TEXT, prefix="p", **GREEDY, **asked)


@pytest.mark.parametrize("asked", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_they_are_refused_in_a_generation_config_too(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"give prefix or {next(iter(asked))}, not both"):
        manager(tiny("llama")).generate(TEXT[:1], prefix="p", generation_config=GenerationConfig(**GREEDY, **asked))
