"""`ChatterboxEngine`: a loaded Chatterbox model, streaming on managed caches."""

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from typing_extensions import Self, Unpack

from kvcache import InputError, SizePolicy, SpeakerCache
from kvcache.decoding import Told, WarmUp, as_async, in_thread, untold
from kvcache.memory import release_threads
from kvcache_chatterbox.audio import Chunks, SegmentedAudio, Speaker, chunking_of, heard
from kvcache_chatterbox.checks import check_conditionals, check_count
from kvcache_chatterbox.engine._options import EngineFields, EngineOptions
from kvcache_chatterbox.engine._request import RequestFields, SpeechRequest, TextFields, asked
from kvcache_chatterbox.engine._texts import long_text
from kvcache_chatterbox.engine._voice_source import VoiceSource
from kvcache_chatterbox.engine._warm_up import FEW, TEXT, batch_begun, begun
from kvcache_chatterbox.loading import byte_tokens, random_conditionals
from kvcache_chatterbox.speech import (
    Carry,
    LongText,
    UtteranceDecoder,
    UtteranceFields,
    UtteranceOptions,
    Watch,
    check_carry,
    generate_defaults,
    most_tokens,
    seeds,
    unwatched,
)
from kvcache_chatterbox.text import LongTextPlan, RowLimits
from kvcache_chatterbox.vocoder import Vocoder
from kvcache_chatterbox.voices import Voice, Voices


