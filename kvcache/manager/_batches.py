"""Prompts of a language model that decode together: the batch, and each prompt as a job of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from kvcache.cache import SizePolicy
from kvcache.decoding import BackendName, Batch, Job, Prefilled
from kvcache.errors import CapacityError, InputError, check_whole
from kvcache.generation import GenerateCall
from kvcache.io import parse_bytes
from kvcache.manager._caches import ModelCaches
from kvcache.manager._engine import EngineCalls, prefill_of
from kvcache.manager._runs import Runs
from kvcache.models import cache_kwarg, kv_layers, output_cache
from kvcache.prefixes import PrefixRegistry

SLOTS = 2048
"""Tokens that a row of a batch has room for, where nothing says how many."""

PREFILL_CHUNK = 256
"""Tokens of a prompt that run at once while others decode."""


@dataclass(frozen=True)
class BatchRoom:
    """How many prompts decode together, and how much room each has.

    Attributes:
        max_rows: prompts at most.
        slots: tokens of each, prompt and answer; by default the manager's ``max_cache_length``, or 2048 where the model has so
            many positions. Where its policy evicts, as many as that keeps, and the longest prefix besides.
        memory_budget: bytes of the cache, or ``"2GiB"``: fewer rows where they would take more.

    Raises:
        InputError, PolicyError: for a number that cannot be.
    """

    max_rows: int = 8
    slots: int | None = None
    memory_budget: int | str | None = None

    def __post_init__(self) -> None:
        check_whole("max_rows", self.max_rows, 1)
        if self.slots is not None:
            check_whole("slots", self.slots, 1)
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)


class BatchRoomFields(TypedDict, total=False):
    """The fields of `BatchRoom`, as keyword arguments."""

    max_rows: int
    slots: int | None
    memory_budget: int | str | None


def batch_room(room: BatchRoom | None, given: Mapping[str, Any]) -> BatchRoom:
    """The room that these arguments stand for.

    Raises:
        InputError: for an unknown keyword, or keywords beside a room.
    """
    unknown = sorted(set(given) - set(BatchRoomFields.__annotations__))
    if unknown:
        raise InputError(
            f"{unknown[0]} is no setting of a batch; those are {', '.join(BatchRoomFields.__annotations__)}"
        )
    if room is not None and given:
        raise InputError(f"a BatchRoom and {', '.join(given)} are given; put them into it with dataclasses.replace()")
    return BatchRoom(**given) if room is None else room


class Batches:
    """Batches of one manager.

    Args:
        caches: what prompts are prefilled on.
        engine: decodes them.
        runs: runs prefills.
        prefixes: that a prompt can be behind, by name.
    """

    def __init__(self, caches: ModelCaches, engine: EngineCalls, runs: Runs, prefixes: PrefixRegistry) -> None:
        self._caches, self._engine, self._runs, self._prefixes = caches, engine, runs, prefixes

    def room(self, room: BatchRoom) -> tuple[int, int]:
        """Rows, and slots of each.

        Raises:
            InputError: if the model does not decode on the engine.
            CapacityError: if the budget does not hold one row.
        """
        policy, geometry = self._policy, self._caches.geometry
        kept = None if policy.limit is None else policy.limit + self._prefixes.longest  # a prefix is pinned besides
        slots = room.slots or kept or self._caches.spec.max_length or min(SLOTS, geometry.max_positions or SLOTS)
        if policy.limit is not None and slots < policy.limit:
            raise CapacityError(
                f"slots={slots} are fewer than the {policy.limit} tokens that {policy!r} keeps; give more"
            )
        one = slots * replace(geometry, dtype=self._engine.decoder.kv_dtype or geometry.dtype).token_bytes
        budget = room.max_rows * one if room.memory_budget is None else parse_bytes(room.memory_budget)
        if budget < one:
            raise CapacityError(
                f"one row of {slots} tokens takes {one / 2**20:.1f} MiB of KV cache, memory_budget is "
                f"{budget / 2**20:.1f} MiB; raise it, or lower slots"
            )
        return min(room.max_rows, budget // one), slots

    @property
    def _policy(self) -> SizePolicy:
        if (reason := self._engine.why_no_batch()) is not None:
            raise InputError(f"prompts cannot decode together here: {reason}; use stream() or generate(), one by one")
        policy = self._caches.spec.policy
        assert isinstance(policy, SizePolicy)
        return policy

    @contextmanager
    def batch(self, room: BatchRoom, backend: BackendName) -> Iterator[Batch]:
        """See `KVCacheManager.batch`."""
        rows, slots = self.room(room)
        with self._engine.decoder.lent(rows, slots, backend) as decoding:
            yield Batch(decoding)

    def job(self, call: GenerateCall, prefix: str | None, seed: int | None, prefill_chunk: int) -> Job:
        """See `KVCacheManager.job`."""
        check_whole("prefill_chunk", prefill_chunk, 1)
        policy = self._policy
        reason = self._engine.unsupported_reason(call, prefix is not None)
        whole = self._runs.whole(call, prefix) if reason is None else call
        settings = None if reason is not None else self._engine.settings(whole)
        if settings is not None:
            reason = settings.unsupported_reason
            if settings.copies > 1:
                reason = f"num_return_sequences={settings.copies} is more than one row"
        if settings is None or reason is not None:
            raise InputError(f"this prompt cannot decode in a batch: {reason}; use stream() or generate()")
        if call.rows not in (None, 1) or (call.mask is not None and not bool(call.mask.all())):
            raise InputError(
                f"a job is one prompt, [tokens] or [1, tokens] without pads, and this has {call.rows} rows; give each row as "
                "a job of its own"
            )
        ids = None if whole.prompt is None or whole.prompt.is_floating_point() else whole.prompt
        generator = torch.Generator(self._caches.geometry.device)
        generator.manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
        known = None if prefix is None else self._prefixes.snapshot(prefix)
        in_pieces = ids is not None and ids.shape[1] - (0 if known is None else len(known)) > prefill_chunk
        held: list[Any] = []  # the cache that pieces have begun

        def pieces() -> Iterator[None]:
            assert ids is not None
            held.append(self._caches.empty(1) if known is None else self._caches.behind(known, 1))
            yield from self._pieces(ids, held[0], prefill_chunk)

        def prefill() -> Prefilled:
            if held:
                begun = cache_kwarg(self._caches.model, held.pop())
                out = self._runs.generate(prefill_of(whole, settings, **begun), None, cached=True)
            else:
                out = self._runs.generate(prefill_of(call, settings), prefix, cached=True)
            return Prefilled(out.logits[0], kv_layers(output_cache(out)))

        seen = torch.zeros(0, dtype=torch.long) if ids is None else ids[0]
        skip = settings.unpenalized[0] if settings.unpenalized else 0
        return Job(
            prefill,
            settings.sampling,
            generator,
            settings.new_tokens,
            ends=settings.ends,
            seen=seen[skip:],
            pieces=pieces if in_pieces else None,
            prompt=0 if ids is None or policy.evicts else ids.shape[1],
        )

    @torch.no_grad()
    def _piece(self, ids: Tensor, cache: Any) -> None:
        model = self._caches.observed_model
        more = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        with self._caches.one_model(runs=True), self._caches.exactly():
            model(input_ids=ids, **cache_kwarg(model, cache), use_cache=True, **more)

    def _pieces(self, ids: Tensor, cache: Any, size: int) -> Iterator[None]:
        """Run all but the last piece of a prompt ``[1, tokens]``, behind what the cache holds."""
        done = kv_layers(cache)[0].seen
        while ids.shape[1] - done > size:
            self._piece(ids[:, done : done + size], cache)
            done += size
            yield
