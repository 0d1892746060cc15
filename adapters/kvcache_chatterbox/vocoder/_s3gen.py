"""S3Gen behind one call: speech tokens and voices to waveforms, several in one run, with settings and noise that are given."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvcache import InputError
from kvcache.decoding import Programs
from kvcache.models import Following, check_precision, onednn_linear, signature_of
from kvcache_chatterbox.checks import without_autocast
from kvcache_chatterbox.units import FRAMES_PER_TOKEN, SAMPLES_PER_FRAME, SAMPLES_PER_TOKEN
from kvcache_chatterbox.vocoder._flow import Flow, Reference, check_reference, reference_tokens
from kvcache_chatterbox.vocoder._hift import CONTEXT, Hift
from kvcache_chatterbox.vocoder._options import VocoderOptions
from kvcache_chatterbox.vocoder._run import Run, Waveform
from kvcache_chatterbox.vocoder._weights import distilled
from kvcache_chatterbox.voices import Voice

_UPSTREAM = "chatterbox.models.s3gen."


def why_plain(s3gen: Any) -> str | None:
    """Why this is to be run by its own `inference`, as nothing else says what it computes; None for upstream's S3Gen as it is."""
    if not all(hasattr(s3gen, part) for part in ("flow", "mel2wav", "trim_fade", "meanflow")):
        return f"{type(s3gen).__name__} is not upstream's S3Gen"
    for part in (
        s3gen,
        s3gen.flow,
        s3gen.flow.encoder,
        s3gen.flow.decoder,
        s3gen.flow.decoder.estimator,
        s3gen.mel2wav,
    ):
        for name in ("inference", "forward", "__call__"):
            where = getattr(getattr(type(part), name, None), "__module__", _UPSTREAM)
            if not where.startswith((_UPSTREAM, "torch.")):
                return f"{type(part).__name__} has a {name} of its own"
        for name in ("inference", "hift_inference", "flow_inference", "forward"):
            if name in vars(part):
                return f"{name} of its {type(part).__name__} was replaced"
    signature = signature_of(s3gen)
    changed = [*signature.hooked, *signature.bound]
    return f"{changed[0] or 'it'} has a hook or a forward of its own" if changed else None


@dataclass(frozen=True)
class _Parts:
    flow: Flow
    hift: Hift


