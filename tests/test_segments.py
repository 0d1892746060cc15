"""Long texts in segments: nothing lost, no word divided, the fewest and most even packing."""

import ast
import itertools
import re
import sys
from pathlib import Path

import pytest
import sentencex
from hypothesis import example, given
from hypothesis import strategies as st
from support.inside.speech import PACKED, pace, predicted_tokens
from support.inside.speech import segments as segmenting
from support.searching import search

from kvcache import InputError
from kvcache_chatterbox.text import Segment, primary_language, split

pytestmark = pytest.mark.one_release

SEARCH = search(150)

# Three sentences each, ends where a reader would put them.
SENTENCES = {
    "en": ["Dr. Smith paid $3.50 to Mr. Jones at 5 p.m. on Monday.", "“Is it mine?” she asked.", "Nobody knew."],
    "fr": ["« Bonjour ! » dit M. Dupont en 3,5 secondes.", "Il part demain ; rien ne presse.", "Vraiment ?"],
    "de": ["Am 3. Oktober kam Dr. Meier, z. B. mit dem Zug.", "„Wirklich?“, fragte er.", "»Ja.«"],
    "hi": ["नमस्ते मित्र।", "आप कैसे हैं?", "मैं ठीक हूँ।"],
    "ar": ["مرحبا يا صديقي.", "كيف حالك؟", "أنا بخير؛ شكرا."],
    "zh": ["我叫张三，今年三十岁，住在北京的一条小街上。", "“你去哪儿呢，我的朋友？”", "他问了我两次。"],
    "ja": ["「元気ですか？」", "はい、元気です、ありがとうございます。", "行こう。"],
}
SPACELESS = {"zh", "ja"}

words = st.text(
    st.characters(categories=["L", "Nd", "Po", "Ps", "Pe", "Pd", "So"], exclude_characters="\u2029"), min_size=1
)
plain_word = st.text("abcdefgXYZ", min_size=1, max_size=30) | st.sampled_from(["z.B.", "т.е.", "go.”Then", "a?b=c"])
spaces = st.sampled_from([" ", "  ", "\n", "\n\n", "\r\n\r\n", "\xa0", "\u3000", "\u2029", "\t", "\x85"])


@st.composite
def prose(draw):
    """Words with every kind of end and space between them."""
    ends = st.sampled_from(["", "", "", "", ",", ";", ".", "!", "?", "…", ".”", ")", " —", ". 😀", ".\n\n- "])
    parts = draw(st.lists(st.tuples(plain_word, ends, spaces), min_size=1, max_size=40))
    return "".join(itertools.chain.from_iterable(parts))


def said(text):
    return any(character.isalnum() for character in text)


def check(text, segments):
    """What holds for every text: segments in order, cut out of it at whitespace or clause marks, all of it in them."""
    assert segments
    position = 0
    for segment in segments:
        assert segment.text == text[segment.start : segment.end] == segment.text.strip()
        assert said(segment.text)
        assert segment.start >= position, "two segments overlap"
        assert not text[position : segment.start].strip(), "something between two segments is lost"
        position = segment.end
    assert not text[position:].strip()


@SEARCH
@given(prose(), st.sampled_from(["en", "fr", "de", "ru", None]), st.sampled_from([20, 45, 200]))
def test_words_are_kept_in_order_and_whole(text, language, target):
    segments = split(text, language, target)
    check(text, segments)
    assert [word for segment in segments for word in segment.text.split()] == text.split()
    for segment in segments:
        spoken = [word for word in segment.text.split() if said(word)]
        if len(segment.text) > target:
            assert len(spoken) == 1, "only a single word, with what stays with it, may be longer"


