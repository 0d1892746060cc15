"""Whole Chatterbox models of upstream's own classes around a tiny T3, with random weights, where the audio stack is installed."""

import copy
import importlib
import warnings
import wave
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache import MissingDependencyError
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.vocoder import made_up_reference, random_s3gen
from support.t3_models import tiny_t3


@cache
def s3gen(meanflow: bool) -> Any:
    """Upstream's S3Gen with random weights, made once; a test that asks for it is skipped where it does not load."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return random_s3gen(meanflow=meanflow).requires_grad_(False)
    except MissingDependencyError as error:
        pytest.skip(f"S3Gen's own imports are missing or do not load, see docs/chatterbox.md: {error}")


@cache
def short_s3gen(meanflow: bool) -> Any:
    """The same with one layer of a kind where it has several: all of its code in a fifth of its time."""
    made = copy.deepcopy(s3gen(meanflow))
    encoder, estimator = made.flow.encoder, made.flow.decoder.estimator
    encoder.encoders, encoder.up_encoders = encoder.encoders[:1], encoder.up_encoders[:1]
    estimator.mid_blocks = estimator.mid_blocks[:1]
    for blocks in (estimator.down_blocks, estimator.mid_blocks, estimator.up_blocks):
        for block in blocks:
            block[1] = block[1][:1]
    return made


def whole(kind: str) -> Any:
    """A `ChatterboxTTS`, or of "gpt" a `ChatterboxTurboTTS`, of upstream's, but for its tokenizer, without a watermarker."""
    vocoder = s3gen(kind == "gpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = "chatterbox.tts_turbo" if kind == "gpt" else "chatterbox.tts"
        module = importlib.import_module(name)
        encoder = importlib.import_module("chatterbox.models.voice_encoder")
    tts = object.__new__(module.ChatterboxTurboTTS if kind == "gpt" else module.ChatterboxTTS)
    tts.t3, tts.s3gen, tts.sr, tts.device = tiny_t3(kind), vocoder, 24_000, "cpu"
    tts.tokenizer, tts.conds, tts.watermarker = stand_in(tts.t3).tokenizer, None, None
    torch.manual_seed(0)
    tts.ve = encoder.VoiceEncoder().eval().requires_grad_(False)
    return tts


def clip(path: Path, seconds: float, seed: int = 0) -> Path:
    """A file of noise, 16 bit at 24 kHz."""
    samples = 2000 * torch.randn(round(seconds * 24_000), generator=torch.Generator().manual_seed(seed))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes(samples.to(torch.int16).numpy().tobytes())
    return path


def reference(seconds: float, seed: int = 0) -> dict[str, Any]:
    """A made-up reference of a voice, as S3Gen's `embed_ref` makes it."""
    return made_up_reference(seconds, seed)


def take_away_the_audio_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let upstream's S3Gen not load, as where torchaudio is not installed."""
    load = importlib.import_module

    def lacking(name: str, *args: Any) -> Any:
        if name == "chatterbox.models.s3gen":
            raise ImportError("No module named 'torchaudio'", name="torchaudio")
        return load(name, *args)

    monkeypatch.setattr(importlib, "import_module", lacking)
