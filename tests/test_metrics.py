"""Prometheus metrics against what is counted without them."""

import sys

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.families import tiny, token_ids
from support.inside.tools import METRICS

from kvcache import InputError, KVCacheManager, MemoryStore, SlidingWindow, SpeakerCache, TieredStore, events
from kvcache.monitoring import CacheMetrics
from kvcache.prefixes.stores import DiskStore

GREEDY = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": -1, "pad_token_id": 0}  # no token is -1


def scraped(registry):
    """What Prometheus would read: name and labels to value."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}


def test_caches_and_their_events():
    registry, manager = CollectorRegistry(), KVCacheManager(tiny("llama"), SlidingWindow(8, sinks=2))
    with CacheMetrics(registry).watch("llm", manager):
        before = scraped(registry)
        assert before["kvcache_kv_bytes", "llm"] == 0 and ("kvcache_events_total", "evicted") not in before
        manager.generate(token_ids(1, 30), **GREEDY)
        report, found = manager.report(), scraped(registry)
        assert found["kvcache_kv_bytes", "llm"] == report.nbytes > 0
        assert found["kvcache_seen_tokens", "llm"] == report.seen == 49
        assert found["kvcache_stored_tokens", "llm"] == report.stored == 10
        assert found["kvcache_event_tokens_total", "evicted"] == report.evicted
        assert found["kvcache_events_total", "evicted"] == 20, "once a forward"
    manager.generate(token_ids(1, 30), **GREEDY)
    assert scraped(registry) == {}
    assert not events.has_listeners("hit")


def test_prefixes_and_their_tiers(tmp_path):
    prefix_cache = SpeakerCache(TieredStore(MemoryStore(), DiskStore(tmp_path), write_behind=False))
    registry, manager = CollectorRegistry(), KVCacheManager(tiny("llama"), prefix_cache=prefix_cache)
    alone = MemoryStore()
    with CacheMetrics(registry).watch("prompts", prefix_cache).watch("alone", alone):
        manager.add_prefix("one", token_ids(1, 12))
        manager.add_prefix("two", token_ids(1, 12))
        manager.add_prefix("long", token_ids(1, 20))
        found, stats = scraped(registry), prefix_cache.stats()
    assert found["kvcache_prefixes_built_total", "prompts"] == stats.built
    assert found["kvcache_prefixes_extended_total", "prompts"] == stats.extended
    assert found["kvcache_prefixes_refused_total", "prompts"] == 0
    assert found["kvcache_prefix_build_seconds_total", "prompts"] == pytest.approx(stats.build_seconds)
    assert found["kvcache_prefix_saved_seconds_total", "prompts"] == pytest.approx(stats.seconds_saved)
    for tier in ("memory", "disk"):
        assert found["kvcache_store_bytes", tier, "prompts"] == stats.nbytes[tier] > 0
        assert found["kvcache_store_hits_total", tier, "prompts"] == stats.hits[tier]
    assert stats.hits["memory"] == 1
    assert found["kvcache_store_misses_total", "memory", "prompts"] == prefix_cache.store.tiers[0].misses > 0
    assert found["kvcache_store_bytes", "alone", "memory"] == 0
    kinds = {"built": stats.built, "extended": stats.extended, "hit": 1}
    assert {kind: found["kvcache_events_total", kind] for kind in kinds} == kinds


def test_what_cannot_be_watched():
    with CacheMetrics(CollectorRegistry()) as metrics:
        metrics.watch("a", MemoryStore())
        with pytest.raises(InputError, match="'a' is watched already; give it another name"):
            metrics.watch("a", MemoryStore())
        with pytest.raises(InputError, match=r"int has no report\(\)"):
            metrics.watch("b", 3)


def test_without_prometheus_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    monkeypatch.delitem(sys.modules, METRICS)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kvcache\[metrics\]'"):
        __import__(METRICS)
