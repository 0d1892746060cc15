"""Whether tokens can leave a model's cache before others: two that are gone must be as two that are hidden."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvcache.models._probe import TOKENS, Probe, alike
from kvcache.models._seats import Fresh, Seat, as_masks
from kvcache.models._spy import SpyLayer, copied, layers_of, spying_cache


def why_no_eviction(model: Any, seats: Sequence[Seat], fresh: Fresh) -> str | None:
    """Why a token that follows would tell the difference between two that a mask hides and the same two gone.

    Args:
        seats: where the mask is put.
    """
    probe, names, gone = Probe(model), [seat.module for seat in seats], (1, 2)
    visible = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    visible[..., list(gone)] = False
    try:
        with fresh():
            ids = probe.ids[None, :TOKENS]
            cache = spying_cache(model)
            probe.run(ids[:, :-1], cache)
            other = copied(cache)
            for layer in layers_of(other):
                if isinstance(layer, SpyLayer):
                    layer.keep([i for i in range(TOKENS - 1) if i not in gone])
            masked = probe.run(ids[:, -1:], cache, masks=as_masks(model, seats, visible), wanted=names).outputs
            evicted = probe.run(ids[:, -1:], other, wanted=names).outputs
    except Exception as error:  # code of any model; the reason is told where it is asked for
        return f"a short run without two of its tokens failed with {type(error).__name__}: {str(error)[:200]}"
    for name in names:
        if not alike(masked[name], evicted[name]):
            return "without a token that was hidden, it computes something else: its positions count slots"
        if masked[name].dtype != torch.float32:
            break  # deeper layers differ by rounding, and a mixture of experts by more
    return None


def banded(model: nn.Module) -> str | None:
    """A module with a table of which slot sees which, in which the last does not see the first (GPT-Neo); None without one."""
    for name, module in model.named_modules():
        for table in module._buffers.values():
            square = isinstance(table, Tensor) and table.dtype == torch.bool and table.dim() >= 2
            if square and 1 < table.shape[-1] == table.shape[-2] and table.device.type != "meta":
                last = table[..., -1, :]
                if bool(last[..., -1].all()) and not bool(last[..., 0].any()):
                    return str(name)
    return None
