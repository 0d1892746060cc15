"""What is asked of a cache, as one value; the layer that serves it, and what that takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from kvcache.cache._bits import KVQuantization, check_storage
from kvcache.cache._budget import Token, Whole, bytes_of
from kvcache.cache._geometry import CacheGeometry
from kvcache.cache._group_sides import grouped_bytes
from kvcache.cache._groups import GroupedLayer
from kvcache.cache._layer import Expected, LayerCache, plain_keys
from kvcache.cache._policies import KeepAll, Pinned, SizePolicy, budgeted, check_policy
from kvcache.cache._policies_by_head import AdaKV, PerHead, chosen_by_head, pinned_around
from kvcache.cache._ranked import RankedLayer
from kvcache.cache._rope import KeyRotation
from kvcache.cache._shape import CacheShape
from kvcache.cache._slots import slots_for
from kvcache.cache._slotted import KVLayer
from kvcache.cache._split import AdaKVLayer, SplitLayer
from kvcache.cache._storage import Plain, Storage, held_bytes
from kvcache.errors import GeometryError, PolicyError, PositionsError

PositionMode = Literal["absolute", "rerotated"]
_ENDLESS = 2**31 - 1
_ALL, _PLAIN = KeepAll(), Plain()


@dataclass(frozen=True)
class CacheSpec:
    """What is asked of a cache, of whatever model.

    Attributes:
        policy: which tokens stay: one for all layers, or one for each.
        max_length: refuse to hold more tokens than this; None for no limit.
        positions: ``"rerotated"`` moves the pinned keys next to the window, as StreamingLLM does (needs RoPE).
        storage: how keys and values are held.
        static: take the memory of all tokens at the first one.

    Raises:
        InputError, PolicyError, PositionsError: for values that are none of these.
    """

    policy: SizePolicy | tuple[SizePolicy, ...] = _ALL
    max_length: int | None = None
    positions: PositionMode = "absolute"
    storage: Storage = _PLAIN
    static: bool = False

    def __post_init__(self) -> None:
        check_storage(self.storage)
        if self.positions not in get_args(PositionMode):
            raise PositionsError(f"positions={self.positions!r} must be 'absolute' or 'rerotated'")
        if not isinstance(self.policy, SizePolicy | tuple):
            raise PolicyError(f"policy={self.policy!r} must be one SizePolicy, or a tuple of one for each layer")
        for policy in (self.policy,) if isinstance(self.policy, SizePolicy) else self.policy:
            check_policy(policy)

    @property
    def evicts(self) -> bool:
        """Whether tokens may leave any layer."""
        return any(policy.evicts for policy in ((self.policy,) if isinstance(self.policy, SizePolicy) else self.policy))

    @property
    def rerotated(self) -> bool:
        """Whether pinned keys are turned."""
        return self.positions == "rerotated"

    def policies(self, layers: int) -> tuple[SizePolicy, ...]:
        """One for each of so many layers.

        Raises:
            PolicyError: if there are others.
        """
        if isinstance(self.policy, SizePolicy):
            return (self.policy,) * layers
        if not isinstance(self.policy, Sequence) or isinstance(self.policy, str) or len(self.policy) != layers:
            raise PolicyError(
                f"policy={self.policy!r} must be one SizePolicy, or a sequence of one for each of the {layers} layers"
            )
        return tuple(self.policy)

    # ------------------------------------------------------------------ bytes, before anything is allocated

    def nbytes(self, shape: CacheShape | CacheGeometry, tokens: int, *, rows: int = 1, encoder_tokens: int = 0) -> int:
        """Bytes that a whole cache holds once `tokens` have gone through it, exactly: all of its layers, of whatever kind.

        Args:
            shape: of the model's cache, see `kvcache.models.shape_of`; of a geometry: of as many layers of that shape.
            tokens: per row, pads among them.
            rows: batch size.
            encoder_tokens: positions that an encoder gave.

        Raises:
            PolicyError: if that depends on the text, as where heads keep tokens of their own.
        """
        shape = CacheShape.of(shape) if isinstance(shape, CacheGeometry) else shape
        policies = self.policies(len(shape.layers))
        managed = [policy for layer, policy in zip(shape.layers, policies, strict=True) if layer.managed]
        if any(map(chosen_by_head, managed)):
            raise PolicyError(
                "what a cache takes whose heads keep tokens of their own depends on the text; ask report(cache) afterwards"
            )
        whole = shape.whole(encoder_tokens) if any(map(budgeted, managed)) else None
        total = rows * shape.cross * encoder_tokens
        for layer, policy in zip(shape.layers, policies, strict=True):
            if not layer.managed:
                total += rows * layer.own_bytes(tokens)
            elif layer.token is not None:
                total += self._held(layer.token, policy, tokens, rows, whole or Whole((layer.token,)))
        return total

    def _held(self, token: Token, policy: SizePolicy, tokens: int, rows: int, whole: Whole) -> int:
        """Bytes of one managed layer."""
        if (groups := _groups(self.storage, policy, self.rerotated, self.static)) is not None:
            return grouped_bytes(token, groups, policy, tokens, rows, whole, self.max_length)
        turned = self.rerotated and policy.evicts
        small = sum(sum(held_bytes(self.storage, one)) for one in whole.tokens)
        beside = whole.beside + (policy.pinned * plain_keys(whole) if turned else 0)
        resolved = policy.resolve(rows * small, rows * beside, self.max_length)
        limit = resolved.limit
        bound, stored = (self.max_length, tokens) if limit is None else (limit, min(tokens, limit))
        total = rows * sum(held_bytes(self.storage, token)) * slots_for(stored, bound, self.static)
        return total + (rows * bytes_of(token)[0] * resolved.pinned if turned and limit is not None else 0)

    # ------------------------------------------------------------------ layers

    def layer(
        self,
        policy: SizePolicy | None = None,
        *,
        rotation: KeyRotation | None = None,
        turn: KeyRotation | None = None,
        padding: Tensor | None = None,
        expected: Expected | None = None,
    ) -> LayerCache:
        """A layer of such a cache.

        Args:
            policy: of this layer; by default that of all.
            rotation: of its keys, where positions are re-rotated and its tokens may leave.
            turn: of its queries, for a policy that looks at them; None if they carry no rotary embedding.
            padding: pads on the left of each row, ``[batch]``.
            expected: as of `LayerCache`.
        """
        policy = self.policies(1)[0] if policy is None else policy
        given: dict[str, Any] = {"max_length": self.max_length, "padding": padding, "expected": expected}
        if not chosen_by_head(policy):
            if (groups := _groups(self.storage, policy, self.rerotated, self.static)) is not None:
                return GroupedLayer(policy, groups, **given)
            return KVLayer(policy, self.storage, static=self.static, rotation=rotation, **given)
        if rotation is not None:
            raise PositionsError(
                f"under {policy!r} each head keeps tokens of its own, so there is no window to turn sinks towards; "
                "use positions='absolute'"
            )
        first, inner = pinned_around(policy)
        if isinstance(inner, AdaKV):
            return self._sharing(policy, first, inner, turn, padding, expected or Expected())
        if isinstance(inner, PerHead):
            return self._divided(policy, first, inner, turn, padding, expected)
        return RankedLayer(policy, self.storage, turn=turn, static=self.static, **given)

    def _divided(
        self,
        policy: SizePolicy,
        first: int,
        inner: PerHead,
        turn: KeyRotation | None,
        padding: Tensor | None,
        expected: Expected | None,
    ) -> SplitLayer:
        """A part for the heads of each policy."""
        known = expected or Expected()
        if known.token is not None and known.token[0] != len(inner.heads):
            raise GeometryError(
                f"{policy!r} is for {len(inner.heads)} KV heads, the model has {known.token[0]}; give a policy for each"
            )
        own = replace(self, storage=self.storage.by_token())
        rows = Expected(rows=known.rows)
        parts = []
        for one in dict.fromkeys(inner.heads):
            heads = [head for head, other in enumerate(inner.heads) if other == one]
            part = own.layer(Pinned(first, one) if first else one, turn=turn, padding=padding, expected=rows)
            parts.append((heads, part))
        return SplitLayer(policy, parts, max_length=self.max_length, padding=padding, expected=rows)

    def _sharing(
        self,
        policy: SizePolicy,
        first: int,
        inner: AdaKV,
        turn: KeyRotation | None,
        padding: Tensor | None,
        expected: Expected,
    ) -> AdaKVLayer:
        """A part for each head, without a bound of its own: one head may hold the budget of all."""
        if expected.token is None:
            raise PolicyError(
                f"{policy!r} divides a budget among KV heads: expected=Expected(token=…) must say how many"
            )
        ranked: SizePolicy = replace(inner.policy, limit=_ENDLESS, low_water=_ENDLESS)
        ranked = Pinned(first, ranked) if first else ranked
        rows = Expected(rows=expected.rows)
        heads = [
            RankedLayer(ranked, self.storage, turn=turn, padding=padding, expected=rows)
            for _ in range(expected.token[0])
        ]
        return AdaKVLayer(policy, inner, heads, max_length=self.max_length, padding=padding, expected=rows)


def _groups(storage: Storage, policy: SizePolicy, turned: bool, static: bool) -> KVQuantization | None:
    """The storage, where it holds the tokens of such a layer in groups: they leave in order, and keys stay as they were."""
    by_age = not chosen_by_head(policy) and not (turned and policy.evicts) and not static
    return storage if isinstance(storage, KVQuantization) and storage.group_size is not None and by_age else None


def spec_of(policy: "CacheSpec | SizePolicy | Sequence[SizePolicy] | None") -> CacheSpec:
    """A spec as it is given, or one of a policy alone."""
    if isinstance(policy, CacheSpec):
        return policy
    if policy is None or isinstance(policy, SizePolicy):
        return CacheSpec(_ALL if policy is None else policy)
    if isinstance(policy, Sequence) and not isinstance(policy, str):
        return CacheSpec(tuple(policy))
    raise PolicyError(f"policy={policy!r} must be a SizePolicy, a sequence of one per layer, or a CacheSpec")