class ChatterboxEngine(UtteranceDecoder):
    """Streams speech tokens, and audio where the model has a vocoder, from a Chatterbox model.

    Each request has a cache of its own, gone when the request ends. Its prefix (voice, text, start of speech) is pinned
    under every policy: only speech tokens are ever evicted. The model is not patched.

    Args:
        model: a loaded `ChatterboxTTS`, `ChatterboxMultilingualTTS`, `ChatterboxTurboTTS` (Nano too), or a bare `T3`.
        options: how it speaks, as `EngineOptions`; or the policy alone.
        prefix_cache: where what is known of voices lives; by default memory over disk, from the first voice on.
        **fields: or the fields of `EngineOptions` as keywords.

    Attributes:
        options: how it speaks.
        prefix_cache: where what is known of voices lives.
        voices: the voices added so far, by name.

    Raises:
        InputError: for an option that cannot be, or not on this device.
        PolicyError, PositionsError: if the policy cannot work for this model.
    """

    options: EngineOptions

    def __init__(
        self,
        model: Any,
        options: EngineOptions | SizePolicy | None = None,
        *,
        prefix_cache: SpeakerCache | None = None,
        **fields: Unpack[EngineFields],
    ) -> None:
        t3 = getattr(model, "t3", model)
        if not hasattr(t3, "tfmr") or not hasattr(t3, "speech_head"):
            raise InputError(
                f"{type(model).__name__} is no Chatterbox model: give a ChatterboxTTS (any variant) or its T3"
            )
        given = EngineOptions.of(options, fields)
        super().__init__(t3, given, prefix_cache)
        self.voices = Voices(self.t3, self._reuse)
        if given.vocoder is not None and not hasattr(model, "s3gen"):
            raise InputError(
                f"vocoder={given.vocoder}: a bare T3 has no vocoder; give the whole ChatterboxTTS, or leave it out"
            )
        self._speaker = None
        if hasattr(model, "s3gen"):
            self._speaker = Speaker(model, given.vocoder, self.prefix_cache, self._programs, given.onednn)
        self._defaults = {} if self._speaker is None else generate_defaults(model)
        self._source = VoiceSource(self.t3, self.voices, self._speaker, self._defaults.get("exaggeration"))
        release_threads()  # who has loaded the model may not be who decodes

    @classmethod
    def from_profile(
        cls,
        model: Any,
        path: str | os.PathLike[str],
        *,
        prefix_cache: SpeakerCache | None = None,
        **fields: Unpack[EngineFields],
    ) -> Self:
        """An engine with the setting that `kvcache tune` found for this model.

        Where it was tuned with a vocoder, a whole model's runs so, too. How many requests to decode together is `TuningProfile.setting.requests`: give it as ``max_rows``.

        Args:
            model: that the profile is of, as it was then.
            path: of the profile.
            prefix_cache, **fields: as of the constructor; they go before what the profile says.

        Raises:
            InputError: if it cannot be read, is another model's, or has a quantized cache, which T3 has not.
            CorruptError: if that is no profile.
        """
        return cls(model, EngineOptions.of_profile(model, path, fields), prefix_cache=prefix_cache)

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
        voice = self._source.add(name, audio_prompt_path, conditionals, exaggeration)
        if self._reuse is not None and self._reuse.usable:
            shared = self._reuse.prepare(voice.t3)
            if pin:
                self.prefix_cache.pin(shared.key)
        return voice

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
        return self._source.chosen(voice, audio_prompt_path)

    # ------------------------------------------------------------------ before the first request

    def warm_up(
        self,
        text: str | SpeechRequest = TEXT,
        *,
        requests: int = 1,
        background: bool = False,
        told: Told = untold,
        **fields: Unpack[RequestFields],
    ) -> WarmUp:
        """Do what a first request would wait for.

        Compiled steps are loaded from their files or made, and it is measured how long runs of the vocoder take.
        It runs the beginning of a made-up request. Requests with other settings (greedy draws, no guidance) may still need
        another compiled step.

        Args:
            text, **fields: a request like those to come, see `SpeechRequest`. A bare T3 knows no text, and speaks with a made-up
                voice where none is given.
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
        request = SpeechRequest.of(text, **fields)
        request = replace(request, utterance=replace(request.utterance, seed=0))
        check_count("requests", requests)
        if requests > 1:
            self.room(requests)
        if self._speaker is None:
            if requests > 1:
                raise InputError(f"requests={requests}: this engine is around a bare T3; give it a whole model")
            run = partial(begun, self._made_up(request), told)
        else:
            who = self.voice_of(request.voice, request.audio_prompt_path)
            long = self.long_text(request, who, RowLimits(1))
            self._speaker.checked(who)
            run = partial(self._warm_audio, who, long, requests, told)
        warming = WarmUp(self._programs, run)
        return warming.in_background() if background else warming.here()

    def _made_up(self, request: SpeechRequest) -> Iterator[Tensor]:
        """Speech tokens of a bare T3."""
        options, voice = request.utterance, request.voice
        if options.max_new_tokens is None:
            options = replace(options, max_new_tokens=most_tokens(self.t3))
        speaker = self._speaks(voice, random_conditionals(self.t3) if voice is None else None)
        tokens = byte_tokens(self.t3, TEXT)
        return self._tokens(self.utterance(speaker, tokens, options, reused=voice is not None), FEW)

    def _warm_audio(self, voice: Voice, text: LongText, requests: int, told: Told) -> None:
        begun(self._in_order(text.utterances[:1], 1, FEW, None, text.plan.slots), told)
        if requests > 1:
            batch_begun(self, text.utterances[0], requests, told)
        self._with_vocoder().warm(voice, told, requests)

    # ------------------------------------------------------------------ speech tokens

    def inference_stream(
        self,
        *,
        text_tokens: Tensor,
        t3_cond: Any = None,
        voice: str | Voice | None = None,
        chunk_size: int = 25,
        **fields: Unpack[UtteranceFields],
    ) -> Iterator[Tensor]:
        """Speech tokens of one text, in chunks ``[1, n]`` as they come; 25 tokens are a second of speech.

        The chunks together are what upstream's `inference` returns under the same seed (Llama variants, the stop token
        included), or `inference_turbo` (GPT-2 variants, without it).

        Args:
            text_tokens: ``[tokens]`` or ``[1, tokens]``, with start and stop token for the Llama variants; or the same
                row twice, as upstream wants it.
            t3_cond: who speaks, upstream's `T3Cond`, run as it is; it is not changed.
            voice: who speaks, by the name it was added under; what is known of it is not run again.
            chunk_size: tokens in a chunk; the last may be shorter.
            **fields: see `UtteranceOptions`; of the sampling, what is left out is as upstream's `inference` has it.

        Raises:
            InputError, CapacityError: before anything has run.
        """
        speaker = self._speaks(voice, t3_cond)
        return self._tokens(self.utterance(speaker, text_tokens, reused=t3_cond is None, **fields), chunk_size)

    def ainference_stream(
        self,
        *,
        text_tokens: Tensor,
        t3_cond: Any = None,
        voice: str | Voice | None = None,
        chunk_size: int = 25,
        **fields: Unpack[UtteranceFields],
    ) -> AsyncIterator[Tensor]:
        """`inference_stream` for an event loop: token ids ``[1, n]`` each time. Cancelling ends the request."""
        stream = self.inference_stream(
            text_tokens=text_tokens, t3_cond=t3_cond, voice=voice, chunk_size=chunk_size, **fields
        )
        return as_async(stream)

    def inference_segments(
        self,
        *,
        texts: Sequence[Tensor],
        t3_cond: Any = None,
        voice: str | Voice | None = None,
        chunk_size: int = 25,
        max_rows: int = 8,
        carry: Carry | None = None,
        **fields: Unpack[UtteranceFields],
    ) -> Iterator[tuple[int, Tensor]]:
        """Speech tokens of several texts that follow one another, decoded together, in their order.

        Args:
            texts: each as `inference_stream` takes one.
            max_rows: texts that decode together at most. The first decodes alone until its first chunk is there.
            carry: see `Segmenting`.
            t3_cond, voice, chunk_size, **fields: see `inference_stream`.

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
        options, speaker = UtteranceOptions.of(fields), self._speaks(voice, t3_cond)
        utterances = [
            self.utterance(speaker, text, replace(options, seed=one), reused=t3_cond is None)
            for text, one in zip(texts, seeds(options.seed, len(texts)), strict=True)
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

    def plan(self, text: str | SpeechRequest, **fields: Unpack[TextFields]) -> LongTextPlan:
        """What `generate_stream` will do with a text, and what that takes; see there for the arguments.

        What the vocoder takes is found by its own code, which runs without numbers: that takes seconds, once for each voice
        and largest chunk.

        Raises:
            InputError, CapacityError: if it cannot be spoken.
        """
        request, limits = asked(text, fields)
        who = self.voice_of(request.voice, request.audio_prompt_path)
        plan = self.long_text(request, who, limits).plan
        most = min(request.chunking.largest, max(segment.most for segment in plan.segments))
        return replace(plan, vocoder=self._with_vocoder().taken(who, most))

    def generate_stream(
        self,
        text: str | SpeechRequest,
        *,
        overlap: bool | None = None,
        watch: Watch = unwatched,
        **fields: Unpack[TextFields],
    ) -> Iterator[Tensor]:
        """Audio of a text of any length, in chunks ``[1, samples]`` at the model's sample rate, as the tokens come.

        A text that is longer than `segment_characters` is divided between sentences. The segments decode together, the
        first one alone until its first chunk is out; audio comes in the text's order.

        Args:
            text: what to say; or a whole `SpeechRequest`.
            overlap: decode in a thread of its own while audio is made; by default on a GPU. On a CPU the two would only take
                each other's cores.
            watch: is told of progress, in the thread that decodes: which segment, how many new speech tokens, whether it
                has ended.
            **fields: with a text, how it is spoken, see `SpeechRequest` and its parts `UtteranceOptions` and `Segmenting`, and
                `chunking_of` for ``chunking``, ``first_chunk`` and ``max_chunk``; and ``max_rows`` and ``memory_budget``, how
                many segments decode together, see `RowLimits`.

        Raises:
            InputError: if the model is a bare T3, there is nothing to say, or no voice to say it.
            CapacityError: if a segment does not fit the cache, or no segment the budget.
        """
        request, limits = asked(text, fields, "overlap", "watch")
        who = self.voice_of(request.voice, request.audio_prompt_path)
        long, rule = self.long_text(request, who, limits), request.chunking
        audio = self.audio(who, request.watermark, long, chunking=rule, pause=request.segmenting.pause)
        pieces = self._in_order(
            long.utterances, long.plan.rows, rule.step, long.carry, long.plan.slots, watch, alone=rule.opening
        )
        if overlap or (overlap is None and self.t3.device.type != "cpu"):
            pieces = in_thread(pieces)
        return heard(audio, pieces)

    def generate(self, text: str | SpeechRequest, **fields: Unpack[TextFields]) -> Tensor:
        """The audio of a text ``[1, samples]``, as upstream's `generate` gives it: all tokens, then one vocoder pass a segment.

        The arguments are those of `generate_stream`, whose chunks are together as long.
        """
        request, limits = asked(text, fields)
        who = self.voice_of(request.voice, request.audio_prompt_path)
        long, speaker = self.long_text(request, who, limits), self._with_vocoder()
        speaker.checked(who)
        pieces = self._in_order(
            long.utterances, long.plan.rows, 1, long.carry, long.plan.slots
        )  # the others wait for one
        noise, pause = speaker.noise_of(long, whole=True), request.segmenting.pause
        return speaker.say(pieces, who, request.watermark, noise, pause=pause, joined=long.carry is not None)

    def long_text(
        self,
        text: str | SpeechRequest,
        who: Voice,
        limits: RowLimits | None = None,
        *,
        slots: int | None = None,
        **fields: Unpack[RequestFields],
    ) -> LongText:
        """A text as utterances, with the plan for them; see `generate_stream` for the request.

        Args:
            who: speaks, whatever voice the request names.
            limits: how many segments decode together; by default those of `RowLimits`.
            slots: of each row of the batch that they shall fit; by default as many as they need, up to `max_cache_length`.
        """
        request, limits = SpeechRequest.of(text, **fields), RowLimits() if limits is None else limits
        return long_text(self, self._with_vocoder(), self._defaults, request, who, limits, slots)

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
            watermark, pause: see `SpeechRequest`.
            text: that is spoken, whose seeds are the vocoder's, too.
            chunking: see `kvcache_chatterbox.audio.chunking_of`.
            vocoder: in place of the engine's own.
        """
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

    def _with_vocoder(self) -> Speaker:
        return self._source.speaker
