"""Where tokens are evicted, rows padded on the left are exact, and say what each says alone."""

import pytest
import torch
from support.families import EVICTING, FAMILIES, cases, logits, tiny
from support.windows import CHUNKS, PADDING, POLICIES, close, padded_prompt, positions_of, reference
from transformers import GenerationConfig

from kvcache import KVCacheManager, Pinned, SizePolicy, SlidingWindow
from kvcache import models as hf

PADDED = [name for name in EVICTING if FAMILIES[name].padded]


@pytest.mark.grid(32)
@pytest.mark.parametrize(
    ("name", "attention", "policy"),
    [
        (name, attention, policy)
        for name, attention in cases(PADDED)
        for policy in (["sinks", "hysteresis"] if name not in ("llama", "opt") else POLICIES)
        if policy != "one-token"  # of a row's pads it would keep none, and a pad must see something
    ],
)
def test_padded_rows_are_exact(name: str, attention: str, policy: str) -> None:
    """With 17 pads and windows of 12 to 14, pads have to leave while the prompt is still coming."""
    model, (ids, mask) = tiny(name, attention), padded_prompt()
    given = {"attention_mask": mask, **positions_of(model, PADDING)}
    theirs = reference(model, ids, POLICIES[policy], PADDING)
    real = mask.bool()
    kv = KVCacheManager(model, POLICIES[policy])
    with hf.exact_windows(model):
        for chunks in (CHUNKS["whole"], CHUNKS["mixed"]):
            ours = logits(model, ids, kv.new_cache(3, mask), chunks, **given)
            assert close(ours[real], theirs[real]), chunks
    ours = logits(model, ids, kv.new_cache(3, mask), CHUNKS["decode"], **given)
    assert close(ours[real], theirs[real])


@pytest.mark.grid(26)
@pytest.mark.parametrize(
    ("policy", "beams"),
    [
        (SlidingWindow(12), 1),
        (SlidingWindow(8, sinks=4), 1),
        (SlidingWindow(8, sinks=4), 3),
        (Pinned(2, SlidingWindow(7, sinks=2)), 1),
    ],
    ids=["window", "sinks", "sinks-beams", "pinned-sinks"],
)
@pytest.mark.parametrize("name", PADDED)
def test_a_padded_row_says_what_it_says_alone(name: str, policy: SizePolicy, beams: int) -> None:
    ids, mask = padded_prompt(20)
    kv = KVCacheManager(tiny(name), policy)
    given = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    together = kv.generate(ids, attention_mask=mask, **given)
    assert kv.report().evicted > 0
    for row, pads in enumerate(PADDING):
        alone = kv.generate(ids[row : row + 1, pads:], **given)
        assert torch.equal(together[row, 20:], alone[0, 20 - pads :]), f"row {row}"


@pytest.mark.parametrize("name", PADDED)
def test_without_a_mask_pads_are_found_as_generate_finds_them(name: str) -> None:
    ids, mask = padded_prompt(20)
    kv = KVCacheManager(tiny(name), SlidingWindow(8, sinks=4))
    given = {"max_new_tokens": 8, "do_sample": False}
    told = kv.generate(ids, attention_mask=mask, **given)
    assert torch.equal(kv.generate(ids, **given), told)
    assert torch.equal(kv.generate(ids, attention_mask=None, **given), told)


def test_the_pad_token_may_be_a_requests_own() -> None:
    ids, mask = padded_prompt(20)
    kv, given = KVCacheManager(tiny("llama"), SlidingWindow(8, sinks=4)), {"max_new_tokens": 12, "do_sample": False}
    told = kv.generate(ids, attention_mask=mask, **given)[:, 20:]
    ids[mask == 0] = 1  # which is in no text here
    assert torch.equal(kv.generate(ids, pad_token_id=1, **given)[:, 20:], told)
    config = GenerationConfig(pad_token_id=1, **given)
    assert torch.equal(kv.generate(ids, generation_config=config)[:, 20:], told)
    # Where the pad token also ends a text, `generate` takes it for text, and so must the cache.
    model, ended = KVCacheManager(tiny("llama")).model, {**given, "pad_token_id": 1, "eos_token_id": 1}
    wide = KVCacheManager(model, SlidingWindow(60, sinks=4))
    assert torch.equal(wide.generate(ids, **ended), model.generate(ids, **ended))
    everything = torch.ones_like(mask)
    assert torch.equal(kv.generate(ids, **ended), kv.generate(ids, attention_mask=everything, **ended))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padded_rows_in_a_stream(name: str) -> None:
    ids, mask = padded_prompt(20)
    kv = KVCacheManager(tiny(name), SlidingWindow(8, sinks=4))
    given = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(torch.cat(list(kv.stream(ids, chunk_size=6, **given)), 1), kv.generate(ids, **given)[:, 20:])