@SEARCH
@given(st.lists(words, min_size=1, max_size=30), spaces, st.sampled_from(["en", "zh", "hi", "am", "xh"]))
@example(["I", ".", "x"], "\xa0", "en")  # sentencex panics on it as it is
@example(["aaaaaaaaaa", "(", "-", "bbbbbbbbbbbbb", ")"], " ", "en")
@example(["(", ")", "a", "(", "(", ")"], "\n", "en")
@example(["））次", "。", "一。二"], " ", "zh")
def test_any_text_is_split_or_refused(parts, space, language):
    text = space.join(parts)
    if not said(text):
        with pytest.raises(InputError, match=r"no letter or digit|empty"):
            split(text, language, 20)
        return
    segments = split(text, language, 20)
    check(text, segments)
    assert "".join("".join(segment.text.split()) for segment in segments) == "".join(text.split())


@SEARCH
@given(st.lists(st.integers(3, 60), min_size=1, max_size=8), st.integers(60, 130))
def test_packing_is_the_fewest_and_most_even(lengths, target):
    """Against all ways to put neighbours together."""
    sentences = ["A" + "b" * (length - 2) + "." for length in lengths]
    options = []
    for breaks in itertools.product([False, True], repeat=len(sentences) - 1):
        packing = [sentences[0]]
        for sentence, apart in zip(sentences[1:], breaks, strict=True):
            packing = [*packing, sentence] if apart else [*packing[:-1], f"{packing[-1]} {sentence}"]
        if all(len(part) <= target for part in packing):
            options.append((len(packing), sum(len(part) ** 2 for part in packing)))
    found = [len(segment.text) for segment in split(" ".join(sentences), "en", target)]
    assert (len(found), sum(length**2 for length in found)) == min(options)


def length(text, language):
    """In Latin characters, as `split` counts."""
    written, spoken = (sum(of(character, language) for character in text) for of in (pace.length, pace.seconds))
    return round(max(written, 10 * spoken), 6)


@SEARCH
@given(
    st.lists(st.text("a1今か한", min_size=1, max_size=15), min_size=1, max_size=9),
    st.sampled_from([20, 33, 60]),
    st.sampled_from(["en", "ja"]),
)
def test_packing_of_any_script_is_the_fewest_and_most_even(words, target, language):
    """Against all ways to put neighbours together, where a character counts as a fraction of others."""
    text = " ".join(words)
    options = []
    for breaks in itertools.product([" ", "\n"], repeat=len(words) - 1):
        parts = "".join(itertools.chain(*itertools.zip_longest(words, breaks, fillvalue=""))).split("\n")
        if all(" " not in part or length(part, language) <= target or len(part) <= min(target, 25) for part in parts):
            options.append((len(parts), sum(length(part, language) ** 2 for part in parts)))
    found = texts(text, language=language, target=target)
    assert len(found) == min(options)[0]
    assert sum(length(part, language) ** 2 for part in found) == pytest.approx(min(options)[1], rel=1e-6)


LONGEST = {
    "one-letter words": "a ",
    "short sentences": "Hi. ",
    "digits": "1",
    "digits apart": "1 ",
    "only punctuation": "?!,",
    "punctuation and spaces": ". ",
    "commas": ",",
    "closing quotes": ".”",
    "ideographs": "今",
    "ideographs, stops": "今。",
    "ideographs, ASCII commas": "今,",
    "stops in quotes": "。”",
    "a variant of each comma": "今，\ufe00",
    "emoji": "😀",
    "emoji apart": "😀 ",
    "tags": "[laugh] ",
    "open tags": "[",
    "no spaces": "abc",
    "no-break spaces": "a\xa0",
    "words held together": "a\u2060",
    "paragraphs": "a\n\n",
}


def work(text, monkeypatch):
    """Calls of any function, of Python or C, and packings compared, to split a text."""
    count, longest = 0, 0

    def called(frame, event, function):
        nonlocal count
        count += event in ("call", "c_call")

    def compared(choices):
        nonlocal count
        count += len(choices)
        return min(choices)

    def handed_on(language, text):
        nonlocal longest
        longest = max([longest, *map(len, text.split())])
        return sentences(language, text)

    sentences = sentencex.segment
    with monkeypatch.context() as patch:
        patch.setattr(segmenting, "min", lambda *given: compared(*given) if len(given) == 1 else min(*given), False)
        patch.setattr(segmenting.sentencex, "segment", handed_on)
        before = sys.getprofile()
        sys.setprofile(called)
        try:
            split(text, "zh", 40)
        finally:
            sys.setprofile(before)
    return count, longest


