"""What the vocoder takes, found without its weights: its own code runs on torch's meta device, as T3's does for a plan."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from kvcache import InputError, MissingDependencyError
from kvcache.decoding import VocoderSetting
from kvcache.models import check_precision, planned, structural_copy, without_numbers
from kvcache.tools import VocoderFootprint
from kvcache_chatterbox.units import MELS, SAMPLES_PER_FRAME, TOKENS_PER_SECOND
from kvcache_chatterbox.vocoder._noise import HARMONICS
from kvcache_chatterbox.vocoder._options import VocoderOptions
from kvcache_chatterbox.vocoder._run import LEAD, Run
from kvcache_chatterbox.vocoder._s3gen import S3GenVocoder
from kvcache_chatterbox.vocoder._weights import s3gen_module
from kvcache_chatterbox.voices import Voice, blank_reference

LONGEST_HEARD = 10  # seconds of a clip that upstream hears
WEIGHTS = ("own", "meanflow")


class _Blank:
    """Noise of the right shapes."""

    def start(self, reference: int, place: int, frames: int) -> Tensor:  # noqa: ARG002  # as other noise has it
        return torch.empty(MELS, reference + frames)

    def phases(self) -> Tensor:
        return torch.empty(HARMONICS)

    def source(self, place: int, frames: int) -> Tensor:  # noqa: ARG002  # as other noise has it
        return torch.empty(HARMONICS, frames * SAMPLES_PER_FRAME)


def blank_s3gen(meanflow: bool) -> Any:
    """Upstream's S3Gen without its weights.

    Raises:
        MissingDependencyError: if what it imports is not installed, or does not load.
    """
    try:
        module = s3gen_module()
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"the vocoder cannot be planned, which runs upstream's own code: {error}"
        ) from error
    with torch.device("meta"):
        made = module.S3Gen(meanflow=meanflow)
    return made.to("meta").eval().requires_grad_(False)


def options_of(setting: VocoderSetting) -> VocoderOptions:
    """The options that a setting of the commands stands for.

    Raises:
        InputError: if they cannot be.
    """
    if setting.weights not in WEIGHTS:
        raise InputError(f"vocoder {setting.weights!r}: give one of {', '.join(WEIGHTS)}")
    return VocoderOptions(
        weights=setting.weights,
        precision=setting.precision,
        compiled=setting.compiled,
        reference_seconds=setting.reference_seconds,
    )


def planned_vocoder(
    s3gen: Any, options: VocoderOptions, tokens: int, heard: int, device: torch.device, rows: int = 1
) -> VocoderFootprint:
    """What a vocoder takes.

    Args:
        s3gen: the model's own, on the meta device.
        options: how it runs; of weights, ``"meanflow"`` are others than the model's if those are not distilled.
        tokens: that its largest run goes over, besides those of the voice's reference.
        heard: tokens of the voice's clip.
        rows: texts in that run.
        device: what is planned for. Where whole modules are cast, a run is taken to need as much as at full precision.
    """
    if (precision := options.precision) is not None and device.type != "cpu":
        check_precision(precision, device)
        options = dataclasses.replace(options, precision=None)
    other = not options.own and not s3gen.meanflow
    vocoder = _blank_vocoder(s3gen, dataclasses.replace(options, weights=blank_s3gen(True) if other else "own"))
    voice = Voice(None, blank_reference(heard))
    workspace = workspace_of(vocoder, voice, tokens, rows)
    given = sum(part.nbytes for part in voice.gen.values())
    cast = [] if precision == options.precision else [planned(part, precision, device) for part in vocoder.modules[1:3]]
    return VocoderFootprint((s3gen, *vocoder.modules, *cast), vocoder.nbytes + given, workspace)


def _blank_vocoder(s3gen: Any, options: VocoderOptions) -> S3GenVocoder:
    """A vocoder on the meta device. Its steps all take the same: two tell what many do."""
    return S3GenVocoder(s3gen, dataclasses.replace(options, compiled=False, steps=min(2, options.steps or 2)))


@torch.inference_mode()
def workspace_of(vocoder: S3GenVocoder, voice: Voice, tokens: int, rows: int = 1) -> int:
    """Bytes that a run over so many tokens of each text takes at most, of a vocoder on the meta device."""
    vocoder.held(voice)  # its parts and the reference stay, and are no workspace
    with without_numbers() as watch:
        said = torch.zeros(tokens, dtype=torch.long)
        known = min(TOKENS_PER_SECOND, tokens - 1)
        run = Run(said, voice, _Blank(), place=known, known=known, lead=LEAD if known else 0)
        vocoder.waves([run] * rows)
    return int(watch.peak)  # what oneDNN lays out is less than attention takes, and gone by then


class PlannedRuns:
    """What the runs of a loaded vocoder take, by the tokens of the voice's reference and of the run.

    Args:
        vocoder: which; its weights are neither read nor changed.
    """

    def __init__(self, vocoder: S3GenVocoder) -> None:
        self._vocoder = vocoder
        self._blank: S3GenVocoder | None = None
        self._known: dict[tuple[int, int], int] = {}

    def workspace(self, reference: int, tokens: int) -> int:
        """Bytes that a run over so many tokens takes at most, behind a reference of so many."""
        if (reference, tokens) not in self._known:
            if self._blank is None:
                self._blank = _blank_vocoder(
                    emptied(self._vocoder.s3gen), dataclasses.replace(self._vocoder.options, weights="own")
                )
            voice = Voice(None, blank_reference(reference))
            self._known[reference, tokens] = workspace_of(self._blank, voice, tokens)
        return self._known[reference, tokens]


def emptied(s3gen: Any) -> Any:
    """A copy without numbers; what it was made from is as before."""
    blank = structural_copy(s3gen, lambda name, module: None).to("meta")
    for part in blank.modules():
        tables = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
        vars(part).update({name: value.to("meta") for name, value in tables.items()})
    return blank


def heard_tokens(seconds: float | None) -> int:
    """Tokens of a clip that are heard, where so many seconds of it are."""
    longest = LONGEST_HEARD * TOKENS_PER_SECOND
    return longest if seconds is None else min(longest, math.ceil(seconds * TOKENS_PER_SECOND))
