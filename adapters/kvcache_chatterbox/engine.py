"""`ChatterboxEngine`: a loaded Chatterbox model, streaming on managed caches."""

import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from kvcache import (
    InputError,
    SizePolicy,
    SpeakerCache,
)
from kvcache.cache import PositionMode
from kvcache.decoding import BUCKET, BackendName, Told, TuningProfile, WarmUp, as_async, in_thread, untold
from kvcache.memory import release_threads
from kvcache.models import Precision
from kvcache_chatterbox.audio import Chunks, SegmentedAudio, Speaker, chunking_of, heard
from kvcache_chatterbox.checks import check_conditionals, check_count, check_number, check_path, check_pause, check_seed
from kvcache_chatterbox.loading import byte_tokens, random_conditionals
from kvcache_chatterbox.speech import (
    OPTIONS,
    Carry,
    LongText,
    SamplingOptions,
    Utterance,
    UtteranceDecoder,
    Watch,
    check_carry,
    generate_defaults,
    most_tokens,
    rows_alone,
    sampling_of,
    seeds,
    unwatched,
)
from kvcache_chatterbox.text import LongTextPlan, check_plan, make_plan, split
from kvcache_chatterbox.vocoder import Vocoder, VocoderOptions, options_of
from kvcache_chatterbox.voices import Reuse, Voice, Voices, check_name, read_conds

log = logging.getLogger("kvcache_chatterbox")

_TEXT = "The birch canoe slid on the smooth planks."
_FEW = 4  # tokens that a warm-up decodes


