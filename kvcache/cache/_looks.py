"""What is known of the attention that tokens received: read a second time, and read from a file."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvcache.cache._ranking import ScoringContext
from kvcache.errors import CorruptError


def looked_at_most(seen: ScoringContext, part: range, sinks: int, stored: int) -> Tensor:
    """The most attention that each token of a part got from its repetition, as KVzip scores it (arXiv:2505.23416).

    Attention is divided among the sinks, that part and its repetition, which is not stored. Nothing has left and no row has
    pads, so tokens are where their positions say.

    Args:
        seen: all tokens, and the queries of the repetition.
        part: positions that are repeated.
        sinks: tokens at the beginning that are seen besides.
        stored: tokens that are not of the repetition.

    Returns:
        The attention that each token received, ``[batch, KV heads, stored]``, with that of the part as it is now.
    """
    fresh = seen.queries.shape[2]
    assert seen.received is not None
    sinks = min(sinks, part.start)
    spans = ((0, sinks), (part.start, part.stop), (seen.length, seen.length + fresh))
    places = torch.cat([torch.arange(n, m) for n, m in spans]).to(seen.keys.device)
    divided = replace(
        seen,
        keys=seen.keys[:, :, places],
        values=seen.values[:, :, places],
        positions=seen.positions[:, :, places],
        length=seen.length + fresh,
    )
    most = seen.received[:, :, part.start : part.stop]
    for weights, _ in divided.parts():
        by_head = weights[..., sinks : sinks + len(part)].amax(2).view(*most.shape[:2], seen.groups, -1)
        most = torch.maximum(most, by_head.amax(2))
    found = seen.received[:, :, :stored].clone()
    found[:, :, part.start : part.stop] = most
    return found


def check_looks(tensors: Mapping[str, Tensor], keys: Tensor, seen: int, stored: int, most: int) -> None:
    """Raise `CorruptError` for positions, attention received or queries that do not fit what is stored.

    Args:
        tensors: ``at``, ``scaling`` and, where the policy knows them, ``mass`` and ``queries``.
        keys: of no token, ``[batch, KV heads, 0, head_dim]``.
        seen, stored: tokens.
        most: queries that the policy looks at.
    """
    at, scaling, mass, queries = (tensors.get(name) for name in ("at", "scaling", "mass", "queries"))
    shape = (*keys.shape[:2], stored)
    if stored and (
        at is None
        or (tuple(at.shape), at.dtype) != (shape, torch.int32)
        or not bool((at.diff(dim=2) > 0).all())
        or int(at.min()) < 0
        or int(at.max()) >= seen
    ):
        raise CorruptError("the positions of the tokens that are stored are not in order")
    if mass is not None and (tuple(mass.shape), mass.dtype) != (shape, torch.float32):
        raise CorruptError(f"the attention received is {mass.dtype} {list(mass.shape)}, not float32 {list(shape)}")
    if queries is not None and (
        queries.dim() != 4
        or queries.dtype != keys.dtype
        or (queries.shape[0], queries.shape[3]) != (keys.shape[0], keys.shape[3])
        or queries.shape[1] % keys.shape[1]
        or not 0 < queries.shape[2] <= min(seen, most)
    ):
        raise CorruptError(f"queries {list(queries.shape)} do not fit keys {list(keys.shape)}")
    if scaling is None or scaling.numel() != 1 or not bool(scaling.isfinite()):
        raise CorruptError("the scaling of the scores is missing")
