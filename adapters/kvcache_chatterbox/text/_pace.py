"""How long a text takes to say, character by character: what predictions, and the lengths of segments, go by."""

import unicodedata
from functools import lru_cache

# Written characters, spaces among them, that are spoken in a second: about 150 words a minute of about 6 characters.
CHARACTERS_PER_SECOND = 15.0
# Where a character stands for a syllable or more. Syllables a second: F. Pellegrino, C. Coupé and E. Marsico, "A
# cross-language perspective on speech information rate", Language 87(3), 2011: Mandarin 5.18, Japanese 7.84, English 6.19. A
# Japanese character, kana and kanji mixed, is taken as one and a half. Other scripts are taken as fast as English.
_CHINESE, _JAPANESE, _SYLLABLE = 5.18, 7.84 / 1.5, 6.19
_DIGITS_PER_SECOND = 3.0  # a digit is read as a word or so, whatever the script

# Of Unicode, first and last. Hangul is here as whole syllables; taken apart, its letters are letters.
_KANA = ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F))
_SYLLABARIES = (
    (0x1200, 0x139F),  # Ethiopic
    (0x13A0, 0x13FF),  # Cherokee
    (0x1400, 0x167F),  # Canadian Aboriginal
    (0x2D80, 0x2DDF),  # Ethiopic
    (0xA000, 0xA48F),  # Yi
    (0xAB70, 0xABBF),  # Cherokee
    (0xAC00, 0xD7A3),  # Hangul
)
_IDEOGRAPHS = ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_SOUTHEAST_ASIAN = (
    (0x0E00, 0x0EFF),
    (0x0F00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
)  # Thai and Lao, Tibetan, ...

UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in _IDEOGRAPHS + _KANA + _SOUTHEAST_ASIAN)
"""What is written without spaces between words, as a class of a regular expression."""


@lru_cache(maxsize=4096)
def seconds(character: str, language: str = "en") -> float:
    """How long a character takes to say; punctuation and emoji take no time.

    Args:
        character: of a text.
        language: two-letter code; it decides how ideographs are read.
    """
    if character.isspace():
        return 1 / CHARACTERS_PER_SECOND
    if character.isalpha() or unicodedata.category(character)[0] == "M":
        return 1 / _letters_per_second(ord(character), language)
    return 1 / _DIGITS_PER_SECOND if character.isnumeric() else 0.0


@lru_cache(maxsize=4096)
def length(character: str, language: str = "en") -> float:
    """A character in characters of the Latin script that take as long to say; one for a digit or a mark, as on paper."""
    return max(1.0, CHARACTERS_PER_SECOND * seconds(character, language)) if character.isalpha() else 1.0


def _letters_per_second(code: int, language: str) -> float:
    if code < 0x1200:
        return CHARACTERS_PER_SECOND
    if _among(code, _IDEOGRAPHS):
        return _JAPANESE if language == "ja" else _CHINESE
    if _among(code, _KANA):
        return _JAPANESE
    return _SYLLABLE if _among(code, _SYLLABARIES) else CHARACTERS_PER_SECOND


def _among(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= code <= last for first, last in ranges)
