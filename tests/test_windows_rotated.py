"""Keys that are rotated again to where they stand among those kept; what would be silently wrong is refused."""

from functools import cache
from typing import Any

import pytest
import torch
from support.families import ROPE_BY_LENGTH, ROTATING, build, dynamic_cache, logits, tiny, token_ids
from support.windows import (
    CLOSE,
    as_given,
    assert_unchanged,
    close,
    kept_after_each,
    padded_prompt,
    policy_mask,
    snapshot,
)

from kvcache import KVCacheManager, MaxBytes, MaxTokens, Pinned, PolicyError, PositionsError, SizePolicy, SlidingWindow
from kvcache import models as hf

# ---------------------------------------------------------------------- re-rotated positions


LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}


@cache
def one_layer(name: str) -> Any:
    """One layer: its keys and values depend on token and position alone, so that recomputing them is the reference."""
    settings: dict[str, Any] = {"num_hidden_layers": 1}
    if name in ("gemma2", "gemma3"):
        settings["layer_types"] = ["full_attention"]
    if name == "llama3-scaling":
        return build("llama", **settings, **LLAMA3)
    if name == "linear-scaling":
        return build("llama", **settings, **LINEAR)
    return build(name, **settings)


@pytest.mark.grid(12)
@pytest.mark.parametrize("policy", [SlidingWindow(12, sinks=4), Pinned(3, MaxTokens(10, 6))], ids=["sinks", "pinned"])
@pytest.mark.parametrize("name", [*ROTATING, "llama3-scaling", "linear-scaling"])
def test_rerotated_is_the_kept_text_run_as_if_nothing_had_been_between(name: str, policy: SizePolicy) -> None:
    """StreamingLLM: the sinks and the window, fed as one contiguous text."""
    model, ids = one_layer(name), token_ids(1, 60)
    ours = logits(model, ids, KVCacheManager(model, policy, positions="rerotated").new_cache(), (1,) * 60)
    absolute = logits(model, ids, KVCacheManager(model, policy).new_cache(), (1,) * 60)
    apart = 0.0
    for token, kept in enumerate(kept_after_each(policy, 60)):
        theirs = logits(model, ids[:, kept])[:, -1]
        assert close(ours[:, token], theirs), token
        apart = max(apart, float((absolute[:, token] - theirs).abs().max()))
    assert apart > 50 * CLOSE  # absolute positions are something else, so this could have failed


@pytest.mark.parametrize("name", ["llama", "llama3-scaling", "cohere", "gpt-neox", "stablelm"])
def test_a_rerotated_chunk_sees_the_sinks_where_its_first_token_does(name: str) -> None:
    """One turn for a chunk: sinks, what is kept for its first token, and the chunk, as one contiguous text."""
    model, ids, policy = one_layer(name), token_ids(1, 80), SlidingWindow(12, sinks=4)
    held = KVCacheManager(model, policy, positions="rerotated").new_cache()
    with hf.exact_windows(model):
        ours = logits(model, ids, held, (20,) * 4)
    history, mask = kept_after_each(policy, 80), policy_mask(policy, 80)
    for start in (20, 40, 60):
        text = history[start] + list(range(start + 1, start + 20))
        theirs = logits(model, ids[:, text], attention_mask=as_given(model, mask[:, :, text][:, :, :, text]))
        assert close(ours[:, start : start + 20], theirs[:, -20:])


def test_rerotated_while_nothing_has_left_is_absolute() -> None:
    model = tiny("llama")
    kv = KVCacheManager(model, SlidingWindow(60, sinks=4), positions="rerotated")
    assert torch.equal(
        logits(model, token_ids(), kv.new_cache(2), (7, 13)), logits(model, token_ids(), dynamic_cache(model), (7, 13))
    )


@pytest.mark.parametrize("name", ROTATING)
def test_generate_rerotated(name: str) -> None:
    """A one-layer model's greedy text, token by token from the kept text alone."""
    model, policy = one_layer(name), SlidingWindow(12, sinks=4)
    ids = KVCacheManager(model, policy, positions="rerotated").generate(
        token_ids(1, 10), max_new_tokens=40, do_sample=False
    )
    for token, kept in enumerate(kept_after_each(policy, 49)):
        if token >= 9:
            under = logits(model, ids[:, kept])[0, -1]
            assert under[ids[0, token + 1]] > under.max() - CLOSE


# ---------------------------------------------------------------------- what would be silently wrong is refused


@pytest.mark.parametrize(
    "policy", [SlidingWindow(8), MaxTokens(8), MaxBytes("1MiB"), Pinned(2, SlidingWindow(8))], ids=repr
)
@pytest.mark.parametrize("name", ["t5", "bloom", "mpt", "falcon-alibi"])
def test_positions_that_count_slots_refuse_eviction(name: str, policy: SizePolicy) -> None:
    with pytest.raises(PositionsError, match=r"cannot be evicted.*KeepAll"):
        KVCacheManager(tiny(name), policy)
    kv = KVCacheManager(tiny(name))
    held = kv.new_cache()
    logits(tiny(name), token_ids(1), held)
    before = snapshot(held)
    with pytest.raises(PositionsError, match="cannot be evicted"):
        kv.trim(held, 8)
    assert_unchanged(held, before)


@pytest.mark.parametrize("name", ["gpt2", "opt", "whisper-decoder", "bart", "t5", "bloom", "mpt", "falcon-alibi"])
def test_keys_without_rotary_embeddings_refuse_rerotation(name: str) -> None:
    with pytest.raises(PositionsError):
        KVCacheManager(tiny(name), SlidingWindow(8, sinks=2), positions="rerotated")


@pytest.mark.parametrize("rope", ROPE_BY_LENGTH, ids=lambda rope: rope["rope_type"])
def test_frequencies_that_change_with_the_length_refuse_rerotation(rope: dict[str, Any]) -> None:
    model = build("llama", rope_parameters=rope, max_position_embeddings=256)
    with pytest.raises(PositionsError, match=rope["rope_type"]):
        KVCacheManager(model, SlidingWindow(8, sinks=2), positions="rerotated")
    KVCacheManager(model, SlidingWindow(8, sinks=2))  # in their own places they may stay


def test_padded_rows_refuse_rerotation() -> None:
    ids, mask = padded_prompt(20)
    kv = KVCacheManager(tiny("llama"), SlidingWindow(8, sinks=2), positions="rerotated")
    with pytest.raises(PositionsError, match="padding"):
        kv.generate(ids, attention_mask=mask, max_new_tokens=4)
    with pytest.raises(PositionsError, match="padding"):
        kv.new_cache(3, mask)
    kv.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=4)  # one that has none


def test_an_unknown_word_for_positions_is_refused() -> None:
    with pytest.raises(PositionsError, match="'absolute' or 'rerotated'"):
        KVCacheManager(tiny("llama"), SlidingWindow(8), positions="relative")  # type: ignore[arg-type]


def test_a_model_with_only_layers_of_its_own_refuses_a_policy() -> None:
    with pytest.raises(PolicyError, match="no layer to work on"):
        KVCacheManager(tiny("mistral-own-window"), SlidingWindow(8))
