"""Events against what is counted without them: the report, the store's statistics, the engine's own state."""

import logging

import pytest
import torch
from support.families import tiny, token_ids
from support.inside.decoding import EMIT_EVICTIONS, MAKE_FX
from support.inside.ground import TELL_EVICTIONS

from kvcache import InputError, KVCacheManager, MaxTokens, MemoryStore, SlidingWindow, SnapKV, SpeakerCache, events
from kvcache.events import Event, subscribe

GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": -1, "pad_token_id": 0}  # no token is -1


def numbers(seen, name, kind="evicted"):
    return [event.numbers[name] for event in seen if event.kind == kind]


@pytest.fixture
def seen():
    """All events of a test."""
    found = []
    with subscribe(found.append):
        yield found


POLICIES = [SlidingWindow(8, sinks=2), MaxTokens(16, low_water=4), SnapKV(20, sinks=1, window_size=2)]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_evictions_add_up_to_the_reports(policy, seen):
    manager = KVCacheManager(tiny("llama"), policy)
    manager.generate(token_ids(2, 30), **GREEDY)
    report = manager.report()
    assert sum(numbers(seen, "tokens")) == 2 * report.evicted > 0  # the report counts those of one row
    assert set(numbers(seen, "rows")) == {2}
    assert {event.about for event in seen} == {repr(policy)}
    assert numbers(seen, "seen") == sorted(set(numbers(seen, "seen"))), "once a forward"


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_the_engines_evictions_and_captures(backend, seen):
    policy = SlidingWindow(8, sinks=2)
    manager = KVCacheManager(tiny("llama"), policy)
    list(manager.stream(token_ids(2, 30), chunk_size=7, backend=backend, **GREEDY))
    report = manager.report()
    assert report.backend == backend
    assert sum(numbers(seen, "tokens")) == 2 * report.evicted > 0
    captured = [event for event in seen if event.kind == "captured"]
    assert [event.about for event in captured] == (["graph"] if backend == "graph" else [])
    assert numbers(captured, "columns", "captured") == ([10] if backend == "graph" else [])  # of 10 slots
    list(manager.stream(token_ids(2, 30), chunk_size=7, backend=backend, **GREEDY))
    assert sum(event.kind == "captured" for event in seen) == len(captured), "captured once"


def test_nothing_leaves_nothing_is_told(seen):
    manager = KVCacheManager(tiny("llama"))
    manager.generate(token_ids(1, 9), **GREEDY)
    list(manager.stream(token_ids(1, 9), backend="eager", **GREEDY))
    assert seen == []


def run(manager, cache, tokens, seed=0):
    with torch.no_grad():
        manager.model(token_ids(1, tokens, seed=seed), past_key_values=cache)


def test_a_loop_of_ones_own_tells_exactly_what_left_while_somebody_listened():
    manager = KVCacheManager(tiny("llama"), SlidingWindow(8))
    cache = manager.new_cache()
    run(manager, cache, 20)
    with subscribe((seen := []).append):
        run(manager, cache, 1)
    run(manager, cache, 5)
    with subscribe(seen.append):
        run(manager, cache, 3)
        manager.truncate(cache, 0)
        run(manager, cache, 12)
    layers = len(cache.layers)
    assert numbers(seen, "tokens") == [1 * layers, 3 * layers, 4 * layers]
    assert numbers(seen, "seen") == [21, 29, 12]


def test_trims_are_told_as_such(seen):
    manager = KVCacheManager(tiny("llama"), SlidingWindow(16))
    cache = manager.new_cache()
    run(manager, cache, 14)
    left = manager.trim(cache, 6)
    manager.trim(cache, 6)
    run(manager, cache, 1)
    layers = len(cache.layers)
    assert [(event.kind, event.numbers["tokens"]) for event in seen] == [("trimmed", left * layers)]


def test_prefixes_are_built_hit_and_extended(seen):
    manager = KVCacheManager(tiny("llama"), prefix_cache=SpeakerCache(MemoryStore()))
    ids = token_ids(1, 20)
    manager.add_prefix("short", ids[:, :12])
    manager.add_prefix("again", ids[:, :12])
    manager.add_prefix("long", ids)
    manager.generate(token_ids(1, 4, seed=1), prefix="long", **GREEDY)
    assert [event.kind for event in seen] == ["built", "hit", "extended", "hit"]
    assert [event.numbers["tokens"] for event in seen] == [12, 12, 20, 20]
    assert seen[2].numbers["known"] == 12
    stats = manager.prefix_cache.stats()
    assert (stats.built, stats.extended) == (1, 1)
    assert stats.hits["memory"] == 2
    assert sum(numbers(seen, "seconds", "hit")) == pytest.approx(stats.seconds_saved, rel=0.5)  # its sum has beginnings


