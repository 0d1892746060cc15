"""What a long text will take before it is spoken: speech tokens of each segment, cache memory, and how many run at once."""

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcache import CapacityError, InputError
from kvcache.policies import parse_bytes
from kvcache_chatterbox.segments import Segment, primary_language

if TYPE_CHECKING:
    from rich.table import Table

TOKENS_PER_SECOND = 25
# Most speech tokens of a segment: upstream's own default, 40 seconds.
_MOST = 1000
_QUOTED = 40  # characters of a segment that a message or a table repeats

# Written characters, spaces among them, that are spoken in a second: about 150 words a minute of about 6 characters.
_CHARACTERS_PER_SECOND = 15.0
# Where a character stands for a syllable or more. Syllables a second: F. Pellegrino, C. Coupé and E. Marsico, "A
# cross-language perspective on speech information rate", Language 87(3), 2011: Mandarin 5.18, Japanese 7.84. A Japanese
# character, kana and kanji mixed, is taken as one and a half. Korean is not in that study and taken as English's 6.19.
_OTHER_RATES = {"zh": 5.18, "ja": 7.84 / 1.5, "ko": 6.19}
_DIGITS_PER_SECOND = 3.0  # a digit is read as a word or so, whatever the script


def predicted_tokens(text: str, language: str | None) -> int:
    """Speech tokens that a text will probably take, at the pace at which people read aloud.

    Letters, digits and the spaces between words count; punctuation and emoji do not.

    Args:
        text: what is said.
        language: two-letter code, as for `split`; all but Chinese, Japanese and Korean are taken as fast as English.
    """
    rate = _OTHER_RATES.get(primary_language(language), _CHARACTERS_PER_SECOND)
    digits = sum(character.isnumeric() and not character.isalpha() for character in text)
    letters = sum(character.isalpha() or unicodedata.category(character)[0] == "M" for character in text)
    spaces = max(len(text.split()) - 1, 0)
    tokens = TOKENS_PER_SECOND * (letters + spaces) / rate + TOKENS_PER_SECOND * digits / _DIGITS_PER_SECOND
    return max(1, math.ceil(tokens))


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
class LongTextPlan:
    """What a long text will take, segment by segment.

    Attributes:
        segments: in the order of the text.
        rows: segments that decode together.
        cache_rows: rows of the cache: two for each segment with guidance, else one.
        slots: tokens that each cache row has room for: the voice, the longest segment's text, and its most speech.
        kv_bytes: what a static cache of `cache_rows` rows and `slots` slots holds, exactly.
        row_bytes: of it, what one segment takes.
        prefix: tokens of the voice, before the text.
        attention: score matrices of all segments against those of the whole text as one segment, 0 to 1: the sum of n²
            against the square of the sum of n, where n are the text and predicted speech tokens of a segment. The voice is
            left aside, both have it. It says how the quadratic part shrinks; a decoder with a cache computes one row of
            such a matrix at a time and never holds it whole.
        kv_share: tokens that one row of the longest segment caches against those of the whole text as one segment, voice
            included and with the predicted speech, 0 to 1.
        memory_budget: bytes that the cache may take; None: no limit.
        rows_allowed: segments that the budget has room for at once; None without one.
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

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "segments": [dataclasses.asdict(segment) for segment in self.segments]}

    def table(self) -> "Table":
        """The plan as a table to print with rich, a row a segment."""
        from rich.markup import escape
        from rich.table import Table

        made = Table(caption="\n".join(self._summary()), caption_justify="left")
        made.add_column("segment", justify="right")
        for heading in ("characters", "text tokens", "speech tokens", "at most"):
            made.add_column(heading, justify="right")
        made.add_column("text", no_wrap=True)
        for i, segment in enumerate(self.segments):
            numbers = (i, segment.characters, segment.text_tokens, segment.predicted, segment.most)
            made.add_row(*(str(number) for number in numbers), escape(_shortened(segment.text)))
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
        yield f"against one segment: {self.attention:.0%} of the attention scores, {self.kv_share:.0%} of a row's KV cache"


def make_plan(
    segments: Sequence[Segment],
    text_tokens: Sequence[int],
    *,
    language: str | None,
    prefix: int,
    overhead: int,
    token_bytes: int,
    guided: bool,
    max_rows: int,
    memory_budget: int | str | None,
    max_new_tokens: int | None,
    longest: int | None,
    max_length: int | None,
    slots_of: Callable[[int, int], int] = lambda before, most: before + most - 1,
) -> LongTextPlan:
    """Plan the segments of a text: what each takes, and how many decode together.

    Args:
        segments: from `split`.
        text_tokens: how many tokens each segment is for the model, start and stop included.
        language: of the text, as for `split`.
        prefix: voice tokens before the text.
        overhead: start-of-speech tokens behind the text, 1 or 2.
        token_bytes: that one token takes in one cache row, all layers together.
        guided: whether each segment runs two rows, for guidance.
        max_rows: segments at once at most.
        memory_budget: bytes that the cache may take, or ``"200MiB"``; None: no limit.
        max_new_tokens: speech tokens of each segment at most; None: three times the predicted and two seconds more,
            at most 1000 and at most `longest`.
        longest: speech tokens that the model has positions for; None: any number.
        max_length: tokens that a cache row may hold; None: any number.
        slots_of: slots of a cache row for so many tokens before the speech, and so many of it. By default one for each but
            the last, which is never run.

    Raises:
        InputError: if a number cannot be used, or a segment is predicted to take more speech than the model can make.
        CapacityError: if one segment does not fit into `memory_budget` or `max_length`.
    """
    if not segments or len(segments) != len(text_tokens):
        raise InputError(
            f"{len(segments)} segments with {len(text_tokens)} numbers of text tokens; give one for each of at least one"
        )
    for name, value in (("max_rows", max_rows), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    memory_budget = parse_bytes(memory_budget) if isinstance(memory_budget, str) else memory_budget
    planned = []
    slots = 0
    for i, (segment, tokens) in enumerate(zip(segments, text_tokens, strict=True)):
        name = f"segment {i} ({_shortened(segment.text)!r})"
        predicted = predicted_tokens(segment.text, language)
        _check_speech(name, segment.text, predicted, max_new_tokens, longest)
        # Nobody reads three times as slowly: what is not done by then is a model that does not find its end. It is stopped
        # there, for until then its rows of the cache are taken and its batch waits.
        bound = _MOST if longest is None else min(_MOST, longest)
        most = min(3 * predicted + 50, bound) if max_new_tokens is None else max_new_tokens
        needed = slots_of(prefix + tokens + overhead, most)
        if max_length is not None and needed > max_length:
            raise CapacityError(
                f"{name} may need {needed} slots of cache (for {prefix} tokens of voice, {tokens} of text, {overhead + most} of "
                f"speech), there are {max_length}; lower segment_characters or max_new_tokens, or raise max_cache_length"
            )
        slots = max(slots, needed)
        planned.append(SegmentPlan(segment.text, len(segment.text), tokens, predicted, most))

    rows_each = 2 if guided else 1
    row_bytes = rows_each * slots * token_bytes
    allowed = None if memory_budget is None else memory_budget // row_bytes
    if memory_budget is not None and memory_budget < row_bytes:
        raise CapacityError(
            f"one segment takes {_mib(row_bytes)} of KV cache ({rows_each} x {slots} slots), memory_budget is "
            f"{_mib(memory_budget)}; raise memory_budget, or lower segment_characters or max_new_tokens"
        )
    rows = min(len(segments), max_rows, len(segments) if allowed is None else allowed)
    spans = [segment.text_tokens + segment.predicted for segment in planned]
    fixed = prefix + overhead - 1
    return LongTextPlan(
        segments=tuple(planned),
        rows=rows,
        cache_rows=rows * rows_each,
        slots=slots,
        kv_bytes=rows * row_bytes,
        row_bytes=row_bytes,
        prefix=prefix,
        attention=sum(span**2 for span in spans) / sum(spans) ** 2,
        kv_share=(fixed + max(spans)) / (fixed + sum(spans)),
        memory_budget=memory_budget,
        rows_allowed=allowed,
    )


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
    line = " ".join(text.split())
    return line if len(line) <= _QUOTED else line[: _QUOTED - 1] + "…"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
