"""What a vocoder's chance is made of: drawn by place, so that a seed gives the same waveform however a text is cut and batched.

Upstream draws it from torch's global generator in the order in which it runs. Here each stretch of frames has a generator of
its own, seeded by the request's seed and the stretch's place in the text.
"""

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcache_chatterbox.units import MELS, SAMPLES_PER_FRAME

HARMONICS = 9  # of HiFT's source, the fundamental among them
_STRETCH = 50  # frames that are drawn together, a second
_MEL, _SOURCE, _PHASES, _REFERENCE = range(4)


class Noise(Protocol):
    """The chance of one text. A run asks for its `start`, its `phases` and its `source`, once each and in this order."""

    def start(self, reference: int, place: int, frames: int) -> Tensor:
        """Normal ``[80, reference + frames]``: what the flow starts from, the frames of the voice's reference first.

        Args:
            reference: frames of the voice's reference.
            place: of the first frame in the text.
            frames: of the text.
        """
        ...

    def phases(self) -> Tensor:
        """Even in (-pi, pi), ``[9]``: where HiFT's harmonics begin; 0 for the first."""
        ...

    def source(self, place: int, frames: int) -> Tensor:
        """Normal ``[9, 480 frames]``: what is added to the harmonics, from the frame `place` of the text on."""
        ...


class SeededNoise(Noise):
    """Noise by place.

    Args:
        seed: the request's.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def start(self, reference: int, place: int, frames: int) -> Tensor:
        parts = [self._stretches(_REFERENCE, 0, reference, MELS, 1), self._stretches(_MEL, place, frames, MELS, 1)]
        return torch.cat(parts, 1)

    def phases(self) -> Tensor:
        phases = (torch.rand(HARMONICS, generator=self._generator(_PHASES, 0)) * 2 - 1) * torch.pi
        phases[0] = 0
        return phases

    def source(self, place: int, frames: int) -> Tensor:
        return self._stretches(_SOURCE, place, frames, HARMONICS, SAMPLES_PER_FRAME)

    def _stretches(self, kind: int, start: int, frames: int, rows: int, each: int) -> Tensor:
        first, last = start // _STRETCH, -(-(start + frames) // _STRETCH)
        drawn = [
            torch.randn(rows, _STRETCH * each, generator=self._generator(kind, index)) for index in range(first, last)
        ]
        begin = (start - first * _STRETCH) * each
        return torch.cat([torch.zeros(rows, 0), *drawn], 1)[:, begin : begin + frames * each]

    def _generator(self, kind: int, index: int) -> torch.Generator:
        # Hashed, as neighbouring seeds are asked for: the segments of a text have one after another.
        place = hashlib.sha256(f"{self._seed} {kind} {index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(place[:8], "big"))


class UpstreamNoise(Noise):
    """Noise in upstream's order, for a text that is made in one run: with the same generator its waveform.

    Args:
        generator: of the draws; None is torch's global one.
        device: where upstream draws.
        meanflow: whether the flow's weights are distilled, for which upstream draws once more.
        dtype: in which it draws.
    """

    def __init__(
        self,
        generator: torch.Generator | None,
        device: torch.device,
        *,
        meanflow: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        self._meanflow = meanflow

    def start(self, reference: int, place: int, frames: int) -> Tensor:  # noqa: ARG002  # as other noise has it
        text = torch.randn(1, MELS, frames, **self._options) if self._meanflow else None
        whole = torch.randn(1, MELS, reference + frames, **self._options)[0]
        return whole if text is None else torch.cat([whole[:, :reference], text[0]], 1)

    def phases(self) -> Tensor:
        phases = (torch.rand(1, HARMONICS, 1, **self._options)[0, :, 0] * 2 - 1) * torch.pi
        phases[0] = 0
        return phases

    def source(self, place: int, frames: int) -> Tensor:  # noqa: ARG002  # as other noise has it
        source = torch.randn(1, HARMONICS, frames * SAMPLES_PER_FRAME, **self._options)[0]
        # Upstream draws it and lets it go: what is drawn next is the same.
        torch.randn(1, 1, frames * SAMPLES_PER_FRAME, **self._options)
        return source
