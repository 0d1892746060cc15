"""`ChatterboxEngine`: a loaded Chatterbox model, streaming on managed caches."""

import dataclasses
import os
from collections.abc import AsyncIterator, Iterator
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
from kvcache.streaming import as_async, chunked
from kvcache_chatterbox.audio import Speaker
from kvcache_chatterbox.decoding import Decoder
from kvcache_chatterbox.requests import check_count, check_text, condition, prefill
from kvcache_chatterbox.reuse import Reuse, VoiceReuse
from kvcache_chatterbox.sampling import SamplingOptions, sampling_of
from kvcache_chatterbox.stepping import Stepper, at_precision
from kvcache_chatterbox.utterance import Utterance
from kvcache_chatterbox.voices import Voice, Voices, read_conds


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
        speaker = self._voice(voice) if t3_cond is None else Voice(t3_cond, {})
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

    # ------------------------------------------------------------------ audio

    def generate_stream(
        self,
        text: str,
        *,
        voice: str | Voice | None = None,
        audio_prompt_path: str | os.PathLike[str] | None = None,
        exaggeration: float | None = None,
        language_id: str | None = None,
        max_new_tokens: int = 1000,
        chunk_size: int = 25,
        seed: int | None = None,
        watermark: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Tensor]:
        """Audio of one text, in chunks ``[1, samples]`` at the model's sample rate, as the tokens come.

        Args:
            text: what to say.
            voice: who speaks, by the name it was added under; by default the voice that the model was loaded with.
            audio_prompt_path: or a clip of who speaks.
            exaggeration: emotion; by default as the voice has it.
            language_id: for the multilingual model, such as ``"fr"``.
            watermark: mark each chunk with the model's watermarker.
            max_new_tokens, chunk_size, seed, **sampling: see `inference_stream`.

        Raises:
            InputError: if the model is a bare T3, the text is empty, or there is no voice.
        """
        speaker = self._with_vocoder()
        who = self._voice(voice, audio_prompt_path)
        tokens = self.inference_stream(
            voice=who,
            exaggeration=exaggeration,
            text_tokens=speaker.tokenize(text, language_id),
            max_new_tokens=max_new_tokens,
            chunk_size=chunk_size,
            seed=seed,
            **sampling,
        )
        return speaker.speak(tokens, who, watermark)

    def generate(
        self,
        text: str,
        *,
        voice: str | Voice | None = None,
        audio_prompt_path: str | os.PathLike[str] | None = None,
        exaggeration: float | None = None,
        language_id: str | None = None,
        max_new_tokens: int = 1000,
        seed: int | None = None,
        watermark: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Tensor:
        """The audio of one text ``[1, samples]``, as upstream's `generate` makes it: all tokens, then one vocoder pass."""
        speaker = self._with_vocoder()
        who = self._voice(voice, audio_prompt_path)
        tokens = self.inference_stream(
            voice=who,
            exaggeration=exaggeration,
            text_tokens=speaker.tokenize(text, language_id),
            max_new_tokens=max_new_tokens,
            seed=seed,
            **sampling,
        )
        return speaker.say(tokens, who, watermark)

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
        """Slots of cache that an utterance needs in a batch: voice, text, start of speech and speech, or what its policy
        keeps of it."""
        prefix = self._conditioning(utterance).shape[1] + utterance.text.shape[1]
        prefix += 2 if self.double_bos and not self.t3.is_gpt else 1
        geometry, rows = self._manager.geometry, 1 if self.t3.is_gpt else 2
        limit = (
            Pinned(prefix, self.policy).resolve(geometry.token_bytes * rows, 0, self._manager.max_cache_length).limit
        )
        return prefix + utterance.max_new_tokens - 1 if limit is None else limit

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
        request = prefill(self.t3, self._conditioning(utterance), text, self.double_bos)
        total = utterance.max_new_tokens
        cache = self._new_cache(request.embeds, total) if caching else None
        start = None if cache is None or reuse is None else reuse.start
        return Decoder(self.t3, request, utterance.sampling, total, cache, generator, start, self.onednn), cache

    def _conditioning(self, utterance: Utterance) -> Tensor:
        reuse = self._reuse if utterance.reused else None
        return condition(self.t3, utterance.voice.t3) if reuse is None else reuse.condition(utterance.voice.t3)

    def _voice(self, voice: str | Voice | None, audio_prompt_path: str | os.PathLike[str] | None = None) -> Voice:
        if voice is not None and audio_prompt_path is not None:
            raise InputError(f"give voice={voice!r} or audio_prompt_path={audio_prompt_path!r}, not both")
        if isinstance(voice, Voice):
            return voice
        if voice is not None:
            return self.voices[voice]
        speaker = self._with_vocoder()
        return speaker.builtin() if audio_prompt_path is None else speaker.encode(audio_prompt_path)

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
