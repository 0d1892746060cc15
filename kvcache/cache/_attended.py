"""What the next attention needs, and that attention where heads see tokens of their own.

A layer hands over spans: some heads, some tokens. Spans of the same heads are one attention, merged by the log-sum-exp of
their scores, as the blocks of FlashAttention are (Dao et al., arXiv:2205.14135): so what two caches share, or what is held in
another way, need not be copied together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Observer = Callable[[Tensor, float], None]


@dataclass(frozen=True, eq=False)
class Span:
    """Some tokens of some KV heads, as one attention sees them.

    Attributes:
        heads: which KV heads of the layer.
        keys, values: of the tokens, ``[batch, heads, tokens, head_dim]``.
        mask: which new token sees which of them, ``[batch or 1, heads or 1, fresh or 1, tokens or 1]``, True for "sees".
            None: the new tokens are the last of these, and each sees all before it.
        observe: is told the queries, ``[batch, query heads, fresh, head_dim]``, and their scaling, after they have attended.
    """

    heads: Sequence[int]
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    observe: Observer | None = None


@dataclass(frozen=True, eq=False)
class Attended:
    """All that the tokens of an append attend to.

    Attributes:
        keys, values: what a model's own attention is given, ``[batch, KV heads, tokens, head_dim]``.
        spans: what `attend` is given instead, where heads see tokens of their own; else none.
    """

    keys: Tensor
    values: Tensor
    spans: tuple[Span, ...] = ()

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys, self.values


def attend(queries: Tensor, spans: Sequence[Span], scaling: float | None = None) -> Tensor:
    """The attention of new tokens over spans; then their observers are told.

    Args:
        queries: ``[batch, query heads, fresh, head_dim]``; those of one KV head are neighbours.
        spans: of every KV head at least one.
        scaling: of the scores; by default one over the square root of head_dim.

    Returns:
        ``[batch, query heads, fresh, head_dim of the values]``.
    """
    rows, heads, fresh, dim = queries.shape
    together: dict[tuple[int, ...], list[Span]] = {}
    for span in spans:
        together.setdefault(tuple(span.heads), []).append(span)
    grouped = queries.view(rows, sum(map(len, together)), -1, fresh, dim)
    out = grouped.new_empty(*grouped.shape[:4], spans[0].values.shape[3]) if len(together) > 1 else grouped
    for which, same in together.items():
        at = place(which)
        own = grouped if len(together) == 1 else grouped[:, at]
        found = _one(own, same[0], scaling) if len(same) == 1 else _merged(own, same, scaling)
        if len(together) == 1:
            out = found
        else:
            out[:, at] = found
        for span in same:
            if span.observe is not None:
                span.observe(own.flatten(1, 2), dim**-0.5 if scaling is None else scaling)
    return out.reshape(rows, heads, fresh, -1)


def _one(queries: Tensor, span: Span, scaling: float | None) -> Tensor:
    """Of queries ``[batch, KV heads, groups, fresh, head_dim]``, in that shape."""
    fresh, groups, mask = queries.shape[3], queries.shape[2], span.mask
    if mask is None and 1 < fresh != span.keys.shape[2]:
        mask = _mask(span, fresh, queries.device)
    if fresh == 1:
        # The query heads of one KV head are so many queries to it: keys and values need not be repeated.
        found = scaled_dot_product_attention(queries.squeeze(3), span.keys, span.values, mask, scale=scaling)
        return found[:, :, :, None]
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(groups, 1)
    keys, values = (states.repeat_interleave(groups, 1) for states in (span.keys, span.values))
    causal = mask is None
    found = scaled_dot_product_attention(queries.flatten(1, 2), keys, values, mask, is_causal=causal, scale=scaling)
    return found.view(*queries.shape[:4], -1)


def _merged(queries: Tensor, spans: Sequence[Span], scaling: float | None) -> Tensor:
    """The same over several spans of the same heads."""
    scale = queries.shape[4] ** -0.5 if scaling is None else scaling
    outs, sums = [], []
    for span in spans:
        scores = (queries.float() @ span.keys.float()[:, :, None].transpose(3, 4)) * scale
        scores = scores.masked_fill(~_mask(span, queries.shape[3], scores.device)[:, :, None], -torch.inf)
        total = scores.logsumexp(4, keepdim=True)
        weights = (scores - total).exp().nan_to_num(0)  # of a span of which a token sees nothing
        outs.append(weights @ span.values.float()[:, :, None])
        sums.append(total)
    shares = torch.stack(sums).softmax(0)
    return (torch.stack(outs) * shares).sum(0).to(queries.dtype)


def _mask(span: Span, fresh: int, device: torch.device) -> Tensor:
    if span.mask is not None:
        return span.mask
    tokens = span.keys.shape[2]
    column, query = torch.arange(tokens, device=device), torch.arange(fresh, device=device)
    return (column <= tokens - fresh + query[:, None])[None, None]


def place(heads: Sequence[int]) -> slice | list[int]:
    """These heads, in order, as an index: neighbours as a slice, of which a tensor has a view."""
    return slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] + 1 == len(heads) else list(heads)
