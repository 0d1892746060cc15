"""A layer whose KV heads each keep the tokens that a `RankingPolicy` scores highest."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvcache.cache._attended import Attended, Span
from kvcache.cache._buffer import Buffer, held_of, states_like, token_of
from kvcache.cache._layer import Expected, LayerCache
from kvcache.cache._looks import check_looks, looked_at_most
from kvcache.cache._policies import SizePolicy
from kvcache.cache._ranking import RankingPolicy, ScoringContext
from kvcache.cache._rope import KeyRotation
from kvcache.cache._slots import slots_for
from kvcache.cache._storage import Storage
from kvcache.errors import GeometryError, PolicyError, RollbackError

_AT_ONCE = 16  # queries that wait to be looked at together, or to push older ones out together


class RankedLayer(LayerCache):
    """Keys and values of one layer, ``[batch, KV heads, tokens, head_dim]``, of which the best-scored stay.

    A chunk is stored, attended to as a whole, and then ranked. Where the policy looks at queries, its span's `observe` says
    what they were and does the ranking, so it must follow each append; see `attend`. Tokens stay in order.

    Args:
        policy: a `RankingPolicy`, or one `Pinned`.
        storage, max_length, padding, expected: as of `LayerCache`.
        turn: turns the model's queries, for a policy that does so; None if they carry no rotary embedding.
        static: take the memory for the policy's limit at the first append.
    """

    by_head = True

    def __init__(
        self,
        policy: SizePolicy,
        storage: Storage | None = None,
        *,
        turn: KeyRotation | None = None,
        max_length: int | None = None,
        static: bool = False,
        padding: Tensor | None = None,
        expected: Expected | None = None,
    ) -> None:
        if not isinstance(policy.ranking, RankingPolicy):
            raise PolicyError(f"{policy!r} ranks no tokens; give for example SnapKV(1024), or use a KVLayer")
        self.ranking: RankingPolicy = policy.ranking
        self.static = static
        self._turn = turn
        by_token = None if storage is None else storage.by_token()
        super().__init__(policy, by_token, max_length=max_length, padding=padding, expected=expected)
        self._buffer: Buffer | None = None
        self._clear()

    def _clear(self) -> None:
        self.seen = self.stored = 0
        self._floor = 0  # no roll back below this length
        self._at: Tensor | None = None  # [B, H, stored] positions, int32
        self._mass: Tensor | None = None  # [B, H, stored] attention received in all
        self._queries: Tensor | None = None  # [B, heads, room, D]; in the first `_held` places the latest
        self._held = 0
        self._scaling = 1.0
        self.rehearsing: range | None = None  # tokens are attended to and looked at, and not stored: they repeat these
        self._waiting: tuple[Tensor, Tensor, Tensor] | None = None  # keys, values, positions that wait to be observed

    # ------------------------------------------------------------------ what it holds

    @property
    def observes(self) -> bool:
        """Whether it must be told what is attended to."""
        return self.ranking.observes

    @property
    def retained(self) -> int:
        return self.stored

    @property
    def capacity(self) -> int:
        return 0 if self._buffer is None else self._buffer.slots

    @property
    def rows(self) -> int | None:
        return self._rows if self._buffer is None else self._buffer.rows

    @property
    def initialized(self) -> bool:
        return self._buffer is not None

    @property
    def rolls_back(self) -> bool:
        return not self.policy.evicts

    @property
    def nbytes(self) -> int:
        more = (self._at, self._mass, self._queries)
        held = 0 if self._buffer is None else self._buffer.nbytes
        return held + sum(t.numel() * t.element_size() for t in more if t is not None)

    @property
    def keys(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer.read_side("keys", self.stored)

    @property
    def values(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer.read_side("values", self.stored)

    def positions(self) -> Tensor:
        return torch.zeros(1, 1, 0, dtype=torch.long) if self._at is None else self._at.long().cpu()

    # ------------------------------------------------------------------ append, observe

    def check_append(self, keys: Tensor, values: Tensor) -> None:
        super().check_append(keys, values)
        if self._waiting is not None:
            raise PolicyError(
                f"{self.ranking!r} ranks tokens by what is attended to, but was not told after the last append; run the "
                "model as manager.observed_model, or call observe()"
            )

    def append(self, keys: Tensor, values: Tensor) -> Attended:
        self.check_append(keys, values)
        buffer = self._buffer
        if buffer is None or (self.seen == 0 and not buffer.made_for(keys, values)):
            buffer = self._allocate(keys, values)
        fresh, after = keys.shape[2], self.stored + keys.shape[2]
        if fresh == 0:
            return Attended(*buffer.read(self.stored))
        keys, values = keys.detach(), values.detach()
        at = torch.arange(self.seen, self.seen + fresh, dtype=torch.int32, device=keys.device)
        at = at.expand(keys.shape[0], keys.shape[1], -1)
        at = at.contiguous() if self._at is None else torch.cat([self._at, at], 2)
        limit = self.policy.limit
        assert limit is not None
        stays = self.rehearsing is None and after <= limit
        if stays:
            self._reserve(buffer, after)
            buffer.write(self.stored, keys, values)
            self.stored, self._at = after, at
        if stays and self.storage.exact:
            attended = buffer.read(after)
        else:
            held = buffer.read(after - fresh)
            attended = torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2)
        if self.rehearsing is not None:
            self._waiting = *attended, at
            return self._attended(*attended, fresh)
        self.seen += fresh
        if self.observes and self.seen > self.policy.pinned:
            self._waiting = *attended, at
        elif not stays:
            self._rank(*attended, at, self.policy.keep(after))
        return self._attended(*attended, fresh)

    def _attended(self, keys: Tensor, values: Tensor, fresh: int) -> Attended:
        observe = self.observe if self.observes or self.rehearsing is not None else None
        span = Span(range(keys.shape[1]), keys, values, self._mask(keys.shape[2], fresh, keys.device), observe)
        return Attended(keys, values, (span,))

    def _mask(self, columns: int, fresh: int, device: torch.device) -> Tensor | None:
        """Which of the last `fresh` of so many tokens sees what."""
        if self.padding is None and (fresh == 1 or columns == fresh):
            return None
        column, query = torch.arange(columns, device=device), torch.arange(fresh, device=device)
        mask = (column <= columns - fresh + query[:, None])[None, None]
        if self.padding is None:
            return mask
        left = self.seen - columns  # before these; pads are the first to leave, in every head
        pads = (self.padding.clamp_max(self.seen) - left).clamp_min(0).to(device)[:, None, None, None]
        itself = column == columns - fresh + query[:, None]  # a pad sees itself: no row of a softmax without a key
        return (mask & (column >= pads)) | itself

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
            seen = self._seen(keys, values, at, queries.detach())
            self._mass = looked_at_most(seen, self.rehearsing, self.ranking.sinks, self.stored)
            return
        if self.ranking.needs_cumulative_attention and (self.ranking.query_window or queries.shape[2] > _AT_ONCE):
            self._count(keys, values, at, self.seen - queries.shape[2])
            self._add_mass(self._seen(keys, values, at, queries.detach()))
        elif self.ranking.needs_cumulative_attention and self._held + queries.shape[2] > _AT_ONCE:
            self._count(keys, values, at, self.seen - queries.shape[2])
        if self.ranking.query_window or (self.ranking.needs_cumulative_attention and queries.shape[2] <= _AT_ONCE):
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
            if (counted := self.ranking.query_mask(seen, at)) is not None:
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

    def _keep_queries(self, queries: Tensor) -> None:
        """Note the queries of the latest tokens: as many as the policy looks at, or those whose looks are not yet counted."""
        most, fresh = self.ranking.query_window, queries.shape[2]
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
        most = self.ranking.query_window
        return (
            None if self._queries is None or not most else self._queries[:, :, max(0, self._held - most) : self._held]
        )

    def _count(self, keys: Tensor, values: Tensor, at: Tensor, length: int | None = None) -> None:
        """Add the looks that wait to be counted, all at once: the keys are then read once for all of them.

        Args:
            keys, values, at: of all tokens that are there.
            length: tokens seen when the last of these queries came; by default all.
        """
        if self._queries is not None and self._held and not self.ranking.query_window:
            waiting = self._queries[:, :, : self._held]
            seen = self._seen(keys, values, at, waiting)
            self._add_mass(seen if length is None else replace(seen, length=length))
            self._held = 0

    def _count_all(self) -> None:
        if self._buffer is not None and self._at is not None and self._waiting is None:
            self._count(*self._buffer.read(self.stored), self._at)

    def _seen(self, keys: Tensor, values: Tensor, at: Tensor, queries: Tensor | None) -> ScoringContext:
        asked, unknown = (
            self.ranking.needs_cumulative_attention or self.ranking.rehearses,
            0.0 if self.ranking.needs_cumulative_attention else -1.0,
        )
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
        assert self._at is not None and self._buffer is not None
        return self._seen(*self._buffer.read(self.stored), self._at, self._latest)

    def worth(self) -> Tensor:
        """The scores of what is stored, best first in each head, ``[batch, KV heads, stored]``; infinite for what must stay."""
        return self._scores(self.seen_all()).sort(dim=2, descending=True).values

    def rank_to(self, stay: int) -> None:
        """Keep the best `stay` of what is stored."""
        if stay < self.stored and self._at is not None and self._buffer is not None:
            self._rank(*self._buffer.read(self.stored), self._at, stay)

    def _scores(self, seen: ScoringContext) -> Tensor:
        score = self.ranking.score(seen).float().expand(seen.positions.shape)
        own = seen.positions - seen.padding
        kept = (own >= 0) & ((own < self.policy.pinned) | (seen.positions >= self.seen - self.ranking.window_size))
        # Pads leave first; pinned and recent tokens stay.
        return score.masked_fill(own < 0, -torch.inf).masked_fill(kept, torch.inf)

    def _rank(self, keys: Tensor, values: Tensor, at: Tensor, stay: int) -> None:
        """Keep the best `stay` of these tokens, what is stored and what has just come; of equal scores the older ones."""
        self._count(keys, values, at)
        seen = self._seen(keys, values, at, self._latest)
        columns = self._scores(seen).sort(dim=2, descending=True, stable=True).indices[:, :, :stay].sort(2).values
        buffer, stored = self._buffer, self.stored
        assert buffer is not None
        if self.storage.exact:
            held = buffer.encode(keys, values)
        elif stored == keys.shape[2]:
            held = buffer.first(stored)
        else:
            held = buffer.behind(buffer.first(stored), buffer.encode(keys[:, :, stored:], values[:, :, stored:]))
        self._reserve(buffer, stay)
        buffer.fill(held, columns)
        with torch.inference_mode(False):
            self._at = at.gather(2, columns)
            if self._mass is not None and seen.received is not None:
                self._mass = seen.received.gather(2, columns)
        self.stored = stay
        self._floor = self.seen

    # ------------------------------------------------------------------ going back, trimming

    def check_truncate(self, length: int) -> None:
        super().check_truncate(length)
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

    def truncate(self, length: int) -> None:
        self.check_truncate(length)
        if length == 0:
            self._clear()
            return
        self.stored -= self.seen - length
        self.seen = length
        self._at = None if self._at is None else self._at[:, :, : self.stored].clone()

    def reset(self) -> None:
        self._clear()
        self._rows = None

    def check_trim(self, max_tokens: int) -> None:
        least = self.policy.pinned + self.ranking.window_size
        if max_tokens < least:
            raise PolicyError(
                f"cannot trim to {max_tokens} tokens: {self.policy.pinned} are pinned and {self.ranking.window_size} recent; "
                f"give at least {least}"
            )

    def trim(self, max_tokens: int | None = None) -> int:
        """Rank now, down to `max_tokens`, or to where the policy ranks down to. How many left."""
        self.refuse_waiting("trim")
        assert self.policy.limit is not None
        stay = min(self.stored, self.policy.keep(self.policy.limit + 1)) if max_tokens is None else max_tokens
        if max_tokens is not None:
            self.check_trim(stay)
        leaving = self.stored - stay
        if leaving <= 0:
            return 0
        self.rank_to(stay)
        return leaving

    def shrink_to_fit(self) -> None:
        if self._buffer is not None:
            self._buffer.cut(slots_for(self.stored, self._bound(), self.static))

    def refuse_waiting(self, what: str) -> None:
        """Raise `PolicyError` between an append and its observation."""
        if self._waiting is not None:
            raise PolicyError(f"cannot {what} between an append and its observation; call observe() first")

    # ------------------------------------------------------------------ as tensors

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        self.refuse_waiting("save")
        if self.padding is not None:
            raise GeometryError("rows padded on the left cannot be saved; run the rows apart")
        self._count_all()
        tensors = {} if self._buffer is None else self._buffer.tensors(self.stored)
        held = {"at": self._at, "mass": self._mass, "queries": self._latest}
        tensors |= {name: part.clone() for name, part in held.items() if part is not None}
        if tensors:
            tensors["scaling"] = torch.tensor(self._scaling, dtype=torch.float64)
        counts = {"seen": self.seen, "stored": self.stored, "floor": self._floor}
        return tensors, counts | {"tensors": len(tensors)}

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        self._check_numbers(tensors, counts)
        if not tensors:
            return
        keys, values = states_like(tensors)
        self._check_counts(counts, keys, values)
        seen, stored = counts["seen"], counts["stored"]
        check_looks(tensors, keys, seen, stored, self.ranking.query_window)
        buffer = self._allocate(keys, values)
        held = held_of(buffer, tensors, stored, ("at", "mass", "queries", "scaling"))
        self._reserve(buffer, stored)
        buffer.fill(held)
        self.seen, self.stored, self._floor = seen, stored, counts["floor"]
        self._scaling = float(tensors["scaling"])
        self._at, self._mass = (
            None if part is None else part.clone() for part in (tensors.get("at"), tensors.get("mass"))
        )
        if (queries := tensors.get("queries")) is not None:
            self._keep_queries(queries)

    # ------------------------------------------------------------------ rows, inside

    def select(self, rows: Tensor) -> None:
        if rows.numel() == 0:
            raise GeometryError("cannot select no rows: give at least one, or reset the cache")
        self.refuse_waiting("choose rows")
        if self._buffer is not None:
            self._buffer.select(rows, self.stored)
        elif self._rows is not None:
            self._rows = rows.shape[0]
        self.padding = None if self.padding is None else self.padding[rows.cpu()]
        for name in ("_at", "_mass", "_queries"):
            held: Tensor | None = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, rows.to(held.device)))

    def _check_shapes(self, keys: Tensor, values: Tensor) -> None:
        super()._check_shapes(keys, values)
        if self._buffer is not None and (self.seen or self._buffer.made_for(keys, values)):
            self._check_alike(keys, values, self._buffer.like)
        else:
            self._check_first(keys, values)

    def _allocate(self, keys: Tensor, values: Tensor) -> Buffer:
        self.policy = self._resolved(keys.shape[0], token_of(keys, values))
        self._buffer = Buffer(self.storage, keys, values, slots_for(0, self._bound(), self.static))
        return self._buffer

    def _reserve(self, buffer: Buffer, tokens: int) -> None:
        if tokens > buffer.slots:
            buffer.grow(slots_for(tokens, self._bound(), self.static), self.stored)
