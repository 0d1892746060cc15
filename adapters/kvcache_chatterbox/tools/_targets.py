"""Chatterbox's models for the commands `kvcache plan`, `profile` and `tune`: ``chatterbox-nano`` and its kin."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kvcache import CacheReport, InputError, MemoryStore, SpeakerCache
from kvcache.decoding import BUCKET, Setting, Told, VocoderSetting, WarmUp
from kvcache.models import planned, structural_copy
from kvcache.tools import Footprint, ModelTarget, Prepared, VocoderFootprint
from kvcache_chatterbox.audio import CONTEXT, ENDING, MOST, Speaker, heard, perth_or_none
from kvcache_chatterbox.engine import ChatterboxEngine, EngineOptions
from kvcache_chatterbox.loading import WEIGHTS, load_t3, random_conditionals
from kvcache_chatterbox.prefill import prefill
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.tools._footprint import check_together, speech_footprint, text_room
from kvcache_chatterbox.units import SPEECH_TOKENS, TOKENS_PER_SECOND
from kvcache_chatterbox.vocoder import (
    LONGEST_HEARD,
    S3GenVocoder,
    VocoderOptions,
    blank_s3gen,
    emptied,
    heard_tokens,
    made_up_reference,
    most_together,
    options_of,
    planned_vocoder,
    random_s3gen,
    s3gen_of,
    why_plain,
)
from kvcache_chatterbox.voices import kept_bytes

_BEGINS = "chatterbox-"
_VOICE = "made up"
_LONGEST = 4096  # tokens of a request, where a setting does not say
_SLOTS = 2048  # of an engine that is told nothing, as the pages have it; a longer request needs one that is told


def subject(name: str) -> "ChatterboxTarget | None":
    """``chatterbox-english``, ``-multilingual``, ``-turbo`` or ``-nano``, with a folder of weights behind a colon if there is
    one, as in ``chatterbox-nano:/models/nano``; None for other names.

    Raises:
        InputError: for an unknown variant.
    """
    if not name.startswith(_BEGINS):
        return None
    variant, _, folder = name[len(_BEGINS) :].partition(":")
    if variant not in WEIGHTS:
        raise InputError(f"{name!r}: Chatterbox has no variant {variant!r}; give one of {', '.join(WEIGHTS)}")
    if folder and not any((Path(folder) / file).is_file() for file in WEIGHTS[variant]):
        raise InputError(
            f"{name!r}: there is no {' or '.join(WEIGHTS[variant])} in {folder}; give the folder that holds it"
        )
    return ChatterboxTarget(name, variant, folder or None)


class ChatterboxTarget(ModelTarget):
    """A T3 with its weights from a folder, or random ones, which keep shapes, bytes and speed."""

    quantizes = batches_off = False
    speaks = True

    def __init__(self, name: str, variant: str, folder: str | None) -> None:
        self.name, self.variant = name, variant
        self._folder = None if folder is None else Path(folder)
        self.gpt = variant in ("turbo", "nano")
        self.rows = 1 if self.gpt else 2
        self.random = folder is None
        self._vocoders: dict[tuple[VocoderSetting, int, str], VocoderFootprint] = {}

    @property
    def shortest(self) -> int:  # type: ignore[override]
        """The voice, a start, a text of one token with its frame, and the start of speech."""
        return 376 + 2 if self.gpt else 34 + 3 + 2

    def sample(self, tokens: int) -> tuple[Tensor, str | None]:
        ids, made_up = super().sample(tokens)
        return ids, "the weights are random: this tells nothing about the real ones" if self.random else made_up

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            found: nn.Module = load_t3(self.variant, device="meta")  # type: ignore[arg-type]
        return found

    def decoder(self, model: nn.Module) -> nn.Module:
        found: nn.Module = model.tfmr  # type: ignore[assignment]
        return found

    @cached_property
    def _t3(self) -> Any:
        try:
            return load_t3(self.variant, self._folder)  # type: ignore[arg-type]
        except (OSError, RuntimeError, SafetensorError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{self.name} cannot be loaded: {lines[0]}; check the file of its weights") from error

    def load(self, device: str = "cpu") -> nn.Module:
        found: nn.Module = self._t3.to(device)
        return found

    def prepared(self, setting: Setting, device: str = "cpu") -> Prepared:
        speech = _Speech(engine_of(endless(self.load(device)), setting), setting, self._speaker(setting, device))
        speech.engine.add_voice(_VOICE, conditionals=random_conditionals(speech.engine.t3))
        return speech

    def warm_up(self, setting: Setting, context: int, tokens: int, told: Told) -> WarmUp:
        self.load()
        model, options = self._whole(setting, "cpu")
        alone = options is None and setting.requests == 1
        engine = engine_of(model.t3 if alone else model, setting, vocoder=options)
        if engine._why_not is not None and options is None:
            raise InputError(
                f"{self.name} has no steps to compile: {engine._why_not}; its vocoder has: give --vocoder own"
            )
        language = "en" if engine.t3.hp.is_multilingual and not alone else None
        return engine.warm_up(language_id=language, max_new_tokens=tokens, requests=setting.requests, told=told)

    def longest(self, setting: Setting) -> int | None:
        return setting.max_length or _LONGEST

    def footprint(self, setting: Setting, context: int, tokens: int, device: str) -> Footprint:
        t3 = self.blank
        if device != "cpu":  # there the whole model is cast, and not its layers by the engine
            t3, setting = planned(t3, setting.precision, torch.device(device)), replace(setting, precision=None)
        found = speech_footprint(engine_of(t3, setting, context + tokens), setting.requests, context, tokens, device)
        if setting.vocoder is None:
            return found
        return replace(found, vocoder=self._vocoder_footprint(setting.vocoder, setting.requests, device))

    def _vocoder_footprint(self, setting: VocoderSetting, requests: int, device: str) -> VocoderFootprint:
        """What the vocoder takes; found once for a setting, as that takes seconds."""
        options, heard = options_of(setting), heard_tokens(setting.reference_seconds)
        longest = CONTEXT + (MOST if setting.max_chunk is None else setting.max_chunk)
        tokens = longest + self._blank_s3gen.flow.pre_lookahead_len + (ENDING if self.gpt else 0)
        # As `Together` puts them together; fewer longer ones take less than so many of these.
        together = most_together(torch.device(device)) // (heard + tokens)
        rows = max(1, min(requests, together))
        if (setting, rows, device) not in self._vocoders:
            place = torch.device(device)
            made = planned_vocoder(self._blank_s3gen, options, tokens, heard, place, rows)
            kept = kept_bytes(random_conditionals(self.blank), LONGEST_HEARD * TOKENS_PER_SECOND)
            self._vocoders[setting, rows, device] = replace(made, voice=made.voice + kept)
        return self._vocoders[setting, rows, device]

    @cached_property
    def _blank_s3gen(self) -> Any:
        return blank_s3gen(self.gpt)

    def _speaker(self, setting: Setting, device: str) -> Speaker | None:
        """What makes audio, as a setting asks for it."""
        return None if setting.vocoder is None else Speaker(*self._whole(setting, device))

    def _whole(self, setting: Setting, device: str) -> tuple[Any, VocoderOptions | None]:
        """A whole model with a made-up voice, and how its vocoder runs: upstream's S3Gen, or tones where none is asked for."""
        model = stand_in(self._t3)
        if setting.vocoder is None:
            return model, None
        options = options_of(setting.vocoder)
        if not options.own and not self.gpt and self._folder is None:
            options = replace(options, weights=random_s3gen(meanflow=True, seed=1).to(device))
        model.s3gen = self._s3gen.to(device)
        model.watermarker = perth_or_none()
        assert model.conds is not None
        model.conds.gen = made_up_reference()
        return model, options

    @cached_property
    def _s3gen(self) -> Any:
        if self._folder is None:
            return random_s3gen(meanflow=self.gpt)
        return s3gen_of(self._folder, meanflow=self.gpt)


