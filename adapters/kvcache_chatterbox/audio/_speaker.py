"""The parts of a loaded Chatterbox model around its T3: voice, tokenizer, vocoder, watermarker."""

import copy
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kvcache import InputError, PrefixKey, PrefixSnapshot, SpeakerCache
from kvcache.decoding import Programs
from kvcache.errors import said
from kvcache.events import Event, emit
from kvcache.tools import bytes_in
from kvcache_chatterbox.audio._chunking import FIXED, Chunking, Cost
from kvcache_chatterbox.audio._segmented import CONTEXT, Joints, SegmentedAudio
from kvcache_chatterbox.audio._watermark import StreamMarker, Watermarker, check_watermarker, marked
from kvcache_chatterbox.checks import check_language, check_path, without_autocast
from kvcache_chatterbox.speech import LongText, speech_end
from kvcache_chatterbox.text import VocoderBytes
from kvcache_chatterbox.units import SPEECH_TOKENS
from kvcache_chatterbox.upstream import beside, needed_beside
from kvcache_chatterbox.vocoder import (
    LEAST_REFERENCE,
    Noise,
    PlannedRuns,
    Run,
    S3GenVocoder,
    SeededNoise,
    UpstreamNoise,
    Vocoder,
    VocoderOptions,
    most_together,
    vocoder_of,
    why_plain,
)
from kvcache_chatterbox.voices import Voice, clip_key, encoder_of, packed, unpacked

ENDING = 3  # tokens that upstream puts behind Turbo's
_CLIPS = 32
_WARMED = (25, 50, 100, 200)  # tokens of the runs that a warm-up times


