"""S3Gen behind one call: speech tokens and a voice to a waveform, with settings that are upstream's unless they are asked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcache import InputError
from kvcache_chatterbox.flow import FRAMES_PER_TOKEN, Flow, Reference
from kvcache_chatterbox.hift import Hift
from kvcache_chatterbox.noise import Noise
from kvcache_chatterbox.voices import Voice

LEAST_REFERENCE = 1.0  # seconds


@dataclass(frozen=True)
class VocoderOptions:
    """How the vocoder runs. By default as upstream does; everything else changes the sound.

    Attributes:
        weights: ``"own"``, the model's; ``"meanflow"``, those that upstream distilled to two steps for Turbo, which read the
            same speech tokens. The flow then takes an eighth of the time.
        steps: of Euler's method; by default 10, or 2 of distilled weights.
        guidance: classifier-free guidance; by default upstream's 0.7. 0 halves the flow's time. Distilled weights have none.
        reference_seconds: of the voice's clip that the flow hears, its first ones; by default all, at most 10.

    Raises:
        InputError: if a value is none of these.
    """

    weights: Literal["own", "meanflow"] = "own"
    steps: int | None = None
    guidance: float | None = None
    reference_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("weights", self.weights in ("own", "meanflow"), "'own' or 'meanflow'"),
            ("steps", _whole(self.steps, 1, 1000), "a whole number from 1 to 1000"),
            ("guidance", _finite(self.guidance, 0, 100), "from 0 to 100"),
            (
                "reference_seconds",
                _finite(self.reference_seconds, LEAST_REFERENCE, 3600),
                f"at least {LEAST_REFERENCE:g} s, below which a voice is not told",
            ),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)!r} must be {wanted}")
        if self.weights == "meanflow" and self.guidance:
            raise InputError(
                f"guidance={self.guidance} is part of distilled weights already; leave it out with 'meanflow'"
            )


class Vocoder:
    """An S3Gen and the settings that it runs with.

    Args:
        s3gen: upstream's `S3Gen`.
        options: settings; upstream's by default.

    Raises:
        InputError: if distilled weights are asked for, and these are not.
    """

    def __init__(self, s3gen: Any, options: VocoderOptions | None = None) -> None:
        self.options = options or VocoderOptions()
        meanflow = bool(s3gen.meanflow)
        if self.options.weights == "meanflow" and not meanflow:
            raise InputError(
                "weights='meanflow' needs Turbo's S3Gen: load s3gen_meanflow.safetensors of upstream's Turbo repository into "
                "S3Gen(meanflow=True), and give that"
            )
        self.flow = Flow(s3gen.flow, meanflow=meanflow, steps=self.options.steps, guidance=self.options.guidance)
        self.hift = Hift(s3gen.mel2wav)
        self._fade = s3gen.trim_fade
        self._references: WeakKeyDictionary[Voice, Reference] = WeakKeyDictionary()

    def reference(self, voice: Voice) -> Reference:
        """What the flow is told of a voice, made once for each."""
        found = self._references.get(voice)
        if found is None:
            found = self._references[voice] = self.flow.reference(voice.gen, self.options.reference_seconds)
        return found

    def waves(
        self, texts: Sequence[Tensor], voices: Sequence[Voice], noises: Sequence[Noise], places: Sequence[int]
    ) -> list[Tensor]:
        """Waveforms ``[960 n]`` of speech tokens ``[n]``, in one run of the flow.

        Args:
            texts: consecutive speech tokens of a text each.
            voices: who says it.
            noises: of each text.
            places: of the first token in its text.
        """
        references = [self.reference(voice) for voice in voices]
        given = [
            torch.cat(
                [
                    noise.reference(reference.mel.shape[0]),
                    noise.mel(FRAMES_PER_TOKEN * place, FRAMES_PER_TOKEN * text.numel()),
                ],
                1,
            ).to(reference.mel)
            for text, reference, noise, place in zip(texts, references, noises, places, strict=True)
        ]
        mels = self.flow.mels(texts, references, given)
        return [
            self._wave(mel, noise, FRAMES_PER_TOKEN * place)
            for mel, noise, place in zip(mels, noises, places, strict=True)
        ]

    def _wave(self, mel: Tensor, noise: Noise, start: int) -> Tensor:
        wave, _ = self.hift.wave(mel, noise, start)
        wave = wave.clone()
        # Upstream fades each run in, so that nothing of the reference is heard.
        wave[: self._fade.numel()] *= self._fade[: wave.numel()]
        return wave.cpu()


def _whole(value: Any, least: int, most: int) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most)


def _finite(value: Any, least: float, most: float) -> bool:
    if value is None:
        return True
    return not isinstance(value, bool | str) and math.isfinite(value) and least <= value <= most


def reference_of(gen: Mapping[str, Any]) -> float:
    """Seconds of a voice's reference."""
    return float(torch.as_tensor(gen["prompt_token"]).shape[-1]) / 25
