"""A transformers language model on the decode engine: what `generate` would say, decoded in whole steps."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvcache.cache import CacheReport, SizePolicy, slots_for
from kvcache.decoding._backends import BUCKET, BackendName
from kvcache.decoding._chunks import chunks_of
from kvcache.decoding._drafts import Drafting
from kvcache.decoding._ends import Criteria, TextEnd
from kvcache.decoding._engine import Decoding
from kvcache.decoding._generation_settings import GenerationSettings
from kvcache.decoding._pool import Pool
from kvcache.decoding._programs import Programs
from kvcache.decoding._sampler import GREEDY, Sampler
from kvcache.decoding._static_cache import StaticKV
from kvcache.decoding._token_rules import RuleRoom
from kvcache.decoding._wiring import decoder_copy, unsupported_reason
from kvcache.errors import GeometryError
from kvcache.models import (
    ModelFacts,
    alike,
    autocasts,
    cache_kwarg,
    closeness,
    each_without_autocast,
    facts_of,
    geometry_of,
    kv_layers,
    new_cache,
    untouched,
    watch_of,
)

_KINDS = 8
"""Numbers of rows, back ends and rules of requests whose decodings wait for more of the kind."""


class LanguageDecoder:
    """Decodes what a language model's prefill has begun.

    What it is made of follows the model: after a change the next request has a new one. A request that is under way ends
    with the parts that the model had when it began; numbers that change in place count at once, as in `generate`.

    Args:
        model: with its head.
        kv_dtype: of the static cache; by default the model's.
        max_length: the most tokens of a row. A cache that keeps all of them is made as long at once.
        bucket: see `Decoding`.

    Attributes:
        kv_dtype: as given.
    """

    def __init__(
        self,
        model: Any,
        kv_dtype: torch.dtype | None,
        max_length: int | None,
        bucket: int = BUCKET,
    ) -> None:
        self._model = model
        self._watch = watch_of(model)
        self.kv_dtype = kv_dtype
        self._max_length = max_length
        self._bucket = bucket
        self._pool = Pool(_KINDS)
        self.programs = Programs()

    def unsupported_reason(self) -> str | None:
        """Why the model cannot be decoded so; None if it can. Tried once on a few tokens: the answer must be its own."""
        if autocasts(self._model.device.type):
            return "its steps, which wait for later requests, are not taken under torch.autocast"
        return unsupported_reason(self._model) or facts_of(self._model).once("engine", _why_not_tried)

    def why_eager(self, backend: BackendName, why_host: str | None) -> str | None:
        """Why steps run eagerly, whatever the back end; None if they run as it says.

        Args:
            why_host: what of a request's rules does not run within a step, see `RuleRoom`.
        """
        return None if backend == "eager" else self._watch.signature().why_no_capture or why_host

    def release(self) -> None:
        """Let go of the memory that waits for the next request."""
        self._pool.clear()

    def chunks(
        self,
        prefill: Callable[[], tuple[Tensor, Any, Sequence[Tensor], Tensor | None]],
        settings: GenerationSettings,
        backend: BackendName,
        size: int,
    ) -> Iterator[tuple[Tensor, CacheReport]]:
        """New tokens ``[rows, n]`` as `generate` would give them, and the account of the cache.

        They are made without autocast, wherever the consumer asks for the next: steps are captured for later requests.

        Args:
            prefill: gives the logits of the last position ``[rows, vocabulary]``, the cache, the token ids that each row
                began with, and how many of them are pads.
            settings: of the generation.
            backend: see `Decoding`.
            size: tokens in a chunk.
        """
        return each_without_autocast([self._model.device.type], self._chunks(prefill, settings, backend, size))

    def _chunks(
        self,
        prefill: Callable[[], tuple[Tensor, Any, Sequence[Tensor], Tensor | None]],
        settings: GenerationSettings,
        backend: BackendName,
        size: int,
    ) -> Generator[tuple[Tensor, CacheReport], None, None]:
        with self._watch.running() as signature:
            logits, cache, seen, pads = prefill()
        layers, copies = kv_layers(cache), settings.copies
        if copies > 1:
            for layer in layers:
                layer.repeat(copies)
            logits, seen = logits.repeat_interleave(copies, 0), [ids for ids in seen for _ in range(copies)]
            pads = None if pads is None else pads.repeat_interleave(copies, 0)
        prompt = torch.stack(list(seen))
        if any(settings.unpenalized):
            few = settings.unpenalized * (len(seen) // len(settings.unpenalized))  # one for each row, or one for all
            seen = [ids[skip:] for ids, skip in zip(seen, few, strict=True)]
        policy, total = layers[0].policy, settings.new_tokens
        needed = self.needed(policy, layers[0].stored, total)
        rows, vocabulary = logits.shape
        room = settings.rules.room(prompt.shape[1] + total)
        drafts = settings.drafts
        if drafts is not None and self._max_length is None:  # what is guessed needs slots of its own
            needed += drafts.tokens

        def make(slots: int) -> Decoding:
            return self.decoding(policy, rows, slots, vocabulary, backend, room)

        with self._pool.lent((rows, backend, room), needed, make, signature=signature) as decoding:
            decoding.load(0, layers, pads)
            del cache, layers
            notes = [settings.rules.notes(ids, settings.ends, settings.pad) for ids in prompt]
            decoding.start(0, logits, [settings.sampling] * rows, [None] * rows, seen, notes)
            criteria = Criteria(settings.criteria, prompt, settings.pad) if settings.criteria else None
            text = [*prompt[0].tolist(), int(decoding.token[0])] if drafts is not None else []
            more = None if drafts is None else Drafting(decoding, drafts, text, len(text) + total).chunk
            if settings.rules.why_host is not None:  # a processor is not asked what comes behind an end
                more = partial(one_by_one, decoding)
            for chunk in chunks_of(decoding, TextEnd(settings.ends, total), size, settings.pad, criteria, more):
                yield chunk, decoding.report()

    @contextmanager
    def lent(self, rows: int, slots: int, backend: BackendName, rules: RuleRoom) -> Iterator[Decoding]:
        """A decoding of so many rows of so many slots each, with nothing in it, which waits for the next afterwards."""
        vocabulary = facts_of(self._model).trial()[1].shape[-1]

        def make(slots: int) -> Decoding:
            return self._decoding(rows, slots, vocabulary, backend, rules)

        kind, signature = ("batch", rows, backend, rules), self._watch.signature()
        with self._pool.lent(kind, slots, make, exactly=True, signature=signature) as decoding:
            yield decoding

    def teacher_forced_logits(self, logits: Tensor, cache: Any, ids: Tensor) -> Tensor:
        """The logits ``[n, vocabulary]`` after each of these token ids ``[n]``, behind what a cache of one row holds.

        Args:
            logits: of the last position, ``[1, vocabulary]``.
        """
        layers = kv_layers(cache)
        decoding = self.decoding(layers[0].policy, 1, layers[0].stored + len(ids), logits.shape[1], "eager")
        decoding.load(0, layers)
        decoding.start(0, logits, [GREEDY], [None], [ids[:0]])
        return decoding.teacher_forced_logits(ids)[:, 0]

    def needed(self, policy: SizePolicy, stored: int, total: int) -> int:
        """Slots of a row that needs room for `total` new tokens behind so many stored ones."""
        if policy.limit is not None:
            return policy.limit
        needed = stored + total - 1  # the last token drawn is never run
        return needed if self._max_length is None else min(needed, self._max_length)

    def decoding(
        self,
        policy: SizePolicy,
        rows: int,
        slots: int,
        vocabulary: int,
        backend: BackendName,
        rules: RuleRoom | None = None,
    ) -> Decoding:
        """What decodes so many rows of at least so many slots each, by these rules; by default by none."""
        room = slots_for(slots, self._max_length, static=True) if policy.limit is None else slots
        return self._decoding(rows, room, vocabulary, backend, RuleRoom() if rules is None else rules)

    def _decoding(self, rows: int, slots: int, vocabulary: int, backend: BackendName, rules: RuleRoom) -> Decoding:
        geometry = geometry_of(self._model)
        kv = StaticKV(geometry, rows, slots, dtype=self.kv_dtype)
        step = _Step(decoder_copy(self._model))
        made = rules.rules(rows, vocabulary, geometry.device)
        sampler = Sampler(rows, vocabulary, rules.order, geometry.device, rules=made)
        why_eager = self.why_eager(backend, rules.why_host)
        return Decoding(step, kv, sampler, backend, bucket=self._bucket, why_eager=why_eager, programs=self.programs)


def one_by_one(decoding: Decoding, most: int) -> Tensor:  # noqa: ARG001  # as every source of tokens
    """The next token of every request, ``[requests, 1]``, however many are wanted."""
    return decoding.chunk(1)


class _Step(nn.Module):
    """From a token of each row ``[rows]`` to the logits of the next; or from several, ``[rows, n]``, to those after each."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, made: Tensor, given: dict[str, Any]) -> Tensor:  # noqa: ARG002  # as every step's
        logits = self.model(input_ids=tokens if tokens.dim() == 2 else tokens[:, None], **given).logits
        return torch.as_tensor(logits if tokens.dim() == 2 else logits[:, -1])


def _why_not_tried(facts: ModelFacts) -> str | None:
    model = facts.model
    if model.device.type == "meta":
        return None  # nothing is computed
    try:
        ids, told = facts.trial()
    except GeometryError:
        if facts.why_not_probed is not None and facts.runs():
            return facts.why_not_probed
        return None  # it runs on more than text, which is known only with a request
    half = ids.shape[1] // 2
    try:
        with untouched(model):
            cache = new_cache(model)
            model(ids[:, :half], **cache_kwarg(model, cache), use_cache=True)
            found = LanguageDecoder(model, None, None).teacher_forced_logits(told[:, half - 1], cache, ids[0, half:])
    except Exception as error:  # code of any model; the reason is told where it is asked for
        return f"a short trial of {type(model).__name__} failed with {type(error).__name__}: {str(error)[:200]}"
    if alike(found, told[0, half:], closeness(model, told.dtype)):
        return None
    return f"step by step on a static cache, {type(model).__name__} says something else"
