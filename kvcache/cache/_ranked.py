"""A layer whose KV heads each keep the tokens that a `RankingPolicy` scores highest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcache.cache._growing import KVLayer
from kvcache.cache._policies import SizePolicy
from kvcache.cache._ranking import RankingPolicy, ScoringContext
from kvcache.cache._rope import KeyRotation
from kvcache.errors import CorruptError, GeometryError, PolicyError, RollbackError

_AT_ONCE = 16  # queries that wait to be looked at together, or to push older ones out together


Observer = Callable[[Tensor, float], None]


@dataclass(frozen=True)
class Piece:
    """Some KV heads of a layer as one attention sees them.

    Attributes:
        heads: which KV heads of the layer.
        keys, values: all that the new tokens attend to, ``[batch, heads, tokens, dim]``.
        mask: which new token sees what, ``[batch or 1, heads or 1, fresh, tokens]``; None if each sees all before it.
        observe: is told the queries, ``[batch, heads, fresh, head_dim]``, and their scaling, after they have been attended.
    """

    heads: Sequence[int]
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    observe: Observer | None


def place(heads: Sequence[int]) -> slice | list[int]:
    """These heads, in order, as an index: neighbours as a slice, of which a tensor has a view."""
    return slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] + 1 == len(heads) else list(heads)


class RankedLayer(KVLayer):
    """Keys and values of one layer, ``[batch, KV heads, tokens, head_dim]``, of which the best-scored stay.

    A chunk is stored, attended to as a whole, and then ranked. Where the policy looks at queries, `observe` says what they
    were and does the ranking, so it must follow each append; see `kvcache.models.observed_copy`. Tokens stay in order.

    Args:
        policy: a `RankingPolicy`, or one `Pinned`.
        turn: turns the model's queries, for a policy that does so; None if they carry no rotary embedding.
        max_length, preallocate, padding, rows, layers, token_bytes: as for `KVLayer`.
    """

    def __init__(
        self,
        policy: SizePolicy,
        *,
        turn: KeyRotation | None = None,
        max_length: int | None = None,
        preallocate: bool = False,
        padding: Tensor | None = None,
        layers: int = 1,
        rows: int | None = None,
        token_bytes: tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(policy.ranking, RankingPolicy):
            raise PolicyError(f"{policy!r} ranks no tokens; give for example SnapKV(1024), or use a KVLayer")
        self.ranking: RankingPolicy = policy.ranking
        self._turn = turn
        super().__init__(
            policy,
            max_length=max_length,
            preallocate=preallocate,
            layers=layers,
            rows=rows,
            token_bytes=token_bytes,
        )
        if padding is not None and bool((padding > 0).any()):
            self.padding = padding.detach().cpu().long()

    def _clear(self) -> None:
        super()._clear()
        self._pads = None  # of the base, which knows them by counts; here each token's position tells
        self._at: Tensor | None = None  # [B, H, stored] positions, int32
        self._mass: Tensor | None = None  # [B, H, stored] attention received in all
        self._queries: Tensor | None = None  # [B, heads, room, D]; in the first `_held` places the latest
        self._held = 0
        self._scaling = 1.0
        self.rehearsing: range | None = None  # tokens are attended to and looked at, and not stored: they repeat these
        self._waiting: tuple[Tensor, Tensor, Tensor] | None = None  # keys, values, positions that wait to be observed

    # ------------------------------------------------------------------ what it holds

    @property
    def by_head(self) -> bool:
        return True

    @property
    def observes(self) -> bool:
        """Whether it must be told what is attended to."""
        return self.ranking.observes

    @property
    def retained(self) -> int:
        return self.stored

    @property
    def nbytes(self) -> int:
        more = (self._at, self._mass, self._queries)
        return super().nbytes + sum(t.numel() * t.element_size() for t in more if t is not None)

    def positions(self) -> Tensor:
        """The position of the token in each slot, ``[batch, KV heads, stored]``."""
        return torch.zeros(1, 1, 0, dtype=torch.long) if self._at is None else self._at.long().cpu()

    # ------------------------------------------------------------------ append, observe

    def check_append(self, keys: Tensor, values: Tensor) -> None:
        super().check_append(keys, values)
        if self._waiting is not None:
            raise PolicyError(
                f"{self.ranking!r} ranks tokens by what is attended to, but was not told after the last append; run the "
                "model as manager.runner, or call observe()"
            )

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return all that they attend to: all that is stored, then the new ones.

        Raises:
            GeometryError, PolicyError: before anything has changed.
        """
        self.check_append(keys, values)
        if self._keys is None or (self.seen == 0 and not self._made_for(keys, values)):
            self._allocate(keys, values)
        fresh, after = keys.shape[2], self.stored + keys.shape[2]
        if fresh == 0:
            return self._valid()
        keys, values = keys.detach(), values.detach()
        at = torch.arange(self.seen, self.seen + fresh, dtype=torch.int32, device=keys.device)
        at = at.expand(keys.shape[0], keys.shape[1], -1)
        at = at.contiguous() if self._at is None else torch.cat([self._at, at], 2)
        if self.rehearsing is not None:
            held = self._valid()
            self._waiting = torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2), at
            return self._waiting[:2]
        unpinned = self.seen + fresh > self.policy.pinned
        assert self.policy.limit is not None
        if after <= self.policy.limit:
            attended = self._extend(keys, values)
            self._at = at
        else:
            held = self._valid()
            attended = torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2)
            self.seen += fresh
        waiting = (*attended, at)
        if self.observes and unpinned:
            self._waiting = waiting
        elif after > self.policy.limit:
            self._rank(*waiting, self.policy.keep(after))
        return attended

    def pieces(self, keys: Tensor, values: Tensor, fresh: int) -> list[Piece]:
        """What the attention of the last `fresh` tokens sees: to be asked after their append, before `observe`."""
        return [self.piece(keys, values, fresh)]

    def piece(self, keys: Tensor, values: Tensor, fresh: int) -> Piece:
        """The same, of which there is one."""
        columns = keys.shape[2]
        mask = None
        if self.padding is not None or (fresh > 1 and columns > fresh):
            column, query = torch.arange(columns, device=keys.device), torch.arange(fresh, device=keys.device)
            mask = (column <= columns - fresh + query[:, None])[None, None]
        if self.padding is not None and mask is not None:
            left = self.seen - columns  # before these; pads are the first to leave, in every head
            pads = (self.padding.clamp_max(self.seen) - left).clamp_min(0).to(keys.device)[:, None, None, None]
            itself = column == columns - fresh + query[:, None]  # a pad sees itself: no row of a softmax without a key
            mask = (mask & (column >= pads)) | itself
        observe = self.observe if self.observes or self.rehearsing is not None else None
        return Piece(range(keys.shape[1]), keys, values, mask, observe)

    @torch.no_grad()
    def observe(self, queries: Tensor, scaling: float) -> None:
        """Learn what the tokens of the last append looked at; then rank, if there are too many.

        Args:
            queries: of these tokens, ``[batch, heads, tokens, head_dim]``.
            scaling: of the scores.
        """
        if self._waiting is None:
            return
        keys, values, at = self._waiting
        self._scaling = scaling
        if self.rehearsing is not None:
            self._waiting = None
            self._rehearse(self._seen(keys, values, at, queries.detach()))
            return
        if self.ranking.accumulates and (self.ranking.queries or queries.shape[2] > _AT_ONCE):
            self._count(keys, values, at, self.seen - queries.shape[2])
            self._add_mass(self._seen(keys, values, at, queries.detach()))
        elif self.ranking.accumulates and self._held + queries.shape[2] > _AT_ONCE:
            self._count(keys, values, at, self.seen - queries.shape[2])
        if self.ranking.queries or (self.ranking.accumulates and queries.shape[2] <= _AT_ONCE):
            self._keep_queries(queries.detach())
        self._waiting = None
        assert self.policy.limit is not None
        if keys.shape[2] > self.policy.limit:
            self._rank(keys, values, at, self.policy.keep(keys.shape[2]))

    def _add_mass(self, seen: ScoringContext) -> None:
        assert seen.received is not None
        mass = seen.received
        for weights, at in seen.parts():
            weights = seen.per_kv_head(weights)
            if (counted := self.ranking.counted(seen, at)) is not None:
                weights = weights * counted
            mass = mass + weights.sum(2) * seen.groups
        self._mass = mass

    def begin_rehearsal(self) -> Callable[[], None]:
        """Forget what was looked at: `rehearsing` will say what is read again. Returns what undoes a failed one."""
        self._count_all()
        before = self._mass

        def undo() -> None:
            self._mass, self._waiting = before, None

        self._mass = None
        return undo

    def _rehearse(self, seen: ScoringContext) -> None:
        """Note the most attention that each token of a part got, divided among the sinks, that part and its repetition.

        Nothing has left and no row has pads, so tokens are where their positions say.
        """
        part, fresh = self.rehearsing, seen.queries.shape[2]
        assert part is not None and seen.received is not None
        sinks = min(self.ranking.sinks, part.start)
        places = torch.cat(
            [torch.arange(n, m) for n, m in ((0, sinks), (part.start, part.stop), (self.seen, self.seen + fresh))]
        )
        places = places.to(seen.keys.device)
        divided = replace(
            seen,
            keys=seen.keys[:, :, places],
            values=seen.values[:, :, places],
            positions=seen.positions[:, :, places],
            length=self.seen + fresh,
        )
        most = seen.received[:, :, part.start : part.stop]
        for weights, _ in divided.parts():
            by_head = weights[..., sinks : sinks + len(part)].amax(2).view(*most.shape[:2], seen.groups, -1)
            most = torch.maximum(most, by_head.amax(2))
        self._mass = seen.received[:, :, : self.stored].clone()
        self._mass[:, :, part.start : part.stop] = most

    def _keep_queries(self, queries: Tensor) -> None:
        """Note the queries of the latest tokens: as many as the policy looks at, or those whose looks are not yet counted."""
        most, fresh = self.ranking.queries, queries.shape[2]
        if most and fresh >= most:
            queries, fresh, self._held = queries[:, :, -most:], most, 0
        room = min(most, self._held + fresh) + (min(_AT_ONCE, most - 1) if most else _AT_ONCE)
        if self._queries is None or self._queries.shape[2] < min(room, self._held + fresh):
            old = self._queries
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written to outside of it
                self._queries = queries.new_zeros((*queries.shape[:2], room, queries.shape[3]))
            if old is not None:
                self._queries[:, :, : self._held] = old[:, :, : self._held]
        if self._held + fresh > self._queries.shape[2]:
            left = min(self._held, max(0, most - fresh))
            self._queries[:, :, :left] = self._queries[:, :, self._held - left : self._held].clone()
            self._held = left
        self._queries[:, :, self._held : self._held + fresh] = queries
        self._held += fresh

    @property
    def _latest(self) -> Tensor | None:
        """The queries that the policy looks at."""
        most = self.ranking.queries
        return (
            None if self._queries is None or not most else self._queries[:, :, max(0, self._held - most) : self._held]
        )

    def _count(self, keys: Tensor, values: Tensor, at: Tensor, length: int | None = None) -> None:
        """Add the looks that wait to be counted, all at once: the keys are then read once for all of them.

        Args:
            keys, values, at: of all tokens that are there.
            length: tokens seen when the last of these queries came; by default all.
        """
        if self._queries is not None and self._held and not self.ranking.queries:
            waiting = self._queries[:, :, : self._held]
            seen = self._seen(keys, values, at, waiting)
            self._add_mass(seen if length is None else replace(seen, length=length))
            self._held = 0

    def _count_all(self) -> None:
        if self._at is not None and self._waiting is None:
            self._count(*self._valid(), self._at)

    def _seen(self, keys: Tensor, values: Tensor, at: Tensor, queries: Tensor | None) -> ScoringContext:
        asked, unknown = self.ranking.accumulates or self.ranking.rehearses, 0.0 if self.ranking.accumulates else -1.0
        mass = torch.zeros(*at.shape[:2], 0, device=keys.device) if self._mass is None else self._mass
        pads = torch.zeros(1, 1, 1, dtype=torch.long) if self.padding is None else self.padding[:, None, None]
        return ScoringContext(
            keys,
            values,
            at,
            pads.to(keys.device),
            self.seen,
            keys[:, :, :0] if queries is None else queries,
            self._scaling,
            torch.nn.functional.pad(mass, (0, at.shape[2] - mass.shape[2]), value=unknown) if asked else None,
            self._turn,
        )

    def seen_all(self) -> ScoringContext:
        """What there is to rank now."""
        self._count_all()
        assert self._at is not None
        return self._seen(*self._valid(), self._at, self._latest)

    def worth(self) -> Tensor:
        """The scores of what is stored, best first in each head, ``[batch, KV heads, stored]``; infinite for what must stay."""
        return self._scores(self.seen_all()).sort(dim=2, descending=True).values

    def rank_to(self, stay: int) -> None:
        """Keep the best `stay` of what is stored."""
        if stay < self.stored and self._at is not None:
            keys, values = self._valid()
            self._rank(keys.clone(), values.clone(), self._at, stay)

    def _scores(self, seen: ScoringContext) -> Tensor:
        score = self.ranking.score(seen).float().expand(seen.positions.shape)
        own = seen.positions - seen.padding
        kept = (own >= 0) & ((own < self.policy.pinned) | (seen.positions >= self.seen - self.ranking.recent))
        # Pads leave first; pinned and recent tokens stay.
        return score.masked_fill(own < 0, -torch.inf).masked_fill(kept, torch.inf)

    def _rank(self, keys: Tensor, values: Tensor, at: Tensor, stay: int) -> None:
        """Keep the best `stay` of these tokens; of equal scores the older ones."""
        self._count(keys, values, at)
        seen = self._seen(keys, values, at, self._latest)
        columns = self._scores(seen).sort(dim=2, descending=True, stable=True).indices[:, :, :stay].sort(2).values
        key_slots, value_slots = self._reserve(stay)
        for slots, states in ((key_slots, keys), (value_slots, values)):
            slots[:, :, :stay] = states.gather(2, columns[..., None].expand(-1, -1, -1, states.shape[3]))
        with torch.inference_mode(False):
            self._at = at.gather(2, columns)
            if self._mass is not None and seen.received is not None:
                self._mass = seen.received.gather(2, columns)
        self.stored = stay
        self._floor = self.seen

    # ------------------------------------------------------------------ going back, trimming

    def check_truncate(self, length: int) -> None:
        if self.observes and 0 < length < self.seen:
            raise RollbackError(
                f"cannot roll back to {length} tokens: {self.ranking!r} cannot forget what the tokens after them looked "
                "at; reset the cache, or rank without attention, by KeyNorm or KeyDiff"
            )
        if 0 < length < self._floor <= self.seen:
            raise RollbackError(
                f"cannot roll back to {length} tokens: tokens left up to length {self._floor}; give {self._floor} or "
                "more, or reset"
            )
        super().check_truncate(length)

    def truncate(self, length: int) -> None:
        self.check_truncate(length)
        if length == 0:
            self._clear()
            return
        self.stored -= self.seen - length
        self.seen = length
        self._at = None if self._at is None else self._at[:, :, : self.stored].clone()

    def check_trim(self, max_tokens: int) -> None:
        least = self.policy.pinned + self.ranking.recent
        if max_tokens < least:
            raise PolicyError(
                f"cannot trim to {max_tokens} tokens: {self.policy.pinned} are pinned and {self.ranking.recent} recent; "
                f"give at least {least}"
            )

    def trim(self, max_tokens: int | None = None) -> int:
        """Rank now, down to `max_tokens`, or to where the policy ranks down to. How many left."""
        self._refuse_waiting("trim")
        assert self.policy.limit is not None
        stay = min(self.stored, self.policy.keep(self.policy.limit + 1)) if max_tokens is None else max_tokens
        if max_tokens is not None:
            self.check_trim(stay)
        leaving = self.stored - stay
        if leaving <= 0:
            return 0
        self.rank_to(stay)
        return leaving

    def _refuse_waiting(self, what: str) -> None:
        if self._waiting is not None:
            raise PolicyError(f"cannot {what} between an append and its observation; call observe() first")

    # ------------------------------------------------------------------ as tensors

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        self._refuse_waiting("save")
        self._count_all()
        tensors, counts = super().state()
        held = {"at": self._at, "mass": self._mass, "queries": self._latest}
        tensors |= {name: part.clone() for name, part in held.items() if part is not None}
        if tensors:
            tensors["scaling"] = torch.tensor(self._scaling, dtype=torch.float64)
        return tensors, counts | {"tensors": len(tensors)}

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        known = {"keys", "values", "at", "mass", "queries", "scaling"}
        seen, stored = self._check_state(tensors, counts, known)
        if not tensors:
            return
        keys, at, scaling = tensors["keys"], tensors.get("at"), tensors.get("scaling")
        mass, queries = tensors.get("mass"), tensors.get("queries")
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
            or not 0 < queries.shape[2] <= min(seen, self.ranking.queries)
        ):
            raise CorruptError(f"queries {list(queries.shape)} do not fit keys {list(keys.shape)}")
        if scaling is None or scaling.numel() != 1 or not bool(scaling.isfinite()):
            raise CorruptError("the scaling of the scores is missing")
        self._allocate(keys[:, :, :0], tensors["values"][:, :, :0])
        self._fill(keys, tensors["values"])
        self.seen, self._floor, self._scaling = seen, counts["floor"], float(scaling)
        self._at, self._mass = (None if part is None else part.clone() for part in (at, mass))
        if queries is not None:
            self._keep_queries(queries)

    # ------------------------------------------------------------------ rows

    def select(self, rows: Tensor) -> None:
        if rows.numel() == 0:
            raise GeometryError("cannot select no rows: give at least one, or reset the cache")
        self._refuse_waiting("choose rows")
        super().select(rows)
        self.padding = None if self.padding is None else self.padding[rows.cpu()]
        for name in ("_at", "_mass", "_queries"):
            held: Tensor | None = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, rows.to(held.device)))