@pytest.mark.parametrize("kind", LONGEST)
def test_twice_the_text_is_twice_the_work(kind, monkeypatch):
    """One-letter words took 3 s for 20,000 characters, and stops in quotes 12 s, while nobody else was served."""
    once, twice = ((("a" + LONGEST[kind] * size)[:size], size) for size in (2000, 4000))
    done, _ = work(once[0], monkeypatch)
    more, longest = work(twice[0], monkeypatch)
    assert more <= 2.5 * done
    assert more <= 100 * twice[1]
    if any(mark in LONGEST[kind] for mark in ".。?"):
        assert longest <= 1100, "the time that sentencex takes grows with the square of this"


def test_without_a_target_nothing_is_packed(monkeypatch):
    """This took 27 s to find the one segment that it is."""
    monkeypatch.setattr(PACKED, None)
    text = "\n " + "Hi. " * 3000
    assert split(text, "en", None) == [Segment(text.strip(), 2, 2 + 11_999)]


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_of_a_language(language):
    """With a target as long as the longest sentence, every sentence stays whole."""
    sentences = SENTENCES[language]
    text = ("" if language in SPACELESS else " ").join(sentences)
    target = max(20, *(len(sentence) for sentence in sentences))
    segments = split(text, language, target)
    check(text, segments)
    assert len(segments) > 1
    for sentence in sentences:
        assert sum(sentence in segment.text for segment in segments) == 1, (sentence, segments)


def texts(text, *, language="en", target):
    return [segment.text for segment in split(text, language, target)]


@pytest.mark.parametrize(
    ("text", "language", "target", "expected"),
    [
        ("One two three four. Five six seven.", "en", 20, ["One two three four.", "Five six seven."]),
        ("Dr. Smith met Mr. Jones. He left at once.", "en", 24, ["Dr. Smith met Mr. Jones.", "He left at once."]),
        ("It was 3.5 miles. Then 1,000 more.", "en", 20, ["It was 3.5 miles.", "Then 1,000 more."]),
        ("He said: “I am going home.” Then he left us.", "en", 30, ["He said: “I am going home.”", "Then he left us."]),
        ("(I am going home.) “Now then.” [Yes, let us.]", "en", 20, ["(I am going home.)", "“Now then.”", "[Yes, let us.]"]),
        ("Hier, elle a enfin vu M. Roux. Bonne nuit.", "fr", 30, ["Hier, elle a enfin vu M. Roux.", "Bonne nuit."]),
        ("Boil it. 2. Stir all of the rice.", "en", 24, ["Boil it.", "2. Stir all of the rice."]),
        ("No stop\n\nand there is none down here", "en", 27, ["No stop", "and there is none down here"]),
        ("See plan B.\r\n\r\nThen all of us leave it now.", "en", 28, ["See plan B.", "Then all of us leave it now."]),
        ("Buy\n- bread and butter\n- milk", "en", 20, ["Buy", "- bread and butter", "- milk"]),
        ("When it rained, we stayed at home all day long", "en", 32, ["When it rained,", "we stayed at home all day long"]),
        ("We waited — nobody came to see us that day", "en", 32, ["We waited —", "nobody came to see us that day"]),
        ("one two three four five six seven", "en", 20, ["one two three four", "five six seven"]),
        ("a word-with-a-hyphen-and-www.example.com/path b", "en", 20, ["a", "word-with-a-hyphen-and-www.example.com/path", "b"]),
        ("“I stood there for long. Then I turned around.”", "en", 30, ["“I stood there for long.", "Then I turned around.”"]),
        ("(मैं घर गया था।)वह आया और गया।", "hi", 20, ["(मैं घर गया था।)", "वह आया और गया।"]),
        ("我叫张三，今年三十岁，住在北京的一条小街上，天天读书", "zh", 20, ["我叫张三，今年三十岁，", "住在北京的一条小街上，天天读书"]),
        ("「一二三四五六七八。」「一二三四五六七八九十。」", "ja", 20, ["「一二三四五六七八。」", "「一二三四五六七八九十。」"]),
        ("一二三四五六七八１，０００九十一二三四五六七八", "zh", 20, ["一二三四五六七八１，０００九十一二三四五六七八"]),
        ("สวัสดีครับผมชื่อสมชาย ยินดีที่ได้รู้จักทุกคน", "th", 25, ["สวัสดีครับผมชื่อสมชาย", "ยินดีที่ได้รู้จักทุกคน"]),
    ],
)  # fmt: skip
def test_where_texts_are_divided(text, language, target, expected):
    assert texts(text, language=language, target=target) == expected


