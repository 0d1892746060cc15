"""W15: what `plan` says is what is held, the pool of what waits included, and no budget is ever exceeded."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.decoding import idle
from support.inside.speech import STATIC_CACHE, stepper_of
from support.searching import search
from support.t3_models import tiny_t3

from kvcache import (
    CapacityError,
    InputError,
    KVCacheError,
    MaxBytes,
    MaxTokens,
    MemoryStore,
    PolicyError,
    SlidingWindow,
    SpeakerCache,
)
from kvcache.decoding import Pool, StaticKV
from kvcache_chatterbox import ChatterboxEngine, byte_tokens, stand_in

pytestmark = pytest.mark.one_release

SENTENCES = (
    "The birch canoe slid on the smooth planks. Glue the sheet to the blue background. Rice is served in bowls. "
)
MODELS = {}


def engine(kind, policy=None, **options):
    if kind not in MODELS:
        MODELS[kind] = stand_in(tiny_t3(kind))
    return ChatterboxEngine(MODELS[kind], policy, prefix_cache=SpeakerCache(MemoryStore("32MiB")), **options)


class Counted(StaticKV):
    """A static cache that is counted as long as it lives; a front of it is a view, and is not."""

    living: ClassVar[list] = []

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        Counted.living.append(weakref.ref(self))


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(Counted, "living", [])
    monkeypatch.setattr(STATIC_CACHE, Counted)


def static_bytes():
    """Of all static caches that live."""
    return sum(one.nbytes for ref in Counted.living if (one := ref()) is not None)


def check(ours, text, **request):
    """Speak a text, and compare: what the report says at each chunk, and what static caches hold then and afterwards."""
    request = {"language_id": "en", "segment_characters": 45, "max_new_tokens": 5, **request}
    ours.release()
    plan = ours.plan(text, **request)
    held = {ours.report().nbytes for _ in ours.generate_stream(text, seed=0, chunking=[5], **request)}
    assert max(held) == plan.kv_bytes
    if stepper_of(ours) is not None:
        assert len(held) == 1
        gc.collect()
        assert static_bytes() == plan.kv_bytes
    budget = plan.memory_budget
    assert budget is None or plan.kv_bytes <= budget
    return plan


@pytest.mark.grid(4)
@pytest.mark.parametrize("backend", ["eager", "graph", "off"])
@pytest.mark.parametrize("kind", ["english", "gpt", "multilingual"])
def test_w15_planned_is_held_for_one_and_eight_rows(kind, backend):
    ours = engine(kind, backend=backend)
    batches = backend != "off"
    long = SENTENCES * 3 if batches else SENTENCES
    assert check(ours, "Hello there.").rows == 1
    assert check(ours, long).rows == (8 if batches else 1)
    assert check(ours, long, max_rows=1).rows == 1
    assert check(ours, SENTENCES, carry="tail").rows == 1
    if kind != "gpt":
        alone = check(ours, "Hello there.", cfg_weight=0.0)
        assert (alone.rows, alone.cache_rows) == (1, 1)


@pytest.mark.grid(6)
@pytest.mark.parametrize("policy", [SlidingWindow(12), MaxTokens(150), MaxBytes("1MiB")], ids=repr)
@pytest.mark.parametrize(
    "options", [{}, {"positions": "rerotated"}, {"kv_dtype": torch.bfloat16}, {"precision": "bf16"}], ids=str
)
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_w15_planned_is_held_under_every_policy_and_precision(kind, policy, options):
    if kind == "gpt" and "positions" in options:
        with pytest.raises(KVCacheError, match="cannot be re-rotated"):
            engine(kind, policy, **options)
        return
    ours = engine(kind, policy, **options)
    for request in ({"max_rows": 1}, {}, *([{"cfg_weight": 0.0}] if kind == "english" else [])):
        check(ours, "Hello there. It is a fine day.", segment_characters=20, **request)


def test_w15_what_waits_of_another_text_goes_before_more_is_held():
    ours = engine("english")
    for text, request in (
        ("Hello.", {}),
        (SENTENCES, {}),
        (SENTENCES, {"max_rows": 2}),
        ("Hello.", {"cfg_weight": 0.0}),
    ):
        plan = ours.plan(text, segment_characters=45, max_new_tokens=9, **request)
        for _ in ours.generate_stream(text, segment_characters=45, max_new_tokens=9, **request):
            assert static_bytes() == plan.kv_bytes
        gc.collect()
        assert static_bytes() == plan.kv_bytes
    tokens = ours.inference_stream(
        text_tokens=byte_tokens(ours.t3, "Hi."), voice=ours.voice_of(None), max_new_tokens=900
    )
    next(tokens)
    tokens.close()
    check(ours, "Hello.", memory_budget="2MiB")


def test_w15_a_cache_that_is_off_takes_nothing():
    ours = engine("english")
    ours.enabled = False
    plan = ours.plan("Hello there.", max_new_tokens=4, memory_budget=1)
    assert (plan.rows, plan.kv_bytes) == (1, 0)
    ours.generate("Hello there.", max_new_tokens=4, memory_budget=1)
    assert ours.report().nbytes == 0


words = st.lists(
    st.sampled_from(["Rice.", "a", "birch", "canoe,", "slid!", "smooth", "2024", "你好。", "[clear throat]"]),
    min_size=1,
    max_size=60,
)


def bounded(kinds, count):
    @search(count, whole=count < 20)
    @given(
        kind=st.sampled_from(kinds),
        text=words.map(" ".join),
        room=st.integers(20, 4000),
        request=st.fixed_dictionaries(
            {
                "max_rows": st.integers(1, 8),
                "max_new_tokens": st.integers(1, 12),
                "segment_characters": st.integers(20, 120),
                "carry": st.sampled_from([None, "tail"]),
            }
        ),
        guided=st.booleans(),
    )
    def one(kind, text, room, request, guided):
        """A text is spoken within its budget, or refused before anything is held."""
        ours = ENGINES[kind] if kind in ENGINES else ENGINES.setdefault(kind, engine(kind))
        for other in ENGINES.values():
            if other is not ours:
                other.release()
        request = {**request, "language_id": "en", "memory_budget": room * 2**10, "seed": 0}
        if kind != "gpt" and not guided:
            request["cfg_weight"] = 0.0
        try:
            stream = ours.generate_stream(text, **request)
        except CapacityError:  # of the budget: nothing else is too small here
            return
        for _ in stream:
            assert static_bytes() <= room * 2**10
            assert ours.report().nbytes <= room * 2**10
        assert static_bytes() <= room * 2**10

    return one


ENGINES = {}
test_w15_no_budget_is_exceeded = bounded(["english", "gpt"], 10)
test_w15_no_budget_is_exceeded_over_100_texts = pytest.mark.slow(bounded(["english", "gpt", "multilingual"], 100))


def test_w15_one_kind_waits_where_memory_is_planned():
    class Made:
        backend = "eager"

        def __init__(self, slots):
            self.kv, self.token, self.beside = self, [0], {}
            self.slots = slots

        def free(self, first, requests):
            pass

    pool = Pool(most=1)
    with pool.lent("one", 4, Made) as one:
        assert not idle(pool)
    with pool.lent("one", 3, Made) as again:
        assert again is one
    with pool.lent("eight", 3, Made) as eight:
        assert not idle(pool)
        with pool.lent("one", 3, Made) as other:
            assert other is not one
    assert list(idle(pool).values()) == [eight]


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"memory_budget": "much"}, PolicyError, "cannot read 'much' as a size"),
        ({"memory_budget": 1.5e6}, InputError, r"memory_budget=1500000\.0 must be a number of bytes"),
        ({"memory_budget": True}, InputError, "memory_budget=True must be"),
        ({"memory_budget": float("nan")}, InputError, "memory_budget=nan must be"),
        ({"memory_budget": "1KiB"}, CapacityError, "one segment takes"),
    ],
)
def test_w15_a_budget_is_a_size_or_refused(request_, error, message):
    ours = engine("english")
    with pytest.raises(error, match=message):
        ours.generate_stream("Hello.", **request_)
    assert ours.plan("Hello.", memory_budget="20 MiB").memory_budget == 20 * 2**20
