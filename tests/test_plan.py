"""The plan of a long text against arithmetic of its own, and what it refuses."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.inside.speech import predicted_tokens
from support.searching import search

from kvcache import CapacityError, InputError
from kvcache_chatterbox.text import RowLayout, RowLimits, Segment, TokenRoom, make_plan, split

pytestmark = pytest.mark.one_release

SEARCH = search(100)

TEXT = (
    "The lighthouse keeper climbed the stairs every evening at six, carrying oil for the lamp. From the top he could see "
    "the whole bay. Fishing boats came home one by one, and he knew each of them by its light. When the fog rolled in, he "
    "rang the great brass bell until morning. Nobody ever thanked him for it, but nobody was ever lost on those rocks "
    "either. He thought that this was a fair trade."
)


def planned(segments, tokens=None, **changes):
    segments = [Segment(text, 0, len(text)) if isinstance(text, str) else text for text in segments]
    tokens = [len(segment.text) + 2 for segment in segments] if tokens is None else tokens
    rows, token_bytes = 2 if changes.pop("guided", True) else 1, changes.pop("token_bytes", 1000)
    limits = {name: changes.pop(name) for name in ("max_rows", "memory_budget") if name in changes}
    room = {name: changes.pop(name) for name in ("overhead", "longest", "max_length") if name in changes}
    return make_plan(
        segments,
        tokens,
        **{"language": "en", "max_new_tokens": None, **changes},
        limits=RowLimits(**limits),
        room=TokenRoom(34, **{"overhead": 2, **room}),
        together=RowLayout(rows, token_bytes),
    )


@pytest.mark.parametrize(
    ("text", "language", "seconds"),
    [
        ("a" * 150, "en", 10),
        ("abcd " * 30 + "x", "en", 151 / 15),  # spaces between words are time
        ("abc...!?!, — 😀 def", "en", (6 + 3) / 15),
        ("a" * 150, None, 10),
        ("a" * 150, "sw", 10),
        ("Am 3.", "de", 3 / 15 + 1 / 3),
        ("20000000", "en", 8 / 3),
        ("नमस्ते", "hi", 6 / 15),  # vowel signs are letters of it
        ("我" * 518 + "。", "zh", 100),
        ("三" * 518, "zh-TW", 100),
        ("あ" * 784, "ja", 150),
        ("한" * 619, "ko", 100),
        ("!", "en", 0),
    ],
)
def test_prediction_is_the_pace_of_people(text, language, seconds):
    assert predicted_tokens(text, language) == pytest.approx(max(1, 25 * seconds), abs=1)


def test_prediction_of_150_words_is_a_minute():
    assert predicted_tokens(" ".join(["words"] * 150), "en") == pytest.approx(60 * 25, rel=0.01)


@SEARCH
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=1, max_size=12),
    st.booleans(),
    st.integers(1, 2),
    st.integers(1, 15),
    st.none() | st.integers(1, 400),
    st.none() | st.integers(1, 10),
)
def test_numbers(parts, guided, overhead, max_rows, max_new_tokens, room):
    """Each number of the plan, worked out here by itself."""
    segments = ["a" * length for length, _ in parts]
    tokens = [count for _, count in parts]
    predicted = [-(-25 * length // 15) for length, _ in parts]
    most = [max_new_tokens or min(1000, 3 * p + 50) for p in predicted]
    slots = max(34 + t + overhead + m - 1 for t, m in zip(tokens, most, strict=True))
    row = slots * 1000 * (2 if guided else 1)
    budget = None if room is None else room * row + row // 2

    plan = planned(
        segments,
        tokens,
        guided=guided,
        overhead=overhead,
        max_rows=max_rows,
        max_new_tokens=max_new_tokens,
        memory_budget=budget,
    )
    assert [s.predicted for s in plan.segments] == predicted
    assert [s.most for s in plan.segments] == most
    assert [s.text_tokens for s in plan.segments] == tokens
    assert [(s.text, s.characters) for s in plan.segments] == [(text, len(text)) for text in segments]
    assert plan.slots == slots
    assert plan.row_bytes == row
    assert plan.rows == min(len(parts), max_rows, *([] if room is None else [room]))
    assert plan.cache_rows == plan.rows * (2 if guided else 1)
    assert plan.kv_bytes == plan.cache_rows * slots * 1000
    assert plan.rows_allowed == room
    assert plan.memory_budget == budget
    assert budget is None or plan.kv_bytes <= budget
    lengths = [t + p for t, p in zip(tokens, predicted, strict=True)]
    assert plan.attention == pytest.approx(sum(n * n for n in lengths) / sum(lengths) ** 2)
    fixed = 34 + overhead - 1
    assert plan.kv_share == pytest.approx((fixed + max(lengths)) / (fixed + sum(lengths)))
    assert 0 < plan.attention <= 1
    assert 0 < plan.kv_share <= 1


def test_a_realistic_text_saves_most_of_the_attention():
    """Two thirds would be three parts of one length; sentences are not of one length."""
    assert 390 <= len(TEXT) <= 410
    segments = split(TEXT, "en", target=150)
    plan = planned(segments)
    assert len(segments) == 3
    assert plan.rows == 3
    assert 0.60 < 1 - plan.attention < 0.67
    assert plan.kv_share < 0.5


def test_one_segment_saves_nothing():
    plan = planned(["Hello there."])
    assert (plan.rows, plan.cache_rows, plan.attention, plan.kv_share) == (1, 2, 1, 1)


def test_a_segment_is_stopped_early_but_not_before_upstream_would():
    assert planned(["a" * 60]).segments[0].most == 3 * 100 + 50
    assert planned(["a " * 290]).segments[0].most == 1000
    assert planned(["a " * 100], longest=400).segments[0].most == 400
    assert planned(["a"], max_new_tokens=7).segments[0].most == 7


def test_a_budget_of_exactly_the_rows():
    row = planned(["Hello there."]).row_bytes
    texts = ["Hello there."] * 5
    assert planned(texts, memory_budget=3 * row).rows == 3
    assert planned(texts, memory_budget=3 * row - 1).rows == 2
    assert planned(texts, memory_budget=row).rows == 1
    with pytest.raises(CapacityError):
        planned(texts, memory_budget=row - 1)


def test_a_cache_length_of_exactly_the_slots():
    slots = planned(["Hello there."]).slots
    assert planned(["Hello there."], max_length=slots).slots == slots
    with pytest.raises(CapacityError):
        planned(["Hello there."], max_length=slots - 1)


@pytest.mark.parametrize(
    ("texts", "changes", "error", "message"),
    [
        (["Hi."], {"max_rows": 0}, InputError, "max_rows=0 must be a whole number of at least 1"),
        (["Hi."], {"max_new_tokens": 0}, InputError, "max_new_tokens=0 must be a whole number of at least 1"),
        (["Hi."], {"tokens": [1, 2]}, InputError, "1 segments with 2 numbers of text tokens"),
        ([], {}, InputError, "0 segments with 0 numbers"),
        (["Hi."], {"language": "xx"}, InputError, "language='xx' is not"),
        (
            ["Hi.", "Hello there, it is a fine day."],
            {"max_length": 110},
            CapacityError,
            r"segment 1 \('Hello there, it is a fine day\.'\) may need 258 slots of cache \(for 34 tokens of voice, 32 of text, 193 of speech\), "
            "there are 110; lower segment_characters",
        ),
        (
            ["a " * 512],
            {"tokens": [66], "max_new_tokens": 924, "memory_budget": 2**20},
            CapacityError,
            r"one segment takes 2\.0 MiB of KV cache \(2 x 1025 slots\), memory_budget is 1\.0 MiB; raise memory_budget",
        ),
        (["Hi."], {"memory_budget": 0}, CapacityError, r"memory_budget is 0\.0 MiB"),
        (["Hi."], {"memory_budget": -5}, CapacityError, "memory_budget is"),
        (["a" * 5000], {}, InputError, "predicted to take 8334 speech tokens, 1000 is the most, and one word of 5000 chara"),
        (["a" * 5000], {"max_new_tokens": 5}, InputError, "one word of 5000 characters cannot be divided; put spaces"),
        (["a" * 100], {"longest": 90}, InputError, "167 speech tokens, 90 is the most, and one word of 100 characters"),
        (["a" * 5000 + " b"], {}, InputError, "8337 speech tokens, 1000 is the most; lower segment_characters, or give max_new_tokens"),
        (["ab " * 40], {"longest": 90, "max_new_tokens": 50}, InputError, "199 speech tokens, 90 is the most; lower segment_characters$"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(texts, changes, error, message):
    with pytest.raises(error, match=message):
        planned(texts, **({"token_bytes": 1024} | changes))


def test_what_the_caller_bounds_is_planned():
    assert planned(["a " * 600], max_new_tokens=1500).segments[0].most == 1500
    assert planned(["ab " * 40], longest=199).segments[0].predicted == 199


def test_plan_as_json():
    plan = planned(split(TEXT, "en", target=150), memory_budget=2**22)
    read = json.loads(json.dumps(plan.to_dict()))
    assert [segment["text"] for segment in read["segments"]] == [segment.text for segment in plan.segments]
    for name in ("rows", "cache_rows", "slots", "kv_bytes", "row_bytes", "prefix", "attention", "kv_share"):
        assert read[name] == getattr(plan, name)
    assert read["memory_budget"] == 2**22
    assert read["rows_allowed"] == plan.rows_allowed


@pytest.mark.parametrize("budget", [None, 2**22])
def test_plan_in_words_and_as_a_table(budget):
    plan = planned([*split(TEXT, "en", target=150), Segment("[bold]ly said", 0, 13)], memory_budget=budget)
    printed = io.StringIO()
    Console(file=printed, width=200).print(plan.table())
    for shown in (printed.getvalue(), str(plan)):
        assert "[bold]ly said" in shown
        for segment in plan.segments:
            assert segment.text[:30] in shown
            assert str(segment.predicted) in shown
            assert str(segment.most) in shown
        assert f"4 segments, {plan.rows} at once" in shown
        assert f"{plan.kv_bytes / 2**20:.1f} MiB in {plan.cache_rows} rows of {plan.slots} slots" in shown
        assert f"{plan.attention:.0%} of the attention scores" in shown
        assert ("memory budget: 4.0 MiB" in shown) == (budget is not None)
    assert len(str(plan).splitlines()) == 3 + (budget is not None) + 1 + 4
