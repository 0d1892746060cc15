"""`ChatterboxEngine`: a loaded Chatterbox model, streaming on managed caches."""

import dataclasses
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from kvcache import (
    CacheReport,
    CapacityError,
    InputError,
    KeepAll,
    KVCacheManager,
    Pinned,
    SizePolicy,
    SpeakerCache,
    default_store,
)
from kvcache.decoding import BackendName, Batch, Job, check_backend
from kvcache.hf import PositionMode, new_cache
from kvcache.precision import Precision
from kvcache.streaming import as_async, chunked, in_thread
from kvcache_chatterbox.audio import SegmentedAudio, Speaker, heard
from kvcache_chatterbox.decoding import Decoder
from kvcache_chatterbox.long_text import Carry, LongText, Watch, check_carry, in_batch, seeds, unwatched
from kvcache_chatterbox.plan import LongTextPlan, make_plan
from kvcache_chatterbox.requests import check_count, check_text, condition, prefill
from kvcache_chatterbox.reuse import Reuse, VoiceReuse
from kvcache_chatterbox.sampling import SamplingOptions, sampling_of
from kvcache_chatterbox.segments import split
from kvcache_chatterbox.stepping import Stepper, at_precision
from kvcache_chatterbox.utterance import Utterance
from kvcache_chatterbox.voices import Voice, Voices, read_conds

_UPSTREAMS_MOST = 1000  # speech tokens
_SLOTS_STEP = 256  # what is recorded for a graph reads so many at a time


