"""What is refused where a prefix cannot stand, and what a request may change meanwhile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import FAMILIES, build, logits, tiny, token_ids
from support.prefixes import (
    CLOSE,
    GREEDY,
    PREFIX,
    TEXT,
    after,
    all_bits,
    cold,
    embedded,
    forwarded,
    held_states,
    in_memory,
    in_place,
    manager,
    plain,
    snapshot_of,
    unchanged,
    voice,
)
from torch import Tensor, nn
from transformers import DynamicCache

from kvcache import (
    CapacityError,
    InputError,
    KVCacheManager,
    MaxBytes,
    MemoryStore,
    PolicyError,
    PrefixKey,
    SlidingWindow,
    SpeakerCache,
    model_fingerprint,
)
from kvcache.models import trains

# ---------------------------------------------------------------------- what is refused


LLAMA_WIDTH = 64
NO_PREFIX: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], r"token ids \[tokens\] or embeddings \[tokens, dim\] of one row, got \[1, 2\]"),
    "nothing": (None, "of one row, got None"),
    "a number": (torch.tensor(3), r"of one row, got torch.int64 \[\]"),
    "a mask": (torch.ones(3, dtype=torch.bool), r"of one row, got torch.bool \[3\]"),
    "complex": (torch.ones(3, dtype=torch.complex64), r"token ids .* or embeddings .* got torch.complex64 \[3\]"),
    "empty": (torch.zeros(0, dtype=torch.long), r"at least one; got torch.int64 \[0\]"),
    "an empty row": (torch.zeros(1, 0, dtype=torch.long), r"at least one; got torch.int64 \[0\]"),
    "no embeddings": (torch.zeros(0, LLAMA_WIDTH), r"at least one; got torch.float32 \[0, 64\]"),
    "two rows": (token_ids(2, 4), "one row, got 2; add each as a prefix of its own"),
    "two rows of embeddings": (torch.zeros(2, 4, LLAMA_WIDTH), "one row, got 2; add each as a prefix of its own"),
    "a row of floats": (torch.zeros(4), r"embeddings \[tokens, dim\], at least one; got torch.float32 \[4\]"),
    "ids in three dimensions": (token_ids(1, 4)[None], r"token ids \[tokens\] .* got torch.int64 \[1, 1, 4\]"),
    "embeddings in four": (torch.zeros(1, 1, 4, LLAMA_WIDTH), r"got torch.float32 \[1, 1, 4, 64\]"),
}


@pytest.mark.parametrize("wrong", NO_PREFIX)
def test_what_is_no_prefix_is_refused(wrong: str) -> None:
    given_, words = NO_PREFIX[wrong]
    kv = manager(tiny("llama"))
    with unchanged(kv), pytest.raises(InputError, match=words):
        kv.add_prefix("q", given_)
    with unchanged(kv), pytest.raises(InputError, match=words):
        kv.add_prefix("p", given_)
    assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), plain("llama"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"inputs": TEXT, "prefix": "q"}, r"no prefix 'q' \(known: 'p'\); add it with add_prefix\(\)"),
    "no inputs": ({}, r"'p' needs inputs to stand before: token ids \[rows, tokens\] or inputs_embeds .* got None"),
    "one dimension": ({"inputs": TEXT[0]}, r"needs inputs .* got \[9\]"),
    "no tokens": ({"inputs": TEXT[:, :0]}, r"at least one token, got \[2, 0\]"),
    "flat embeddings": ({"inputs_embeds": torch.zeros(9, LLAMA_WIDTH)}, r"needs inputs .* got \[9, 64\]"),
    "no embeddings": ({"inputs_embeds": torch.zeros(2, 0, LLAMA_WIDTH)}, r"at least one token, got \[2, 0, 64\]"),
    "a cache": ({"inputs": TEXT, "past_key_values": DynamicCache()}, "prefix or past_key_values, not both; new_cache"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_request_that_a_prefix_cannot_stand_before_is_refused(wrong: str) -> None:
    asked, words = REFUSED[wrong]
    asked = {"prefix": "p", **GREEDY, **asked}
    inputs = asked.pop("inputs", None)
    kv = manager(tiny("llama"))
    kv.generate(TEXT, prefix="p", **GREEDY)
    for call in (kv.generate, lambda *args, **kwargs: next(kv.stream(*args, **kwargs))):
        with unchanged(kv), pytest.raises(InputError, match=words):
            call(inputs, **asked)
        kv.enabled = False
        with unchanged(kv), pytest.raises(InputError, match=words):
            call(inputs, **asked)
        kv.enabled = True
    assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), plain("llama"))


def test_an_unknown_name_says_what_is_known() -> None:
    kv = KVCacheManager(tiny("llama"), prefix_cache=in_memory())
    calls: list[Callable[[], Any]] = [
        lambda: kv.new_cache(1, prefix="q"),
        lambda: kv.remove_prefix("q"),
        lambda: kv.generate(TEXT, prefix="q"),
    ]
    for call in calls:
        with (
            unchanged(kv),
            pytest.raises(InputError, match=r"no prefix 'q' \(known: none yet\); add it with add_prefix"),
        ):
            call()
    kv.add_prefix("a", PREFIX)
    kv.add_prefix("b", PREFIX)
    for call in calls:
        with unchanged(kv), pytest.raises(InputError, match="known: 'a', 'b'"):
            call()


def test_a_model_in_training_is_refused() -> None:
    model = build("llama")
    kv = manager(model)
    model.train()
    with unchanged(kv), pytest.raises(InputError, match=r"training mode, where dropout .* call model.eval\(\)"):
        kv.add_prefix("q", PREFIX)
    model.eval()
    kv.add_prefix("q", PREFIX)
    assert torch.equal(kv.generate(TEXT, prefix="q", **GREEDY), plain("llama"))


class Dropping(nn.Dropout):
    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states)


PARTS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "dropout": (lambda: nn.Dropout(0.5), r"layers.0.mlp.1 is in training mode"),
    "dropout inside": (lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5)), r"mlp.1.1 is in training mode"),
    "a class of its own": (lambda: Dropping(0.5), r"layers.0.mlp.1 is in training mode"),
    "nothing that asks": (nn.Identity, None),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_was_added_after_eval_is_refused_if_training_matters(part: str) -> None:
    model, (make, refused) = build("llama"), PARTS[part]
    kv = manager(model)
    mlp = model.model.layers[0].mlp
    model.model.layers[0].mlp = nn.Sequential(mlp, make())
    assert not model.training
    if refused is not None:
        with unchanged(kv), pytest.raises(InputError, match=refused):
            kv.add_prefix("q", PREFIX)
        model.eval()
    kv.add_prefix("q", PREFIX)
    assert torch.equal(kv.generate(TEXT, prefix="q", **GREEDY), plain("llama"))


@pytest.mark.parametrize("name", FAMILIES)
def test_eval_leaves_no_part_in_training(name: str) -> None:
    assert trains(tiny(name)) is None


@pytest.mark.parametrize("given_", ["mask", "ids", "embeddings"])
def test_padded_rows_are_refused_where_tokens_leave(given_: str) -> None:
    model, padded = tiny("llama"), TEXT.clone()
    padded[1, :2] = 0
    mask = (padded != 0).long()
    asked: dict[str, Any] = {"inputs": TEXT, "attention_mask": mask}
    if given_ == "ids":
        asked = {"inputs": padded}
    if given_ == "embeddings":
        asked = {"inputs_embeds": embedded(model, TEXT), "attention_mask": mask}
    kv = manager(model, SlidingWindow(6))
    kv.generate(TEXT, prefix="p", **GREEDY)
    with (
        unchanged(kv),
        pytest.raises(InputError, match=r"padded behind a prefix .* use KeepAll\(\), or run rows .* apart"),
    ):
        kv.generate(prefix="p", **asked, **GREEDY)
    kv.generate(prefix="p", **{**asked, "attention_mask": torch.ones_like(TEXT)}, **GREEDY)


def test_what_is_too_long_is_refused_before_anything_changes() -> None:
    model = tiny("llama")
    kv = manager(model, max_cache_length=20, static=True)
    for long in (token_ids(1, 20)[0], token_ids(1, 21)[0]):
        words = f"'q' has {len(long)} tokens, max_cache_length is 20; raise max_cache_length, or shorten the prefix"
        with unchanged(kv), forwarded(model) as counts, pytest.raises(CapacityError, match=words):
            kv.add_prefix("q", long)
        assert counts == []
    kv.add_prefix("q", token_ids(1, 19, seed=9)[0])
    before = all_bits(snapshot_of(kv))
    with pytest.raises(CapacityError, match=r"cannot append 9 tokens: 13 of 20 slots used; raise .*max_cache_length"):
        kv.generate(TEXT, prefix="p", **GREEDY)
    held = kv.new_cache(2, prefix="p")
    with unchanged(kv), pytest.raises(CapacityError):
        logits(model, TEXT, held)
    assert int(held.get_seq_length()) == 13
    expected = logits(model, after(PREFIX, TEXT[:, :7]))[:, 13:]
    assert (logits(model, TEXT[:, :7], held) - expected).abs().max() < CLOSE
    assert all_bits(snapshot_of(kv)) == before
    short = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        kv.generate(TEXT[:, :3], prefix="p", **short), model.generate(after(PREFIX, TEXT[:, :3]), **short)
    )


def test_a_policy_that_has_no_room_behind_the_prefix_says_so() -> None:
    kv = manager(tiny("llama"), SlidingWindow(12), max_cache_length=20)
    with unchanged(kv), pytest.raises(PolicyError, match=r"Pinned\(count=13.* keeps up to 25 tokens, .* is 20; lower"):
        kv.new_cache(1, prefix="p")
    kv = manager(tiny("llama"), MaxBytes("6KB"))
    with (
        unchanged(kv),
        pytest.raises(PolicyError, match=r"does not hold one token .* beside 6656 bytes .* at least 7168"),
    ):
        kv.new_cache(1, prefix="p")


def test_a_table_of_positions_ends_behind_a_prefix_too() -> None:
    model, long = tiny("gpt2"), token_ids(1, 250)[0]
    kv = manager(model, prefix=long)
    with pytest.raises(CapacityError, match=r"cannot run 1 tokens at position 256: this model learned 256 positions"):
        kv.generate(TEXT[:, :4], prefix="p", **GREEDY)
    fits = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(after(long, TEXT[:, :4]), **fits)
    assert torch.equal(kv.generate(TEXT[:, :4], prefix="p", **fits), expected)


# ---------------------------------------------------------------------- what a request may change meanwhile


def test_a_prefix_is_not_computed_in_training_mode_by_a_request_either() -> None:
    model = build("llama", attention_dropout=0.5)
    kv = manager(model)
    kv.prefix_cache.evict(PrefixKey(model_fingerprint(model), PREFIX))
    model.train()
    with pytest.raises(InputError, match="training mode"):
        kv.new_cache(1, prefix="p")


def test_a_cache_for_padded_rows_behind_a_prefix_is_refused_where_tokens_leave() -> None:
    kv = manager(tiny("llama"), SlidingWindow(6))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(InputError, match="padded"):
        kv.new_cache(2, mask, prefix="p")


def test_a_prefix_of_embeddings_survives_a_change_of_dtype() -> None:
    model = build("llama")
    kv = manager(model, prefix=voice(model))
    spoken = voice(model).half()
    model.half()
    for ours, expected in zip(held_states(kv.new_cache(1, prefix="p")), cold(model, spoken), strict=True):
        assert (ours - expected).abs().max() < 0.01  # of values of size 1, in fp16


def test_a_pin_follows_the_weights() -> None:
    model = build("llama")
    store = MemoryStore("20KB")  # two of 13 tokens, not three
    kv = KVCacheManager(model, prefix_cache=SpeakerCache(store))
    kv.add_prefix("voice", PREFIX, pin=True)
    in_place(model)
    kv.new_cache(1, prefix="voice")
    for seed in range(20, 23):
        kv.add_prefix("other", token_ids(1, 13, seed=seed)[0])
    assert kv.prefix_cache.get(PrefixKey(model_fingerprint(model), PREFIX)) is not None


def test_a_name_that_is_given_anew_unpins_what_it_named() -> None:
    kv = KVCacheManager(tiny("llama"), prefix_cache=SpeakerCache(MemoryStore("20KB")))
    kv.add_prefix("voice", PREFIX, pin=True)
    for seed in range(20, 23):
        kv.add_prefix("voice", token_ids(1, 13, seed=seed)[0], pin=True)
    assert kv.prefix_cache.get(PrefixKey(model_fingerprint(kv.model), token_ids(1, 13, seed=22)[0])) is not None


def test_a_text_that_runs_past_the_table_of_positions_is_refused_as_such() -> None:
    kv = manager(tiny("gpt2"), prefix=token_ids(1, 250)[0])
    with pytest.raises(CapacityError, match="256 positions"):
        kv.generate(TEXT, prefix="p", **GREEDY)


def test_a_prefix_longer_than_the_table_of_positions_is_refused() -> None:
    kv = KVCacheManager(tiny("gpt2"), prefix_cache=in_memory())
    with unchanged(kv), pytest.raises(CapacityError, match="256 positions"):
        kv.add_prefix("p", token_ids(1, 300)[0])


@pytest.mark.parametrize(
    "wrong", [torch.tensor([4, 97]), torch.tensor([-1, 4]), torch.zeros(5, 63)], ids=["beyond", "negative", "width"]
)
def test_what_the_model_cannot_read_is_refused(wrong: Tensor) -> None:
    kv = manager(tiny("llama"))
    with unchanged(kv), pytest.raises(InputError):
        kv.add_prefix("q", wrong)


@pytest.mark.parametrize("shape", [(2, 22), (2, 8), (1, 9), (2, 1, 9, 9)], ids=str)
def test_a_mask_of_another_shape_than_the_inputs_is_refused(shape: tuple[int, ...]) -> None:
    kv = manager(tiny("llama"))
    with pytest.raises(InputError, match="attention_mask"):
        kv.generate(TEXT, prefix="p", attention_mask=torch.ones(shape, dtype=torch.long), **GREEDY)


def test_autocast_makes_another_prefix() -> None:
    kv = KVCacheManager(build("llama"), prefix_cache=in_memory())
    with torch.autocast("cpu", torch.bfloat16):
        kv.add_prefix("p", PREFIX)
    assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), plain("llama"))


def test_a_stream_behind_a_prefix_reads_the_one_of_its_own_autocast() -> None:
    kv, model = manager(build("llama")), build("llama")
    given: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    exact = model.generate(after(PREFIX), **given)[:, -40:]
    for backend in ("off", "eager"):
        with torch.autocast("cpu", torch.bfloat16):
            expected = model.generate(after(PREFIX), **given)[:, -40:]
            asked = kv.stream(TEXT, prefix="p", backend=backend, **given)
        assert not torch.equal(expected, exact)  # else this would show nothing
        assert torch.equal(torch.cat(list(asked), 1), expected)
        asked = kv.stream(TEXT, prefix="p", backend=backend, **given)
        with torch.autocast("cpu", torch.bfloat16):
            said = torch.cat(list(asked), 1)
        assert torch.equal(said, exact)


def test_ids_given_with_their_embeddings_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="token ids or as inputs_embeds, not as both"):
        manager(model).generate(input_ids=TEXT, inputs_embeds=embedded(model, TEXT), prefix="p", **GREEDY)
