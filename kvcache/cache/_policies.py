"""Size policies: how many tokens stay in a cache. Pure functions from counts to counts.

A policy keeps the first ``pinned`` tokens for ever and the most recent ones after them; ``keep(count)`` says how many
stay of ``count``. That is all a policy is, so your own takes a few lines::

    @dataclass(frozen=True)
    class Halving(SizePolicy):
        limit: int

        def keep(self, count: int) -> int:
            return count if count <= self.limit else self.limit // 2

Policies are frozen dataclasses: their repr is their configuration, and equal policies share their schedules.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from kvcache.errors import PolicyError
from kvcache.io import parse_bytes


class SizePolicy(ABC):
    """Base of all size policies."""

    if TYPE_CHECKING:  # properties to the type checker; at run time a dataclass field may take their place

        @property
        def limit(self) -> int | None:
            """The most tokens a cache ever holds after an append; None if it grows without end."""

        @property
        def pinned(self) -> int:
            """How many of the first tokens never leave."""
    else:
        pinned = 0

    @abstractmethod
    def keep(self, count: int) -> int:
        """How many of `count` tokens stay: the pinned first ones, and the most recent.

        Must be `count` while that is within the limit, and at least ``pinned + 1`` otherwise.
        """

    @property
    def evicts(self) -> bool:
        """Whether tokens may ever leave."""
        return self.limit is not None

    @property
    def ranking(self) -> "SizePolicy | None":
        """What ranks the tokens that are not pinned (see `kvcache.cache.RankingPolicy`); None if the oldest leave first."""
        return None

    def resolve(self, token_bytes: int, reserved: int = 0, most: int | None = None) -> "SizePolicy":
        """This policy for a cache whose tokens take `token_bytes` each, over all its layers and rows.

        Args:
            token_bytes: of one token.
            reserved: bytes of the cache that are not this policy's: what a `Pinned` around it keeps.
            most: how many tokens the cache may hold for this policy, whatever their bytes.
        """
        return self


def _at_least(name: str, given: int, least: int, hint: str = "") -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise PolicyError(f"{name}={given!r} must be a whole number of at least {least}{hint}")


@dataclass(frozen=True)
class KeepAll(SizePolicy):
    """Keep every token: the cache changes speed, never the answer."""

    @property
    def limit(self) -> None:
        return None

    def keep(self, count: int) -> int:
        return count


@dataclass(frozen=True)
class SlidingWindow(SizePolicy):
    """Keep the first `sinks` tokens and the last `window`, the current one among them.

    With ``sinks=0`` the sliding window of Mistral (arXiv:2310.06825); with a few sinks, StreamingLLM's attention sinks
    (Xiao et al., arXiv:2309.17453), which keep a model fluent far past its window.
    """

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        _at_least("sinks", self.sinks, 0)
        _at_least("window", self.window, 1, ": the current token takes one place; give the sinks by sinks=…")

    @property
    def pinned(self) -> int:
        return self.sinks

    @property
    def limit(self) -> int:
        return self.sinks + self.window

    def keep(self, count: int) -> int:
        return min(count, self.limit)


@dataclass(frozen=True)
class MaxTokens(SizePolicy):
    """Keep at most `limit` tokens; when one more comes, drop the oldest down to `low_water` at once.

    The distance between the two marks spreads the cost of a trim over that many tokens. Default: 7/8 of the limit.
    """

    limit: int
    low_water: int | None = None

    def __post_init__(self) -> None:
        _at_least("limit", self.limit, 1)
        if self.low_water is None:
            object.__setattr__(self, "low_water", max(1, self.limit * 7 // 8))
        _at_least("low_water", self._low, 1)
        if self._low > self.limit:
            raise PolicyError(
                f"low_water={self.low_water} is above limit={self.limit}; give a mark of at most the limit"
            )

    @property
    def _low(self) -> int:
        return self.limit if self.low_water is None else self.low_water

    def keep(self, count: int) -> int:
        return count if count <= self.limit else self._low


@dataclass(frozen=True)
class MaxBytes(SizePolicy):
    """Keep as many tokens as fit in `budget` bytes, counted over all that a cache holds: all rows and layers, those that a
    model manages its own way at the most that they may come to, pinned tokens, and what attends to an encoder.

    Becomes a `MaxTokens` when the cache learns its geometry, with the same low-water mark (a fraction of the limit).
    """

    budget: int | str
    low_water: float = 0.875

    def __post_init__(self) -> None:
        parse_bytes(self.budget)
        if not 0 < self.low_water <= 1:
            raise PolicyError(f"low_water={self.low_water} must be a fraction in (0, 1]")

    @property
    def limit(self) -> None:
        return None  # in tokens it is known only to what `resolve` returns

    @property
    def evicts(self) -> bool:
        return True

    def keep(self, count: int) -> int:
        return count

    def resolve(self, token_bytes: int, reserved: int = 0, most: int | None = None) -> SizePolicy:
        tokens = (parse_bytes(self.budget) - reserved) // token_bytes
        if tokens < 1:
            raise PolicyError(
                f"{self!r} does not hold one token of {token_bytes} bytes beside {reserved} bytes that are pinned; "
                f"give at least {reserved + token_bytes}"
            )
        if most is not None:
            tokens = min(tokens, most)
        return MaxTokens(tokens, max(1, int(tokens * self.low_water)))


@dataclass(frozen=True)
class Pinned(SizePolicy):
    """Keep the first `count` tokens for ever (a voice, a system prompt), and the rest by another policy."""

    count: int
    policy: SizePolicy

    def __post_init__(self) -> None:
        _at_least("count", self.count, 0)

    @property
    def pinned(self) -> int:
        return self.count + self.policy.pinned

    @property
    def limit(self) -> int | None:
        return None if self.policy.limit is None else self.count + self.policy.limit

    @property
    def evicts(self) -> bool:
        return self.policy.evicts

    @property
    def ranking(self) -> "SizePolicy | None":
        return self.policy.ranking

    def keep(self, count: int) -> int:
        return count if count <= self.count else self.count + self.policy.keep(count - self.count)

    def resolve(self, token_bytes: int, reserved: int = 0, most: int | None = None) -> SizePolicy:
        most = None if most is None else most - self.count
        return Pinned(self.count, self.policy.resolve(token_bytes, reserved + self.count * token_bytes, most))


def budgeted(policy: SizePolicy) -> bool:
    """Whether a policy counts bytes, so that its limit in tokens is known only with the shape of a cache."""
    return policy.evicts and policy.limit is None


def check_policy(policy: SizePolicy) -> None:
    """Refuse a policy that breaks the contract of `SizePolicy.keep` around its limit.

    Raises:
        PolicyError: with the count at which it does.
    """
    if not isinstance(policy, SizePolicy):
        raise PolicyError(f"policy={policy!r} is no SizePolicy; give for example SlidingWindow(1024, sinks=4)")
    if not hasattr(policy, "limit"):
        raise PolicyError(f"{policy!r} does not say its limit; give it a field or property `limit`, None for no limit")
    limit = policy.limit
    if limit is None:
        return
    _at_least(f"the limit of {policy!r},", limit, policy.pinned + 1, ": the pinned tokens and the current one must fit")
    for count in (1, policy.pinned + 1, limit, limit + 1, 2 * limit + 1):
        kept = policy.keep(count)
        least, most = (count, count) if count <= limit else (policy.pinned + 1, limit)
        if not least <= kept <= most:
            raise PolicyError(
                f"{policy!r}.keep({count}) is {kept}; it must be from {least} to {most} (see SizePolicy.keep)"
            )


@lru_cache(maxsize=256)
def schedule(policy: SizePolicy, stored: int, fresh: int) -> tuple[int, ...]:
    """How many tokens stand in the cache after each of `fresh` tokens appended one by one to `stored`.

    An append of a chunk is, by definition, that many appends of one token, so this decides what every chunk evicts and
    what each of its queries may see.
    """
    counts = []
    for _ in range(fresh):
        stored = policy.keep(stored + 1)
        counts.append(stored)
    return tuple(counts)
