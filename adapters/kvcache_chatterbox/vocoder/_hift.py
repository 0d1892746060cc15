"""HiFT of S3Gen: mel to waveform, by upstream's own modules, with noise that is given and weights that are ready."""

import copy
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kvcache.decoding import Programs
from kvcache.models import Precision
from kvcache_chatterbox.units import SAMPLES_PER_FRAME
from kvcache_chatterbox.vocoder._compiling import compiled_over
from kvcache_chatterbox.vocoder._narrow import half_of, narrowed
from kvcache_chatterbox.vocoder._noise import HARMONICS, Noise

CONTEXT = 20  # frames to either side of a frame that its samples depend on


class Hift:
    """Upstream's `HiFTGenerator` (HiFTNet, arXiv:2309.09493), driven from outside.

    Args:
        hift: S3Gen's ``mel2wav``. It stays as it is: the weights are held ready in a copy, where upstream computes each from
            its norm and direction at every call.
        precision: of its convolutions, see `half_of`; by default as they are.
        compiled: let torch's compiler fuse what lies between them.
        programs: where what it made is kept; by default in the user's cache.
    """

    def __init__(
        self, hift: Any, precision: Precision | None = None, compiled: bool = False, programs: Programs | None = None
    ) -> None:
        # Not those of the pitch, which would be heard as another melody.
        self._hift = narrowed(ready(hift), half_of(precision, next(hift.parameters()).device), "f0_predictor")
        self._decode: Any = self._hift.decode
        if compiled:
            decode = type(self._hift).decode
            self._decode = compiled_over(decode, self._hift, {"x": (2,), "s": (2,)}, "HiFT", programs)

    @property
    def module(self) -> nn.Module:
        """What runs."""
        found: nn.Module = self._hift
        return found

    @torch.inference_mode()
    def wave(
        self, mel: Tensor, noise: Noise, start: int = 0, turned: Tensor | None = None, skip: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The waveform ``[480 (n - skip)]`` of a mel ``[80, n]``, and how far its fundamental has turned by each frame's end.

        Args:
            mel: of consecutive frames.
            noise: of the text.
            start: the first frame's place in the text.
            turned: how far the fundamental had turned by then, in periods; none by default.
            skip: frames of which no waveform is made. Their pitch is followed all the same.
        """
        pitch = self._hift.f0_predictor(mel[None])
        source, turns = self._source(pitch[0], noise, start, turned)
        mel, source = mel[None, :, skip:].contiguous(), source[..., SAMPLES_PER_FRAME * skip :].contiguous()
        return self._decode(mel, source)[0], turns

    def _source(self, pitch: Tensor, noise: Noise, start: int, turned: Tensor | None) -> tuple[Tensor, Tensor]:
        """Upstream's `SineGen` and `SourceModuleHnNSF`: sines where there is a pitch, noise elsewhere ``[1, 1, samples]``."""
        module = self._hift.m_source
        sines = module.l_sin_gen
        sampled = pitch.repeat_interleave(SAMPLES_PER_FRAME)
        order = torch.arange(1, HARMONICS + 1, device=pitch.device, dtype=pitch.dtype)[:, None]
        periods = torch.cumsum(sampled * order / sines.sampling_rate, -1)
        if turned is not None:
            periods = periods + turned.to(periods) * order
        wave = sines.sine_amp * torch.sin(2 * torch.pi * (periods % 1) + noise.phases().to(pitch)[:, None])
        voiced = (sampled > sines.voiced_threshold).to(pitch.dtype)
        loud = voiced * sines.noise_std + (1 - voiced) * sines.sine_amp / 3
        wave = wave * voiced + loud * noise.source(start, pitch.numel()).to(pitch)
        merged = module.l_tanh(module.l_linear(wave.T))
        return merged.T[None], periods[0, SAMPLES_PER_FRAME - 1 :: SAMPLES_PER_FRAME] % 1


def ready(module: nn.Module) -> Any:
    """A copy whose weights are what their parametrizations give, weight norm among them.

    `remove_parametrizations` would change a class that the copy shares with its original.
    """
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, value in list(
            vars(part).items()
        ):  # upstream reckons sizes with numpy, whose numbers are none of Python's
            if isinstance(value, tuple) and any(map(_of_numpy, value)):
                setattr(part, name, tuple(int(one) for one in value))
            elif _of_numpy(value):
                setattr(part, name, int(value))
        held = part._modules.get("parametrizations")
        if held is None:
            continue
        weights = {name: getattr(part, name).detach() for name, _ in held.named_children()}
        plain = parametrize.type_before_parametrizations(part)
        del part._modules["parametrizations"]
        part.__class__ = plain
        for name, weight in weights.items():
            part.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return module.requires_grad_(False)


def _of_numpy(value: Any) -> bool:
    return isinstance(value, Integral) and type(value).__module__ == "numpy"
