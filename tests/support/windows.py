"""Where tokens are evicted: the reference is one forward pass under a mask.

The mask says which tokens each token sees. It comes from a list that a policy is played on by hand, token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcache import MaxTokens, Pinned, SizePolicy, SlidingWindow
from kvcache import models as hf
from support.families import OWN_WINDOW, logits, tiny, token_ids

LENGTH = 44
# A chunk and the whole sum in other orders: in fp32 that is some 1e-6 on these logits, which are up to 5 in size. What
# a wrong window costs is 0.01 and more; `test_the_reference_can_tell` holds that apart.
CLOSE = 2e-5


@dataclass(frozen=True)
class Halving(SizePolicy):
    """A user's policy: down to half of what has just become too much."""

    limit: int
    pinned: int = 0

    def keep(self, count: int) -> int:
        return count if count <= self.limit else max(self.pinned + 1, self.limit // 2)


POLICIES: dict[str, SizePolicy] = {
    "window": SlidingWindow(12),
    "sinks": SlidingWindow(8, sinks=4),
    "one-token": SlidingWindow(1),
    "hysteresis": MaxTokens(14, low_water=9),
    "pinned": Pinned(3, MaxTokens(10, low_water=6)),
    "pinned-sinks": Pinned(2, SlidingWindow(7, sinks=2)),
    "user": Halving(13, pinned=2),
}
CHUNKS: dict[str, tuple[int, ...]] = {
    "whole": (LENGTH,),
    "halves": (22, 22),
    "mixed": (20, 7, 9, 1, 1, 1, 5),
    "tokens": (1,) * LENGTH,
    "decode": (9,) + (1,) * (LENGTH - 9),
}


def kept_after_each(policy: SizePolicy, tokens: int, pads: int = 0) -> list[list[int]]:
    """Which positions a row holds after each of its tokens came, one by one. Pads on the left leave first."""
    held: list[int] = []
    history = []
    for position in range(tokens):
        held.append(position)
        for _ in range(len(held) - policy.keep(len(held))):
            held.pop(0 if held[0] < pads else policy.pinned)
        history.append(list(held))
    return history


def policy_mask(policy: SizePolicy, tokens: int = LENGTH, padding: Sequence[int] = (0,)) -> Tensor:
    """What each token sees, ``[rows, 1, tokens, tokens]``, True for "sees". Pads see themselves only."""
    mask = torch.zeros(len(padding), 1, tokens, tokens, dtype=torch.bool)
    for row, pads in enumerate(padding):
        for query, held in enumerate(kept_after_each(policy, tokens, pads)):
            mask[row, 0, query, [p for p in held if p >= pads] + [query]] = True
    return mask


def own_window_mask(tokens: int = LENGTH, padding: Sequence[int] = (0,)) -> Tensor:
    """The same for the layers that keep the window of the model's own config."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    first = torch.tensor(padding)[:, None, None]
    return (((key <= query) & (key > query - OWN_WINDOW) & (key >= first)) | (key == query))[:, None]


def as_given(model: Any, mask: Tensor) -> Tensor:
    """A 4-D mask as the attention takes it: sdpa a bool, eager the lowest float where not."""
    if model.config._attn_implementation == "sdpa":
        return mask
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


def positions_of(model: Any, padding: Sequence[int] = (0,), tokens: int = LENGTH) -> dict[str, Any]:
    """Positions that start at each row's first real token; for models that take them."""
    if model.config.is_encoder_decoder or model.config.model_type == "whisper":
        return {}
    return {"position_ids": (torch.arange(tokens)[None] - torch.tensor(padding)[:, None]).clamp_min(0)}


def reference(model: Any, ids: Tensor, policy: SizePolicy, padding: Sequence[int] = (0,)) -> Tensor:
    """One forward pass without a cache, under the policy's mask."""
    mask: Any = as_given(model, policy_mask(policy, ids.shape[1], padding))
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or []):
        own = as_given(model, own_window_mask(ids.shape[1], padding))
        mask = {"full_attention": mask, "sliding_attention": own}
    return logits(model, ids, attention_mask=mask, **positions_of(model, padding, ids.shape[1]))


@cache
def expected(name: str, attention: str, policy: SizePolicy) -> Tensor:
    return reference(tiny(name, attention), token_ids(2, LENGTH), policy)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < CLOSE)


PADDING = (0, 5, 17)


def padded_prompt(tokens: int = LENGTH) -> tuple[Tensor, Tensor]:
    ids, mask = token_ids(3, tokens), torch.ones(3, tokens, dtype=torch.long)
    for row, pads in enumerate(PADDING):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask


def snapshot(held: Any) -> list[Any]:
    result = []
    for layer in hf.cache_layers(held):
        tensors = [None if t is None else t.clone() for t in (layer.keys, layer.values)]
        result.append((layer.get_seq_length(), *tensors))
    return result


def assert_unchanged(held: Any, before: list[Any]) -> None:
    for (seen, keys, values), (seen_before, keys_before, values_before) in zip(snapshot(held), before, strict=True):
        assert seen == seen_before
        for now, then in ((keys, keys_before), (values, values_before)):
            assert (now is None) == (then is None)
            assert now is None or torch.equal(now, then)
