"""Models whose cache keeps everything, and whose attention is the plain list's of a policy that ranks."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache import H2O, TOVA, KeyDiff, KeyNorm, Pinned, SizePolicy, SnapKV
from support.families import build, logits
from support.ranking import FewExpected, Reference

REFERENCE = "ranking_reference"
PLACES: dict[int, Reference] = {}  # by layer
PLAYED: list[Any] = [
    None,
    None,
    (),
]  # policies, padding and rotary frequencies that the next reference model is run with


def _reference_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of a model whose cache keeps all, over what a `Reference` for each layer says is still there."""
    policies, padding, frequencies = PLAYED
    policy = policies[module.layer_idx]
    if getattr(module, "is_sliding", False) or policy.ranking is None:
        plain: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return cast(tuple[Tensor, None], plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs))
    rows, heads, fresh, _ = query.shape
    if module.layer_idx not in PLACES:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        PLACES[module.layer_idx] = Reference(policy, padding, key.shape[1], heads // key.shape[1], scale, frequencies)
    found = PLACES[module.layer_idx].append(query, key[:, :, -fresh:], value[:, :, -fresh:])
    out = torch.zeros(rows, fresh, heads, value.shape[3])
    for b in range(rows):
        for h in range(heads):
            for t in range(fresh):
                if found[b][h][t] is not None:
                    out[b, t, h] = torch.tensor(found[b][h][t])
    return out.to(query.dtype), None


AttentionInterface.register(REFERENCE, _reference_attention)
AttentionMaskInterface.register(REFERENCE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class _Beams(DynamicCache):
    """Keeps everything; where beams are reordered, so are the references."""

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        for place in PLACES.values():
            place.select(beam_idx.tolist())


def reference_of(family: str, policy: Any, padding: Sequence[int]) -> tuple[Any, DynamicCache]:
    """A model like `tiny(family)` that plays a policy by hand, and the cache that it needs."""
    model = build(family)
    layers = model.config.get_text_config().num_hidden_layers
    rotary = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    frequencies: list[Any] = [
        getattr(one, "inv_freq", getattr(one, "full_attention_inv_freq", None)) for one in rotary[:1]
    ]
    PLAYED[:] = [
        [policy] * layers if isinstance(policy, SizePolicy) else list(policy),
        list(padding),
        frequencies[0].tolist() if frequencies else [],
    ]
    PLACES.clear()
    model.set_attn_implementation(REFERENCE)
    return model, _Beams(config=model.config)


MODELS = ["llama", "qwen3", "mistral", "gpt2", "gpt-neox", "phi3", "gemma3", "opt"]
LIMITED: dict[str, SizePolicy] = {
    "heavy": H2O(14, sinks=2, window_size=4, low_water=11),
    "heavy-sum": H2O(14, sinks=0, window_size=3, average=False),
    "snapkv": SnapKV(16, sinks=1, window_size=6, kernel=3, low_water=16),
    "tova": TOVA(12, sinks=1, low_water=12),
    "expected": FewExpected(14, sinks=2, window_size=4, n_future_positions=6, low_water=14),
    "norm": KeyNorm(13, sinks=2, window_size=4),
    "diff": KeyDiff(13, sinks=2, window_size=4, low_water=13),
    "pinned": Pinned(3, SnapKV(12, sinks=1, window_size=4, kernel=5)),
}
EXACT = 2e-4  # the reference sums in fp64; what another kept token costs is 0.01 and more: see the test of that


def padded(lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Rows of these lengths padded on the left: ids, mask, pads."""
    most, generator = max(lengths), torch.Generator().manual_seed(seed)
    # No token twice: a rotary key of the first layer is as long wherever its token stands, and KeyNorm could not tell.
    ids = torch.stack([torch.randperm(90, generator=generator)[:most] + 3 for _ in lengths])
    pads = [most - length for length in lengths]
    mask = (torch.arange(most) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask, pads


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def reference_logits(
    family: str, policy: Any, ids: Tensor, mask: Tensor, pads: Sequence[int], chunks: Sequence[int]
) -> Tensor:
    model, cache = reference_of(family, policy, pads)
    return logits(model, ids, cache, chunks, attention_mask=mask, position_ids=places(mask))


CHUNKINGS = {"decode": [18] + [1] * 16, "chunks": [7, 12, 1, 9, 1, 1, 3]}
