"""The watermark of a signal, and of one that comes in pieces: a single continuous mark, not one for each piece.

Chatterbox's own watermarker, Perth (https://github.com/resemble-ai/Perth), changes the magnitudes of a short-time spectrum
with a hop of 10 ms. What it does to a sample depends on some 0.18 s before and behind it, and on a threshold, 5 % of the
loudest frame that it is given, below which only digital silence lies. A signal is therefore marked in windows that begin on
that hop and overlap; what is too near to a window's edge is not handed out.
"""

import importlib
import io
from contextlib import redirect_stdout
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvcache import InputError, KVCacheError
from kvcache.models import without_autocast

HOPS = 100  # a second: a watermarker is given whole hops, as Perth drops what is behind the last whole one
CONTEXT = 18  # hops around a sample that its mark depends on; with more Perth's comes no closer to that of the whole
LATER = CONTEXT / HOPS  # seconds that a marked stream is behind
_FADE = 200  # of a second: 5 ms


@runtime_checkable
class Watermarker(Protocol):
    """What marks audio: ``perth.PerthImplicitWatermarker``, or an object of one's own."""

    def apply_watermark(self, wav: Any, sample_rate: int) -> Any:
        """The marked audio, as long as `wav`, a float32 array ``[samples]`` which it may overwrite."""


class WatermarkError(KVCacheError, RuntimeError):
    """What a watermarker gave is not the audio it was given, marked. Nothing of it is handed out."""


def check_watermarker(watermarker: Any) -> None:
    """Raise `InputError` for what cannot mark audio."""
    if not isinstance(watermarker, Watermarker):
        raise InputError(
            f"the model's watermarker is a {type(watermarker).__name__}, which has no apply_watermark(wav, sample_rate=); "
            "give it one that has, or None, or ask for watermark=False"
        )


def marked(watermarker: Watermarker, audio: Tensor, sample_rate: int) -> Tensor:
    """Audio ``[samples]`` with its mark, as many samples.

    Raises:
        WatermarkError: if the watermarker gives another number of samples.
    """
    samples = audio.numel()
    missing = -samples % (sample_rate // HOPS)
    if missing:  # mirrored, so that the last frames hear no edge
        audio = torch.cat([audio, audio.flip(0)[:missing]])
    wav = audio.detach().to("cpu", torch.float32, copy=True).numpy()
    with without_autocast(["cpu", "cuda"]):
        given = torch.as_tensor(watermarker.apply_watermark(wav, sample_rate=sample_rate))
    if given.numel() != audio.numel():
        raise WatermarkError(
            f"{type(watermarker).__name__} gave {given.numel()} samples for {audio.numel()}: a watermarker must give as "
            "many as it is given; use another, or watermark=False"
        )
    return given.detach().to("cpu", torch.float32, copy=True).flatten()[:samples]


def perth_or_none() -> Watermarker | None:
    """Upstream's watermarker with its own weights; None where that does not load."""
    try:
        with redirect_stdout(io.StringIO()):  # it says there which weights it has loaded
            found: Watermarker = importlib.import_module("perth").PerthImplicitWatermarker()
    except Exception:  # the package sets it to None where a part of it is missing
        return None
    return found


class StreamMarker:
    """Marks a signal that comes in pieces, with one continuous mark; what has been handed out is as long as what was given.

    It is the mark of the whole signal, if the watermarker looks no further than 0.175 s to either side, and does the same
    wherever in a signal it stands, in steps of 10 ms. Windows are faded into each other over 5 ms, so that no other
    watermarker makes clicks. Audio is handed out once the 0.18 s behind it are there.

    Args:
        watermarker: of whole signals.
        sample_rate: samples a second.
    """

    def __init__(self, watermarker: Watermarker, sample_rate: int) -> None:
        check_watermarker(watermarker)
        self._watermarker, self._sample_rate = watermarker, sample_rate
        self._hop = sample_rate // HOPS
        self._context = CONTEXT * self._hop
        self._begin()

    def _begin(self) -> None:
        self._window = torch.zeros(0)  # unmarked: what was handed out last, as context, and all that was not
        self._known = 0  # samples of the window that were handed out
        self._tail = torch.zeros(0)  # what comes next, as the window before has it

    def push(self, audio: Tensor, last: bool = False) -> Tensor:
        """The marked audio ``[samples]`` that `audio` ``[samples]`` completes.

        Args:
            last: the signal ends with it: all of it is handed out, and the next begins anew.
        """
        self._window = torch.cat([self._window, audio])
        ready = self._window.numel()
        if not last:
            ready = (ready - self._context) // self._hop * self._hop
        out = self._handed(ready) if ready > self._known else torch.zeros(0)
        if last:
            self._begin()
        return out

    def _handed(self, ready: int) -> Tensor:
        """The window's marked audio up to here, that was not handed out before."""
        audio = marked(self._watermarker, self._window, self._sample_rate)
        fade = self._tail.numel()
        rising = torch.linspace(0, 1, fade + 2)[1:-1]
        joint = audio[self._known : self._known + fade]
        joint.copy_(self._tail * (1 - rising) + joint * rising)
        out = audio[self._known : ready]
        self._tail = audio[ready : ready + self._sample_rate // _FADE]
        begin = max(0, ready - self._context)  # on a hop, as `ready` and the context are
        self._window, self._known = self._window[begin:].clone(), ready - begin
        return out
