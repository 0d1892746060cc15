"""What utterances take of a cache: its rows, the slots of a row, and bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcache import KVCacheManager, Pinned
from kvcache.decoding import rows_within
from kvcache.errors import check_whole
from kvcache_chatterbox.speech._options import DecoderOptions
from kvcache_chatterbox.speech._step_engine import Stepper
from kvcache_chatterbox.text import RowLayout, RowLimits

SlotsOf = Callable[[int, int, int], int]
"""Gives the slots of a row from three counts: tokens before the speech, tokens of speech, rows of the utterance."""


@dataclass(frozen=True, eq=False)
class CacheNeeds:
    """What utterances of a T3 take of a cache, with the model as it is now.

    Attributes:
        t3: upstream's.
        options: how it decodes.
        manager: of its caches.
        stepper: what decodes whole steps, if the model can.
        captures: whether steps are captured or compiled.
    """

    t3: Any
    options: DecoderOptions
    manager: KVCacheManager
    stepper: Stepper | None
    captures: bool

    @property
    def overhead(self) -> int:
        """Start-of-speech tokens behind the text."""
        return 2 if self.options.double_bos and not self.t3.is_gpt else 1

    @property
    def rows(self) -> int:
        """Cache rows of an utterance in a batch: two where the model can be guided, whatever its weight."""
        return 1 if self.t3.is_gpt else 2

    @property
    def token_bytes(self) -> int:
        """Of one token in one cache row, over all layers."""
        return self.manager.geometry.token_bytes if self.stepper is None else self.stepper.token_bytes

    def layout(self, rows: int, slots_of: SlotsOf, held: bool) -> RowLayout:
        """How a segment lies in so many rows of a cache.

        Args:
            slots_of: of its rows.
            held: False where everything is recomputed, and nothing is held.
        """
        return RowLayout(
            rows,
            self.token_bytes if held else 0,
            lambda before, most: slots_of(before, most, rows),
            lambda before: self._pinned_twice(before, rows) if held else 0,
        )

    def exactly(self, before: int, total: int, rows: int) -> int:
        """Slots of a row with so many tokens before the speech and so many of it, or what the policy keeps of them."""
        token, twice = self.manager.geometry.token_bytes * rows, self._pinned_twice(before, rows)
        policy = Pinned(before, self.options.kept).resolve(token, twice, self.manager.max_cache_length)
        return before + total - 1 if policy.limit is None else policy.limit  # the last token drawn is never run

    def taken(self, before: int, total: int, rows: int) -> int:
        """The same; in steps where steps of the decode are captured or compiled, which then serve other texts, too."""
        needed = self.exactly(before, total, rows)
        most = self.manager.max_cache_length
        captures = self.captures and self.stepper is not None
        if not captures or self.options.kept.evicts or most is None or needed > most:
            return needed
        return min(-(-needed // self.options.bucket) * self.options.bucket, most)

    def room(self, limits: RowLimits, slots: int | None) -> tuple[int, int]:
        """Slots and places of a batch that any utterance fits; see `UtteranceDecoder.room`."""
        slots = self.manager.max_cache_length if slots is None else slots
        assert slots is not None
        check_whole("slots", slots, 1)
        one = slots * self.token_bytes * self.rows
        return slots, rows_within(limits.max_rows, limits.bytes, slots, one, "max_cache_length")

    def _pinned_twice(self, before: int, rows: int) -> int:
        """Bytes of the keys that re-rotated positions keep besides, as they were before they were turned."""
        if self.manager.positions != "rerotated" or not self.options.kept.evicts:
            return 0
        geometry = self.manager.geometry
        keys = sum(geometry.of(layer).layer_token_bytes[0] for layer in range(geometry.layers))
        return rows * keys * Pinned(before, self.options.kept).pinned