class ChatterboxEngine(UtteranceDecoder):
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
        onednn: let oneDNN multiply in fp32 on a CPU, where it is faster, T3 and the vocoder. See `kvcache.models.onednn_linear`.
        backend: what decodes, see `kvcache.decoding.Decoding`: ``"eager"``, ``"compile"``, ``"graph"`` or
            ``"graph+compile"``; ``"auto"`` is graph on a GPU, eager elsewhere; ``"off"`` is the token loop that looks at
            the host for every token. What cannot be done falls back to that, and the report says why.
        precision: of the backbone: ``"bf16"``, ``"fp16"``, ``"int8"``, see `kvcache.models.quantize_linear`; by default as the model is.
        kv_dtype: of the cache while decoding; by default bf16 where the precision is bf16 or int8 and the CPU has AMX, else the
            model's.
        tf32: let a GPU round the inputs of fp32 products to TF32 while decoding.
        bucket: slots that a captured graph reads, or a multiple of so many, see `kvcache.decoding.Decoding`.
        vocoder: how the vocoder runs; by default as upstream's does.

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
        bucket: int = BUCKET,
        vocoder: VocoderOptions | None = None,
    ) -> None:
        t3 = getattr(model, "t3", model)
        if not hasattr(t3, "tfmr") or not hasattr(t3, "speech_head"):
            raise InputError(
                f"{type(model).__name__} is no Chatterbox model: give a ChatterboxTTS (any variant) or its T3"
            )
        super().__init__(
            t3,
            policy,
            max_cache_length,
            positions=positions,
            double_bos=double_bos,
            speakers=speakers,
            reuse=reuse,
            onednn=onednn,
            backend=backend,
            precision=precision,
            kv_dtype=kv_dtype,
            tf32=tf32,
            bucket=bucket,
        )
        self.voices = Voices(self.t3, self._reuse)
        if vocoder is not None and not hasattr(model, "s3gen"):
            raise InputError(
                f"vocoder={vocoder}: a bare T3 has no vocoder; give the whole ChatterboxTTS, or leave it out"
            )
        self._speaker = None
        if hasattr(model, "s3gen"):
            self._speaker = Speaker(model, vocoder, self.speakers, self._programs, onednn)
        self._defaults = {} if self._speaker is None else generate_defaults(model)
        release_threads()  # who has loaded the model may not be who decodes

    @classmethod
    def from_profile(cls, model: Any, path: str | os.PathLike[str], **overrides: Any) -> "ChatterboxEngine":
        """An engine with the setting that `kvcache tune` found for this model.

        Where it was tuned with a vocoder, a whole model's runs so, too. How many requests to decode together is `TuningProfile.setting.requests`: give it as ``max_rows``.

        Args:
            model: that the profile is of, as it was then.
            path: of the profile.
            **overrides: arguments of the constructor, which go before what the profile says.

        Raises:
            InputError: if it cannot be read, is another model's, or has a quantized cache, which T3 has not.
            CorruptError: if that is no profile.
        """
        arguments = TuningProfile.load(Path(path), getattr(model, "t3", model)).arguments
        if "storage" in arguments:
            raise InputError(f"{path} has a quantized cache, which Chatterbox's engine has not; tune with kvcache tune")
        vocoder = arguments.pop("vocoder", None)
        if vocoder is not None and hasattr(model, "s3gen"):
            arguments["vocoder"] = options_of(vocoder)
        return cls(model, **{**arguments, **overrides})

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
        check_name(name)
        if exaggeration is not None:
            exaggeration = check_number("exaggeration", exaggeration)
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
        voice = self.voices[name]
        if self._reuse is not None and self._reuse.usable:
            shared = self._reuse.prepare(voice.t3)
            if pin:
                self.speakers.pin(shared.key)
        return voice

    # ------------------------------------------------------------------ before the first request

    def warm_up(
        self,
        text: str = _TEXT,
        *,
        voice: str | Voice | None = None,
        language_id: str | None = None,
        max_new_tokens: int | None = None,
        requests: int = 1,
        background: bool = False,
        told: Told = untold,
        **sampling: Unpack[SamplingOptions],
    ) -> WarmUp:
        """Do what a first request would wait for: compiled steps are loaded from their files or made, what runs of the vocoder
        take is measured.

        It runs the beginning of a made-up request. Requests with other settings (greedy draws, no guidance) may still need
        another compiled step.

        Args:
            text: that is begun.
            voice: who speaks; by default the voice that the model was loaded with, or for a bare T3 a made-up one.
            language_id, max_new_tokens, **sampling: as requests will have them, see `generate_stream`.
            requests: rows of the scheduler that will serve, its ``max_rows``: its steps are those of one request and of all, or
                of powers of two as graphs.
            background: return at once and do it in a thread. From then on no request waits for a compiler: it runs eagerly
                until its compiled step is there, and says the same tokens.
            told: is told what is done next, in the thread that does it.

        Returns:
            What was made and how long that took, see `WarmUp`.

        Raises:
            InputError, CapacityError: as `generate_stream`, before anything has run; or if this engine cannot decode `requests` together.
        """
        check_count("requests", requests)
        if requests > 1:
            self.room(requests)
        if self._speaker is None:
            if requests > 1:
                raise InputError(f"requests={requests}: this engine is around a bare T3; give it a whole model")
            run = self._warm_tokens(voice, max_new_tokens, told, sampling)
        else:
            who = self.voice_of(voice)
            given = {"language_id": language_id, "max_new_tokens": max_new_tokens, "seed": 0, "max_rows": 1}
            long = self.long_text(text, who, **given, **sampling)  # type: ignore[arg-type]
            self._speaker.checked(who)
            run = partial(self._warm_audio, who, long, requests, told)
        warming = WarmUp(self._programs, run)
        return warming.in_background() if background else warming.here()

    def _warm_tokens(
        self, voice: str | Voice | None, max_new_tokens: int | None, told: Told, sampling: SamplingOptions
    ) -> Callable[[], None]:
        most = most_tokens(self.t3) if max_new_tokens is None else max_new_tokens
        tokens = byte_tokens(self.t3, _TEXT)
        cond = random_conditionals(self.t3) if voice is None else None
        stream = self.inference_stream(
            text_tokens=tokens, voice=voice, t3_cond=cond, max_new_tokens=most, chunk_size=_FEW, seed=0, **sampling
        )
        return partial(_begun, stream, told)

    def _warm_audio(self, voice: Voice, text: LongText, requests: int, told: Told) -> None:
        _begun(self._in_order(text.utterances[:1], 1, _FEW, None, text.plan.slots), told)
        if requests > 1:
            self._warm_batch(text.utterances[0], requests, told)
        self._with_vocoder().warm(voice, told, requests)

    def _warm_batch(self, utterance: Utterance, requests: int, told: Told) -> None:
        """Of as many places as a scheduler with so many rows has: each number that a step may run."""
        slots, _ = self.room(requests)
        with self.batch(requests, slots) as batch:
            for size in batch.sizes:
                told(f"decoding the first tokens of {size} at once")
                while batch.busy < size:
                    batch.enter(self.job(utterance))
                batch.turn()

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
        speaker = self._speaks(voice, t3_cond)
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
        if not isinstance(texts, Sequence) or not texts:
            raise InputError(f"texts={texts!r:.80} must be a list of at least one text, each as tokens")
        check_count("max_rows", max_rows)
        check_count("chunk_size", chunk_size)
        check_carry(carry)
        speaker = self._speaks(voice, t3_cond)
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

    def _speaks(self, voice: str | Voice | None, t3_cond: Any) -> Voice:
        if (t3_cond is None) == (voice is None):
            raise InputError("give either voice, a name among engine.voices, or t3_cond")
        if t3_cond is None:
            return self.voice_of(voice)
        check_conditionals(t3_cond)
        return Voice(t3_cond, {})

    # ------------------------------------------------------------------ audio

    def plan(
        self,
        text: str,
        *,
        voice: str | Voice | None = None,
        language_id: str | None = None,
        max_new_tokens: int | None = None,
        max_rows: int = 8,
        memory_budget: int | str | None = None,
        segment_characters: int | None = 200,
        carry: Carry | None = None,
        chunking: Chunks = "auto",
        first_chunk: int | None = None,
        max_chunk: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> LongTextPlan:
        """What `generate_stream` will do with a text, and what that takes; see there for the arguments.

        What the vocoder takes is found by its own code, which runs without numbers: that takes seconds, once for each voice
        and largest chunk.

        Raises:
            InputError, CapacityError: if it cannot be spoken.
        """
        rule, who = chunking_of(chunking, first_chunk, max_chunk), self.voice_of(voice)
        plan = self.long_text(
            text,
            who,
            language_id=language_id,
            max_new_tokens=max_new_tokens,
            max_rows=max_rows,
            memory_budget=memory_budget,
            segment_characters=segment_characters,
            carry=carry,
            **sampling,
        ).plan
        most = min(rule.largest, max(segment.most for segment in plan.segments))
        return dataclasses.replace(plan, vocoder=self._with_vocoder().taken(who, most))

    def generate_stream(
        self,
        text: str,
        *,
        voice: str | Voice | None = None,
        audio_prompt_path: str | os.PathLike[str] | None = None,
        exaggeration: float | None = None,
        language_id: str | None = None,
        max_new_tokens: int | None = None,
        chunking: Chunks = "auto",
        first_chunk: int | None = None,
        max_chunk: int | None = None,
        seed: int | None = None,
        watermark: bool = True,
        max_rows: int = 8,
        memory_budget: int | str | None = None,
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
            chunking, first_chunk, max_chunk: how much audio comes at once, see `kvcache_chatterbox.audio.chunking_of`: by
                default a small chunk first, and each next one as large as what there is to play allows.
            **sampling: see `inference_stream`.
            seed: of the first segment's draws, the vocoder's too; each further segment has the next number. Where chunks have
                given sizes, it always gives the same samples.
            watermark: mark the audio with the model's watermarker, if it has one: one continuous mark, which makes each chunk
                0.18 s later.
            max_rows: segments that decode together at most; with guidance each takes two rows of the cache.
            memory_budget: bytes that their cache may take, or ``"200MiB"``; fewer rows where not all fit.
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
        pause = check_pause(pause)
        rule = chunking_of(chunking, first_chunk, max_chunk)
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
        audio = self.audio(who, watermark, long, chunking=rule, pause=pause)
        pieces = self._in_order(
            long.utterances, long.plan.rows, rule.step, carry, long.plan.slots, watch, alone=rule.opening
        )
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
        memory_budget: int | str | None = None,
        segment_characters: int | None = 200,
        pause: float = 0.2,
        carry: Carry | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Tensor:
        """The audio of a text ``[1, samples]``: all tokens, then one vocoder pass for each segment, as upstream's `generate`
        does for its one. The arguments are those of `generate_stream`, whose chunks are together as long."""
        pause = check_pause(pause)
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
        speaker = self._with_vocoder()
        speaker.checked(who)
        pieces = self._in_order(long.utterances, long.plan.rows, 1, carry, long.plan.slots)  # the others wait for one
        noise = speaker.noise_of(long, whole=True)
        return speaker.say(pieces, who, watermark, noise, pause=pause, joined=carry is not None)

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
        memory_budget: int | str | None = None,
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
        check_carry(carry)
        check_plan(max_rows, max_new_tokens, memory_budget)
        check_seed(seed)
        options = self._options(sampling, exaggeration)
        guided = sampling_of(self.t3.is_gpt, options)
        who = voice if exaggeration is None else voice.with_emotion(exaggeration)
        parts = split(text, language_id, segment_characters)
        check_seed(seed, len(parts))
        # Upstream's rules look at the first character, be it white space.
        said = [text if len(parts) == 1 else text[: parts[0].end], *(part.text for part in parts[1:])]
        tokens = [speaker.tokenize(one, language_id) for one in said]
        if len(parts) == 1 and max_new_tokens is None:
            max_new_tokens = most_tokens(self.t3)
        positions = self.t3.speech_pos_emb
        slots_of = self._slots_taken if slots is None else self._slots_needed
        together = self._layout(self._rows_together, slots_of)
        plan = make_plan(
            parts,
            [one.shape[1] for one in tokens],
            language=language_id,
            prefix=self._conditioning(who, True).shape[1],
            overhead=self._overhead,
            token_bytes=together.token_bytes,
            guided=together.rows == 2,
            slots_of=together.slots,
            alone=self._layout(rows_alone(guided), slots_of),
            max_rows=max_rows if carry is None and self.batches else 1,
            memory_budget=memory_budget,
            max_new_tokens=max_new_tokens,
            longest=None if positions is None else positions.emb.num_embeddings - 1,
            max_length=self._manager.max_cache_length if slots is None else slots,
        )
        utterances = [
            self.utterance(who, text_tokens, max_new_tokens=segment.most, seed=one, **options)
            for text_tokens, segment, one in zip(tokens, plan.segments, seeds(seed, len(parts)), strict=True)
        ]
        return LongText(plan, utterances, carry)

    def _options(self, sampling: SamplingOptions, exaggeration: float | None) -> SamplingOptions:
        """What `generate` of the model's own class would draw with: its defaults, where nothing is given.

        Upstream's Turbo takes `min_p` and `exaggeration`, says that it ignores them, and ignores them; so does this.
        """
        given: dict[str, Any] = {name: self._defaults[name] for name in OPTIONS if name in self._defaults} | dict(
            sampling
        )
        if self.t3.is_gpt:
            sampling_of(True, sampling)  # says what is wrong with what is not used, too
            unused = [name for name in ("min_p",) if given.get(name)] + ["exaggeration"] * bool(exaggeration)
            if unused:
                log.warning("%s: the GPT-2 variants know nothing of it; ignored, as upstream does", ", ".join(unused))
            given["min_p"] = 0.0
        return cast(SamplingOptions, given)

    def audio(
        self,
        voice: str | Voice | None,
        watermark: bool = True,
        text: LongText | None = None,
        *,
        chunking: Chunks = "fixed",
        pause: float = 0.2,
        vocoder: Vocoder | None = None,
    ) -> SegmentedAudio:
        """What turns the speech tokens of segments into a voice's audio as they are pushed; one request's own.

        Args:
            voice: who speaks.
            text: that is spoken, whose seeds are the vocoder's, too.
            chunking: see `generate_stream`.
            watermark, pause: see `SegmentedAudio`.
            vocoder: in place of the engine's own.
        """
        pause = check_pause(pause)
        speaker = self._with_vocoder()
        return speaker.segmented(
            self.voice_of(voice),
            watermark,
            None if text is None else speaker.noise_of(text),
            chunking=chunking_of(chunking),
            pause=pause,
            joined=text is not None and text.carry is not None,
            vocoder=vocoder,
        )

    @property
    def vocoder(self) -> Vocoder:
        """What makes audio of speech tokens, with the model as it is now.

        Raises:
            InputError: if the model is a bare T3.
        """
        return self._with_vocoder().vocoder

    def voice_of(self, voice: str | Voice | None, audio_prompt_path: str | os.PathLike[str] | None = None) -> Voice:
        """Who speaks: a voice by its name, of a clip, or the one that the model was loaded with.

        Raises:
            InputError: if there is no such voice.
        """
        return self.chosen_voice(voice, audio_prompt_path)()

    def chosen_voice(
        self, voice: str | Voice | None, audio_prompt_path: str | os.PathLike[str] | None = None
    ) -> Callable[[], Voice]:
        """What gives the voice that is meant now, whatever its name means, or the model is given, by then.

        It is given later as it takes time: a clip is read and encoded, conditionals are copied and checked. A clip's file is
        read as it is by then.

        Raises:
            InputError: if there is no such voice.
        """
        if voice is not None and audio_prompt_path is not None:
            raise InputError(f"give voice={voice!r:.80} or audio_prompt_path={audio_prompt_path!r}, not both")
        if voice is not None:
            named = voice if isinstance(voice, Voice) else self.voices[voice]
            return lambda: named
        speaker = self._with_vocoder()
        if audio_prompt_path is not None:
            check_path("audio_prompt_path", audio_prompt_path)
            return lambda: self._as_generate(speaker.encode(audio_prompt_path))
        conds = speaker.conds
        return lambda: self._as_generate(Voice.of(self.t3, conds))

    def _as_generate(self, voice: Voice) -> Voice:
        """A voice without a name as upstream's `generate` has it where it is given no emotion."""
        emotion = self._defaults.get("exaggeration") if self.t3.hp.emotion_adv else None
        return voice if emotion is None or voice.emotion == emotion else voice.with_emotion(emotion)

    def _with_vocoder(self) -> Speaker:
        if self._speaker is None:
            raise InputError(
                "a bare T3 has no vocoder: give the whole ChatterboxTTS, or use inference_stream() for tokens"
            )
        return self._speaker


def _begun(stream: Iterator[Any], told: Told) -> None:
    """The beginning of a stream of tokens, which is closed then."""
    told("decoding the first tokens")
    with closing(cast(Any, stream)) as begun:
        next(begun, None)
        next(begun, None)  # the first may be there without a step