def test_what_a_store_should_not_have_given_is_told(seen):
    class Mixed(MemoryStore):
        def get(self, key):
            return next(iter(self._entries.values())).snapshot if self._entries else None

    manager = KVCacheManager(tiny("llama"), prefix_cache=SpeakerCache(Mixed()))
    manager.add_prefix("one", token_ids(1, 9))
    manager.add_prefix("other", token_ids(1, 9, seed=5))
    assert [event.kind for event in seen] == ["built", "refused", "built"]
    assert seen[1].reason == f"memory gave another one: it is {seen[0].about}"


def test_falling_back_says_why(seen, monkeypatch, caplog):
    manager = KVCacheManager(tiny("llama"), SnapKV(20, sinks=1, window_size=2))
    list(manager.stream(token_ids(1, 5), backend="eager", **GREEDY))
    told = [event for event in seen if event.kind == "fell_back"]
    assert [(event.about, event.reason) for event in told] == [("eager to generate", manager.report().fallback)]

    def breaking():
        raise RuntimeError("no memory")

    monkeypatch.setattr(MAKE_FX, lambda step: breaking)
    manager = KVCacheManager(tiny("llama"))
    with caplog.at_level(logging.WARNING):
        list(manager.stream(token_ids(1, 5), backend="graph", **GREEDY))
    assert seen[-1].about == "graph to eager"
    assert manager.report().fallback in seen[-1].reason
    assert "no memory; decoding goes on in eager mode" in caplog.text


# ---------------------------------------------------------------------- who is told


def test_a_callback_that_fails_breaks_no_request(seen, caplog):
    manager = KVCacheManager(tiny("llama"), SlidingWindow(8))
    expected = manager.generate(token_ids(1, 20), **GREEDY)
    told = len(seen)
    with subscribe(lambda event: 1 / 0):
        result = manager.generate(token_ids(1, 20), **GREEDY)
    assert torch.equal(result, expected)
    assert len(seen) == 2 * told, "the others are still told"
    assert sum("a callback failed" in message for message in caplog.messages) == told
    assert "ZeroDivisionError" in caplog.text


def test_subscriptions_end():
    first, second, only = [], [], []
    stop = subscribe(first.append)
    with subscribe(second.append), subscribe(only.append, kinds={"hit"}):
        events.emit(Event("built", "a"))
        events.emit(Event("hit", "b"))
        stop()
        stop()
        events.emit(Event("built", "c"))
    events.emit(Event("built", "d"))
    assert [[event.about for event in one] for one in (first, second, only)] == [["a", "b"], ["a", "b", "c"], ["b"]]
    assert not events.has_listeners("hit")
    for wrong in ({"hits"}, "hit"):
        with pytest.raises(InputError, match="must be some of 'evicted', 'trimmed'"):
            subscribe(first.append, wrong)


def test_the_same_callback_twice_is_two_subscriptions():
    seen = []
    with subscribe(seen.append):
        with subscribe(seen.append):
            events.emit(Event("hit", "a"))
        events.emit(Event("hit", "b"))
    assert [event.about for event in seen] == ["a", "a", "b"]


def test_the_log_has_each_kind_at_its_level(caplog):
    manager = KVCacheManager(tiny("llama"), SlidingWindow(8))
    with caplog.at_level(logging.INFO, "kvcache.events"):
        manager.generate(token_ids(1, 20), **GREEDY)
        assert caplog.messages == []
    with caplog.at_level(logging.DEBUG, "kvcache.events"):
        manager.generate(token_ids(1, 20), max_new_tokens=1)
    layers = len(manager.report().layers)
    assert caplog.messages == [
        f"evicted: SlidingWindow(window=8, sinks=0) (tokens {12 * layers}, layers {layers}, rows 1, seen 20)"
    ]


def test_nothing_is_put_together_while_nobody_listens(monkeypatch):
    monkeypatch.setattr(events, "Event", lambda *args, **kwargs: pytest.fail("nobody listens"))
    manager = KVCacheManager(tiny("llama"), SlidingWindow(8))
    monkeypatch.setattr(TELL_EVICTIONS, lambda *args: pytest.fail("nobody listens"))
    monkeypatch.setattr(EMIT_EVICTIONS, lambda *args: pytest.fail("nobody listens"))
    manager.generate(token_ids(1, 20), **GREEDY)
    list(manager.stream(token_ids(1, 20), backend="eager", **GREEDY))
