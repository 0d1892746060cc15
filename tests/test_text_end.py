"""Where a text ends, against a plain reading of the rule, however its tokens come."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.speech import Ending
from support.searching import search

from kvcache.decoding import Said, TextEnd
from kvcache_chatterbox.speech import speech_end

pytestmark = pytest.mark.one_release

ENDS = (7, 9)


def plainly(ids: list[int], most: int, first: bool, included: bool) -> tuple[list[int], bool, bool]:
    """What is said of tokens that were drawn, whether that is all of the text, and whether it was cut off."""
    said: list[int] = []
    for i, token in enumerate(ids):
        if i == most:
            break
        if token in ENDS and (first or i):
            return said + [token] * included, True, False
        said.append(token)
    return said, len(said) == most, len(said) == most


@search(300)
@given(
    ids=st.lists(st.sampled_from([1, 2, 3, 7, 9]), max_size=12),
    most=st.integers(1, 12),
    first=st.booleans(),
    included=st.booleans(),
    cuts=st.lists(st.integers(0, 12), max_size=5),
)
def test_a_text_ends_at_the_same_place_however_its_tokens_come(
    ids: list[int], most: int, first: bool, included: bool, cuts: list[int]
) -> None:
    end, expected = TextEnd(ENDS, most, first, included), plainly(ids, most, first, included)
    whole = end.of(ids)
    assert (ids[: whole.tokens], whole.over, whole.cut_off) == expected
    ending, said = Ending(end), []
    places = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for begin, stop in pairwise(places):
        if not ending.over:
            said += ending.take(torch.tensor(ids[begin:stop])).tolist()
    assert said == expected[0]
    if ids:
        assert (ending.over, ending.cut_off) == expected[1:]
    if whole.over and not whole.cut_off:
        at = next(i for i, token in enumerate(ids) if token in ENDS and (first or i))
        assert end.drawn(len(said)) == at + 1


class Kind:
    """As much of a T3 as says how its loop ends."""

    class hp:
        stop_speech_token = 7

    def __init__(self, is_gpt: bool) -> None:
        self.is_gpt = is_gpt


def test_the_two_loops_of_upstream_end_each_in_its_way() -> None:
    llama, gpt = speech_end(Kind(False), 5), speech_end(Kind(True), 5)
    assert llama.of([1, 7, 2]) == Said(2, True, False)
    assert gpt.of([1, 7, 2]) == Said(1, True, False)
    assert llama.of([7, 1, 2]) == Said(1, True, False)
    assert gpt.of([7, 1, 2]) == Said(3, False, False)  # a model that begins with it goes on
    for end in (llama, gpt):
        assert end.of([1, 2, 3, 4, 7]).cut_off is False
        assert end.of([1, 2, 3, 4, 5]) == Said(5, True, True)
    assert (llama.drawn(2), gpt.drawn(2), gpt.drawn(5)) == (2, 3, 5)