MARKS = [
    ",",
    ".",
    "!",
    "?",
    ";",
    ":",
    "…",
    "……",
    "——",
    "—",
    "～",
    "~",
    "｡",
    "､",
    "，",
    "。",
    "!?",
    "？！",
    "！!",
    "…！",
]
UNSPACED = {
    "zh": "今天天气很好",
    "ja": "とてもいいてんき",
    "th": "สวัสดีครับ",
    "km": "ខ្ញុំទៅផ្សារ",
    "my": "မင်္ဂလာပါ",
    "lo": "ສະບາຍດີ",
}


@pytest.mark.parametrize("mark", [*MARKS, "។", "།", "။", "!」", "。”", "，\ufe00", "!\ufe01", "。\ufe00」"])
@pytest.mark.parametrize("language", UNSPACED)
def test_unspaced_text_is_divided_behind_every_mark(language, mark):
    """Such texts were segments of 30 s, or refused with the advice to put punctuation into them."""
    clause = UNSPACED[language] + mark
    assert re.fullmatch(f"({re.escape(clause)})+", max(texts(clause * 40, language=language, target=60), key=len))
    assert len(texts(clause * 40, language=language, target=60)) > 5


INSIDE = (
    "访问example.com 一二三v1.2版 一二三,a四五 下午3:30见 比分三:2 五,000 10～20元 五月～6月 二〇一〇年—2020年 好...a"
)


@pytest.mark.parametrize(
    "word",
    [f"天天天天天天{inside}地地地地地地" for inside in INSIDE.split()]
    + ["ณวันที่หนึ่งพ.ศ.ก.ค.", "w" * 18 + "wait…what", "w" * 18 + "one—two", "很好很好，\u2060我们", "很好很好。\ufeff我们"],
)
def test_marks_inside_of_a_word_do_not_divide_it(word):
    assert texts(f"Say it now, please. {word}", target=20)[1:] == [word]


@pytest.mark.parametrize("space", ["\xa0", "\u202f", "\u2007"])
@pytest.mark.parametrize(
    ("before", "held", "after"),
    [
        ("The population was", "1 000 000", "people at that time"),
        ("Dans la ville de", "M. Dupont", "ce jour"),
        ("Il y vit ce jour", "Mme. Roux", "et lui"),
        ("Il regarde la page", "p. 12", "de ce livre"),
        ("Et toujours il disait", "« Bonjour ! »", "à elle"),
        ("Il part demain soir", "ici ;", "rien ne presse"),
        ("Est-ce bien vrai cela", "Vraiment ?", "Oui, oui"),
    ],
)
def test_a_no_break_space_holds_words_together(before, held, after, space):
    held = held.replace(" ", space)
    for target in range(20, 40):
        assert any(held in part for part in texts(f"{before} {held} {after}.", language="fr", target=target)), target


def test_a_no_break_space_holds_no_more_than_fits():
    assert texts("a\xa0" * 40, target=20) == ["\xa0".join("a" * 10)] * 4
    assert max(map(len, texts("word\u202f" * 500, target=100))) <= 100
    assert texts("今天天气很好，\u2060" * 10, language="zh", target=40)[1:]
    assert texts("The end of it.\xa0Then a new one began", target=24) == ["The end of it.", "Then a new one began"]


