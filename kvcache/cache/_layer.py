"""What every layer of a cache is: the contract that models, prefixes, the decode engine and the laws rely on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcache.cache._attended import Attended
from kvcache.cache._budget import Token, Whole, bytes_of
from kvcache.cache._buffer import token_of
from kvcache.cache._policies import KeepAll, SizePolicy, check_policy
from kvcache.cache._rope import KeyRotation
from kvcache.cache._storage import Plain, Storage, held_bytes
from kvcache.errors import CapacityError, CorruptError, GeometryError, PolicyError, RollbackError


@dataclass(frozen=True)
class Expected:
    """What a layer is told of its cache before anything comes.

    Attributes:
        rows: refuse a first append with another batch size.
        token: of its keys and values; with `rows` it lets a budget in bytes be known before the first append.
        whole: what shares a budget in bytes; by default one layer like this.
    """

    rows: int | None = None
    token: Token | None = None
    whole: Whole | None = None


class LayerCache(ABC):
    """The keys and values of one attention layer, ``[batch, KV heads, tokens, head_dim]``.

    A policy says which tokens stay, a `Storage` how they are held. Appending a chunk of tokens is, by definition, appending
    them one by one: the same tokens stay, however they came. For inference only: what is stored is detached.

    Args:
        policy: which tokens stay; by default all.
        storage: how they are held; by default as they came.
        max_length: refuse, with a `CapacityError`, to hold more tokens than this.
        padding: pads on the left of each row, ``[batch]``. Needed only where tokens may be evicted.
        expected: what is known of the cache that this is a layer of.

    Attributes:
        seen: tokens appended since the start, evicted ones too.
        stored: tokens held, by the fullest head.
        by_head: whether its heads may hold different tokens, so that attention is `attend`'s and not the model's own.
        heads: how many tokens each KV head holds, where they differ.
        static: whether the memory of all tokens is taken at the first append.
        rotation: of its pinned keys, where they are turned; see `KVLayer`.
        rehearsing: tokens are attended to and looked at, and not stored: they repeat those at these positions.
    """

    by_head: ClassVar[bool] = False
    static: bool = False
    rotation: KeyRotation | None = None
    rehearsing: range | None = None
    seen: int
    stored: int

    def __init__(
        self,
        policy: SizePolicy | None = None,
        storage: Storage | None = None,
        *,
        max_length: int | None = None,
        padding: Tensor | None = None,
        expected: Expected | None = None,
    ) -> None:
        if max_length is not None and not isinstance(max_length, int):
            raise PolicyError(f"max_length={max_length!r} must be a whole number of tokens, or left out")
        if max_length is not None and max_length < 1:
            raise PolicyError(f"max_length={max_length} must be at least 1; leave it out for a cache that grows")
        self.given = KeepAll() if policy is None else policy
        self.storage = Plain() if storage is None else storage
        self.expected = Expected() if expected is None else expected
        self.max_length = max_length
        self.padding = None if padding is None or not bool((padding > 0).any()) else padding.detach().cpu().long()
        check_policy(self.given)
        self._rows, token = self.expected.rows, self.expected.token
        self.policy = self.given if self._rows is None or token is None else self._resolved(self._rows, token)
        self._check_bounds(self.policy)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy!r}, seen={self.seen}, stored={self.stored}, nbytes={self.nbytes})"

    # ------------------------------------------------------------------ what it holds

    @property
    def evicted(self) -> int:
        """Tokens (pads among them) that have left."""
        return self.seen - self.stored

    @property
    @abstractmethod
    def retained(self) -> int:
        """How many of the stored tokens the next append will still attend to."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Slots for tokens now."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors that this layer holds."""

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """The batch size; None before it is known."""

    @property
    @abstractmethod
    def initialized(self) -> bool:
        """Whether it knows the shape of its tokens."""

    @property
    @abstractmethod
    def keys(self) -> Tensor | None:
        """The stored keys, ``[batch, KV heads, stored, head_dim]``, in slot order: valid until the next append. None before
        the first.
        """

    @property
    @abstractmethod
    def values(self) -> Tensor | None:
        """The stored values, as `keys`."""

    @abstractmethod
    def positions(self) -> Tensor:
        """The position of the token in each slot, ``[batch or 1, stored]`` or, by head, ``[batch, KV heads, stored]``.

        Positions count all tokens from 0, pads too.
        """

    @property
    def rolls_back(self) -> bool:
        """Whether any number of the newest tokens can be taken out again, now and later."""
        return False

    @property
    def holds_pads(self) -> bool:
        """Whether any row still has pads among what is stored, in slots that the caller's mask must hide."""
        return False

    @property
    def heads(self) -> tuple[int, ...]:
        return ()

    def parts(self) -> "Iterator[tuple[Sequence[int] | None, LayerCache]]":
        """What it is made of: KV heads and the layer that holds them; itself, with None for all heads."""
        yield None, self

    # ------------------------------------------------------------------ append

    def check(self, fresh: int) -> None:
        """Raise `CapacityError` if `fresh` more tokens cannot be appended."""
        if self.max_length is not None and not self.policy.evicts and self.stored + fresh > self.max_length:
            raise CapacityError(
                f"cannot append {fresh} tokens: {self.stored} of {self.max_length} slots used; "
                "raise max_length (max_cache_length), or use a policy that evicts, such as SlidingWindow"
            )

    def check_append(self, keys: Tensor, values: Tensor) -> None:
        """Raise `GeometryError` or `CapacityError` if these cannot be appended."""
        self._check_shapes(keys, values)
        self.check(keys.shape[2])

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> Attended:
        """Store new tokens and return all that they attend to: the retained tokens, then the new ones.

        Args:
            keys: ``[batch, KV heads, tokens, head_dim]``.
            values: the same, but for its own head_dim.

        Returns:
            Keys and values ``[batch, KV heads, retained + tokens, head_dim]``: views where possible, valid until the next
            append. Its own tokens are as they came. Where heads see tokens of their own, spans say which.

        Raises:
            CapacityError, GeometryError: before anything has changed.
        """

    def begin_rehearsal(self) -> Callable[[], None]:
        """Forget what was looked at: `rehearsing` will say what is read again. Returns what undoes a failed one."""
        return lambda: None

    # ------------------------------------------------------------------ what the next tokens see

    def mask(self, fresh: int) -> Tensor:
        """What each of the next `fresh` tokens sees, ``[batch or 1, 1, fresh, retained + fresh]``, True for "sees".

        Columns are those that `append` returns. To be asked before it.

        Raises:
            PolicyError: where each head sees its own tokens: what `append` returns says which.
        """
        raise PolicyError(
            f"under {self.policy!r} each head sees its own tokens: no mask says which, but Attended.spans"
        )

    def columns(self, fresh: int) -> Tensor:
        """The position of the token in each column that `append` returns of the next `fresh`, ``[batch or 1, columns]``.

        Raises:
            PolicyError: as `mask`.
        """
        raise PolicyError(
            f"under {self.policy!r} each head sees its own tokens: their columns are those of Attended.spans"
        )

    # ------------------------------------------------------------------ going back, trimming

    def check_truncate(self, length: int) -> None:
        """Raise `RollbackError` if the layer cannot be rolled back to `length` tokens."""
        if not 0 <= length <= self.seen:
            raise RollbackError(
                f"cannot roll back to {length} tokens: {self.seen} were seen; give a length of 0 to {self.seen}"
            )

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Roll back to the first `length` tokens, keeping the memory. `seen` becomes `length`.

        Raises:
            RollbackError: if that cannot be; nothing has changed then.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens, keeping the memory; but another batch size, dtype or device may come next."""

    def check_trim(self, max_tokens: int) -> None:
        """Raise `PolicyError` if the layer cannot be trimmed to `max_tokens`."""
        if max_tokens < max(1, self.policy.pinned):
            raise PolicyError(
                f"cannot trim to {max_tokens} tokens: {self.policy.pinned} are pinned; "
                f"give at least {max(1, self.policy.pinned)}"
            )

    @abstractmethod
    def trim(self, max_tokens: int | None = None) -> int:
        """Evict tokens now, down to `max_tokens`, or to where the policy trims to. How many left.

        Raises:
            PolicyError: if what must stay is more.
        """

    @abstractmethod
    def shrink_to_fit(self) -> None:
        """Give back the slots that what is stored does not need, as after a `trim`; not those that were preallocated."""

    # ------------------------------------------------------------------ rows

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, ``[new batch]``: beam search reorders, a finished request leaves.

        Raises:
            GeometryError: without any row.
            PolicyError: if a `MaxBytes` budget does not hold a token of so many rows.
        """

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, the copies side by side."""
        rows = self.rows if self.rows is not None or self.padding is None else self.padding.shape[0]
        if rows is not None:
            self.select(torch.arange(rows).repeat_interleave(times))

    def share(self, whole: Whole) -> None:  # noqa: B027  (most policies have no budget in bytes)
        """Share a budget in bytes with these layers from now on, where the policy has one. What no longer fits leaves.

        Raises:
            PolicyError: if it does not hold a token; nothing has changed then.
        """

    # ------------------------------------------------------------------ as tensors

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that it takes to go on exactly from here: copies of tensors, and counts.

        Raises:
            GeometryError: of rows with pads that cannot be saved.
        """

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Continue, in an empty layer made alike, as the layer of which this is the `state`; tensors are copied.

        Raises:
            CorruptError: if these are not a state of such a layer.
        """

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold copies of these keys and values instead, ``[batch, KV heads, tokens, head_dim]``, in the order of the slots.

        As many tokens as are stored take their places; another number counts as a text from its beginning.

        Raises:
            GeometryError, PolicyError: if then nobody could tell which tokens these are. Nothing has changed.
        """
        raise PolicyError(
            f"keys {list(keys.shape)} cannot be assigned: under {self.policy!r} each head holds tokens of its own; make the "
            "cache anew, and run the text on it"
        )

    # ------------------------------------------------------------------ for those who write one

    def _padded(self) -> Tensor:
        """Pads of each row, ``[batch, 1]`` or ``[1, 1]``."""
        return torch.zeros(1, 1, dtype=torch.long) if self.padding is None else self.padding[:, None]

    def _check_bounds(self, policy: SizePolicy) -> None:
        if self.max_length is not None and policy.limit is not None and policy.limit > self.max_length:
            raise PolicyError(
                f"{policy!r} keeps up to {policy.limit} tokens, but max_length (max_cache_length) is {self.max_length}; "
                "lower the one or raise the other"
            )

    def _bound(self) -> int | None:
        """The most tokens that it may come to hold."""
        return self.max_length if self.policy.limit is None else self.policy.limit

    def _resolved(self, rows: int, token: Token) -> SizePolicy:
        """The policy once the shape of a token is known: a budget in bytes becomes one in tokens."""
        whole = Whole((token,)) if self.expected.whole is None else self.expected.whole
        small, reserved = self._sizes(whole)
        try:
            policy = self.given.resolve(rows * small, rows * reserved, self.max_length)
        except PolicyError as error:
            if whole.beside:
                raise PolicyError(
                    f"{error}. {rows * whole.beside} of them are what the model keeps its own way"
                ) from error
            raise
        check_policy(policy)
        self._check_bounds(policy)
        return policy

    def _sizes(self, whole: Whole) -> tuple[int, int]:
        """Bytes of a token in one row of all layers that share a budget, and of what is held besides."""
        return sum(sum(held_bytes(self.storage, token)) for token in whole.tokens), whole.beside

    def _check_shapes(self, keys: Tensor, values: Tensor) -> None:
        """Raise `GeometryError` for what are no keys and values of this layer."""
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise GeometryError(
                f"keys {list(keys.shape)} and values {list(values.shape)} must be [batch, heads, tokens, head_dim], alike but for head_dim"
            )

    def _check_first(self, keys: Tensor, values: Tensor) -> None:
        """The same, before anything has come."""
        if self._rows is not None and keys.shape[0] != self._rows:
            raise GeometryError(
                f"the cache was made for {self._rows} rows, got {keys.shape[0]}; make it with new_cache(batch_size={keys.shape[0]})"
            )
        if self.padding is not None and keys.shape[0] != self.padding.shape[0]:
            raise GeometryError(
                f"padding is known for {self.padding.shape[0]} rows, got {keys.shape[0]}; give it for every row"
            )
        self.storage.check(keys, values)

    @staticmethod
    def _check_alike(keys: Tensor, values: Tensor, like: Mapping[Any, Tensor]) -> None:
        """The same, of a layer that has some: `like` are its keys and values, of no token."""
        for (name, held), new in zip(like.items(), (keys, values), strict=True):
            if (new.shape[0], new.shape[1], new.shape[3]) != (held.shape[0], held.shape[1], held.shape[3]):
                raise GeometryError(
                    f"{name} {list(new.shape)} do not fit a cache of [{held.shape[0]}, {held.shape[1]}, tokens, {held.shape[3]}]; "
                    "use a new cache for another model or batch size"
                )
            if (new.dtype, new.device) != (held.dtype, held.device):
                raise GeometryError(
                    f"{name} are {new.dtype} on {new.device}, the cache holds {held.dtype} on {held.device}; "
                    "convert them, or use a new cache"
                )

    def _check_counts(self, counts: Mapping[str, int], keys: Tensor, values: Tensor) -> None:
        """Raise `CorruptError` if these counts are of no layer like this one, which is empty.

        Args:
            counts: ``seen``, ``stored`` and ``floor``.
            keys, values: of no token, as they come; see `states_like`.
        """
        seen, stored, floor = (counts[name] for name in ("seen", "stored", "floor"))
        self._check_shapes(keys, values)
        policy = self._resolved(keys.shape[0], token_of(keys, values))
        most = self.max_length if policy.limit is None else policy.limit
        if stored > seen or floor > seen or (most is not None and stored > most):
            raise CorruptError(f"{stored} tokens stored of {seen} seen, under {policy!r}")
        if (stored < seen) != (floor > 0) or (stored < seen and policy.limit is None and floor == 0):
            raise CorruptError(f"{seen - stored} tokens have left, the last at length {floor}")

    def _check_numbers(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Raise `CorruptError` for counts that are none, or where something is held already."""
        if self.seen:
            raise CorruptError(f"the layer already holds {self.seen} tokens; a state goes into an empty one")
        numbers = [counts.get(name) for name in ("seen", "stored", "floor")]
        if (
            any(type(n) is not int or n < 0 for n in counts.values())
            or None in numbers
            or (counts.get("tensors") != len(tensors))
        ):
            raise CorruptError(f"counts {dict(counts)} with tensors {sorted(tensors)} are no state of a layer")
        if not tensors and (counts["seen"] or counts["stored"]):
            raise CorruptError(f"{counts['stored']} tokens stored, and no tensors")


def plain_keys(whole: Whole) -> int:
    """Bytes of a token's keys in all layers that share a budget, as they came."""
    return sum(bytes_of(token)[0] for token in whole.tokens)
