"""Runs of a model's `generate` on caches of ours, and the account of the last one."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcache.cache import CacheReport
from kvcache.errors import GeometryError
from kvcache.generation import Emitter, GenerateCall, Run, Wanted, asks, behind_prefix, check_undrafted, running
from kvcache.manager._caches import ModelCaches
from kvcache.models import (
    cache_kwarg,
    cache_layers,
    check_continues,
    check_positions,
    emit_evictions,
    facts_of,
    note_read,
    report_of,
)
from kvcache.prefixes import PrefixRegistry, PrefixSnapshot

Emit = Callable[[Tensor], None]


class Runs:
    """Runs `generate`.

    Args:
        caches: makes what it runs on.
        prefixes: that a call can be behind, by name.

    Attributes:
        last: the account of the last run that is over, here or on the decode engine.
    """

    def __init__(self, caches: ModelCaches, prefixes: PrefixRegistry) -> None:
        self._caches, self._prefixes = caches, prefixes
        self.last = CacheReport(())
        self._cache: weakref.ref[Any] | None = None  # of a run that is under way

    def report(self) -> CacheReport:
        """The account of the run that is under way, or was last."""
        cache = None if self._cache is None else self._cache()
        return self.last if cache is None else report_of(cache)

    def check_prefix(self, name: str) -> None:
        """Raise `InputError` for an unknown prefix."""
        self._prefixes[name]

    def whole(self, call: GenerateCall, prefix: str | None) -> GenerateCall:
        """A call with all of its inputs: the prefix of that name before each row.

        Raises:
            InputError: for an unknown prefix, or inputs that it cannot stand before.
        """
        if prefix is None:
            return call
        return behind_prefix(call, prefix, self._prefixes[prefix], self._caches.evicts)

    @torch.no_grad()
    def generate(self, call: GenerateCall, prefix: str | None, *, cached: bool, emit: Emit | None = None) -> Any:
        """What the model's `generate` gives.

        Args:
            call: as it was given.
            prefix: the name of one to put before each row.
            cached: False recomputes every token, whatever the call says.
            emit: takes the tokens, one by one; None if nobody does.
        """
        with self._caches.one_model(runs=True):
            call = self.whole(call, prefix)
            if prefix is not None:
                check_undrafted(call)
                facts_of(call.model).clear_request_state()
            call.check_cache_kind()
            if not (cached and call.caches):
                return self._uncached(call, emit)
            begin = None if prefix is None else partial(self._prefixes.snapshot, prefix)
            return self._cached(call, begin, emit)

    def _uncached(self, call: GenerateCall, emit: Emit | None) -> Any:
        """`generate` as it is without a cache: each token is computed anew with all before it."""
        with running(call.model, self._caches.geometry, lambda wanted: None) as run:
            arguments = call.arguments(caching=False) | _streamer(call, run, emit)
            self.last = CacheReport((), enabled=False)
            return run.model.generate(*_first(call), **arguments)

    def _cached(self, call: GenerateCall, begin: Callable[[], PrefixSnapshot] | None, emit: Emit | None) -> Any:
        """`generate` on a cache that the call brings, or on new ones, which begin with the prefix that `begin` gives."""
        caches = self._caches
        given, call = call.without_cache()
        if given is not None:
            if (text := call.text) is not None:
                check_continues(given, *text)
            note_read(given, None)
        mine: list[weakref.ref[Any]] = []

        def used(cache: Any) -> None:
            self._cache = weakref.ref(cache)
            mine.append(self._cache)

        def make(wanted: Wanted) -> Any:
            cache = caches.for_run(wanted, begin)
            if cache is not None:
                used(cache)
            return cache

        model, geometry = caches.observed_model, caches.geometry
        if given is None and not asks(model, geometry):  # a model of another kind takes the one it is handed
            given = caches.for_run(Wanted(None, None, call.seq2seq, False, True), begin)
        with running(model, geometry, make, given) as run:
            # Said aloud: where a config turns caches off, `generate` would ignore the one it is given.
            arguments = call.arguments(caching=True) | _streamer(call, run, emit)
            if given is not None:
                used(given)
                arguments |= cache_kwarg(model, given)
            try:
                with caches.exactly():
                    out = run.model.generate(*_first(call), **arguments)
                if run.cache is not None:
                    note_read(run.cache, call.read(out))
            except IndexError:
                self._check_positions(run.cache, call)
                raise
            finally:
                if run.cache is not None:
                    self.last = report_of(run.cache)
                    emit_evictions(run.cache)
                if self._cache in mine:
                    self._cache = None
            if not run.asked and given is None and caches.matter:
                raise GeometryError(
                    f"{type(call.model).__name__} made its cache itself, so what this manager was asked to keep and drop did "
                    "not happen; use KVCacheManager(model) without a policy or limit, or a loop of your own with new_cache()"
                )
            return out

    def _check_positions(self, cache: Any, call: GenerateCall) -> None:
        """Some models look into their table of positions before they ask the cache, and find nothing there."""
        if cache is not None:
            prompt = call.prompt
            seen = cache_layers(cache)[0].get_seq_length()
            fresh = 1 if prompt is None else max(1, prompt.shape[1] - seen)
            check_positions(self._caches.geometry.max_positions, seen, fresh)


def _first(call: GenerateCall) -> tuple[Tensor, ...]:
    """The first argument, under whichever name the model has for it."""
    return () if call.inputs is None else (call.inputs,)


def _streamer(call: GenerateCall, run: Run, emit: Emit | None) -> dict[str, Any]:
    if emit is None:
        return {}
    run.streamer = Emitter(emit, run, call.rows, call.settings.get("streamer"))
    return {"streamer": run.streamer}