class ChatterboxEngine:
    """Streams speech tokens, and audio where the model has a vocoder, from a Chatterbox model.

    Each request has a cache of its own, gone when the request ends. Its prefix (voice, text, start of speech) is pinned
    under every policy: only speech tokens are ever evicted. The model is not patched.

    Args:
        model: a loaded `ChatterboxTTS`, `ChatterboxMultilingualTTS`, `ChatterboxTurboTTS` (Nano too), or a bare `T3`.
        policy: which speech tokens stay; by default all.
        max_cache_length: the most tokens a request may hold, prefix and speech.
        positions: ``"rerotated"`` moves the prefix along next to the window (Llama variants).
        double_bos: give the Llama variants the start-of-speech token twice, as upstream does.
        speakers: where what is known of voices lives; by default memory over disk, from the first voice on.
        reuse: ``"all"`` runs of a request only what is not known of its voice; ``"conditioning"`` does without the
            unconditional text, which guidance needs; ``"none"`` runs everything.
        onednn: let oneDNN prefill the Llama variants where it is faster: in fp32, on a CPU. See `kvcache.cpu`.
        backend: what decodes, see `kvcache.decoding.Decoding`: ``"eager"``, ``"compile"``, ``"graph"`` or
            ``"graph+compile"``; ``"auto"`` is graph on a GPU, eager elsewhere; ``"off"`` is the token loop that looks at
            the host for every token. What cannot be done falls back to that, and the report says why.
        precision: of the backbone: ``"bf16"``, ``"fp16"``, ``"int8"``, see `kvcache.precision`; by default as the model is.
        kv_dtype: of the cache while decoding; by default bf16 where the precision is bf16 or int8, else the model's.
        tf32: let a GPU round the inputs of fp32 products to TF32 while decoding.

    Attributes:
        speakers: where what is known of voices lives.
        voices: the voices added so far, by name.

    Raises:
        PolicyError, PositionsError: if the policy cannot work for this model.
    """

    def __init__(
        self,
        model: Any,
        policy: SizePolicy | None = None,
        max_cache_length: int = 2048,
        *,
        positions: PositionMode = "absolute",
        double_bos: bool = True,
        speakers: SpeakerCache | None = None,
        reuse: Reuse = "all",
        onednn: bool = True,
        backend: BackendName | Literal["auto", "off"] = "auto",
        precision: Precision | None = None,
        kv_dtype: torch.dtype | None = None,
        tf32: bool = False,
    ) -> None:
        self.t3 = getattr(model, "t3", model)
        if not hasattr(self.t3, "tfmr") or not hasattr(self.t3, "speech_head"):
            raise InputError(
                f"{type(model).__name__} is no Chatterbox model: give a ChatterboxTTS (any variant) or its T3"
            )
        if reuse not in ("all", "conditioning", "none"):
            raise InputError(f"reuse={reuse!r} must be 'all', 'conditioning' or 'none'")
        if backend not in ("auto", "off"):
            check_backend(backend)
        if precision is not None:
            self.t3 = at_precision(self.t3, precision)
        self.double_bos = double_bos
        self.onednn = onednn
        self.speakers = SpeakerCache(default_store(self.t3.device)) if speakers is None else speakers
        self._reuse = None if reuse == "none" else VoiceReuse(self.t3, self.speakers, reuse)
        self.voices = Voices(self.t3, self._reuse)
        self.enabled = True
        self._manager = KVCacheManager(self.t3.tfmr, policy, max_cache_length, positions=positions)
        self._speaker = Speaker(model) if hasattr(model, "s3gen") else None
        self._last = CacheReport(())
        if backend == "auto":
            backend = "eager" if self.t3.device.type == "cpu" else "graph"
        self._captures = backend not in ("eager", "off")
        if kv_dtype is None and precision in ("bf16", "int8"):
            kv_dtype = torch.bfloat16
        self._stepper, self._why_not = None, None
        if backend != "off":
            self._why_not = Stepper.why_not(self.t3)
            if self._why_not is None and positions == "rerotated" and self.policy.evicts:
                self._why_not = "re-rotated positions are turned on the host"
            if self._why_not is None:
                self._stepper = Stepper(
                    self.t3, backend, kv_dtype, tf32, precision, self.policy, max_cache_length, onednn
                )

    @property
    def policy(self) -> SizePolicy:
        """Which speech tokens stay."""
        policy = self._manager.policy
        return policy if isinstance(policy, SizePolicy) else KeepAll()

    def enable_kv_cache(self) -> None:
        """Use caches again (the default)."""
        self.enabled = True

    def disable_kv_cache(self) -> None:
        """Recompute everything at every token: the same tokens, slowly; the reference that caches are measured against."""
        self.enabled = False

    def report(self) -> CacheReport:
        """The account of the last request's cache, as of its last chunk."""
        return self._last

    def release(self) -> None:
        """Let go of what waits for the next request: caches, and what was captured or compiled for them."""
        if self._stepper is not None:
            self._stepper.release()

    # ------------------------------------------------------------------ voices

    def add_voice(
        self,
        name: str,
        audio_prompt_path: str | os.PathLike[str] | None = None,
        *,
        conditionals: Any = None,
        exaggeration: float | None = None,
        pin: bool = False,
    ) -> Voice:
        """Add a voice for ``voice=name``: encode its clip and compute what its requests will share, or find it.

        Args:
            name: one that exists is replaced.
            audio_prompt_path: a clip of the voice.
            conditionals: or upstream's `Conditionals` or `T3Cond`, a `Voice`, or the path of a ``conds.pt``.
            exaggeration: the voice's emotion unless a request gives another; by default as encoded.
            pin: never evict what was computed.

        Raises:
            InputError: for a name that cannot be one, or a voice that does not fit the model.
        """
        if (audio_prompt_path is None) == (conditionals is None):
            raise InputError(f"voice {name!r} needs either audio_prompt_path or conditionals")
        if audio_prompt_path is not None:
            voice = self._with_vocoder().encode(audio_prompt_path)
        elif isinstance(conditionals, str | os.PathLike):
            voice = read_conds(self.t3, conditionals)
        else:
            voice = Voice.of(self.t3, conditionals)
        if exaggeration is not None:
            voice = voice.with_emotion(exaggeration)
        self.voices.add(name, voice)
        if self._reuse is not None:
            shared = self._reuse.prepare(voice.t3)
            if pin:
                self.speakers.pin(shared.key)
        return voice

    # ------------------------------------------------------------------ speech tokens

    def inference_stream(
        self,
        *,
        text_tokens: Tensor,
        t3_cond: Any = None,
        voice: str | Voice | None = None,
        exaggeration: float | None = None,
        max_new_tokens: int = 1000,
        chunk_size: int = 25,
        use_kv_cache: bool = True,
        seed: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Tensor]:
        """Speech tokens of one text, in chunks ``[1, n]`` as they come; 25 tokens are a second of speech.

        The chunks together are what upstream's `inference` returns under the same seed (Llama variants, the stop token
        included), or `inference_turbo` (GPT-2 variants, without it).

        Args:
            text_tokens: ``[tokens]`` or ``[1, tokens]``, with start and stop token for the Llama variants; or the same
                row twice, as upstream wants it.
            t3_cond: who speaks, upstream's `T3Cond`, run as it is; it is not changed.
            voice: who speaks, by the name it was added under; what is known of it is not run again.
            exaggeration: emotion; by default as the voice has it.
            max_new_tokens: how many speech tokens at most.
            chunk_size: tokens in a chunk; the last may be shorter.
            use_kv_cache: False recomputes everything, as `disable_kv_cache` does for all requests.
            seed: of this request's draws; None draws from torch's global generator.
            **sampling: see `Sampling`; what is left out is as upstream has it.

        Raises:
            InputError, CapacityError: before anything has run.
        """
        if (t3_cond is None) == (voice is None):
            raise InputError("give either voice, a name among engine.voices, or t3_cond")
        speaker = self.voice_of(voice) if t3_cond is None else Voice(t3_cond, {})
        utterance = self.utterance(
            speaker,
            text_tokens,
            exaggeration=exaggeration,
            max_new_tokens=max_new_tokens,
            seed=seed,
            reused=t3_cond is None,
            **sampling,
        )
        return self._tokens(utterance, chunk_size, use_kv_cache)

    def ainference_stream(
        self,
        *,
        text_tokens: Tensor,
        t3_cond: Any = None,
        voice: str | Voice | None = None,
        exaggeration: float | None = None,
        max_new_tokens: int = 1000,
        chunk_size: int = 25,
        use_kv_cache: bool = True,
        seed: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncIterator[Tensor]:
        """`inference_stream` for an event loop. Cancelling ends the request."""
        return as_async(
            self.inference_stream(
                text_tokens=text_tokens,
                t3_cond=t3_cond,
                voice=voice,
                exaggeration=exaggeration,
                max_new_tokens=max_new_tokens,
                chunk_size=chunk_size,
                use_kv_cache=use_kv_cache,
                seed=seed,
                **sampling,
            )
        )

    def inference_segments(
        self,
        *,
        texts: Sequence[Tensor],
        t3_cond: Any = None,
        voice: str | Voice | None = None,
        exaggeration: float | None = None,
        max_new_tokens: int = 1000,
        chunk_size: int = 25,
        seed: int | None = None,
        max_rows: int = 8,
        carry: Carry | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[tuple[int, Tensor]]:
        """Speech tokens of several texts that follow one another, decoded together, in their order.

        Args:
            texts: each as `inference_stream` takes one.
            seed: of the first; each further text has the next number.
            max_rows: texts that decode together at most. The first decodes alone until its first chunk is there.
            carry: ``"tail"`` decodes one after another, each from the end of the one before; see `Utterance.after`.
            t3_cond, voice, exaggeration, max_new_tokens, chunk_size, **sampling: see `inference_stream`.

        Yields:
            Which text, and tokens of it ``[1, n]``.

        Raises:
            InputError, CapacityError: before anything has run.
        """
        if (t3_cond is None) == (voice is None):
            raise InputError("give either voice, a name among engine.voices, or t3_cond")
        if not texts:
            raise InputError("texts is empty: give at least one text")
        check_count("max_rows", max_rows)
        check_count("chunk_size", chunk_size)
        check_carry(carry)
        speaker = self.voice_of(voice) if t3_cond is None else Voice(t3_cond, {})
        utterances = [
            self.utterance(
                speaker,
                text,
                exaggeration=exaggeration,
                max_new_tokens=max_new_tokens,
                seed=one,
                reused=t3_cond is None,
                **sampling,
            )
            for text, one in zip(texts, seeds(seed, len(texts)), strict=True)
        ]
        return self._in_order(utterances, min(max_rows, len(texts)), chunk_size, carry)

    # ------------------------------------------------------------------ audio

    def plan(
        self,
        text: str,
        *,
        voice: str | Voice | None = None,
        language_id: str | None = None,
        max_new_tokens: int | None = None,
        max_rows: int = 8,
        memory_budget: int | None = None,
        segment_characters: int | None = 200,
    ) -> LongTextPlan:
        """What `generate_stream` will do with a text, and what that takes; see there for the arguments.

        Raises:
            InputError, CapacityError: if it cannot be spoken.
        """
        return self.long_text(
            text,
            self.voice_of(voice),
            language_id=language_id,
            max_new_tokens=max_new_tokens,
            max_rows=max_rows,
            memory_budget=memory_budget,
            segment_characters=segment_characters,
        ).plan

    def generate_stream(
        self,
        text: str,
        *,
        voice: str | Voice | None = None,
        audio_prompt_path: str | os.PathLike[str] | None = None,
        exaggeration: float | None = None,
        language_id: str | None = None,
        max_new_tokens: int | None = None,
        chunk_size: int = 25,
        seed: int | None = None,
        watermark: bool = True,
        max_rows: int = 8,
        memory_budget: int | None = None,
        segment_characters: int | None = 200,
        pause: float = 0.2,
        carry: Carry | None = None,
        overlap: bool | None = None,
        watch: Watch = unwatched,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Tensor]:
        """Audio of a text of any length, in chunks ``[1, samples]`` at the model's sample rate, as the tokens come.

        A text that is longer than `segment_characters` is divided between sentences. The segments decode together, the
        first one alone until its first chunk is out; audio comes in the text's order.

        Args:
            text: what to say.
            voice: who speaks, by the name it was added under; by default the voice that the model was loaded with.
            audio_prompt_path: or a clip of who speaks.
            exaggeration: emotion; by default as the voice has it.
            language_id: such as ``"fr"``: what the multilingual model speaks, and by whose rules sentences are told.
            max_new_tokens: speech tokens of a segment at most. By default 1000, as upstream, for a text of one segment;
                of several, three times as many as it will probably take (see `plan`).
            chunk_size, **sampling: see `inference_stream`.
            seed: of the first segment's draws; each further segment has the next number.
            watermark: mark each stretch of audio with the model's watermarker.
            max_rows: segments that decode together at most; with guidance each takes two rows of the cache.
            memory_budget: bytes that their cache may take; fewer rows where not all fit.
            segment_characters: of a segment at most; None never divides.
            pause: seconds of silence between segments.
            carry: ``"tail"`` decodes one segment after another, each from the end of the one before.
            overlap: decode in a thread of its own while audio is made; by default on a GPU. On a CPU the two would only take
                each other's cores.
            watch: is told of progress, in the thread that decodes: which segment, how many new speech tokens, whether it
                has ended.

        Raises:
            InputError: if the model is a bare T3, there is nothing to say, or no voice to say it.
            CapacityError: if a segment does not fit the cache, or no segment the budget.
        """
        who = self.voice_of(voice, audio_prompt_path)
        long = self.long_text(
            text,
            who,
            exaggeration=exaggeration,
            language_id=language_id,
            max_new_tokens=max_new_tokens,
            seed=seed,
            max_rows=max_rows,
            memory_budget=memory_budget,
            segment_characters=segment_characters,
            carry=carry,
            **sampling,
        )
        check_count("chunk_size", chunk_size)
        audio = self.audio(who, watermark, pause=pause, joined=carry is not None)
        pieces = self._in_order(long.utterances, long.plan.rows, chunk_size, carry, long.plan.slots, watch)
        if overlap or (overlap is None and self.t3.device.type != "cpu"):
            pieces = in_thread(pieces)
        return heard(audio, pieces)

    def generate(
        self,
        text: str,
        *,
        voice: str | Voice | None = None,
        audio_prompt_path: str | os.PathLike[str] | None = None,
        exaggeration: float | None = None,
        language_id: str | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        watermark: bool = True,
        max_rows: int = 8,
        memory_budget: int | None = None,
        segment_characters: int | None = 200,
        pause: float = 0.2,
        carry: Carry | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Tensor:
        """The audio of a text ``[1, samples]``: all tokens, then one vocoder pass for each segment, as upstream's `generate`
        does for its one. The arguments are those of `generate_stream`, whose chunks are together as long."""
        who = self.voice_of(voice, audio_prompt_path)
        long = self.long_text(
            text,
            who,
            exaggeration=exaggeration,
            language_id=language_id,
            max_new_tokens=max_new_tokens,
            seed=seed,
            max_rows=max_rows,
            memory_budget=memory_budget,
            segment_characters=segment_characters,
            carry=carry,
            **sampling,
        )
        pieces = self._in_order(long.utterances, long.plan.rows, 1000, carry, long.plan.slots)
        return self._with_vocoder().say(pieces, who, watermark, pause=pause, joined=carry is not None)

    def long_text(
        self,
        text: str,
        voice: Voice,
        *,
        exaggeration: float | None = None,
        language_id: str | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        max_rows: int = 8,
        memory_budget: int | None = None,
        segment_characters: int | None = 200,
        carry: Carry | None = None,
        slots: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> LongText:
        """A text as utterances, with the plan for them; see `generate_stream` for the arguments.

        Args:
            slots: of each row of the batch that they shall fit; by default as many as they need, up to `max_cache_length`.
        """
        speaker = self._with_vocoder()
        speaker.check_language(language_id)
        parts = split(text, language_id, len(text) + 20 if segment_characters is None else segment_characters)
        tokens = [speaker.tokenize(part.text, language_id) for part in parts]
        if len(parts) == 1 and max_new_tokens is None:
            max_new_tokens = _UPSTREAMS_MOST
        options = sampling_of(self.t3.is_gpt, sampling)
        guided = not self.t3.is_gpt and (self.batches or options.cfg_weight > 0)
        who = voice if exaggeration is None else voice.with_emotion(exaggeration)
        positions = self.t3.speech_pos_emb
        plan = make_plan(
            parts,
            [one.shape[1] for one in tokens],
            language=language_id,
            prefix=self._conditioning(who, True).shape[1],
            overhead=self._overhead,
            token_bytes=self._token_bytes,
            guided=guided,
            max_rows=1 if carry is not None else max_rows,
            memory_budget=memory_budget,
            max_new_tokens=max_new_tokens,
            longest=None if positions is None else positions.emb.num_embeddings - 1,
            max_length=self._manager.max_cache_length if slots is None else slots,
            slots_of=self._slots_taken if slots is None else self._slots_needed,
        )
        utterances = [
            self.utterance(who, text_tokens, max_new_tokens=segment.most, seed=one, **sampling)
            for text_tokens, segment, one in zip(tokens, plan.segments, seeds(seed, len(parts)), strict=True)
        ]
        return LongText(plan, utterances, carry)

    def audio(
        self, voice: str | Voice | None, watermark: bool = True, *, pause: float = 0.2, joined: bool = False
    ) -> SegmentedAudio:
        """What turns the speech tokens of segments into a voice's audio as they are pushed; one request's own.

        Args:
            voice: who speaks.
            watermark, pause, joined: see `SegmentedAudio`.
        """
        return self._with_vocoder().segmented(self.voice_of(voice), watermark, pause=pause, joined=joined)

    def voice_of(self, voice: str | Voice | None, audio_prompt_path: str | os.PathLike[str] | None = None) -> Voice:
        """Who speaks: a voice by its name, of a clip, or the one that the model was loaded with.

        Raises:
            InputError: if there is no such voice.
        """
        if voice is not None and audio_prompt_path is not None:
            raise InputError(f"give voice={voice!r} or audio_prompt_path={audio_prompt_path!r}, not both")
        if isinstance(voice, Voice):
            return voice
        if voice is not None:
            return self.voices[voice]
        speaker = self._with_vocoder()
        return speaker.builtin() if audio_prompt_path is None else speaker.encode(audio_prompt_path)

    # ------------------------------------------------------------------ utterances, as batches take them

    def utterance(
        self,
        voice: Voice,
        text_tokens: Tensor,
        *,
        exaggeration: float | None = None,
        max_new_tokens: int = 1000,
        seed: int | None = None,
        reused: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Utterance:
        """One text in one voice, checked. See `inference_stream`.

        Raises:
            InputError: if it cannot be said.
        """
        options = sampling_of(self.t3.is_gpt, sampling)
        if self.t3.is_gpt and options.cfg_weight > 0:
            raise InputError(f"cfg_weight={options.cfg_weight}: the GPT-2 variants have no guidance; leave it out")
        check_count("max_new_tokens", max_new_tokens)
        text = check_text(self.t3, text_tokens, guided=options.cfg_weight > 0)
        positions = self.t3.speech_pos_emb
        if positions is not None and max_new_tokens >= (longest := positions.emb.num_embeddings):
            raise InputError(
                f"max_new_tokens={max_new_tokens}: the model learned {longest} speech positions; ask for fewer"
            )
        if exaggeration is not None:
            voice = voice.with_emotion(exaggeration)
        return Utterance(voice, text[:1], options, max_new_tokens, seed, reused)

    def job(self, utterance: Utterance) -> Job:
        """An utterance for a batch of `batch`; where the model can be guided it has two rows, whatever its weight.

        Raises:
            InputError: without a seed, as its draws are to be its own.
        """
        generator = utterance.generator()
        if generator is None:
            raise InputError("an utterance of a batch needs a seed")

        def run() -> tuple[Tensor, Any]:
            decoder, cache = self._decoder(utterance, 1 if self.t3.is_gpt else 2, None, caching=True)
            return decoder.prefill(), cache

        return self._batched().job(run, utterance.sampling, utterance.max_new_tokens, generator)

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
        prefix = (
            self._conditioning(utterance.voice, utterance.reused).shape[1] + utterance.text.shape[1] + self._overhead
        )
        return self._slots_taken(prefix, utterance.max_new_tokens)

    def room(self, max_rows: int, slots: int | None = None, memory_budget: int | None = None) -> tuple[int, int]:
        """Slots and places of a batch that any utterance fits, within a budget.

        Args:
            max_rows: places at most.
            slots: of each; by default `max_cache_length`.
            memory_budget: bytes of the cache.

        Raises:
            InputError: if this engine decodes one utterance at a time.
            CapacityError: if the budget does not hold one place.
        """
        self._batched()
        check_count("max_rows", max_rows)
        slots = self._manager.max_cache_length if slots is None else slots
        assert slots is not None
        check_count("slots", slots)
        one = slots * self._token_bytes * (1 if self.t3.is_gpt else 2)
        if memory_budget is not None and memory_budget < one:
            raise CapacityError(
                f"one row of {slots} tokens takes {one / 2**20:.1f} MiB of KV cache, memory_budget is "
                f"{memory_budget / 2**20:.1f} MiB; raise it, or lower max_cache_length"
            )
        return slots, max_rows if memory_budget is None else min(max_rows, memory_budget // one)

    @property
    def batches(self) -> bool:
        """Whether utterances can decode together here."""
        return self._stepper is not None and self.enabled

    def _batched(self) -> Stepper:
        if self._stepper is None or not self.enabled:
            raise InputError(
                f"this engine decodes one utterance at a time: {self._why_not or 'backend is off, or caching disabled'}"
            )
        return self._stepper

    # ------------------------------------------------------------------ inside

    def _tokens(self, utterance: Utterance, chunk_size: int, use_kv_cache: bool = True) -> Iterator[Tensor]:
        """The speech tokens of one utterance, in chunks ``[1, n]``."""
        check_count("chunk_size", chunk_size)
        rows = 2 if utterance.sampling.cfg_weight > 0 else 1
        generator = utterance.generator()
        decoder, cache = self._decoder(utterance, rows, generator, self.enabled and use_kv_cache)
        if self._stepper is None or cache is None:
            return self._reported(chunked(decoder.tokens(), chunk_size), cache)
        return self._stepped(self._stepper, decoder, cache, utterance, chunk_size, generator)

    def _decoder(
        self, utterance: Utterance, rows: int, generator: torch.Generator | None, caching: bool
    ) -> tuple[Decoder, Any]:
        """What prefills an utterance, and the cache for it, both new."""
        reuse = self._reuse if utterance.reused else None
        text = utterance.text.expand(rows, -1)
        request = prefill(self.t3, self._conditioning(utterance.voice, utterance.reused), text, self.double_bos)
        total = utterance.max_new_tokens
        cache = self._new_cache(request.embeds, total) if caching else None
        start = None if cache is None or reuse is None else reuse.start
        return Decoder(self.t3, request, utterance.sampling, total, cache, generator, start, self.onednn), cache

    def _conditioning(self, voice: Voice, reused: bool) -> Tensor:
        reuse = self._reuse if reused else None
        return condition(self.t3, voice.t3) if reuse is None else reuse.condition(voice.t3)

    @property
    def _overhead(self) -> int:
        """Start-of-speech tokens behind the text."""
        return 2 if self.double_bos and not self.t3.is_gpt else 1

    @property
    def _token_bytes(self) -> int:
        """Of one token in one cache row, over all layers."""
        return self._manager.geometry.token_bytes if self._stepper is None else self._stepper.token_bytes

    def _slots_needed(self, before: int, total: int) -> int:
        """Slots of a row with so many tokens before the speech and so many of it, or what the policy keeps of them."""
        token = self._manager.geometry.token_bytes * (1 if self.t3.is_gpt else 2)
        policy = Pinned(before, self.policy).resolve(token, 0, self._manager.max_cache_length)
        return before + total - 1 if policy.limit is None else policy.limit  # the last token drawn is never run

    def _slots_taken(self, before: int, total: int) -> int:
        """The same; in steps where steps of the decode are captured or compiled, which then serve other texts, too."""
        needed = self._slots_needed(before, total)
        most = self._manager.max_cache_length
        if not self._captures or self.policy.evicts or most is None or needed > most:
            return needed
        return min(-(-needed // _SLOTS_STEP) * _SLOTS_STEP, most)

    def _in_order(
        self,
        utterances: Sequence[Utterance],
        rows: int,
        chunk_size: int,
        carry: Carry | None,
        slots: int | None = None,
        watch: Watch = unwatched,
    ) -> Iterator[tuple[int, Tensor]]:
        """The speech tokens of utterances, decoded together if that can be, one after another else."""
        if rows == 1 or carry is not None or not self.batches:
            return self._one_by_one(utterances, chunk_size, carry, watch)
        slots = max(map(self.slots, utterances)) if slots is None else slots
        return self._together(utterances, rows, chunk_size, slots, watch)

    def _one_by_one(
        self, utterances: Sequence[Utterance], chunk_size: int, carry: Carry | None, watch: Watch
    ) -> Iterator[tuple[int, Tensor]]:
        before = None
        for index, utterance in enumerate(utterances):
            said = []
            for chunk in self._tokens(utterance.after(before), chunk_size):
                said.append(chunk[0])
                watch(index, chunk.shape[1], False)
                yield index, chunk
            watch(index, 0, True)
            before = torch.cat(said) if carry is not None and said else None

    def _together(
        self, utterances: Sequence[Utterance], rows: int, chunk_size: int, slots: int, watch: Watch
    ) -> Iterator[tuple[int, Tensor]]:
        with self.batch(rows, slots) as batch:
            for chunk in in_batch(batch, [self.job(utterance) for utterance in utterances], chunk_size, watch):
                self._last = batch.report()
                if chunk.tokens.numel():
                    yield chunk.index, chunk.tokens[None].to(self.t3.device)

    def _with_vocoder(self) -> Speaker:
        if self._speaker is None:
            raise InputError(
                "a bare T3 has no vocoder: give the whole ChatterboxTTS, or use inference_stream() for tokens"
            )
        return self._speaker

    def _new_cache(self, embeds: Tensor, max_new_tokens: int) -> Any:
        rows, prefix = embeds.shape[:2]
        longest = self._manager.max_cache_length
        # The last token drawn is never run, and so takes no slot.
        if longest is not None and not self.policy.evicts and (needed := prefix + max_new_tokens - 1) > longest:
            raise CapacityError(
                f"the request may need {needed} tokens ({prefix} of voice and text, {max_new_tokens} of speech), "
                f"max_cache_length is {longest}; lower max_new_tokens, raise max_cache_length, or give a policy that evicts"
            )
        policy = Pinned(prefix, self.policy) if self.policy.evicts else self.policy
        return new_cache(
            self.t3.tfmr,
            policy,
            max_length=longest,
            positions=self._manager.positions,
            rows=rows,
            geometry=self._manager.geometry,
        )

    def _reported(self, chunks: Iterator[Tensor], cache: Any) -> Iterator[Tensor]:
        for chunk in chunks:
            report = CacheReport((), enabled=False) if cache is None else self._manager.report(cache)
            self._last = dataclasses.replace(report, fallback=self._why_not)
            yield chunk

    def _stepped(
        self,
        stepper: Stepper,
        decoder: Decoder,
        cache: Any,
        utterance: Utterance,
        size: int,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        logits = decoder.prefill()
        total = utterance.max_new_tokens
        for chunk, report in stepper.chunks(logits, cache, utterance.sampling, total, size, generator):
            self._last = report
            yield chunk
