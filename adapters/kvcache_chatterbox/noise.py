"""What a vocoder's chance is made of: drawn by place, so that a seed gives the same waveform however a text is cut and batched.

Upstream draws it from torch's global generator in the order in which it runs. Here each stretch of frames has a generator of
its own, seeded by the request's seed and the stretch's place in the text.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

MELS = 80
HARMONICS = 9  # of HiFT's source, the fundamental among them
SAMPLES_PER_FRAME = 480
_STRETCH = 50  # frames that are drawn together, a second
_MEL, _SOURCE, _PHASES, _BEHIND = range(4)


class Noise(Protocol):
    """The chance of one text."""

    def mel(self, start: int, frames: int) -> Tensor:
        """Normal ``[80, frames]``: what the flow starts from, from the frame `start` on."""
        ...

    def reference(self, frames: int) -> Tensor:
        """Normal ``[80, frames]``: the same, of the reference before the text."""
        ...

    def phases(self) -> Tensor:
        """Even in (-pi, pi), ``[9]``: where HiFT's harmonics begin; 0 for the first."""
        ...

    def source(self, start: int, frames: int) -> Tensor:
        """Normal ``[9, 480 frames]``: what is added to the harmonics, from the frame `start` on."""
        ...


class SeededNoise:
    """Noise by place.

    Args:
        seed: the request's.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def mel(self, start: int, frames: int) -> Tensor:
        return self._stretches(_MEL, start, frames, MELS, 1)

    def reference(self, frames: int) -> Tensor:
        return self._stretches(_BEHIND, 0, frames, MELS, 1)

    def phases(self) -> Tensor:
        phases = (torch.rand(HARMONICS, generator=self._generator(_PHASES, 0)) * 2 - 1) * torch.pi
        phases[0] = 0
        return phases

    def source(self, start: int, frames: int) -> Tensor:
        return self._stretches(_SOURCE, start, frames, HARMONICS, SAMPLES_PER_FRAME)

    def _stretches(self, kind: int, start: int, frames: int, rows: int, each: int) -> Tensor:
        first, last = start // _STRETCH, -(-(start + frames) // _STRETCH)
        drawn = [
            torch.randn(rows, _STRETCH * each, generator=self._generator(kind, index)) for index in range(first, last)
        ]
        begin = (start - first * _STRETCH) * each
        return torch.cat([torch.zeros(rows, 0), *drawn], 1)[:, begin : begin + frames * each]

    def _generator(self, kind: int, index: int) -> torch.Generator:
        # Neighbouring seeds of torch's generator give unlike numbers; what matters is that no two places share one.
        place = (self._seed & 0xFFFFFFFF) << 30 | (index & 0xFFFFFFF) << 2 | kind
        return torch.Generator().manual_seed(place)


class UpstreamNoise:
    """Noise in upstream's order, for a text that is made in one piece: under the same generator its waveform.

    Args:
        draw: ``torch.randn`` or one with a generator given, of a shape.
        even: ``torch.rand`` likewise.
        meanflow: whether the flow's weights are distilled, for which upstream draws once more.
        frames: of the text.
        reference: frames of the reference.
    """

    def __init__(
        self,
        draw: Callable[..., Tensor],
        even: Callable[..., Tensor],
        *,
        meanflow: bool,
        frames: int,
        reference: int,
    ) -> None:
        text = draw(1, MELS, frames) if meanflow else None
        whole = draw(1, MELS, reference + frames)
        self._reference = whole[0, :, :reference]
        self._mel = whole[0, :, reference:] if text is None else text[0]
        self._phases = (even(1, HARMONICS, 1)[0, :, 0] * 2 - 1) * torch.pi
        self._phases[0] = 0
        self._source = draw(1, HARMONICS, frames * SAMPLES_PER_FRAME)[0]
        draw(1, 1, frames * SAMPLES_PER_FRAME)  # upstream draws it and lets it go; what is drawn next is the same

    def mel(self, start: int, frames: int) -> Tensor:
        return self._mel[:, start : start + frames]

    def reference(self, frames: int) -> Tensor:
        return self._reference[:, :frames]

    def phases(self) -> Tensor:
        return self._phases

    def source(self, start: int, frames: int) -> Tensor:
        return self._source[:, start * SAMPLES_PER_FRAME : (start + frames) * SAMPLES_PER_FRAME]