def test_a_zero_width_space_is_between_words():
    """Khmer and Thai mark words by it."""
    assert len(texts("ខ្ញុំទៅផ្សារ\u200b" * 20, language="km", target=30)) >= 10


def test_what_says_nothing_has_no_segment_of_its_own():
    text = "😀 It is a fine day. 😀😀 ( and then ) it rained !\n\n* * *\n\nThe end. 👍"
    segments = split(text, "en", 24)
    check(text, segments)
    assert [segment.text for segment in segments] == [
        "😀 It is a fine day. 😀😀",
        "( and then ) it rained !",
        "* * *\n\nThe end. 👍",
    ]


def test_a_word_longer_than_the_target_is_a_segment():
    text = f"Say {'a' * 5000} now, please."
    assert [len(segment.text) for segment in split(text, "en", 100)] == [3, 5000, 12]


def test_a_text_that_fits_is_one_segment():
    assert split("  Hello there.\n\nGood bye. ", None) == [Segment("Hello there.\n\nGood bye.", 2, 25)]


def test_realistic_paragraph_is_even():
    text = (
        "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. It is easy to tell the "
        "depth of a well. These days a chicken leg is a rare dish. Rice is often served in round bowls. The juice of "
        "lemons makes fine punch. The box was thrown beside the parked truck. The hogs were fed chopped corn and garbage."
    )
    lengths = [len(part) for part in texts(text, target=200)]
    assert len(lengths) == 2
    assert max(lengths) - min(lengths) < 50


def upstream_punc_norm(module):
    """Upstream's function out of its source; its module imports an audio stack."""
    for folder in sys.path:
        source = Path(folder) / "chatterbox" / f"{module}.py"
        if source.is_file():
            tree = ast.parse(source.read_text())
            found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "punc_norm"]
            space: dict = {}
            exec(compile(ast.Module(found, []), str(source), "exec"), space)
            return space["punc_norm"]
    return pytest.skip("chatterbox is not installed")


@pytest.mark.parametrize("module", ["tts", "mtl_tts"])
def test_segments_end_sensibly_with_upstreams_rules(module):
    """Each segment that upstream normalizes by itself ends with one mark, and begins with none that closes."""
    punc_norm = upstream_punc_norm(module)
    text = (
        "We waited: nobody came; then — at last — she did… “Who is it?” he asked. It was only the wind, the old wind that "
        "had blown here since before any of them was born, and it said nothing at all to anybody who had come to hear."
    )
    normalized = [punc_norm(part) for part in texts(text, target=40)]
    assert len(normalized) > 5
    for part in normalized:
        assert part[0].isalnum() or part[0] == '"'
        assert part[-1] in '.,!?-"'
        assert not any(part.endswith(two) for two in (",.", "..", ",,", "?.", "-.")), part


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "the text is empty: give at least one word"),
        (" \n\u3000\t", {}, "the text is empty"),
        ("… !? 😀 --", {}, r"the text '… !\? 😀 --' has no letter or digit"),
        ("?" * 1000, {}, "the text '" + r"\?" * 40 + "' has no letter"),
        ("Hello \ud83d there", {}, r"half a character \(a lone surrogate\) at position 6"),
        (b"Hello", {}, "must be a str, got bytes; decode"),
        (None, {}, "must be a str, got NoneType"),
        ("Hello", {"language": "xx"}, "language='xx' is not a two-letter code of ISO 639-1; give one such as"),
        ("Hello", {"language": "english"}, "language='english' is not"),
        ("Hello", {"language": ""}, "language='' is not"),
        ("Hello", {"target": 19}, "target=19 characters is below 20; give about 200"),
        ("Hello", {"target": 0}, "target=0 characters"),
        ("Hello", {"target": -200}, "target=-200 characters"),
    ],
)
def test_what_cannot_be_split_is_refused(text, arguments, message):
    with pytest.raises(InputError, match=message):
        split(text, **arguments)


