"""What a long text will take before it is spoken: speech tokens of each segment, cache memory, and how many run at once."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcache import CapacityError, InputError
from kvcache.errors import check_whole
from kvcache.io import parse_bytes, printable
from kvcache_chatterbox.text._pace import CHARACTERS_PER_SECOND, seconds
from kvcache_chatterbox.text._segments import Segment, primary_language
from kvcache_chatterbox.units import TOKENS_PER_SECOND

if TYPE_CHECKING:
    from rich.table import Table

# Most speech tokens of a segment: upstream's own default, 40 seconds.
_MOST = 1000
_QUOTED = 40  # characters of a segment that a message or a table repeats


def predicted_tokens(text: str, language: str | None) -> int:
    """Speech tokens that a text will probably take, at the pace at which people read aloud.

    Letters, digits and the spaces between words count; punctuation and emoji do not. See `kvcache_chatterbox.text`.

    Args:
        text: what is said.
        language: two-letter code, as for `split`.
    """
    language = primary_language(language)
    words = text.split()
    spaces = max(len(words) - 1, 0) / CHARACTERS_PER_SECOND
    said = sum(seconds(character, language) for word in words for character in word)
    return max(1, math.ceil(round(TOKENS_PER_SECOND * (said + spaces), 6)))


@dataclass(frozen=True)
class SegmentPlan:
    """What one segment will take.

    Attributes:
        text: what is said.
        characters: of the text.
        text_tokens: that the text is for the model.
        predicted: speech tokens that it will probably take.
        most: speech tokens at which it is stopped (its ``max_new_tokens``).
    """

    text: str
    characters: int
    text_tokens: int
    predicted: int
    most: int


@dataclass(frozen=True)
class VocoderBytes:
    """What the vocoder takes for a text.

    Attributes:
        weights: as loaded, and what is made of them to run, those of others that run in their place too.
        voice: what is told of the voice, and what the vocoder has made of it.
        workspace: while its largest chunk is made, beside these. The compiler is not in it.
        chunk: speech tokens of that chunk.
    """

    weights: int
    voice: int
    workspace: int
    chunk: int

    @property
    def total(self) -> int:
        """The sum of the bytes."""
        return self.weights + self.voice + self.workspace


@dataclass(frozen=True)
class LongTextPlan:
    """What a long text will take, segment by segment.

    Attributes:
        segments: in the order of the text.
        rows: segments that decode together.
        cache_rows: rows of the cache: two for each segment with guidance, else one.
        slots: tokens that each cache row has room for: the voice, the longest segment's text, and its most speech.
        kv_bytes: what the cache of `cache_rows` rows and `slots` slots holds while it speaks, exactly, and all that the engine
            keeps of it afterwards for the next text.
        row_bytes: of it, what one segment takes.
        prefix: tokens of the voice, before the text.
        attention: score matrices of all segments against those of the whole text as one segment, 0 to 1: the sum of n²
            against the square of the sum of n, where n are the text and predicted speech tokens of a segment. The voice is
            left aside, both have it. It says how the quadratic part shrinks; a decoder with a cache computes one row of
            such a matrix at a time and never holds it whole.
        kv_share: tokens that one row of the longest segment caches against those of the whole text as one segment, voice
            included and with the predicted speech, 0 to 1.
        memory_budget: bytes that the cache may take; None: no limit.
        rows_allowed: how often the budget holds what one segment takes; None without one.
        vocoder: what making audio takes, as far as `ChatterboxEngine.plan` can tell: of upstream's S3Gen; else None.
    """

    segments: tuple[SegmentPlan, ...]
    rows: int
    cache_rows: int
    slots: int
    kv_bytes: int
    row_bytes: int
    prefix: int
    attention: float
    kv_share: float
    memory_budget: int | None
    rows_allowed: int | None
    vocoder: VocoderBytes | None = None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "segments": [dataclasses.asdict(segment) for segment in self.segments]}

    def table(self) -> "Table":
        """The plan as a table to print with rich, a row a segment."""
        from rich.table import Table
        from rich.text import Text

        made = Table(caption="\n".join(self._summary()), caption_justify="left")
        made.add_column("segment", justify="right")
        for heading in ("characters", "text tokens", "speech tokens", "at most"):
            made.add_column(heading, justify="right")
        made.add_column("text", no_wrap=True)
        for i, segment in enumerate(self.segments):
            numbers = (i, segment.characters, segment.text_tokens, segment.predicted, segment.most)
            made.add_row(*(str(number) for number in numbers), Text(_shortened(segment.text)))
        return made

    def __str__(self) -> str:
        lines = [*self._summary()]
        lines.append(f"{'segment':>8} {'chars':>8} {'text':>8} {'speech':>8} {'at most':>8}")
        for i, segment in enumerate(self.segments):
            numbers = (i, segment.characters, segment.text_tokens, segment.predicted, segment.most)
            lines.append(" ".join(f"{number:>8}" for number in numbers) + f"  {_shortened(segment.text)}")
        return "\n".join(lines)

    def _summary(self) -> Iterator[str]:
        seconds = sum(segment.predicted for segment in self.segments) / TOKENS_PER_SECOND
        yield f"{len(self.segments)} segments, {self.rows} at once, about {seconds:.1f} s of speech"
        yield (
            f"KV cache: {_mib(self.kv_bytes)} in {self.cache_rows} rows of {self.slots} slots "
            f"({self.prefix} of voice), {_mib(self.row_bytes)} a segment"
        )
        if self.memory_budget is not None:
            yield f"memory budget: {_mib(self.memory_budget)}, room for {self.rows_allowed} segments at once"
        if (made := self.vocoder) is not None:
            yield (
                f"vocoder: {_mib(made.weights)} of weights, {_mib(made.voice)} of the voice, {_mib(made.workspace)} while "
                f"{made.chunk} tokens become audio"
            )
        yield f"against one segment: {self.attention:.0%} of the attention scores, {self.kv_share:.0%} of a row's KV cache"


@dataclass(frozen=True)
class RowLimits:
    """How many segments of a text may decode together.

    Attributes:
        max_rows: segments at once at most; with guidance each takes two rows of the cache.
        memory_budget: bytes that their cache may take, or ``"200MiB"``; fewer segments at once where not all fit. None: no limit.

    Raises:
        InputError, PolicyError: for a number that cannot be used, or words that are no size.
    """

    max_rows: int = 8
    memory_budget: int | str | None = None

    def __post_init__(self) -> None:
        check_whole("max_rows", self.max_rows, 1)
        budget = self.memory_budget
        if isinstance(budget, str):
            parse_bytes(budget)
        elif budget is not None and type(budget) is not int:
            raise InputError(f"memory_budget={budget!r} must be a number of bytes, or a size such as '200MiB'")

    @property
    def bytes(self) -> int | None:
        """The budget as a number of bytes; None without one."""
        return parse_bytes(self.memory_budget) if isinstance(self.memory_budget, str) else self.memory_budget


@dataclass(frozen=True)
class TokenRoom:
    """What a model has room for, and what of it a segment takes beside its text.

    Attributes:
        prefix: voice tokens before the text.
        overhead: start-of-speech tokens behind the text, 1 or 2.
        longest: speech tokens that the model has positions for; None: any number.
        max_length: tokens that a cache row may hold; None: any number.
    """

    prefix: int
    overhead: int
    longest: int | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class RowLayout:
    """How one segment lies in the cache that decodes it.

    Attributes:
        rows: of the cache: 2 where guidance has a row of its own.
        token_bytes: of one token in one row, over all layers; 0 where everything is recomputed and nothing is held.
        slots: gives the slots of a row from two counts: tokens before the speech, and tokens of speech. By default one for each
            token but the last, which is never run.
        beside: bytes that the cache takes beside its slots, for so many tokens before the speech.
    """

    rows: int
    token_bytes: int
    slots: Callable[[int, int], int] = lambda before, most: before + most - 1
    beside: Callable[[int], int] = lambda before: 0


def make_plan(
    segments: Sequence[Segment],
    text_tokens: Sequence[int],
    *,
    language: str | None,
    max_new_tokens: int | None,
    limits: RowLimits,
    room: TokenRoom,
    together: RowLayout,
    alone: RowLayout | None = None,
) -> LongTextPlan:
    """Plan the segments of a text: what each takes, and how many decode together.

    Args:
        segments: from `split`.
        text_tokens: how many tokens each segment is for the model, start and stop included.
        language: of the text, as for `split`.
        max_new_tokens: speech tokens of each segment at most; None: three times the predicted and two seconds more,
            at most 1000 and at most ``room.longest``.
        limits: of the segments at once.
        room: that the model has.
        together: of a segment that decodes beside others.
        alone: of a segment that decodes by itself; by default as together.

    Raises:
        InputError: if a segment is predicted to take more speech than the model can make.
        CapacityError: if one segment does not fit into the budget or ``room.max_length``.
    """
    if not segments or len(segments) != len(text_tokens):
        raise InputError(
            f"{len(segments)} segments with {len(text_tokens)} numbers of text tokens; give one for each of at least one"
        )
    if max_new_tokens is not None:
        check_whole("max_new_tokens", max_new_tokens, 1)
    planned = [
        _planned(i, segment, tokens, language, max_new_tokens, room.longest)
        for i, (segment, tokens) in enumerate(zip(segments, text_tokens, strict=True))
    ]
    rows, layout, slots, row_bytes = _arranged(planned, limits, room, together, alone)
    spans = [segment.text_tokens + segment.predicted for segment in planned]
    fixed, budget = room.prefix + room.overhead - 1, limits.bytes
    return LongTextPlan(
        segments=tuple(planned),
        rows=rows,
        cache_rows=rows * layout.rows,
        slots=slots,
        kv_bytes=rows * row_bytes,
        row_bytes=row_bytes,
        prefix=room.prefix,
        attention=sum(span**2 for span in spans) / sum(spans) ** 2,
        kv_share=(fixed + max(spans)) / (fixed + sum(spans)),
        memory_budget=budget,
        rows_allowed=None if budget is None else budget // row_bytes if row_bytes else len(segments),
    )


def _arranged(
    planned: Sequence[SegmentPlan], limits: RowLimits, room: TokenRoom, together: RowLayout, alone: RowLayout | None
) -> tuple[int, RowLayout, int, int]:
    """How many segments decode together, how each lies in the cache, and the slots of a row and the bytes of a segment then.

    Raises:
        CapacityError: if one does not fit.
    """
    budget = limits.bytes
    rows, layout = min(len(planned), limits.max_rows), together
    if rows > 1 and budget is not None:
        rows = min(rows, budget // max(1, _taken(planned, together, room)[1]))
    if rows <= 1:
        rows, layout = 1, together if alone is None else alone
    slots, row_bytes = _taken(planned, layout, room)
    if budget is not None and budget < row_bytes:
        raise CapacityError(
            f"one segment takes {_mib(row_bytes)} of KV cache ({layout.rows} x {slots} slots), memory_budget is "
            f"{_mib(budget)}; raise memory_budget, or lower segment_characters or max_new_tokens"
        )
    return rows, layout, slots, row_bytes


def _planned(
    i: int, segment: Segment, tokens: int, language: str | None, max_new_tokens: int | None, longest: int | None
) -> SegmentPlan:
    """What one segment says.

    Raises:
        InputError: if it is predicted to take more speech than the model can make.
    """
    predicted = predicted_tokens(segment.text, language)
    _check_speech(_name(i, segment.text), segment.text, predicted, max_new_tokens, longest)
    # Nobody reads three times as slowly: what is not done by then is a model that does not find its end. It is stopped
    # there, for until then its rows of the cache are taken and its batch waits.
    bound = _MOST if longest is None else min(_MOST, longest)
    most = min(3 * predicted + 50, bound) if max_new_tokens is None else max_new_tokens
    return SegmentPlan(segment.text, len(segment.text), tokens, predicted, most)


def _taken(planned: Sequence[SegmentPlan], layout: RowLayout, room: TokenRoom) -> tuple[int, int]:
    """Slots of a cache row, and bytes of all rows of one segment, where any of them fits.

    Raises:
        CapacityError: if one needs more slots than a row may have.
    """
    slots = nbytes = 0
    for i, segment in enumerate(planned):
        before = room.prefix + segment.text_tokens + room.overhead
        needed = layout.slots(before, segment.most)
        if room.max_length is not None and needed > room.max_length:
            raise CapacityError(
                f"{_name(i, segment.text)} may need {needed} slots of cache (for {room.prefix} tokens of voice, "
                f"{segment.text_tokens} of text, {room.overhead + segment.most} of speech), there are {room.max_length}; lower "
                "segment_characters or max_new_tokens, or raise max_cache_length"
            )
        slots = max(slots, needed)
        nbytes = max(nbytes, layout.rows * needed * layout.token_bytes + layout.beside(before))
    return slots, nbytes


def _name(i: int, text: str) -> str:
    return f"segment {i} ({_shortened(text)!r})"


def _check_speech(name: str, text: str, predicted: int, max_new_tokens: int | None, longest: int | None) -> None:
    divisible = len(text.split()) > 1
    limit = longest
    if max_new_tokens is None or not divisible:
        limit = _MOST if longest is None else min(_MOST, longest)
    if limit is None or predicted <= limit:
        return
    takes = f"{name} is predicted to take {predicted} speech tokens, {limit} is the most"
    if not divisible:
        raise InputError(
            f"{takes}, and one word of {len(text)} characters cannot be divided; put spaces or punctuation into it"
        )
    raise InputError(f"{takes}; lower segment_characters" + (", or give max_new_tokens" if limit == _MOST else ""))


def _shortened(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= _QUOTED else line[: _QUOTED - 1] + "…"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
