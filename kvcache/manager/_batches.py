"""Prompts of a language model that decode together: the batch, and each prompt as a job of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from kvcache.cache import CacheReport, SizePolicy
from kvcache.decoding import (
    LONGEST_NGRAM,
    PREFILL_CHUNK,
    Batch,
    Criteria,
    GenerationSettings,
    Job,
    JobOutput,
    Piece,
    Prefilled,
    RuleRoom,
    backend_on,
    rows_within,
)
from kvcache.errors import CapacityError, InputError, check_whole
from kvcache.generation import GenerateCall
from kvcache.io import parse_bytes
from kvcache.manager._caches import ModelCaches
from kvcache.manager._engine import EngineCalls, prefill_of
from kvcache.manager._options import Backends
from kvcache.manager._runs import Runs
from kvcache.models import (
    cache_kwarg,
    check_generate_arguments,
    check_generates,
    check_positions,
    facts_of,
    kv_layers,
    output_cache,
    signature_of,
)
from kvcache.prefixes import PrefixRegistry

SLOTS = 2048
"""Tokens that a row of a batch has room for, where nothing says how many."""


@dataclass(frozen=True)
class BatchRoom:
    """How many prompts decode together, and how much room each has.

    Attributes:
        max_rows: prompts at most.
        slots: tokens of each, prompt and answer; by default the manager's ``max_cache_length``, or 2048 where the model has so
            many positions. Where its policy evicts, as many as that keeps, and the longest prefix besides.
        memory_budget: bytes of the cache, or ``"2GiB"``: fewer rows where they would take more.
        prefill_chunk: tokens of prompts that are run between two chunks of 8 tokens: who decodes waits for so many.

    Raises:
        InputError, PolicyError: for a number that cannot be.
    """

    max_rows: int = 8
    slots: int | None = None
    memory_budget: int | str | None = None
    prefill_chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        check_whole("max_rows", self.max_rows, 1)
        check_whole("prefill_chunk", self.prefill_chunk, 1)
        if self.slots is not None:
            check_whole("slots", self.slots, 1)
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)


class BatchRoomFields(TypedDict, total=False):
    """The fields of `BatchRoom`, as keyword arguments."""

    max_rows: int
    slots: int | None
    memory_budget: int | str | None
    prefill_chunk: int


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
        policy, geometry = self._policy_of_a_row(), self._caches.geometry
        kept = None if policy.limit is None else policy.limit + self._prefixes.longest  # a prefix is pinned besides
        most = self._caches.spec.max_length
        slots = room.slots or kept or most or min(SLOTS, geometry.max_positions or SLOTS)
        if most is not None and slots > most:
            raise CapacityError(
                f"slots={slots} are more than max_cache_length={most}; give as many, or make a manager with more"
            )
        if policy.limit is not None and slots < policy.limit:
            raise CapacityError(
                f"slots={slots} are fewer than the {policy.limit} tokens that {policy!r} keeps; give more"
            )
        one = slots * replace(geometry, dtype=self._engine.decoder.kv_dtype or geometry.dtype).token_bytes
        budget = None if room.memory_budget is None else parse_bytes(room.memory_budget)
        return rows_within(room.max_rows, budget, slots, one, "slots"), slots

    def _policy_of_a_row(self) -> SizePolicy:
        if (reason := self._engine.why_no_batch()) is not None:
            raise InputError(f"prompts cannot decode together here: {reason}; use stream() or generate(), one by one")
        policy = self._caches.spec.policy
        assert isinstance(policy, SizePolicy)
        if policy.evicts and policy.limit is None:
            raise InputError(
                f"prompts cannot decode together here: {policy!r} is a budget for all rows of a call, and these come one by one; "
                "use MaxTokens for each, and memory_budget for all"
            )
        return policy

    @contextmanager
    def opened(self, room: BatchRoom, backend: Backends) -> Iterator[Batch]:
        """A batch that takes what `job` makes; see `KVCacheManager.batch`."""
        rows, slots = self.room(room)
        named, signature = backend_on(backend, self._caches.geometry.device), signature_of(self._caches.model)

        def check() -> None:
            if signature_of(self._caches.model) is not signature:
                raise InputError("the model has changed since this batch was made for it; let it end and make another")

        rules = RuleRoom(limits=True, ngram=LONGEST_NGRAM, tokens=max(SLOTS, slots + 1))
        with (
            self._engine.decoder.lent(rows, slots, "eager" if named == "off" else named, rules) as decoding,
            closing(Batch(decoding, prefill_chunk=room.prefill_chunk, check=check)) as batch,
        ):
            yield batch

    @contextmanager
    def prompts(self, room: BatchRoom, backend: Backends) -> Iterator["PromptBatch"]:
        """See `KVCacheManager.batch`."""
        with self.opened(room, backend) as batch:
            yield PromptBatch(batch, self, room.prefill_chunk)

    def job(
        self,
        inputs: Tensor | None,
        given: Mapping[str, Any],
        *,
        prefix: str | None = None,
        seed: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Job:
        """One prompt for a batch; see `PromptBatch.add`.

        Args:
            inputs: token ids ``[tokens]`` or ``[1, tokens]``.
            given: the other arguments of `generate`.
        """
        model = self._caches.model
        check_generates(model)
        check_generate_arguments(model, given)
        if isinstance(inputs, Tensor) and inputs.dim() == 1:
            inputs = inputs[None]
        with self._caches.one_model(runs=False):
            call = GenerateCall.of(model, self._caches.geometry, inputs, given)
            return self._job(call, prefix, seed, prefill_chunk)

    def _job(self, call: GenerateCall, prefix: str | None, seed: int | None, prefill_chunk: int) -> Job:
        policy = self._policy_of_a_row()
        reason = self._engine.unsupported_reason(call, prefix is not None)
        whole = self._runs.whole(call, prefix) if reason is None else call
        settings = None if reason is not None else self._engine.settings(whole)
        if settings is not None:
            reason = settings.unsupported_reason
            if settings.copies > 1:
                reason = f"num_return_sequences={settings.copies} is more than one row"
            reason = reason or _why_no_rules(settings, policy.limit is not None, whole.prompt)
        if settings is None or reason is not None:
            raise InputError(f"this prompt cannot decode in a batch: {reason}; use stream() or generate()")
        if call.rows not in (None, 1) or (call.mask is not None and not bool(call.mask.all())):
            raise InputError(
                f"a job is one prompt, [tokens] or [1, tokens] without pads, and this has {call.rows} rows; give each row as "
                "a job of its own"
            )
        return self._made(call, whole, settings, policy, prefix, seed, prefill_chunk)

    def _made(
        self,
        call: GenerateCall,
        whole: GenerateCall,
        settings: GenerationSettings,
        policy: SizePolicy,
        prefix: str | None,
        seed: int | None,
        prefill_chunk: int,
    ) -> Job:
        """The job of a call that can be one; `whole` has the prefix before its inputs."""
        geometry, prompt = self._caches.geometry, whole.prompt
        tokens = 0 if prompt is None else prompt.shape[1]
        ids = None if prompt is None or prompt.is_floating_point() else prompt
        check_positions(geometry.max_positions, tokens, settings.new_tokens - 1)
        known = [] if prefix is None else [self._prefixes.snapshot(prefix)]
        begin = len(known[0]) if known else 0
        held: list[Any] = []  # the cache that pieces have begun

        def cache() -> Any:
            if not held:
                held.append(self._caches.behind(known[0], 1) if known else self._caches.empty(1))
            return held[0]

        def let_go() -> None:
            held.clear()
            known.clear()

        def prefill() -> Prefilled:
            try:
                if ids is None:  # embeddings
                    out = self._runs.generate(prefill_of(call, settings), prefix, cached=True)
                else:
                    mine = cache_kwarg(self._caches.model, cache())
                    out = self._runs.generate(prefill_of(whole, settings, **mine), None, cached=True)
                return Prefilled(out.logits[0], kv_layers(output_cache(out)), settings.rules.notes(seen))
            finally:
                let_go()

        ends = [] if ids is None else range(begin + prefill_chunk, tokens, prefill_chunk)
        pieces = [Piece(prefill_chunk, partial(self._piece, ids, end - prefill_chunk, end, cache)) for end in ends]
        generator = torch.Generator(geometry.device)
        generator.manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
        seen = torch.zeros(0, dtype=torch.long) if ids is None else ids[0]
        kept = None if policy.limit is None else policy.limit + begin
        return Job(
            prefill,
            settings.sampling,
            generator,
            settings.new_tokens,
            ends=settings.ends,
            seen=seen[settings.unpenalized[0] if settings.unpenalized else 0 :],
            pieces=pieces,
            rest=tokens - begin - sum(piece.tokens for piece in pieces),
            close=let_go,
            slots=tokens + settings.new_tokens - 1 if kept is None else kept,
            criteria=Criteria(settings.criteria, seen[None], settings.pad) if settings.criteria else None,
        )

    @torch.no_grad()
    def _piece(self, ids: Tensor | None, begin: int, end: int, cache: Callable[[], Any]) -> None:
        """Run these tokens of a prompt ``[1, tokens]``, behind what the cache holds."""
        assert ids is not None
        model, held = self._caches.observed_model, cache()
        more = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        with self._caches.one_model(runs=True), self._caches.exactly():
            facts_of(self._caches.model).clear_request_state(model)  # of who came before
            model(input_ids=ids[:, begin:end], **cache_kwarg(model, held), use_cache=True, **more)


def _why_no_rules(settings: GenerationSettings, evicts: bool, prompt: Tensor | None) -> str | None:
    """Why the rules of a prompt do not run beside others; None if they do."""
    rules = settings.rules
    if rules.why_host is not None:
        return f"{rules.why_host}, which all of its batch would wait for"
    if rules.ngram > LONGEST_NGRAM:
        return f"no_repeat_ngram_size={rules.ngram} is more than the {LONGEST_NGRAM} tokens that a batch looks back for"
    tokens = settings.new_tokens + (0 if prompt is None else prompt.shape[1])
    if rules.ngram and evicts and tokens > SLOTS:
        return f"no_repeat_ngram_size needs all {tokens} tokens, and a batch remembers {SLOTS} where its policy evicts"
    return None


class PromptBatch:
    """Prompts that decode together: each says what `KVCacheManager.stream` would say of it alone, up to rounding.

    Not safe for threads: one drives it.

    Args:
        batch: with nothing in it.
        batches: makes the jobs.
        prefill_chunk: see `BatchRoom`.
    """

    def __init__(self, batch: Batch, batches: Batches, prefill_chunk: int) -> None:
        self._batch, self._batches, self._prefill_chunk = batch, batches, prefill_chunk
        self._said: list[JobOutput] = []  # by those that have been added since the last step

    @property
    def rows(self) -> int:
        """How many prompts can decode together."""
        return self._batch.places

    @property
    def busy(self) -> int:
        """How many do, or have ended and not been told of."""
        return self._batch.busy + sum(piece.over for piece in self._said)

    def report(self) -> CacheReport:
        """The account of the cache, and of what runs the steps."""
        return self._batch.report()

    def add(
        self,
        inputs: Tensor | None = None,
        *,
        prefix: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Job:
        """Let a prompt decode. What it says is told by the steps that follow, under the job that this gives.

        Args:
            inputs: token ids ``[tokens]`` or ``[1, tokens]``.
            prefix: as in `KVCacheManager.generate`.
            seed: of its draws, which are its own: it draws as after ``torch.manual_seed(seed)``. By default torch's global
                generator gives one.
            **kwargs: as in `generate`, for this prompt alone.

        Raises:
            InputError: for what cannot decode in a batch, with the reason: more than one row, pads, a setting of `generate` that
                the engine does not know, or one that `generate` refuses.
            CapacityError: if all rows are taken, or it does not fit its row. Nothing has run then.
        """
        if self._batch.busy == self._batch.places:
            raise CapacityError(f"all {self.rows} rows are taken; wait until one of the prompts has ended")
        job = self._batches.job(inputs, kwargs, prefix=prefix, seed=seed, prefill_chunk=self._prefill_chunk)
        self._said.append(self._batch.add(job))
        return job

    def cancel(self, job: Job) -> None:
        """End a prompt. Nothing happens if it is not here."""
        self._said = [piece for piece in self._said if piece.job is not job]
        self._batch.cancel(job)

    def step(self) -> list[JobOutput]:
        """Decode some steps: what each prompt has said since the last, and whether it has ended."""
        said, self._said = {piece.job: piece for piece in self._said}, []
        for piece in self._batch.step():
            before = said.get(piece.job)
            said[piece.job] = (
                piece if before is None else replace(piece, tokens=torch.cat([before.tokens, piece.tokens]))
            )
        return list(said.values())
