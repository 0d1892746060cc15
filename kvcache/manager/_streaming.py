"""The tokens of `generate` as they come: from the decode engine, or from `generate` in a worker thread."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode

from kvcache.decoding import BackendName, GenerationSettings, chunked, from_worker, processor_name
from kvcache.errors import InputError
from kvcache.events import Event, emit
from kvcache.generation import STEPWISE, GenerateCall, check_undrafted
from kvcache.manager._engine import EngineCalls
from kvcache.manager._explaining import Explanation
from kvcache.manager._runs import Runs
from kvcache.models import check_generate_arguments

_REASONS = 100  # that are remembered, so that each is warned of once


class Streams:
    """Streams calls of `generate`.

    Args:
        engine: decodes those that it can.
        runs: runs the others.
    """

    def __init__(self, engine: EngineCalls, runs: Runs) -> None:
        self._engine, self._runs = engine, runs
        self._warned: set[str] = set()  # reasons why `generate` did what was asked of the engine

    def begin(
        self,
        call: GenerateCall,
        prefix: str | None,
        backend: BackendName | Literal["off"],
        chunk_size: int,
        *,
        cached: bool,
    ) -> Iterator[Tensor]:
        """The new tokens in chunks ``[batch, n]``; see `KVCacheManager.stream`.

        Args:
            call: as it was given.
            prefix: the name of one to put before each row.
            backend: ``"off"`` for `generate`.
            chunk_size: tokens in a chunk.
            cached: see `Runs.generate`.
        """
        if prefix is not None:
            self._runs.check_prefix(prefix)
        _check(call)
        reason: str | None = None
        if backend != "off":
            settings = self._settings(call, prefix, cached)
            if isinstance(settings, GenerationSettings):
                return self._decoded(call, settings, prefix, backend, chunk_size)
            reason = settings
            level = None if reason in self._warned else logging.WARNING
            self._warned = {*self._warned, reason} if len(self._warned) < _REASONS else {reason}
            emit(Event("fell_back", f"{backend} to generate", reason=reason), level)

        if prefix is not None:
            check_undrafted(call)

        def generate(emit: Callable[[Tensor], None]) -> None:
            self._runs.generate(call, prefix, cached=cached, emit=emit)
            self._runs.last = replace(self._runs.last, fallback=reason)

        return chunked(_tokens_of(generate, call.model), chunk_size)

    def explain(
        self, call: GenerateCall, prefix: str | None, backend: BackendName | Literal["off"], *, cached: bool
    ) -> Explanation:
        """How this call would be decoded; see `begin` for its arguments."""
        check_generate_arguments(call.model, call.settings)
        _check(call)
        if backend == "off":
            return Explanation(None)
        settings = self._settings(call, prefix, cached)
        if isinstance(settings, str):
            return Explanation(None, settings)
        why_eager = self._engine.decoder.why_eager(backend, settings.rules.why_host)
        step, chunk = (
            tuple(processor_name(one) for one in each) for each in (settings.rules.processors, settings.criteria)
        )
        return Explanation(backend if why_eager is None else "eager", why_eager, step, chunk)

    def _settings(self, call: GenerateCall, prefix: str | None, cached: bool) -> GenerationSettings | str:
        """What the engine is to do, or why it cannot."""
        if not cached:
            return "the cache is disabled"
        if (reason := self._engine.unsupported_reason(call, prefix is not None)) is not None:
            return reason
        settings = self._engine.settings(self._runs.whole(call, prefix))
        return settings if settings.unsupported_reason is None else settings.unsupported_reason

    def _decoded(
        self,
        call: GenerateCall,
        settings: GenerationSettings,
        prefix: str | None,
        backend: BackendName,
        chunk_size: int,
    ) -> Iterator[Tensor]:
        for chunk, report in self._engine.stream(
            call,
            settings,
            lambda prefill: self._runs.generate(prefill, prefix, cached=True),
            behind_prefix=prefix is not None,
            backend=backend,
            chunk_size=chunk_size,
        ):
            self._runs.last = report
            yield chunk


def _check(call: GenerateCall) -> None:
    """Refuse what is no stream of tokens, before anything runs."""
    if call.module is None:
        return
    mode = call.mode
    if "beam" in mode.value:
        raise InputError(
            "beams cannot be streamed: their tokens are known only at the end; use generate(), or num_beams=1"
        )
    if mode not in (*STEPWISE, GenerationMode.ASSISTED_GENERATION):
        name = mode.value.replace("_", " ")
        raise InputError(f"{name} cannot be streamed; use generate(), or greedy search or sampling")
    if isinstance(temperature := call.settings.get("temperature"), Sequence):
        raise InputError(
            f"temperature={temperature!r} tries again where a text is poor, so what was streamed may be "
            "replaced; give one temperature, or use generate()"
        )


def _tokens_of(generate: Callable[[Callable[[Tensor], None]], Any], model: Any) -> Iterator[Tensor]:
    """The tokens that a call of `generate` emits, as it emits them, in a thread of its own.

    Args:
        generate: is called with what takes the tokens.
        model: whose it is.
    """

    def work(emit: Callable[[Tensor], None]) -> None:
        told = 0

        def count(token: Tensor) -> None:
            nonlocal told
            told += 1
            emit(token)

        generate(count)
        if not told:
            raise InputError(
                f"the generate of {type(model).__name__} tells a streamer nothing, so nothing can be streamed; use generate()"
            )

    return from_worker(work)
