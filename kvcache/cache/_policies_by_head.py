"""Policies under which KV heads keep tokens of their own: a policy for each, or one budget that they share by need."""

from dataclasses import dataclass

from kvcache.cache._policies import Pinned, SizePolicy, check_policy
from kvcache.cache._ranking import RankingPolicy
from kvcache.errors import PolicyError


@dataclass(frozen=True)
class PerHead(SizePolicy):
    """A policy for each KV head of a layer."""

    heads: tuple[SizePolicy, ...]

    def __post_init__(self) -> None:
        if not self.heads:
            raise PolicyError("PerHead has no heads; give a policy for each KV head of the layer")
        for policy in self.heads:
            check_policy(policy)
            inner = policy
            while isinstance(inner, Pinned):
                inner = inner.policy
            if isinstance(inner, PerHead | AdaKV) or (policy.evicts and policy.limit is None):
                raise PolicyError(f"{policy!r} cannot be that of one head; give it a limit in tokens")

    @property
    def pinned(self) -> int:
        return min(policy.pinned for policy in self.heads)

    @property
    def limit(self) -> int | None:
        limits = [policy.limit for policy in self.heads]
        return None if None in limits else max(limit for limit in limits if limit is not None)

    @property
    def evicts(self) -> bool:
        return any(policy.evicts for policy in self.heads)

    def keep(self, count: int) -> int:
        return max(policy.keep(count) for policy in self.heads)


@dataclass(frozen=True)
class AdaKV(SizePolicy):
    """The heads of a layer share the budget of all of them: tokens stay where they score highest (Feng et al., Ada-KV,
    arXiv:2407.11550).

    Args:
        policy: ranks the tokens; its `limit` is the mean over the heads.
        alpha_safeguard: what share of its own part each head is sure to keep.
    """

    policy: RankingPolicy
    alpha_safeguard: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.policy, RankingPolicy):
            raise PolicyError(f"policy={self.policy!r} ranks no tokens; give for example SnapKV(1024)")
        if not 0 <= self.alpha_safeguard <= 1:
            raise PolicyError(f"alpha_safeguard={self.alpha_safeguard} must be from 0 to 1")

    @property
    def pinned(self) -> int:
        return self.policy.pinned

    @property
    def ranking(self) -> RankingPolicy:
        return self.policy

    @property
    def limit(self) -> int:
        return self.policy.limit

    def keep(self, count: int) -> int:
        return self.policy.keep(count)


def chosen_by_head(policy: SizePolicy) -> bool:
    """Whether the heads of a layer may keep different tokens."""
    while isinstance(policy, Pinned):
        policy = policy.policy
    return policy.ranking is not None or isinstance(policy, PerHead | AdaKV)


def turns(policy: SizePolicy) -> bool:
    """Whether any head's policy turns queries to other positions."""
    while isinstance(policy, Pinned):
        policy = policy.policy
    if isinstance(policy, PerHead):
        return any(map(turns, policy.heads))
    return isinstance(policy.ranking, RankingPolicy) and policy.ranking.needs_rope


def pinned_around(policy: SizePolicy) -> tuple[int, SizePolicy]:
    """How many tokens are pinned around the policy of heads, and that policy; 0 and the policy itself for others."""
    count, inner = 0, policy
    while isinstance(inner, Pinned) and isinstance(inner.policy, Pinned | PerHead | AdaKV):
        count, inner = count + inner.count, inner.policy
    return count, inner
