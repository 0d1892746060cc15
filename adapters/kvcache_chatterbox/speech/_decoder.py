"""Speech tokens of utterances on managed caches: one by one, or several together in a batch."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from kvcache import (
    CacheReport,
    CapacityError,
    InputError,
    KVCacheManager,
    Pinned,
    SizePolicy,
    SpeakerCache,
    default_store,
)
from kvcache.cache import CacheSpec
from kvcache.decoding import Batch, Job, Prefilled, Programs, backend_on, chunked
from kvcache.events import Event, emit
from kvcache.models import kv_layers, new_cache, reads_half_caches
from kvcache.prefixes import check_prefix_cache
from kvcache.prefixes.stores import Aside
from kvcache_chatterbox.checks import autocast_on, check_count, each_without_autocast
from kvcache_chatterbox.prefill import check_text, condition, prefill
from kvcache_chatterbox.speech._cache_needs import CacheNeeds
from kvcache_chatterbox.speech._ending import CutOff, Ending
from kvcache_chatterbox.speech._long_text import Carry, Watch, in_batch, unwatched
from kvcache_chatterbox.speech._options import DecoderOptions
from kvcache_chatterbox.speech._sampling import sampling_of
from kvcache_chatterbox.speech._step_engine import Stepper, at_precision
from kvcache_chatterbox.speech._token_loop import Decoder
from kvcache_chatterbox.speech._utterance import Utterance, UtteranceFields, UtteranceOptions, rows_alone
from kvcache_chatterbox.text import RowLimits
from kvcache_chatterbox.voices import Prepared, Voice, VoiceReuse

_MOST = 1000  # speech tokens of an utterance that is not told how many


class UtteranceDecoder:
    """What `ChatterboxEngine` decodes with: a T3, its caches, what is known of voices, and the engine of its steps.

    Args:
        t3: upstream's.
        options: how it decodes.
        prefix_cache: see `ChatterboxEngine`.

    Attributes:
        options: as given.
        enabled: False recomputes everything at every token: the same tokens, slowly; the reference that caches are measured
            against.
    """

    def __init__(self, t3: Any, options: DecoderOptions, prefix_cache: SpeakerCache | None) -> None:
        check_prefix_cache(prefix_cache)
        backend = backend_on(options.backend, t3.device)
        precision, kv_dtype = options.precision, options.kv_dtype
        self.options = options
        self.t3 = t3 if precision is None else at_precision(t3, precision)
        self.prefix_cache = SpeakerCache(default_store(self.t3.device)) if prefix_cache is None else prefix_cache
        self._reuse = None if options.reuse == "none" else VoiceReuse(self.t3, self.prefix_cache, options.reuse)
        self.enabled = True
        self._manager = KVCacheManager(
            self.t3.tfmr, options.policy, options.max_cache_length, positions=options.positions
        )
        self._last = CacheReport(())
        reads = reads_half_caches() or (backend == "compile" and t3.device.type == "cpu")
        if kv_dtype is None and precision in ("bf16", "int8") and reads:
            kv_dtype = torch.bfloat16
        self._programs = Programs()
        self._engine: Stepper | None = None
        self._captures = backend not in ("eager", "off")
        if backend != "off":
            self._engine = Stepper(
                self.t3, backend, kv_dtype, options.tf32, precision, options.onednn, options.bucket, self._programs
            )
            if (reason := self._why_not) is not None:
                emit(Event("fell_back", f"{backend} to the token loop", reason=reason))

    @property
    def _why_not(self) -> str | None:
        """Why the model, as it is now, decodes in the token loop; None if it need not."""
        if self._engine is None:
            return None
        if self._manager.positions == "rerotated" and self.policy.evicts:
            return "re-rotated positions are turned on the host"
        return self._engine.unsupported_reason

    @property
    def _stepper(self) -> Stepper | None:
        """What decodes whole steps, if the model can as it is now."""
        return self._engine if self._why_not is None else None

    @property
    def needs(self) -> CacheNeeds:
        """What utterances take of a cache."""
        return CacheNeeds(self.t3, self.options, self._manager, self._stepper, self._captures)

    def __repr__(self) -> str:
        decodes = "the token loop" if self._stepper is None else "the decode engine"
        limit = self._manager.max_cache_length
        return (
            f"{type(self).__name__}({type(self.t3).__name__}, {self.policy!r}, max_cache_length={limit}, by {decodes})"
        )

    @property
    def policy(self) -> SizePolicy:
        """Which speech tokens stay."""
        return self.options.kept

    def report(self) -> CacheReport:
        """The account of the last request's cache, as of its last chunk."""
        return self._last

    def release(self) -> None:
        """Let go of what waits for the next request: caches, and what was captured or compiled for them."""
        if self._engine is not None:
            self._engine.release()

    # ------------------------------------------------------------------ utterances, as batches take them

    def utterance(
        self,
        voice: Voice,
        text_tokens: Tensor,
        options: UtteranceOptions | None = None,
        *,
        reused: bool = True,
        **fields: Unpack[UtteranceFields],
    ) -> Utterance:
        """One text ``[tokens]`` or ``[1, tokens]`` in one voice, checked.

        Args:
            voice: who speaks.
            text_tokens: see `ChatterboxEngine.inference_stream`.
            options: how it is spoken; or give its fields as keywords.
            reused: whether what is known of the voice is used.

        Raises:
            InputError: if it cannot be said.
        """
        if options is not None and fields:
            raise InputError(f"options and {', '.join(fields)} are given; give the one or the others")
        options = UtteranceOptions.of(fields) if options is None else options
        sampling = sampling_of(self.t3.is_gpt, options.sampling)
        if self.t3.is_gpt and sampling.cfg_weight > 0:
            raise InputError(f"cfg_weight={sampling.cfg_weight}: the GPT-2 variants have no guidance; leave it out")
        most = _MOST if options.max_new_tokens is None else options.max_new_tokens
        text = check_text(self.t3, text_tokens, guided=sampling.cfg_weight > 0)
        positions = self.t3.speech_pos_emb
        if positions is not None and most >= (longest := positions.emb.num_embeddings):
            raise InputError(f"max_new_tokens={most}: the model learned {longest} speech positions; ask for fewer")
        if options.exaggeration is not None:
            voice = voice.with_emotion(options.exaggeration)
        if autocast_on(self.t3):
            reason = "an engine computes in its model's precision or the one it was given; give precision='bf16' for that speed"
            emit(Event("fell_back", "autocast to the engine's own precision", reason=reason))
        return Utterance(voice, text[:1], sampling, most, options.seed, reused)

    def job(self, utterance: Utterance) -> Job:
        """An utterance for a batch of `batch`; where the model can be guided it has two rows, whatever its weight.

        Raises:
            InputError: without a seed, as its draws are to be its own.
        """
        generator = utterance.generator()
        if generator is None:
            raise InputError("an utterance of a batch needs a seed")

        def run() -> Prefilled:
            decoder, cache = self._decoder(utterance, 1 if self.t3.is_gpt else 2, None, caching=True)
            return Prefilled(decoder.prefill(), kv_layers(cache), decoder.notes)

        return self._batched().job(run, utterance.sampling, utterance.max_new_tokens, generator)

    def prepared(self, utterances: Sequence[Utterance], aside: Aside) -> list[Utterance]:
        """Utterances of one voice that ask no store once they decode: what is known of the voice is looked up now.

        Args:
            aside: of `prefix_cache`.
        """
        first = utterances[0]
        reuse = self._reuse_now(first.reused)
        if reuse is None:
            return list(utterances)
        key = reuse.key(first.voice.t3, max(utterance.text.shape[1] for utterance in utterances))
        known = Prepared(reuse, key, aside, first.voice.kept)
        return [dataclasses.replace(utterance, known=known) for utterance in utterances]

    def batch(self, places: int, slots: int, *, compact: bool = True) -> AbstractContextManager[Batch]:
        """A batch of so many utterances that decode together, each with so many slots of cache.

        Its memory and what was captured or compiled for it wait for the next batch of the same size; see `release`.

        Args:
            compact: see `kvcache.decoding.Batch`.

        Raises:
            InputError: if this engine decodes on the host, with the reason.
        """
        return self._batched().batch(places, slots, compact)

    def slots(self, utterance: Utterance) -> int:
        """Slots of cache that an utterance needs in each of its rows in a batch."""
        needs = self.needs
        before = self.voice_tokens(utterance.voice, utterance.reused) + utterance.text.shape[1] + needs.overhead
        return needs.taken(before, utterance.max_new_tokens, needs.rows)

    def voice_tokens(self, voice: Voice, reused: bool = True) -> int:
        """Tokens that a voice is, at the beginning of each of its utterances."""
        return int(self._conditioning(voice, reused).shape[1])

    def room(self, max_rows: int, slots: int | None = None, memory_budget: int | str | None = None) -> tuple[int, int]:
        """Slots and places of a batch that any utterance fits, within a budget.

        Args:
            max_rows: places at most.
            slots: of each; by default `max_cache_length`.
            memory_budget: bytes of the cache, or ``"200MiB"``.

        Raises:
            InputError: if this engine decodes one utterance at a time.
            CapacityError: if the budget does not hold one place.
        """
        self._batched()
        return self.needs.room(RowLimits(max_rows, memory_budget), slots)

    @property
    def batches(self) -> bool:
        """Whether utterances can decode together here."""
        return self._stepper is not None and self.enabled

    def _batched(self) -> Stepper:
        stepper = self._stepper
        if stepper is None or not self.enabled:
            raise InputError(
                f"this engine decodes one utterance at a time: {self._why_not or 'backend is off, or caching disabled'}"
            )
        return stepper

    # ------------------------------------------------------------------ inside

    def _tokens(
        self, utterance: Utterance, chunk_size: int, slots: int | None = None, cut_off: CutOff | None = None
    ) -> Iterator[Tensor]:
        """The speech tokens of one utterance, in chunks ``[1, n]``, each reported before it is given.

        Args:
            slots: of its cache, where they were planned; by default as many as it needs, or as a token loop comes to.
            cut_off: of the text that it belongs to.
        """
        check_count("chunk_size", chunk_size)
        rows, generator = rows_alone(utterance.sampling), utterance.generator()
        decoder, cache = self._decoder(utterance, rows, generator, self.enabled, slots)
        ending, stepper = decoder.ending, self._stepper
        if stepper is None or cache is None:
            chunks = self._reported(chunked(decoder.tokens(), chunk_size), cache)
        else:
            exactly = slots is not None
            if slots is None:
                slots = self.needs.taken(decoder.prefix, utterance.max_new_tokens, rows)
            chunks = self._stepped(stepper, decoder, cache, utterance, chunk_size, generator, slots, exactly)
        watched = self._watched(chunks, ending, CutOff() if cut_off is None else cut_off)
        return each_without_autocast(self.t3, watched)

    def _decoder(
        self,
        utterance: Utterance,
        rows: int,
        generator: torch.Generator | None,
        caching: bool,
        slots: int | None = None,
    ) -> tuple[Decoder, Any]:
        """What prefills an utterance, and the cache for it, both new.

        Args:
            slots: of a cache that the token loop goes on with, all at once; by default it grows.
        """
        reuse = self._reuse_now(utterance.reused)
        text = utterance.text.expand(rows, -1)
        request = prefill(self.t3, self._conditioning(utterance.voice, utterance.reused), text, self.options.double_bos)
        total = utterance.max_new_tokens
        slots = slots if self._stepper is None else None
        cache = self._new_cache(request.embeds, total, slots) if caching else None
        start = None
        if cache is not None and reuse is not None:
            known = utterance.known or (None if utterance.voice.kept else reuse.passing)
            start = partial(reuse.start, known=known)
        return Decoder(self.t3, request, utterance.sampling, total, cache, generator, start, self.options.onednn), cache

    def _reuse_now(self, reused: bool) -> VoiceReuse | None:
        """What is known of voices, where the model as it is now lets it be used: else all of a request is run."""
        return self._reuse if reused and self._reuse is not None and self._reuse.usable else None

    def _conditioning(self, voice: Voice, reused: bool) -> Tensor:
        reuse = self._reuse_now(reused)
        return condition(self.t3, voice.t3) if reuse is None else reuse.condition(voice.t3)

    def _in_order(
        self,
        utterances: Sequence[Utterance],
        rows: int,
        chunk_size: int,
        carry: Carry | None,
        slots: int | None = None,
        watch: Watch = unwatched,
        alone: int = 1,
    ) -> Iterator[tuple[int, Tensor]]:
        """The speech tokens of utterances, decoded together if that can be, one after another else; `alone` as of `Request`."""
        if rows == 1 or carry is not None or not self.batches:
            return self._one_by_one(utterances, chunk_size, carry, watch, slots)
        slots = max(map(self.slots, utterances)) if slots is None else slots
        return each_without_autocast(self.t3, self._together(utterances, rows, chunk_size, slots, watch, alone))

    def _one_by_one(
        self, utterances: Sequence[Utterance], chunk_size: int, carry: Carry | None, watch: Watch, slots: int | None
    ) -> Iterator[tuple[int, Tensor]]:
        before, cut_off = None, CutOff()
        for cut_off.segment, utterance in enumerate(utterances):
            index, said = cut_off.segment, []
            for chunk in self._tokens(utterance.after(before), chunk_size, slots=slots, cut_off=cut_off):
                said.append(chunk[0])
                watch(index, chunk.shape[1], False)
                yield index, chunk
            watch(index, 0, True)
            before = torch.cat(said) if carry is not None and said else None

    def _together(
        self, utterances: Sequence[Utterance], rows: int, chunk_size: int, slots: int, watch: Watch, alone: int
    ) -> Generator[tuple[int, Tensor], None, None]:
        cut_off = CutOff()
        with self.batch(rows, slots) as batch:
            jobs = [self.job(utterance) for utterance in utterances]
            for chunk in in_batch(batch, jobs, chunk_size, watch, alone):
                if chunk.cut_off:
                    cut_off.tell(utterances[chunk.index].max_new_tokens, chunk.index)
                self._last = dataclasses.replace(batch.report(), cut_off=tuple(cut_off.found))
                if chunk.tokens.numel():
                    yield chunk.index, chunk.tokens[None].to(self.t3.device)

    def _new_cache(self, embeds: Tensor, max_new_tokens: int, slots: int | None = None) -> Any:
        rows, prefix = embeds.shape[:2]
        longest = self._manager.max_cache_length
        # The last token drawn is never run, and so takes no slot.
        if longest is not None and not self.policy.evicts and (needed := prefix + max_new_tokens - 1) > longest:
            raise CapacityError(
                f"the request may need {needed} tokens ({prefix} of voice and text, {max_new_tokens} of speech), "
                f"max_cache_length is {longest}; lower max_new_tokens, raise max_cache_length, or give a policy that evicts"
            )
        policy = Pinned(prefix, self.policy) if self.policy.evicts else self.policy
        most = longest if slots is None or self.policy.evicts else slots
        spec = CacheSpec(policy, most, self._manager.positions, static=slots is not None)
        return new_cache(self.t3.tfmr, spec, rows=rows, geometry=self._manager.geometry)

    def _reported(self, chunks: Iterator[Tensor], cache: Any) -> Generator[Tensor, None, None]:
        reason = self._why_not
        for chunk in chunks:
            report = CacheReport((), enabled=False) if cache is None else self._manager.report(cache)
            self._last = dataclasses.replace(report, fallback=reason)
            yield chunk

    def _stepped(
        self,
        stepper: Stepper,
        decoder: Decoder,
        cache: Any,
        utterance: Utterance,
        size: int,
        generator: torch.Generator | None,
        slots: int,
        exactly: bool,
    ) -> Generator[Tensor, None, None]:
        sampling, ending = utterance.sampling, decoder.ending
        begun = Prefilled(decoder.prefill(), kv_layers(cache), decoder.notes)
        chunks = stepper.chunks(begun, sampling, ending, size, generator, slots, exactly)
        del begun, decoder, cache  # what was prefilled is copied, and would take its memory twice while this decodes
        for chunk, report in chunks:
            self._last = report
            yield chunk

    def _watched(self, chunks: Iterator[Tensor], ending: Ending, cut_off: CutOff) -> Generator[Tensor, None, None]:
        """The chunks; where they come to the utterance's most tokens without an end, that is told and reported."""
        for chunk in chunks:
            if ending.cut_off:
                cut_off.tell(ending.end.most)
            self._last = dataclasses.replace(self._last, cut_off=tuple(cut_off.found))
            yield chunk
