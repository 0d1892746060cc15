"""Prometheus metrics of caches, prefixes and schedulers; needs ``pip install "kvcache[metrics]"``.

What is counted is read when it is asked for, so a metric costs a request nothing but what its events do.
"""

from collections import Counter
from collections.abc import Iterator
from threading import Lock
from types import TracebackType
from typing import Protocol, TypeVar

from typing_extensions import Self

from kvcache.cache import CacheReport
from kvcache.decoding import SchedulerMetrics
from kvcache.errors import InputError, MissingDependencyError
from kvcache.events import Event, subscribe
from kvcache.prefixes import PrefixCache
from kvcache.prefixes.stores import Store

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector, CollectorRegistry
except ModuleNotFoundError as error:
    raise MissingDependencyError("CacheMetrics needs prometheus-client; run: pip install 'kvcache[metrics]'") from error


T = TypeVar("T")


class Reporting(Protocol):
    """A manager, an engine, a batch."""

    def report(self) -> CacheReport:
        """The account of its cache."""


class Scheduling(Protocol):
    """A scheduler of requests."""

    def metrics(self) -> SchedulerMetrics:
        """What it does and has done."""


_CACHES = {
    "kv_bytes": ("Bytes of keys and values held.", "nbytes"),
    "seen_tokens": ("Tokens that went through the cache, per row.", "seen"),
    "stored_tokens": ("Tokens that the fullest layer holds, per row.", "stored"),
}
_PREFIXES = {
    "prefixes_built": ("Prefixes computed from nothing.", "built"),
    "prefixes_extended": ("Prefixes of which a beginning was known.", "extended"),
    "prefixes_refused": ("Snapshots found and not used: corrupt, or of another content.", "refused"),
    "prefix_build_seconds": ("Spent on computing prefixes.", "build_seconds"),
    "prefix_saved_seconds": ("What it would have taken to compute those that were found.", "seconds_saved"),
}
_GAUGES = {
    "rows": "Requests or segments that can decode together.",
    "busy": "Rows that decode now.",
    "waiting": "Requests that wait for a row.",
    "running": "Requests that have a row.",
}
_COUNTERS = {
    "finished": "Requests that came to their end.",
    "cancelled": "Requests whose client went away.",
    "refused": "Requests turned away because too many waited.",
    "failed": "Requests that ended in an error.",
    "tokens": "Tokens decoded.",
}