class Speaker:
    """The parts of a loaded Chatterbox model around its T3.

    Args:
        tts: a `ChatterboxTTS`, `ChatterboxMultilingualTTS` or `ChatterboxTurboTTS`.
        options: how its vocoder runs; by default as upstream does.
        prefix_cache: where what is made of clips is kept; by default only the last few are, here.
        programs: where what is compiled is kept; by default in the user's cache.
        onednn: let oneDNN multiply in fp32 where it is faster; see `kvcache.models.onednn_linear`.

    Attributes:
        cost: what runs of the vocoder take.

    Raises:
        InputError: if the vocoder cannot run so.
    """

    def __init__(
        self,
        tts: Any,
        options: VocoderOptions | None = None,
        prefix_cache: SpeakerCache | None = None,
        programs: Programs | None = None,
        onednn: bool = True,
    ) -> None:
        self._tts, self._programs, self._onednn = tts, programs, onednn
        self._options = options
        self._vocoder: tuple[Any, str | None, Vocoder] | None = None
        self._planned: tuple[Vocoder, PlannedRuns] | None = None
        self.cost = Cost()
        self._speakers = prefix_cache
        self._clips: OrderedDict[tuple[str | None, bytes], Voice] = OrderedDict()
        self._encoding = RLock()
        if options not in (None, VocoderOptions()):
            self.vocoder  # noqa: B018  # what cannot be is said at once

    @property
    def vocoder(self) -> Vocoder:
        """What turns speech tokens into audio, with the model as it is now."""
        s3gen = self._tts.s3gen
        reason = why_plain(s3gen)
        if self._vocoder is None or self._vocoder[0] is not s3gen or self._vocoder[1] != reason:
            device = self._tts.t3.device
            made = vocoder_of(s3gen, self._options, device, self._programs, self._onednn)
            self._vocoder = s3gen, reason, made
        return self._vocoder[2]

    def checked(self, voice: Voice) -> Vocoder:
        """The vocoder, which can speak with this voice.

        Raises:
            InputError: if it cannot.
        """
        if not voice.gen:
            raise InputError(
                "the voice has no reference for the vocoder, only T3's conditionals; add it from a clip, from upstream's "
                "whole Conditionals, or use inference_stream() for tokens"
            )
        vocoder = self.vocoder
        vocoder.check(voice)
        return vocoder

    def taken(self, voice: Voice, chunk: int) -> VocoderBytes | None:
        """What making audio takes; None where nothing is known of the vocoder. The first time takes seconds.

        Args:
            voice: who speaks.
            chunk: speech tokens of the largest chunk.
        """
        vocoder = self.checked(voice)
        if not isinstance(vocoder, S3GenVocoder):
            return None
        if self._planned is None or self._planned[0] is not vocoder:
            self._planned = vocoder, PlannedRuns(vocoder)
        reference = vocoder.before(voice)
        run = CONTEXT + vocoder.lookahead + chunk + self._ending().numel()
        return VocoderBytes(
            bytes_in([] if (weights := self.weights) is None else [weights]),
            vocoder.held(voice) + sum(part.nbytes for part in voice.gen.values() if isinstance(part, Tensor)),
            self._planned[1].workspace(reference, run),
            chunk,
        )

    @property
    def weights(self) -> nn.Module | None:
        """All modules that hold weights of the vocoder; None if there are none.

        These are the model's own, what runs in their place, and what is made of them to run.
        """
        vocoder = self.vocoder
        parts = [self._tts.s3gen, *(vocoder.modules if isinstance(vocoder, S3GenVocoder) else ())]
        held = [part for part in parts if isinstance(part, nn.Module)]
        return nn.ModuleList(held) if held else None

    @property
    def meanflow(self) -> bool:
        """Whether the vocoder's weights are distilled."""
        return bool(getattr(self.vocoder, "meanflow", getattr(self._tts.s3gen, "meanflow", False)))

    @property
    def conds(self) -> Any:
        """The conditionals that the model has now.

        Raises:
            InputError: if there are none.
        """
        conds = self._tts.conds
        if conds is None:
            raise InputError("there is no voice: give voice or audio_prompt_path, or load the model with its conds.pt")
        return conds

    def builtin(self) -> Voice:
        """The voice that the model has now. Errors are those of `conds`."""
        return Voice.of(self._tts.t3, self.conds)

    def warm(self, voice: Voice, told: Callable[[str], object], requests: int = 1) -> None:
        """Run the vocoder at a few sizes, and the watermarker once.

        Then what the vocoder compiles is there, and it is known how long its runs take.

        Args:
            told: is told what is done next.
            requests: that speak at once at most: with several, chunks of two are run together, too, where they will be.
        """
        vocoder, noise = self.checked(voice), SeededNoise(0)
        before = vocoder.before(voice) + CONTEXT
        tokens = torch.randint(0, SPEECH_TOKENS, (CONTEXT + max(_WARMED),), generator=torch.Generator().manual_seed(0))
        runs = {size: Run(tokens[: CONTEXT + size], voice, noise, known=CONTEXT) for size in _WARMED}
        few, more, *_ = runs.values()
        if requests > 1 and 2 * (before + _WARMED[0]) <= most_together(self._tts.t3.device):
            for together in ((few, few), (few, more)):  # as long as one another, and padded
                told(
                    f"making audio of {' and '.join(str(run.tokens.numel() - CONTEXT) for run in together)} tokens at once"
                )
                vocoder.waves(together)
        for size, run in runs.items():
            told(f"making audio of {size} tokens")
            if size == _WARMED[0]:
                vocoder.waves([run])  # which loads, compiles, or sets up
            began = time.perf_counter()
            [made] = vocoder.waves([run])
            self.cost.took(before + size, time.perf_counter() - began)
        if isinstance(watermarker := getattr(self._tts, "watermarker", None), Watermarker):
            told("marking audio")
            with suppress(Exception):  # the first request that wants a mark says what is wrong with it
                marked(watermarker, made.audio, self._tts.sr)  # Perth's first run imports, and compiles

    def encode(self, audio_prompt_path: str | os.PathLike[str]) -> Voice:
        """The voice of a clip.

        It takes seconds, so each clip is encoded once: it is kept, by content, in the store of what is known of voices, and the
        last few are remembered here.

        Raises:
            InputError: if the vocoder, or upstream, has no use for such a clip.
        """
        check_path("audio_prompt_path", audio_prompt_path)
        try:
            clip = hashlib.sha256(Path(audio_prompt_path).read_bytes()).digest()
        except OSError:
            clip = None
        with self._encoding:
            if clip is None:
                return self._encode(audio_prompt_path)  # upstream says what is wrong with it
            with without_autocast(self._tts.t3):
                encoder = encoder_of(self._tts)
            if (encoder, clip) not in self._clips:
                kept = None if encoder is None or self._speakers is None else clip_key(encoder, clip)
                self._clips[encoder, clip] = (
                    self._encode(audio_prompt_path) if kept is None else self._kept(kept, audio_prompt_path)
                )
                if len(self._clips) > _CLIPS:
                    self._clips.popitem(last=False)
            self._clips.move_to_end((encoder, clip))
            return self._clips[encoder, clip]

    def _kept(self, key: PrefixKey, audio_prompt_path: str | os.PathLike[str]) -> Voice:
        """The voice that is stored under a key, or is encoded and stored now."""
        assert self._speakers is not None
        if (found := self._speakers.get(key)) is not None:
            try:
                voice = unpacked(self._tts.t3, found)
                self.checked(voice)
                return voice
            except InputError as error:  # of somebody who can write there
                emit(Event("refused", repr(key), reason=f"what is stored of a clip is no voice: {error}"))
                self._speakers.evict(key)
        made: list[Voice] = []

        def build(_start: PrefixSnapshot | None) -> PrefixSnapshot:
            made.append(self._encode(audio_prompt_path))
            return packed(key, made[0])

        try:
            self._speakers.keep(self._speakers.compute(key, None, build))
        except InputError:
            if not made:  # it is of the clip, and not of what cannot be kept
                raise
        return made[0]

    def _encode(self, audio_prompt_path: str | os.PathLike[str]) -> Voice:
        """Upstream writes the voice into the model: here into a copy, as others may be speaking with the model's own."""
        self._check_clip(audio_prompt_path)
        tts = copy.copy(self._tts)
        tts.conds = None
        prepare = vars(tts).get("prepare_conditionals")
        if prepare is not None:
            if getattr(prepare, "__self__", None) is not self._tts:
                raise InputError(
                    "the model's prepare_conditionals was replaced by a function that writes into the model, whose own voice "
                    "others may be speaking with; set it on the model's class, or as types.MethodType(function, model)"
                )
            tts.prepare_conditionals = MethodType(prepare.__func__, tts)
        with without_autocast(tts.t3):
            try:
                tts.prepare_conditionals(os.fspath(audio_prompt_path))
            except AssertionError as error:  # Turbo's own limit, in plain words
                raise InputError(f"audio_prompt_path={os.fspath(audio_prompt_path)!r}: {said(error)}") from error
        voice = replace(Voice.of(tts.t3, tts.conds), kept=False)
        self.checked(voice)
        return voice

    def _check_clip(self, audio_prompt_path: str | os.PathLike[str]) -> None:
        """Raise `InputError` for a clip too short for the vocoder, before upstream works on it for seconds."""
        librosa = beside(self._tts, "librosa")
        if librosa is None or why_plain(self._tts.s3gen) is not None:
            return
        try:
            seconds = float(librosa.get_duration(path=os.fspath(audio_prompt_path)))
        except (
            Exception
        ):  # of a format that only its header's reader does not know: upstream says what is wrong with it
            return
        if seconds < LEAST_REFERENCE:
            raise InputError(
                f"audio_prompt_path={os.fspath(audio_prompt_path)!r} is {seconds:.2f} s long, and a voice needs "
                f"{LEAST_REFERENCE:g} s or more, of which the vocoder hears the first 10; give a longer clip"
            )

    def tokenize(self, text: str, language_id: str | None) -> Tensor:
        """The text, its punctuation normalized as upstream does it, as T3's text tokens ``[1, n]``."""
        self.check_language(language_id)
        text = needed_beside(self._tts, "punc_norm")(text)
        tokenizer, hp = self._tts.tokenizer, self._tts.t3.hp
        if self._tts.t3.is_gpt:
            return torch.as_tensor(tokenizer(text, return_tensors="pt", padding=True, truncation=True).input_ids)
        if hp.is_multilingual:
            tokens = tokenizer.text_to_tokens(text, language_id=str(language_id).lower())
        else:
            tokens = tokenizer.text_to_tokens(text)
        return torch.nn.functional.pad(
            torch.nn.functional.pad(tokens, (1, 0), value=hp.start_text_token), (0, 1), value=hp.stop_text_token
        )

    def segmented(
        self,
        voice: Voice,
        watermark: bool,
        noise: Callable[[int, int], Noise] | None = None,
        *,
        chunking: Chunking | None = FIXED,
        pause: float = 0.2,
        joined: bool = False,
        vocoder: Vocoder | None = None,
    ) -> SegmentedAudio:
        """What turns the speech tokens of segments into the voice's audio as they are pushed; one request's own.

        Args:
            voice: who speaks.
            watermark: mark the audio, as one signal, with the model's watermarker if it has one; see `StreamMarker`.
            noise, chunking: see `SegmentedAudio`.
            pause, joined: see `Joints`.
            vocoder: in place of this speaker's own.

        Raises:
            InputError: if the pause cannot be, the vocoder cannot speak with the voice, or the model's watermarker is none.
        """
        joints = Joints(pause, joined, self._ending())
        own = self.checked(voice)
        watermarker = self._watermarker(watermark)
        return SegmentedAudio(
            own if vocoder is None else vocoder,
            voice,
            noise,
            chunking=chunking,
            cost=self.cost,
            joints=joints,
            marker=None if watermarker is None else StreamMarker(watermarker, self._tts.sr),
        )

    def say(
        self,
        pieces: Iterable[tuple[int, Tensor]],
        voice: Voice,
        watermark: bool,
        noise: Callable[[int, int], Noise] | None = None,
        *,
        pause: float = 0.2,
        joined: bool = False,
    ) -> Tensor:
        """The audio ``[1, samples]`` of segments, one vocoder pass each and marked as a whole; as long as it is streamed.

        Args:
            pieces: a segment's index and speech tokens of it ``[1, n]``, in the text's order.
            voice, watermark, noise, pause, joined: see `segmented`.
        """
        watermarker = self._watermarker(watermark)
        audio = self.segmented(voice, False, noise, chunking=None, pause=pause, joined=joined)
        whole = torch.cat([torch.zeros(1, 0), *heard(audio, pieces)], 1)
        if watermarker is None or whole.numel() == 0:
            return whole
        return marked(watermarker, whole[0], self._tts.sr)[None]

    def noise_of(self, text: LongText, whole: bool = False) -> Callable[[int, int], Noise]:
        """The vocoder's noise of each segment of a text, by the segment's seed.

        Args:
            whole: in upstream's order: the seed of a text gives what upstream's `generate` draws behind its tokens.
        """
        if not whole:
            unseeded = _state(self._tts.t3.device)

            def by_place(index: int, _tokens: int) -> Noise:
                seed = text.utterances[index].seed
                return SeededNoise(unseeded if seed is None else seed)

            return by_place

        def in_order(index: int, tokens: int) -> Noise:
            utterance, t3 = text.utterances[index], self._tts.t3
            generator = utterance.generator()
            # Upstream draws the one after the other.
            if generator is not None and not utterance.sampling.greedy:
                row = torch.empty(1, t3.speech_head.out_features, device=t3.device)
                for _ in range(speech_end(t3, utterance.max_new_tokens).drawn(tokens)):
                    row.exponential_(generator=generator)
            return UpstreamNoise(generator, t3.device, meanflow=self.meanflow)

        return in_order

    def check_language(self, language_id: str | None) -> None:
        """Raise `InputError` if the multilingual model does not speak this language; others are not asked."""
        check_language(language_id)
        languages = beside(self._tts, "SUPPORTED_LANGUAGES", {})
        if self._tts.t3.hp.is_multilingual and (language_id is None or language_id.lower() not in languages):
            raise InputError(
                f"language_id={language_id!r} is not one of {', '.join(languages)}; name the text's language"
            )

    def _ending(self) -> Tensor:
        """What upstream puts behind the tokens: Turbo's three of silence."""
        silence = beside(self._tts, "S3GEN_SIL") if self._tts.t3.is_gpt else None
        return torch.full((0 if silence is None else ENDING,), silence or 0, device=self._tts.t3.device)

    def _watermarker(self, wanted: bool) -> Watermarker | None:
        """What marks the audio, if that is wanted and the model has something that does."""
        watermarker = getattr(self._tts, "watermarker", None) if wanted else None
        if watermarker is not None:
            check_watermarker(watermarker)
        return watermarker


def _state(device: torch.device) -> int:
    """A seed that torch's global generator stands for as it is now, from which nothing is drawn."""
    state = torch.get_rng_state() if device.type != "cuda" else torch.cuda.get_rng_state(device)
    return int.from_bytes(hashlib.sha256(state.numpy().tobytes()).digest()[:4], "big")


def heard(audio: SegmentedAudio, pieces: Iterable[tuple[int, Tensor]]) -> Iterator[Tensor]:
    """Audio chunks ``[1, samples]`` of segments, as their speech tokens come."""
    begin: float | None = None  # what comes first waits for its prefill, and tells nothing of those behind it
    try:
        for index, tokens in pieces:
            took = 0.0 if begin is None else time.perf_counter() - begin
            if (chunk := audio.push(index, tokens, took)).numel():
                yield chunk
            begin = time.perf_counter()
        if (chunk := audio.finish()).numel():
            yield chunk
    finally:
        audio.close()
