"""A long text in segments that can be spoken by themselves: whole sentences, packed evenly."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import sentencex  # type: ignore[import-untyped]

from kvcache import InputError
from kvcache_chatterbox.text._pace import CHARACTERS_PER_SECOND, UNSPACED, length, seconds

_SHORTEST_TARGET = 20  # characters; below it, segments are scraps without an intonation of their own
_FEW = 25  # characters that are not too many for any target from there on, however long they take to say
_PAGE = 1000  # characters without a space that sentencex is given at most, if a mark follows
_ABBREVIATED = 5  # characters of a word that may be an abbreviation, its dot among them
_QUOTED = 40  # characters of the text that a message repeats

# ISO 639-1. sentencex takes any string for a language and splits what it does not know as English, without a word.
_LANGUAGES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo "
    "es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg "
    "ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn "
    "no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv sw "
    "ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)

# How good a place a gap is to pause at. Words that belong together have none between them, or, as "10\u202f000", only a
# space at which no line may be broken.
_HELD, _WORD, _CLAUSE, _SENTENCE, _PARAGRAPH = 0, 1, 2, 3, 4

_CLOSING = ")]}\"'”’»›」』）】》〉"
_WIDE = "，、；：。！？．｡､។៕།༎၊။"  # of scripts without spaces: ideographs and kana, Khmer, Tibetan, Burmese
_PAUSING = ",;:—–،؛!?…" + _WIDE
_BLANK_LINE = re.compile(r"\n\s*\n|\r\s*\r|\u2029")
_BREAK = re.compile("[\n\r\u2028\u2029]")
_QUOTES = re.compile('["“”„«»‹›「」『』()（）]')
_VARIANT = "\ufe00-\ufe0f"  # selects the form of the character before it
# Where a script without spaces may be divided: behind its own marks, and behind those that others use, too, if a letter of
# such a script is before them. A comma between digits is part of a number, and so may be a dash before one. A dot behind a
# few letters of Thai and its neighbours abbreviates.
_UNSPACED_CLAUSE = re.compile(
    rf"""(?: [{_WIDE}] (?!(?<=\d.)\d) [,.!?;:~…～]*
    | [{UNSPACED}] [)）」』】》〉”’]*
      (?! (?<![\u0e00-\u109f\u1780-\u17ff]{{5}}) (?<=[\u0e00-\u109f\u1780-\u17ff]) \.[^.] )
      [,.!?;:~…‥⋯—―～〜]+ (?![\d,.!?;:~…‥⋯—―～〜]) (?!(?<=[!-~])[A-Za-z])
    ) [{_VARIANT}]* [)）」』】》〉”’]*""",
    re.VERBOSE,
)
_UNSPACED_SENTENCE = re.compile(r"[.!?؟۔।॥።។༎။。！？．｡]+[)）」』】》〉”’]*")
_ZERO_WIDTH_SPACE = "\u200b"  # between words of a script without spaces
_JOINERS = "\u2060\ufeff"  # no break on either side
_NO_BREAK = re.compile(r"[\xa0\u2007\u202f]+(?=\S)")
# A sound that a model knows by name, such as "[clear throat]", and what it is in: a word, whatever spaces it has.
_TAG = re.compile("\\[[^\\[\\]\n\r\u2028\u2029]{1,40}\\]")
_WORDS = re.compile(rf"(?:{_TAG.pattern}|\S)+")
_INITIAL = re.compile(r"\W*([^\W\d_])\.$")
_NUMBERING = re.compile(r"\W*([^\W\d_]|\d{1,3})[.)]$")


@dataclass(frozen=True)
class Segment:
    """A part of a text that is spoken by itself.

    Attributes:
        text: ``given[start:end]``, without whitespace around it.
        start, end: where in the given text, in characters.
    """

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    gap: int  # what kind of place its end is


class _Ruler:
    """How long the parts of a text are, in characters of the Latin script that take as long to say.

    A digit is one, as on paper; but many of them make a part longer, so that none takes more than half as long again.

    Args:
        text: all of it.
        language: two-letter code.
        target: how long a part may be.
    """

    # Whole numbers, so that parts that are as long are equal wherever they stand; thirds are whole, too.
    UNIT = 3 * 10**9

    def __init__(self, text: str, language: str, target: int) -> None:
        scale = self.UNIT * CHARACTERS_PER_SECOND / 1.5
        self.written = [0, *accumulate(round(self.UNIT * length(character, language)) for character in text)]
        self.spoken = [0, *accumulate(round(scale * seconds(character, language)) for character in text)]
        self._target = target * self.UNIT + self.UNIT // 2_000_000  # what rounding can add
        self._few = min(target, _FEW)

    def fits(self, start: int, end: int) -> bool:
        length = max(self.written[end] - self.written[start], self.spoken[end] - self.spoken[start])
        return length <= self._target or end - start <= self._few


def split(text: str, language: str | None = "en", target: int | None = 200) -> list[Segment]:
    r"""Divide a text into segments of at most `target` characters, between sentences where that is possible.

    Characters are those of a script like Latin. What takes longer to say counts as more: a Chinese, Japanese or Korean
    character as about three, many digits as three each; see `kvcache_chatterbox.text`. So segments are about as long to
    hear, whatever they are written in.

    Neighbouring sentences are packed into the fewest segments, and among those packings the most even one is taken:
    segments decode together in one batch, and the longest decides how long that takes.

    A sentence longer than `target` is divided behind clause punctuation, and a clause longer than that at whitespace.
    Words are never divided, so a single word longer than `target` is a segment of its own; what stands in brackets, as
    "[clear throat]", is one word up to 40 characters. In Chinese, Japanese, Thai and others without spaces, punctuation, also
    that of other scripts, is where a sentence may be divided, and what has none stays whole. What has no letter or digit (a dash, an emoji) stays
    with its neighbour and may make a segment longer than `target`: by itself there would be nothing to say. The words of
    all segments, in order, are the words of the text. What a no-break space joins ("10\u202f000", "M.\xa0Dupont") is divided
    only if it is longer than `target`.

    Args:
        text: what to say. Blank lines end sentences, too; single line breaks do not.
        language: two-letter code (ISO 639-1), also with a region ("pt-BR"); None means English.
        target: characters of a segment at most, at least 20; None never divides.

    Raises:
        InputError: if there is nothing to say, or the language or target cannot be used.
    """
    language = primary_language(language)
    check_target("target", target)
    check_text(text)
    if target is None:
        start = len(text) - len(text.lstrip())
        return [Segment(text.strip(), start, len(text.rstrip()))]
    ruler = _Ruler(text, language, target)
    pieces: list[_Piece] = []
    for sentence in _runs(_kept_together(text, _pieces(text, language)), _SENTENCE):
        pieces += _divided(sentence, ruler)
    return [Segment(text[piece.start : piece.end], piece.start, piece.end) for piece in _packed(pieces, ruler)]


def primary_language(language: str | None) -> str:
    """The two-letter code of a language as callers write it: "en" for None, "pt" for "pt-BR".

    Raises:
        InputError: if there is no such language.
    """
    if language is None:
        return "en"
    code = re.split("[-_]", language)[0].lower()
    if code not in _LANGUAGES.split():
        raise InputError(
            f"language={language!r} is not a two-letter code of ISO 639-1; give one such as 'en', 'de' or 'zh', "
            "for a language without a code that of its nearest relative, or None for English"
        )
    return code


def check_target(name: str, target: Any) -> None:
    """Raise `InputError` for what segments cannot be measured by."""
    if target is not None and type(target) is not int:
        raise InputError(f"{name}={target!r} must be a whole number of characters, or None never to divide")
    if target is not None and target < _SHORTEST_TARGET:
        raise InputError(f"{name}={target} characters is below {_SHORTEST_TARGET}; give about 200")


def check_text(text: Any) -> None:
    """Raise `InputError` for what nobody could say."""
    if not isinstance(text, str):
        raise InputError(f"the text must be a str, got {type(text).__name__}; decode bytes first")
    if not text.strip():
        raise InputError("the text is empty: give at least one word to speak")
    beginning = text.strip()[:_QUOTED]
    if not _says_something(text, 0, len(text)):
        raise InputError(f"the text {beginning!r} has no letter or digit; give at least one word to speak")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text {beginning!r} has half a character (a lone surrogate) at position {error.start}; "
            "decode it again from its source"
        ) from error


def _says_something(text: str, start: int, end: int) -> bool:
    return any(text[at].isalnum() for at in range(start, end))


def _pieces(text: str, language: str) -> list[_Piece]:
    """The smallest parts that the text may be divided into: words, and clauses of what is written without spaces."""
    gaps: dict[int, int] = {}  # what kind of place the end of a sentence is
    begin = 0
    for blank in (*_BLANK_LINE.finditer(text), None):
        paragraph = text[begin : len(text) if blank is None else blank.start()]
        # Sentences inside quotes or brackets: not to be parted from each other unless the whole is too long.
        gaps.update((begin + at, _CLAUSE) for at in _sentence_ends(_QUOTES.sub(" ", paragraph), language))
        gaps.update((begin + at, _SENTENCE) for at in _sentence_ends(paragraph, language))
        gaps[begin + len(paragraph.rstrip())] = _PARAGRAPH
        begin = len(text) if blank is None else blank.end()

    pieces = []
    in_tags = {at for tag in _TAG.finditer(text) for at in range(tag.start() + 1, tag.end())}
    for word in _WORDS.finditer(text):
        start, end = word.span()
        said = next((at for at in range(end, start, -1) if text[at - 1].isalnum()), start)
        cuts = {at: _WORD for at in range(start + 1, end) if text[at - 1] == _ZERO_WIDTH_SPACE}
        cuts.update((cut.end(), _CLAUSE) for cut in _UNSPACED_CLAUSE.finditer(text, start, end))
        cuts[end] = _CLAUSE if _pauses(text[start:end]) else _between(text, end)
        for at in range(start + 1, end + 1):
            if at in gaps:
                # Behind the last word of it, only closing quotes and brackets are left.
                cut = end if at >= said else _cut(text, start, at, at in cuts)
                if cut is not None:
                    cuts[cut] = max(gaps[at], cuts.get(cut, _WORD))
        for cut, gap in sorted(cuts.items()):
            if cut not in in_tags:
                pieces.append(_Piece(start, cut, _HELD if cut < end and _joined(text, cut) else gap))
                start = cut
    return pieces


def _between(text: str, end: int) -> int:
    """What kind of place the space behind a word is."""
    return _HELD if _NO_BREAK.match(text, end) else _WORD


def _joined(text: str, at: int) -> bool:
    return text[at - 1] in _JOINERS or text[at] in _JOINERS


def _pauses(word: str) -> bool:
    """Whether there is clause punctuation behind the last letter or digit of a word."""
    for character in reversed(word):
        if character in _PAUSING or character.isalnum():
            return character in _PAUSING
    return False


def _sentence_ends(text: str, language: str) -> Iterator[int]:
    """Where sentences end, at their last character that is not whitespace."""
    # sentencex 1.0.32 panics, which no `except Exception` catches, on a wide space behind an initial ("I\xa0.").
    plain = re.sub(r"[^\S\n]", " ", text)
    begin = 0
    for end in (*_pages(plain), len(plain)):
        for sentence in sentencex.segment(language, plain[begin:end]):
            if sentence.strip():
                yield begin + len(sentence.rstrip())
            begin += len(sentence)


def _pages(text: str) -> Iterator[int]:
    """Where to interrupt what has no space: the time that sentencex takes grows with the square of its length."""
    for run in re.finditer(r"\S+", text):
        at = run.start()
        while mark := _UNSPACED_SENTENCE.search(text, at + _PAGE, run.end()):
            at = mark.end()
            yield at


def _cut(text: str, start: int, at: int, unspaced: bool) -> int | None:
    """Where to cut the word from `start` of which the part before `at` ends a sentence, but not the word; None: nowhere.

    Args:
        unspaced: a script without spaces may be divided there.
    """
    before = at - 1
    while before > start and text[before] in _CLOSING:
        before -= 1
    if text[before].isascii() and not unspaced:
        return None  # "z.B." and "example.com" are words
    while unicodedata.category(text[at]) in ("Pe", "Pf") or "\ufe00" <= text[at] <= "\ufe0f":
        at += 1
    return at


def _kept_together(text: str, pieces: list[_Piece]) -> list[_Piece]:
    """The pieces, those that say nothing by themselves joined to a neighbour, and without pauses behind initials."""
    joined: list[_Piece] = []
    waiting: int | None = None  # where something begins that says nothing and goes with what follows
    for i, piece in enumerate(pieces):
        before = joined[-1] if joined else _Piece(0, 0, _PARAGRAPH)
        said, last = text[piece.start : piece.end], i + 1 == len(pieces)
        if _says_something(text, piece.start, piece.end):
            space = _between(text, piece.end)
            begins = piece.gap == _SENTENCE and _only_begins(said, before.gap >= _SENTENCE, space == _HELD)
            start = piece.start if waiting is None else waiting
            joined.append(_Piece(start, piece.end, space if begins else piece.gap))
            waiting = None
        elif not last and (waiting is not None or not joined or _opens(text, said, before.end, piece.start)):
            waiting = piece.start if waiting is None else waiting
        else:
            joined[-1] = _Piece(before.start, piece.end, max(before.gap, piece.gap))
    return joined


def _opens(text: str, said: str, before: int, start: int) -> bool:
    """Whether something without words belongs to what follows: an opening quote, or a bullet that begins a line."""
    brackets = all(unicodedata.category(character) in ("Ps", "Pi") for character in said)
    return brackets or _BREAK.search(text, before, start) is not None


def _only_begins(word: str, alone: bool, held: bool) -> bool:
    """Whether a word of which sentencex says that it ends a sentence begins something: "M. Dupont", "2. Stir".

    Args:
        alone: nothing of its sentence is before it.
        held: no line may be broken behind it.
    """
    if held and word[-1] == "." and word[0].isupper() and len(word) <= _ABBREVIATED:
        return True
    initial = _INITIAL.match(word)
    return (initial is not None and initial[1].isupper()) or (alone and _NUMBERING.match(word) is not None)


def _runs(pieces: list[_Piece], gap: int) -> Iterator[list[_Piece]]:
    """The pieces up to each place that is at least as good as `gap`."""
    run: list[_Piece] = []
    for piece in pieces:
        run.append(piece)
        if piece.gap >= gap:
            yield run
            run = []
    if run:
        yield run


def _divided(sentence: list[_Piece], ruler: _Ruler) -> Iterator[_Piece]:
    """The sentence in one piece if it is short enough, else its clauses, and of a long clause even parts."""
    whole = _whole(sentence)
    if ruler.fits(whole.start, whole.end):
        yield whole
        return
    for clause in _runs(sentence, _CLAUSE):
        whole = _whole(clause)
        if ruler.fits(whole.start, whole.end):
            yield whole
        else:
            yield from _packed(list(_words(clause, ruler)), ruler)


def _words(clause: list[_Piece], ruler: _Ruler) -> Iterator[_Piece]:
    """Its words, those that are held together as one if that is short enough."""
    for held in _runs(clause, _WORD):
        whole = _whole(held)
        yield from [whole] if ruler.fits(whole.start, whole.end) else held


def _whole(pieces: list[_Piece]) -> _Piece:
    return _Piece(pieces[0].start, pieces[-1].end, pieces[-1].gap)


def _packed(pieces: list[_Piece], ruler: _Ruler) -> list[_Piece]:
    """Neighbours put together into the fewest pieces that fit, with the least sum of squared lengths."""
    written = [ruler.written[piece.start] for piece in pieces]
    spoken = [ruler.spoken[piece.start] for piece in pieces]
    counts, squares = [0], [0]  # of the first n pieces: how many they become, and the squares
    begins: list[int] = []
    low = stop = 0  # a part that ends with this piece begins at one of these: it fits, and fewest are before it
    for last, piece in enumerate(pieces):
        while low < last and not ruler.fits(pieces[low].start, piece.end):
            low += 1
        while stop <= last and counts[stop] <= counts[low]:
            stop += 1
        w, s = ruler.written[piece.end], ruler.spoken[piece.end]
        choices = [
            before + (d * d if (d := w - x) > (e := s - y) else e * e)
            for before, x, y in zip(squares[low:stop], written[low:stop], spoken[low:stop], strict=True)
        ]
        least = min(choices)
        counts.append(counts[low] + 1)
        squares.append(least)
        begins.append(low + choices.index(least))
    packed = []
    end = len(pieces)
    while end:
        first = begins[end - 1]
        packed.append(_whole(pieces[first:end]))
        end = first
    return packed[::-1]