class LoadedTarget(ChatterboxTarget):
    """A Chatterbox model that is loaded already: with its vocoder, if it is a whole one.

    Args:
        model: a `ChatterboxTTS` of any variant, or a bare T3.
        name: to call it by.
    """

    def __init__(self, model: Any, name: str = "chatterbox") -> None:
        t3 = getattr(model, "t3", model)
        super().__init__(name, "turbo" if t3.is_gpt else "english", None)
        self.random = False
        self._model, self._t3 = model, t3

    @property
    def shortest(self) -> int:  # type: ignore[override]
        """As above, for this voice."""
        hp = self._t3.hp
        voice = 1 + bool(hp.emotion_adv) + (32 if hp.use_perceiver_resampler else hp.speech_cond_prompt_len)
        return voice + (2 if self.gpt else 3 + 2)

    def skeleton(self) -> nn.Module:
        found: nn.Module = structural_copy(self._t3, lambda name, module: None).to("meta")
        return found

    def _speaker(self, setting: Setting, device: str) -> Speaker | None:
        if not hasattr(self._model, "s3gen"):
            return None
        return Speaker(self._model, None if setting.vocoder is None else options_of(setting.vocoder))

    @cached_property
    def _blank_s3gen(self) -> Any:
        if (reason := why_plain(getattr(self._model, "s3gen", None))) is not None:
            raise InputError(f"{self.name}: {reason}, of which nothing can be planned; leave the vocoder out")
        return emptied(self._model.s3gen)


