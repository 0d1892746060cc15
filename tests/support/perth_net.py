"""Perth, Chatterbox's watermarker, with its own weights, where it is installed; `make test-watermark` does that.

Of torchaudio it uses two transforms that are `torch.stft` and `torch.istft`. torchaudio's wheels on PyPI are built for CUDA and
cannot be imported beside a torch for CPUs, so where it is missing these two stand in for it. Resampling is librosa's own.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class _Spectrogram(nn.Module):
    window: Tensor

    def __init__(self, n_fft: int, win_length: int, hop_length: int, window_fn: Any, **_: Any) -> None:
        super().__init__()
        self.register_buffer("window", window_fn(win_length))  # a checkpoint has it by this name
        self._sizes = n_fft, hop_length, win_length

    def forward(self, audio: Tensor) -> Tensor:
        return torch.stft(audio, *self._sizes, window=self.window, return_complex=True)


class _InverseSpectrogram(_Spectrogram):
    def forward(self, spectrum: Tensor) -> Tensor:
        return torch.istft(spectrum, *self._sizes, window=self.window)


class _Unused(nn.Module):
    """`TimeStretch`: made, and never called."""

    def __init__(self, n_freq: int, hop_length: int) -> None:
        super().__init__()
        self.register_buffer("phase_advance", torch.linspace(0, torch.pi * hop_length, n_freq)[..., None])


def missing() -> str | None:
    """Which package of it is not installed, if any."""
    for name in ("perth", "librosa", "pkg_resources"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: run `make test-watermark`"
    return None


@contextmanager
def _transforms() -> Iterator[None]:
    if importlib.util.find_spec("torchaudio") is not None:
        yield
        return
    package, transforms = ModuleType("torchaudio"), ModuleType("torchaudio.transforms")
    transforms.Spectrogram = _Spectrogram  # type: ignore[attr-defined]
    transforms.InverseSpectrogram = _InverseSpectrogram  # type: ignore[attr-defined]
    transforms.TimeStretch = _Unused  # type: ignore[attr-defined]
    sys.modules |= {"torchaudio": package, "torchaudio.transforms": transforms}
    try:
        yield
    finally:
        del sys.modules["torchaudio"], sys.modules["torchaudio.transforms"]


def load() -> Any:
    """A `perth.PerthImplicitWatermarker`."""
    # Chatterbox's package imports perth, which then does without its own watermarker where something is missing, for good.
    for name in [name for name in sys.modules if name.partition(".")[0] == "perth"]:
        del sys.modules[name]
    with warnings.catch_warnings(), _transforms():
        warnings.simplefilter("ignore")  # pkg_resources says of itself that it is deprecated
        return importlib.import_module("perth").PerthImplicitWatermarker()