class S3GenVocoder:
    """An S3Gen and the settings that it runs with.

    Args:
        s3gen: upstream's `S3Gen`, whose weights may give way to others: see `VocoderOptions.weights`.
        options: how it runs.
        programs: where what is compiled is kept; by default in the user's cache.
        onednn: let oneDNN multiply in fp32 where it is faster; see `kvcache.models.onednn_linear`.

    Raises:
        InputError: if this device cannot compute in `options.precision`, or the weights are not to be had.
    """

    def __init__(
        self, s3gen: Any, options: VocoderOptions, programs: Programs | None = None, onednn: bool = True
    ) -> None:
        self.options, self._programs = options, programs
        # Not where parts are compiled: torch's compiler would trace into it, and makes nothing of what it finds there.
        self._onednn = onednn and options.precision in (None, "fp32") and not options.compiled
        self.s3gen = s3gen if options.own else distilled(options.weights, s3gen)
        if options.precision is not None:
            check_precision(options.precision, self.device)
        if self.meanflow and options.guidance:
            raise InputError(
                f"guidance={options.guidance:g}: this model's weights have it in them already; leave it out"
            )
        self._references: WeakKeyDictionary[Voice, Reference] = WeakKeyDictionary()
        self._made = Following(self.s3gen, self._make)
        self._seconds: dict[str, float] | None = None
        self._made.now()  # here, where no request waits for it

    def _make(self) -> _Parts:
        options = self.options
        self._references = WeakKeyDictionary()
        flow = Flow(
            self.s3gen.flow,
            meanflow=self.meanflow,
            steps=options.steps,
            guidance=options.guidance,
            precision=options.precision,
            compiled=options.compiled,
            programs=self._programs,
        )
        return _Parts(flow, Hift(self.s3gen.mel2wav, options.precision, options.compiled, self._programs))

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.s3gen.flow.input_embedding.weight.device)

    @property
    def meanflow(self) -> bool:
        """Whether its weights are distilled."""
        return bool(self.s3gen.meanflow)

    @property
    def lookahead(self) -> int:
        return int(self.s3gen.flow.pre_lookahead_len) if self.options.lookahead else 0

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that holds its weights: as loaded, and what is made of them to run."""
        parts = self._made.now()
        return (self.s3gen, *parts.flow.modules, parts.hift.module)

    @property
    def nbytes(self) -> int:
        return sum(reference.nbytes for reference in list(self._references.values()))

    def check(self, voice: Voice) -> None:
        check_reference(voice.gen, self.options.reference_seconds)

    def before(self, voice: Voice) -> int:
        return reference_tokens(voice.gen, self.options.reference_seconds)

    @contextmanager
    def timed(self) -> Iterator[dict[str, float]]:
        """Within this block its parts are timed: seconds of ``"flow"`` and ``"hift"``. Nothing else should run it meanwhile."""
        self._seconds = {"flow": 0.0, "hift": 0.0}
        try:
            yield self._seconds
        finally:
            self._seconds = None

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        if self._seconds is None:
            yield
            return
        begin = self._now()
        yield
        self._seconds[name] += self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def held(self, voice: Voice) -> int:
        """Bytes of what it keeps of one voice."""
        return self._reference(self._made.now().flow, voice).nbytes

    def _reference(self, flow: Flow, voice: Voice) -> Reference:
        references = self._references
        found = references.get(voice)
        if found is None:
            self.check(voice)
            found = references[voice] = flow.reference(voice.gen, self.options.reference_seconds)
        return found

    def waves(self, runs: Sequence[Run]) -> list[Waveform]:
        with without_autocast(self), torch.inference_mode():
            parts = self._made.now()
            references = [self._reference(parts.flow, run.voice) for run in runs]
            noises = [
                run.noise.start(
                    reference.mel.shape[0], FRAMES_PER_TOKEN * run.place, FRAMES_PER_TOKEN * run.tokens.numel()
                ).to(reference.mel)
                for run, reference in zip(runs, references, strict=True)
            ]
            ended = [run.ended or self.lookahead == 0 for run in runs]
            with self._part("flow"), onednn_linear(self.s3gen.flow) if self._onednn else nullcontext():
                mels = parts.flow.mels([run.tokens for run in runs], references, noises, ended)
            with self._part("hift"):
                waves = [self._wave(parts.hift, run, mel) for run, mel in zip(runs, mels, strict=True)]
        # Outside, as tensors of inference mode cannot be written into where they are used.
        return [Waveform(audio.clone(), turned.clone()) for audio, turned in waves]

    def _wave(self, hift: Hift, run: Run, mel: Tensor) -> tuple[Tensor, Tensor]:
        # What comes before a frame's context is heard by the flow alone.
        skip = max(0, FRAMES_PER_TOKEN * run.known - -(-run.lead // SAMPLES_PER_FRAME) - CONTEXT)
        wave, turned = hift.wave(mel, run.noise, FRAMES_PER_TOKEN * run.place, run.turned, skip)
        if skip == 0:  # upstream fades each run in, so that nothing of the reference is heard
            fade = self.s3gen.trim_fade[: wave.numel()].to(wave)
            wave = torch.cat([wave[: fade.numel()] * fade, wave[fade.numel() :]])
        begin = SAMPLES_PER_TOKEN * run.known - SAMPLES_PER_FRAME * skip - run.lead
        audio = wave[begin:].float()
        return audio if audio.is_meta else audio.cpu(), turned  # without numbers where a plan is made