def endless(t3: Any) -> Any:
    """A T3 that shares all but its head with this one, and never says that speech has ended: for figures of a set length."""
    head = nn.Linear(t3.dim, t3.speech_head.out_features, device="meta")
    head.weight, bias = t3.speech_head.weight, t3.speech_head.bias
    bias = head.weight.new_zeros(head.out_features) if bias is None else bias.detach().clone()
    bias[t3.hp.stop_speech_token] = -1e4
    head.bias = nn.Parameter(bias, requires_grad=False)
    return structural_copy(t3, lambda name, module: head.eval() if module is t3.speech_head else None)


def engine_of(model: Any, setting: Setting, tokens: int = 0, vocoder: VocoderOptions | None = None) -> ChatterboxEngine:
    """The engine that decodes so, for requests of so many tokens, around a T3 or a whole model."""
    if setting.quantization is not None:
        raise InputError("Chatterbox's engine has no quantized caches; leave the bits out")
    options = EngineOptions(
        policy=setting.policy,
        max_cache_length=setting.max_length or max(_SLOTS, tokens),
        backend=setting.backend,
        precision=setting.precision,
        kv_dtype=setting.kv_dtype,
        bucket=setting.bucket or BUCKET,
        vocoder=vocoder,
    )
    return ChatterboxEngine(model, options, prefix_cache=SpeakerCache(MemoryStore("1GiB")))