@pytest.mark.parametrize(
    ("given_code", "code"), [(None, "en"), ("en", "en"), ("PT", "pt"), ("pt-BR", "pt"), ("zh_Hans", "zh"), ("no", "no")]
)
def test_language_codes(given_code, code):
    assert primary_language(given_code) == code
    assert split("One. Two.", given_code)


# ---------------------------------------------------------------------- how long segments are to hear

LONG = {
    "en": "The lighthouse keeper climbed the stairs every evening at six, carrying oil for the lamp. ",
    "zh": "我叫张三，今年三十岁，住在北京的一条小街上，天天读书。",
    "ja": "私は毎朝六時に起きて、海まで散歩をして、それから仕事に行きます。",
    "ko": "나는 매일 아침 여섯 시에 일어나서 바다까지 산책을 하고 일하러 갑니다. ",
    "am": "እኔ በየቀኑ ጠዋት እነሳለሁ፣ ከዚያም ወደ ሥራ እሄዳለሁ። ",
}
TAGS = ["[clear throat]", "[laugh]", "[sigh, deeply]", "[Dr. Who. A pause.]", "[笑。 又笑，]", "[a]b [c d]e"]


def heard(segment, language):
    return predicted_tokens(segment.text, language) / 25


@pytest.mark.parametrize("language", LONG)
def test_told_badly_segments_are_as_long_to_hear_in_every_script(language):
    """200 characters of Chinese, Japanese or Korean were 27 to 34 s of speech; 200 of English are 13."""
    for asked in (language, None):
        segments = split(LONG[language] * 12, asked)
        lengths = [heard(segment, asked) for segment in segments]
        assert sum(lengths) / len(lengths) > 8
        assert max(lengths) <= 200 / 15 + 1
    assert len(split(LONG[language] * 12, language, 800)) < len(segments)
    assert len(split(LONG[language] * 12, language, None)) == 1


@pytest.mark.parametrize("target", [20, 100, 200, 500])
def test_told_badly_digits_that_can_be_divided_are(target):
    text = " ".join(f"{n * 7919:05d} {n}" for n in range(200)) + ". And 1,000 more words."
    segments = split(text, "en", target)
    check(text, segments)
    assert max(heard(segment, "en") for segment in segments) <= max(1.5 * target, 5 * 25) / 15 + 1
    assert [word for segment in segments for word in segment.text.split()] == text.split()


@SEARCH
@given(
    st.lists(st.tuples(plain_word | st.sampled_from(TAGS), st.sampled_from(["", ".", ",", "。"]), spaces), min_size=1),
    st.sampled_from(["en", "zh"]),
    st.sampled_from([20, 60]),
)
def test_told_badly_a_tag_is_never_divided(parts, language, target):
    text = "".join(itertools.chain.from_iterable(parts))
    segments = split(text, language, target)
    check(text, segments)
    whole = [tag for word, *_ in parts for tag in re.findall(r"\[[^\]]*\]", word)]
    assert [tag for segment in segments for tag in re.findall(r"\[[^\]]*\]", segment.text)] == whole


mixed = st.lists(
    st.sampled_from(
        [*"我叫张三，今年。", "hello", "2024", "한국어", "カタカナ", "[clear throat]", "12345678901234", "well."]
    ),
    min_size=1,
)


@SEARCH
@given(
    mixed, st.sampled_from([" ", "", "\n\n"]), st.sampled_from(["en", "zh", "ja", None]), st.sampled_from([20, 60, 200])
)
def test_told_badly_mixed_scripts_keep_every_character_and_the_length(parts, space, language, target):
    text = space.join(parts)
    if not said(text):
        return
    segments = split(text, language, target)
    check(text, segments)
    for segment in segments:
        parts = re.split(r"\s+|[，。]", segment.text.replace("[clear throat]", "x"))
        if sum(map(said, parts)) > 1:  # one word alone may be longer
            assert heard(segment, language) <= max(1.5 * target, 5 * 25) / 15 + 1