class CacheMetrics(Collector):
    """Metrics of what it is told to watch, and of all events of this process while it is registered.

    Counters: ``kvcache_events_total{kind}`` and ``kvcache_event_tokens_total{kind}``; see `kvcache.events`. Of caches, by
    `name`: gauges ``kvcache_kv_bytes``, ``kvcache_seen_tokens``, ``kvcache_stored_tokens``. Of prefixes: counters
    ``kvcache_prefixes_built_total``, ``…_extended_total``, ``…_refused_total``, ``kvcache_prefix_build_seconds_total`` and
    ``…_saved_seconds_total``; by tier ``kvcache_store_bytes`` and the counters ``kvcache_store_hits_total`` and
    ``…_misses_total``.

    Args:
        registry: where they are registered until `close`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._caches: dict[str, Reporting] = {}
        self._prefixes: dict[str, PrefixCache] = {}
        self._stores: dict[str, Store] = {}
        self._lock = Lock()
        self._events: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        registry.register(self)
        self._subscription = subscribe(self._count)

    def __repr__(self) -> str:
        watched = sorted({*self._caches, *self._prefixes, *self._stores})
        return f"{type(self).__name__}(watches {', '.join(watched) or 'nothing'})"

    def watch(self, name: str, cache: Reporting | PrefixCache | Store) -> Self:
        """Add metrics of something.

        Args:
            name: the value of their label ``cache``, ``prefixes`` or ``store``.
            cache: what has a ``report()``, such as a manager or an engine; where prefixes live; or a store alone.

        Returns:
            Itself, so that calls can follow each other.

        Raises:
            InputError: for a name that is taken, or something else.
        """
        if isinstance(cache, PrefixCache):
            _add(self._prefixes, name, cache)
        elif isinstance(cache, Store):
            _add(self._stores, name, cache)
        elif callable(getattr(cache, "report", None)):
            _add(self._caches, name, cache)
        else:
            raise InputError(
                f"{type(cache).__name__} has no report(); give a manager, an engine, a PrefixCache or a store"
            )
        return self

    def close(self) -> None:
        """Count no further, and leave the registry."""
        self._subscription.stop()
        self._registry.unregister(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self) -> list[Metric]:
        """None before they are asked for: a registry may hold several of these."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is given."""
        with self._lock:
            counted = (("events", "Events by kind.", dict(self._events)), ("event_tokens", "Tokens of events by kind, over layers and rows.", dict(self._tokens)))  # fmt: skip
        for name, text, counts in counted:
            family = CounterMetricFamily(f"kvcache_{name}", text, labels=["kind"])
            for kind, count in counts.items():
                family.add_metric([kind], count)
            yield family
        reports = {name: cache.report() for name, cache in self._caches.items()}
        for name, (text, field) in _CACHES.items():
            gauge = GaugeMetricFamily(f"kvcache_{name}", text, labels=["cache"])
            for cache, report in reports.items():
                gauge.add_metric([cache], getattr(report, field))
            yield gauge
        stats = {name: prefix_cache.stats() for name, prefix_cache in self._prefixes.items()}
        for name, (text, field) in _PREFIXES.items():
            family = CounterMetricFamily(f"kvcache_{name}", text, labels=["prefixes"])
            for prefix_cache, found in stats.items():
                family.add_metric([prefix_cache], getattr(found, field))
            yield family
        yield from self._tiers()

    def _tiers(self) -> Iterator[Metric]:
        labels = ["store", "tier"]
        nbytes = GaugeMetricFamily("kvcache_store_bytes", "Bytes that a tier of a store holds.", labels=labels)
        hits = CounterMetricFamily("kvcache_store_hits", "Whole prefixes that a tier had.", labels=labels)
        misses = CounterMetricFamily(
            "kvcache_store_misses", "Prefixes that a tier had not, or not whole.", labels=labels
        )
        stores = {name: prefix_cache.store for name, prefix_cache in self._prefixes.items()} | self._stores
        for name, store in stores.items():
            alike: Counter[str] = Counter()
            for tier in store.tiers:
                alike[tier.name] += 1  # Prometheus knows no two series of the same labels
                where = [name, tier.name if alike[tier.name] == 1 else f"{tier.name}-{alike[tier.name]}"]
                nbytes.add_metric(where, tier.nbytes)
                hits.add_metric(where, tier.hits)
                misses.add_metric(where, tier.misses)
        yield from (nbytes, hits, misses)

    def _count(self, event: Event) -> None:
        with self._lock:
            self._events[event.kind] += 1
            if tokens := event.numbers.get("tokens"):
                self._tokens[event.kind] += int(tokens)


def _add(known: dict[str, T], name: str, one: T) -> None:
    if name in known:
        raise InputError(f"{name!r} is watched already; give it another name")
    known[name] = one


class SchedulerCollector(Collector):
    """A scheduler's own counts.

    Gauges ``kvcache_rows``, ``_busy``, ``_waiting``, ``_running``; counters ``kvcache_finished_total``, ``_cancelled_total``,
    ``_refused_total``, ``_failed_total`` and ``_tokens_total``.

    Args:
        scheduler: what has ``metrics()``: a `Scheduler`, or a `SpeechScheduler`.
    """

    def __init__(self, scheduler: Scheduling) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is given."""
        found = self._scheduler.metrics()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"kvcache_{name}", text, getattr(found, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"kvcache_{name}", text, getattr(found, name))