class _Speech:
    """A T3 that decodes in one way."""

    def __init__(self, engine: ChatterboxEngine, setting: Setting, speaker: Speaker | None = None) -> None:
        self.engine, self._setting, self._speaker = engine, setting, speaker

    @property
    def module(self) -> nn.Module:
        found: nn.Module = self.engine.t3
        return found

    def stream(self, context: int, tokens: int, chunk_size: int = 16) -> Iterator[int]:
        requests = self._setting.requests
        texts = [self._text(context, i) for i in range(requests)]
        if requests == 1:
            for chunk in self.engine.inference_stream(
                text_tokens=texts[0], voice=_VOICE, max_new_tokens=tokens, chunk_size=chunk_size, seed=0
            ):
                yield chunk.numel()
            return
        check_together(self.engine, requests)
        # Not as a long text, whose first segment begins alone: all from the start, as so many requests under way.
        voice = self.engine.voice_of(_VOICE)
        utterances = [self.engine.utterance(voice, text, max_new_tokens=tokens, seed=i) for i, text in enumerate(texts)]
        with self.engine.batch(requests, max(map(self.engine.slots, utterances))) as batch:
            yield sum(len(batch.add(self.engine.job(utterance)).tokens) for utterance in utterances)
            while batch.busy:
                yield sum(len(piece.tokens) for piece in batch.step())
                self.engine._last = batch.report()

    def run(self, context: int, tokens: int) -> None:
        for _ in self.stream(context, tokens):
            pass

    def vocode(self, tokens: int) -> Mapping[str, float] | None:
        if self._speaker is None:
            return None
        ids = torch.randint(0, SPEECH_TOKENS, (1, tokens), generator=torch.Generator().manual_seed(0))
        chunks = ((0, chunk) for chunk in torch.split(ids.to(self.engine.t3.device), self._chunk, 1))
        audio, vocoder = self._speaker.segmented(self._speaker.builtin(), True), self._speaker.vocoder
        with ExitStack() as block:
            seconds = block.enter_context(vocoder.timed()) if isinstance(vocoder, S3GenVocoder) else {}
            for _ in heard(audio, chunks):
                pass
        parts = {"vocoder_mel": seconds.get("flow", 0.0), "vocoder_wave": seconds.get("hift", 0.0)}
        return {**parts, "watermark": audio.marked_seconds}

    @property
    def _chunk(self) -> int:
        """Tokens that become audio at once."""
        vocoder = self._setting.vocoder
        return TOKENS_PER_SECOND if vocoder is None or vocoder.max_chunk is None else vocoder.max_chunk

    @property
    def vocoder(self) -> nn.Module | None:
        return None if self._speaker is None else self._speaker.weights

    @property
    def kept(self) -> int:
        return self.engine.prefix_cache.store.nbytes

    def _text(self, context: int, seed: int) -> Tensor:
        """Made-up text tokens, as many as let a request begin with `context` tokens in all."""
        t3 = self.engine.t3
        count = text_room(self.engine, self._prefix, context)
        if t3.is_gpt:
            return torch.randint(1, 200, (count,), generator=torch.Generator().manual_seed(seed))
        text = torch.randint(1, 200, (count - 2,), generator=torch.Generator().manual_seed(seed))
        return torch.cat([torch.tensor([t3.hp.start_text_token]), text, torch.tensor([t3.hp.stop_text_token])])

    def logits(self, ids: Tensor) -> Tensor:
        engine, t3 = self.engine, self.engine.t3
        ids, voice = ids.to(t3.device), engine.voice_of(_VOICE)
        text = self._text(self._prefix + 30, 0)
        if engine._stepper is not None:
            utterance = engine.utterance(voice, text, max_new_tokens=len(ids) + 1, seed=0)
            decoder, cache = engine._decoder(utterance, 1, None, caching=True)
            return engine._stepper.teacher_forced_logits(decoder.prefill(), cache, ids)
        with torch.inference_mode():
            speech = t3.speech_emb(ids[None])
            if t3.speech_pos_emb is not None:
                speech = speech + t3.speech_pos_emb.emb.weight[1 : len(ids) + 1]
            begin = prefill(t3, engine._conditioning(voice, True), text[None].to(t3.device)).embeds
            hidden = t3.tfmr(inputs_embeds=torch.cat([begin, speech], 1), use_cache=False)[0]
            return torch.as_tensor(t3.speech_head(hidden[0, begin.shape[1] :]))

    @property
    def _prefix(self) -> int:
        """Tokens of the voice."""
        return self.engine.voice_tokens(self.engine.voice_of(_VOICE))

    def report(self) -> CacheReport:
        return self.engine.report()

    def release(self) -> None:
        self.engine.release()
