"""From speech tokens to audio: the voice, the tokenizer and the vocoder of a loaded Chatterbox model."""

import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from kvcache import InputError
from kvcache_chatterbox.voices import Voice

SPEECH_TOKENS = 6561  # tokens from here on are start and stop, not speech
SAMPLES_PER_TOKEN = 960  # 24 kHz audio, 25 tokens a second
_CLIPS = 32


class AudioStream:
    """Turns chunks of speech tokens into chunks of audio that join without a click.

    A vocoder needs to hear what came before: each chunk is made together with the tokens before it, and the joint is
    cross-faded over what was held back of the chunk before. All chunks together are as long as all tokens.

    Args:
        vocode: tokens ``[n]`` to audio ``[n * 960]``.
        context: tokens before a chunk that are run again with it.
        fade: samples of cross-fade.
    """

    def __init__(self, vocode: Callable[[Tensor], Tensor], context: int = 25, fade: int = 480) -> None:
        self._vocode = vocode
        self._context = context
        self._fade = fade
        self._tokens: Tensor | None = None  # those before the next chunk, at most `context`
        self._held: Tensor | None = None

    def push(self, tokens: Tensor) -> Tensor:
        """The audio ``[samples]`` that `tokens` ``[n]`` complete."""
        if tokens.numel() == 0:
            return torch.zeros(0)
        known = tokens if self._tokens is None else torch.cat([self._tokens, tokens])
        audio = self._vocode(known)
        held = 0 if self._held is None else self._held.numel()
        audio = audio[audio.numel() - tokens.numel() * SAMPLES_PER_TOKEN - held :].clone()
        if self._held is not None:
            rising = torch.linspace(0, 1, held + 2, dtype=audio.dtype, device=audio.device)[1:-1]
            audio[:held] = self._held * (1 - rising) + audio[:held] * rising
        self._tokens = known[-self._context :] if self._context else None
        keep = min(self._fade, audio.numel()) if self._tokens is not None else 0
        self._held = audio[audio.numel() - keep :]
        return audio[: audio.numel() - keep]

    def finish(self) -> Tensor:
        """What was held back for a chunk that does not come."""
        held, self._held, self._tokens = self._held, None, None
        return torch.zeros(0) if held is None else held


class Speaker:
    """The parts of a loaded Chatterbox model around its T3.

    Args:
        tts: a `ChatterboxTTS`, `ChatterboxMultilingualTTS` or `ChatterboxTurboTTS`.
    """

    def __init__(self, tts: Any) -> None:
        self._tts = tts
        self._upstream = sys.modules[type(tts).__module__]
        self._clips: OrderedDict[bytes, Voice] = OrderedDict()
        self._encoding = RLock()

    def builtin(self) -> Voice:
        """The voice that the model was loaded with.

        Raises:
            InputError: if there is none.
        """
        if self._tts.conds is None:
            raise InputError("there is no voice: give voice or audio_prompt_path, or load the model with its conds.pt")
        return Voice.of(self._tts.t3, self._tts.conds)

    def encode(self, audio_prompt_path: str | os.PathLike[str]) -> Voice:
        """The voice of a clip. It takes seconds, so each clip is encoded once; the last few are remembered by content."""
        try:
            clip = hashlib.sha256(Path(audio_prompt_path).read_bytes()).digest()
        except OSError:
            clip = None
        with self._encoding:
            if clip is None:
                return self._encode(audio_prompt_path)  # upstream says what is wrong with it
            if clip not in self._clips:
                self._clips[clip] = self._encode(audio_prompt_path)
                if len(self._clips) > _CLIPS:
                    self._clips.popitem(last=False)
            self._clips.move_to_end(clip)
            return self._clips[clip]

    def _encode(self, audio_prompt_path: str | os.PathLike[str]) -> Voice:
        before = self._tts.conds
        try:
            self._tts.prepare_conditionals(os.fspath(audio_prompt_path))
            return Voice.of(self._tts.t3, self._tts.conds)
        finally:
            self._tts.conds = before

    def tokenize(self, text: str, language_id: str | None) -> Tensor:
        """The text, its punctuation normalized as upstream does it, as T3's text tokens ``[1, n]``."""
        if not text.strip():
            raise InputError("the text is empty: give at least one word to speak")
        text = self._upstream.punc_norm(text)
        tokenizer, hp = self._tts.tokenizer, self._tts.t3.hp
        if self._tts.t3.is_gpt:
            return torch.as_tensor(tokenizer(text, return_tensors="pt", padding=True, truncation=True).input_ids)
        if hp.is_multilingual:
            languages = getattr(self._upstream, "SUPPORTED_LANGUAGES", {})
            if language_id is None or language_id.lower() not in languages:
                raise InputError(
                    f"language_id={language_id!r} is not one of {', '.join(languages)}; name the text's language"
                )
            tokens = tokenizer.text_to_tokens(text, language_id=language_id.lower())
        else:
            tokens = tokenizer.text_to_tokens(text)
        return torch.nn.functional.pad(
            torch.nn.functional.pad(tokens, (1, 0), value=hp.start_text_token), (0, 1), value=hp.stop_text_token
        )

    def speak(self, chunks: Iterator[Tensor], voice: Voice, watermark: bool) -> Iterator[Tensor]:
        """Audio chunks ``[1, samples]`` for chunks of speech tokens ``[1, n]``."""
        stream = AudioStream(lambda tokens: self._vocode(tokens, voice))
        for chunk in chunks:
            yield from self._marked(stream.push(_speech(chunk)), watermark)
        yield from self._marked(stream.push(self._silence()), watermark)
        yield from self._marked(stream.finish(), watermark)

    def say(self, chunks: Iterator[Tensor], voice: Voice, watermark: bool) -> Tensor:
        """The audio ``[1, samples]`` of all chunks, in one vocoder pass."""
        tokens = torch.cat([*(_speech(chunk) for chunk in chunks), self._silence()])
        if tokens.numel() == 0:
            return torch.zeros(1, 0)
        return torch.cat(list(self._marked(self._vocode(tokens, voice), watermark)), 1)

    def _silence(self) -> Tensor:
        """What upstream puts behind the tokens: Turbo's three of silence."""
        silence = getattr(self._upstream, "S3GEN_SIL", None)
        return torch.full((0 if silence is None else 3,), silence or 0, device=self._tts.t3.device)

    def _vocode(self, tokens: Tensor, voice: Voice) -> Tensor:
        steps = {"n_cfm_timesteps": 2} if getattr(self._tts.s3gen, "meanflow", False) else {}
        audio, _ = self._tts.s3gen.inference(
            speech_tokens=tokens, ref_dict=dict(voice.gen), **steps
        )  # it writes into it
        return torch.as_tensor(audio).squeeze(0).detach().cpu()

    def _marked(self, audio: Tensor, watermark: bool) -> Iterator[Tensor]:
        if audio.numel() and watermark and getattr(self._tts, "watermarker", None) is not None:
            audio = torch.from_numpy(self._tts.watermarker.apply_watermark(audio.numpy(), sample_rate=self._tts.sr))
        if audio.numel():
            yield audio[None]


def _speech(chunk: Tensor) -> Tensor:
    return chunk[chunk < SPEECH_TOKENS]
