"""Policies that rank tokens: when the cache is full, those with the lowest scores leave, in each KV head its own.

Age-based policies (`kvcache.cache.SizePolicy`) know what leaves before anything has run; these look at keys, values and queries. A
new one is one class with a `score`::

    @dataclass(frozen=True)
    class LargeValues(RankingPolicy):
        def score(self, seen: ScoringContext) -> Tensor:
            return seen.values.norm(dim=-1)

A chunk is attended to as a whole and ranked after it, as all methods of the papers do with a prompt: so unlike under an
age-based policy, what stays depends on how the tokens were divided into chunks.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from kvcache.cache._policies import SizePolicy, _at_least
from kvcache.cache._rope import KeyRotation
from kvcache.errors import PolicyError

_QUERIES_AT_ONCE = 128  # whose weights are held at a time


@dataclass(frozen=True)
class ScoringContext:
    """What a layer holds when its tokens are ranked.

    Attributes:
        keys: ``[batch, KV heads, tokens, head_dim]``, in the order of the tokens.
        values: the same, but for its own head_dim.
        positions: of each token, ``[batch, KV heads, tokens]``, pads counted.
        padding: pads on the left of each row, ``[batch, 1, 1]``.
        length: tokens seen so far, those that have left among them.
        queries: the latest ones, ``[batch, heads, n, head_dim]``, n being at most the policy's `query_window`.
        scaling: of the scores.
        received: `cumulative_attention`, or None where nobody adds it up.
        rotation: turns the model's keys and queries, where the policy `needs_rope`; None if they carry no rotary embedding.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    padding: Tensor
    length: int
    queries: Tensor
    scaling: float
    received: Tensor | None
    rotation: KeyRotation | None = None

    @property
    def cumulative_attention(self) -> Tensor:
        """The attention that each token has received in all, summed over queries and the heads of a KV head, ``[batch, KV heads, tokens]``.

        Raises:
            PolicyError: under a policy that does not say that it `needs_cumulative_attention`: nobody has added it up.
        """
        if self.received is None:
            raise PolicyError(
                "this policy reads seen.cumulative_attention and does not ask for it: add the line `needs_cumulative_attention: ClassVar[bool] = True` to "
                "its class, or rank by seen.weights() of its latest queries, `query_window`"
            )
        return self.received

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def weights(self) -> Tensor:
        """The attention of the latest queries, causal, ``[batch, heads, queries, tokens]``, in fp32; pads look at nothing."""
        parts = [weights for weights, _ in self.parts()]
        return torch.cat(parts, 2)

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`weights`, few queries at a time, with the positions of these."""
        batch, heads, count, dim = self.queries.shape
        keys = self.keys.to(self.queries.dtype)
        first = self.length - count
        real = self.positions >= self.padding
        for start in range(0, count, _QUERIES_AT_ONCE):
            part = self.queries[:, :, start : start + _QUERIES_AT_ONCE]
            # The query heads of one KV head are so many queries to it: keys need not be repeated.
            grouped = part.reshape(batch, keys.shape[1], -1, dim) * self.scaling
            scores = (grouped @ keys.transpose(2, 3)).view(batch, keys.shape[1], self.groups, part.shape[2], -1)
            at = torch.arange(first + start, first + start + part.shape[2], device=keys.device)
            if count == 1 and not bool((self.padding > 0).any()):
                weights = scores.softmax(-1, dtype=torch.float32)
            else:
                hidden = ((self.positions[:, :, None] > at[:, None]) | ~real[:, :, None])[:, :, None]
                weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
                # Of a pad, and of a query older than all that is left, everything is hidden: it looks at nothing.
                weights = weights.masked_fill_(hidden, 0)
            yield weights.view(batch, heads, part.shape[2], -1), at

    def per_kv_head(self, by_head: Tensor) -> Tensor:
        """The mean over the heads of each KV head: ``[batch, heads, …]`` to ``[batch, KV heads, …]``."""
        return by_head.view(by_head.shape[0], self.keys.shape[1], self.groups, *by_head.shape[2:]).mean(2)


@dataclass(frozen=True)
class RankingPolicy(SizePolicy):
    """Keep the tokens with the highest scores, at most `limit` in each KV head.

    Args:
        limit: tokens that a KV head ever holds after a forward.
        sinks: first tokens that never leave.
        window_size: latest tokens that never leave.
        low_water: to how many the cache is ranked down when one more than `limit` comes, which spreads the cost. Default:
            7/8 of the limit.
    """

    limit: int
    sinks: int = 4
    window_size: int = 32
    low_water: int | None = None

    # How many of the latest queries `score` looks at; whether it looks at what all queries looked at, those of `query_mask`;
    # whether it turns queries to other positions; whether it looks at the largest attention of a second reading, -1 before.
    query_window: ClassVar[int] = 0
    needs_cumulative_attention: ClassVar[bool] = False
    needs_rope: ClassVar[bool] = False
    rehearses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _at_least("limit", self.limit, 1)
        _at_least("sinks", self.sinks, 0)
        _at_least("window_size", self.window_size, 1, ": the current token is one")
        protected = self.sinks + self.window_size
        if self.limit <= protected:
            raise PolicyError(
                f"limit={self.limit} leaves nothing to rank beside {self.sinks} sinks and a window_size of {self.window_size}; "
                f"give at least {protected + 1}, or protect fewer"
            )
        if self.low_water is None:
            object.__setattr__(self, "low_water", max(protected + 1, self.limit * 7 // 8))
        _at_least("low_water", self._low, 1)
        if not protected < self._low <= self.limit:
            raise PolicyError(f"low_water={self.low_water} must be from {protected + 1} to limit={self.limit}")

    @property
    def _low(self) -> int:
        return self.limit if self.low_water is None else self.low_water

    @property
    def pinned(self) -> int:
        return self.sinks

    @property
    def ranking(self) -> "RankingPolicy":
        return self

    @property
    def observes(self) -> bool:
        """Whether it needs to see what the model attends to."""
        return self.query_window > 0 or self.needs_cumulative_attention

    def keep(self, count: int) -> int:
        return count if count <= self.limit else self._low

    def query_mask(self, seen: ScoringContext, at: Tensor) -> Tensor | None:
        """Whose looks are added up: of the queries at positions `at` ``[queries]``, a mask ``[…, queries, tokens]``; None for all."""
        return None

    @abstractmethod
    def score(self, seen: ScoringContext) -> Tensor:
        """How much each token is worth keeping, ``[batch, KV heads, tokens]``, or ``[batch, 1, tokens]`` for all alike."""


@dataclass(frozen=True)
class H2O(RankingPolicy):
    """H2O: what has received most attention so far (Zhang et al., arXiv:2306.14048).

    With `average`, attention per query that could see the token, so that older tokens have no advantage; without it the
    sum, as in the paper. It looks at every query, some of them at a time.
    """

    average: bool = True

    needs_cumulative_attention: ClassVar[bool] = True

    def score(self, seen: ScoringContext) -> Tensor:
        return seen.cumulative_attention / (seen.length - seen.positions) if self.average else seen.cumulative_attention


@dataclass(frozen=True)
class SnapKV(RankingPolicy):
    """What the latest 64 queries look at, smoothed over neighbours (Li et al., arXiv:2404.14469).

    Args:
        kernel: tokens over which scores are averaged, odd.
    """

    window_size: int = 64
    kernel: int = 5

    query_window: ClassVar[int] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise PolicyError(f"kernel={self.kernel} must be odd and at least 1")

    def score(self, seen: ScoringContext) -> Tensor:
        looks = seen.per_kv_head(seen.weights().mean(2))
        looks = looks.masked_fill(seen.positions >= seen.length - self.window_size, 0)  # they stay anyway
        return smoothed(looks, self.kernel)


@dataclass(frozen=True)
class TOVA(RankingPolicy):
    """What the latest query looks at, averaged over all heads, which keep the same tokens (Oren et al., arXiv:2401.06104)."""

    window_size: int = 1

    query_window: ClassVar[int] = 1

    def score(self, seen: ScoringContext) -> Tensor:
        if torch.equal(seen.positions, seen.positions[:, :1].expand_as(seen.positions)):
            return seen.weights()[:, :, -1].mean(1, keepdim=True)
        return seen.per_kv_head(seen.weights()[:, :, -1])


@dataclass(frozen=True)
class ExpectedAttention(RankingPolicy):
    """What queries to come are expected to look at, times the value's norm (Devoto et al., arXiv:2510.00636).

    They are taken to be normally distributed, as the latest 128 are, and to stand at the next positions, over which their
    rotation is averaged. The expectation of attention is then known in closed form.

    Args:
        n_future_positions: positions over which is averaged.
    """

    n_future_positions: int = 512

    query_window: ClassVar[int] = 128
    needs_rope: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("n_future_positions", self.n_future_positions, 1)

    def score(self, seen: ScoringContext) -> Tensor:
        queries, heads = seen.queries.float(), (*seen.keys.shape[:2], seen.groups, -1, seen.keys.shape[3])
        at = torch.arange(seen.length - queries.shape[2], seen.length, device=queries.device)
        if seen.rotation is not None:
            queries = seen.rotation.ahead(queries, seen.length - at, self.n_future_positions)
        real = (at >= seen.padding)[..., None]
        count = real.sum(2, keepdim=True).clamp_min(1)
        mean = (queries * real).sum(2, keepdim=True) / count
        apart = (queries - mean) * real
        covariance = apart.transpose(2, 3) @ apart / count
        keys = seen.keys.float()[:, :, None]
        # E[exp(q k)] = exp(mean k + k covariance k / 2), for each query head of a KV head
        looks = seen.scaling * (keys @ mean.view(heads).transpose(3, 4)).squeeze(4)
        looks = looks + seen.scaling**2 / 2 * (keys @ covariance.view(heads) * keys).sum(4)
        first = (seen.positions - seen.padding < self.sinks)[:, :, None]  # they stay anyway, and take most of it
        return looks.masked_fill(first, -torch.inf).softmax(3).mean(2) * _norm(seen.values)


@dataclass(frozen=True)
class KeyNorm(RankingPolicy):
    """Small keys stay: they are what attention rests on (Devoto et al., arXiv:2406.11430). Looks at no query."""

    def score(self, seen: ScoringContext) -> Tensor:
        return -_norm(seen.keys)


@dataclass(frozen=True)
class KeyDiff(RankingPolicy):
    """Keys that are unlike the average key stay (Park et al., arXiv:2504.15364). Looks at no query."""

    def score(self, seen: ScoringContext) -> Tensor:
        real = (seen.positions >= seen.padding)[..., None]
        keys = torch.nn.functional.normalize(seen.keys.float(), dim=-1) * real
        average = torch.nn.functional.normalize(keys.mean(2, keepdim=True), dim=-1)
        return torch.sum(-keys * average, -1)


@dataclass(frozen=True)
class LongRangeAttention(RankingPolicy):
    """What is looked at from afar: the mean attention of all queries at least `near` tokens later, times the value's norm.

    Each token is looked at by its neighbours, which says nothing of its use once they are gone; so their looks do not
    count. By this project's own measurements the best with an eighth of the tokens, among policies that need no second pass;
    with more of them that is `ExpectedAttention`.

    Args:
        near: queries nearer than this do not count.
    """

    near: int = 32

    needs_cumulative_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.near < 0:
            raise PolicyError(f"near={self.near} must be at least 0")

    def query_mask(self, seen: ScoringContext, at: Tensor) -> Tensor:
        """Queries at positions ``[queries]`` that are far enough from each token: ``[batch, KV heads, queries, tokens]``."""
        return seen.positions[:, :, None] <= (at - self.near)[:, None]

    def score(self, seen: ScoringContext) -> Tensor:
        looks = (seen.length - self.near - seen.positions).clamp_min(1)
        return seen.cumulative_attention / looks * _norm(seen.values)


@dataclass(frozen=True)
class KVzip(RankingPolicy):
    """What is looked at most while the text is read a second time (KVzip, Kim et al., arXiv:2505.23416).

    The cache keeps all until `KVCacheManager.compress` reads the text again, against what is held, and ranks by the largest
    attention that each token then got. That costs another prefill, and is worth it where the cache then serves many
    requests. What came later stays before all that was rehearsed, the newest first.

    As in the paper and in kvpress, a long text is read in parts of 2,048 tokens, and the attention that ranks a part is
    divided among the sinks, that part, and what repeats it; not among the rest of the text, of which each part would
    otherwise get less the longer the text is.
    """

    rehearses: ClassVar[bool] = True

    def score(self, seen: ScoringContext) -> Tensor:
        return torch.where(seen.cumulative_attention < 0, 1 + seen.positions / 2**40, seen.cumulative_attention)


def _norm(states: Tensor) -> Tensor:
    return torch.as_tensor(torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32))


def smoothed(scores: Tensor, kernel: int) -> Tensor:
    """The mean of each score and its neighbours, zeros beyond the ends."""
    return torch.nn.functional.avg_pool1d(scores, kernel, 1, kernel // 2)


def pyramid_kv(
    policy: RankingPolicy, layers: int, beta: float = 20.0, *, tokens: int | None = None
) -> list[RankingPolicy]:
    """The same policy with more room in the first layers and less in the last (PyramidKV, Cai et al., arXiv:2406.02069).

    As in its authors' code: where the last layer would keep no more than what is protected, all layers get the same.

    Args:
        policy: whose `limit` is the mean over the layers.
        layers: of the model.
        beta: the last layer keeps ``1 / beta`` of the mean.
        tokens: that the longest text has, if that is known: no layer is given room for more, and the others share it.

    Raises:
        PolicyError: if the policy ranks nothing, there is no layer, or a number makes no sense.
    """
    if not isinstance(policy, RankingPolicy):
        raise PolicyError(f"{policy!r} is no RankingPolicy; give for example SnapKV(1024)")
    _at_least("layers", layers, 1)
    if not isinstance(beta, int | float) or not beta >= 1:
        raise PolicyError(f"beta={beta!r} must be a number of at least 1")
    protected, mean = policy.sinks + policy.window_size, policy._low
    # Exactly: a rounded quotient may equal what it is compared with.
    least = Fraction(0) if beta == math.inf else Fraction(mean) / Fraction(beta)
    if tokens is not None:
        _at_least("tokens", tokens, 1)
        least = max(least, Fraction(2 * mean - max(mean, tokens - protected)))
    if least <= protected or layers == 1:
        return [policy] * layers
    exact = [2 * mean - least - Fraction(2 * i, layers - 1) * (mean - least) for i in range(layers)]
    lows = [max(protected + 1, round(low)) for low in exact]
    return [replace(policy, limit=max(low, round(low * policy.limit / mean)), low_water=low) for low in lows]
