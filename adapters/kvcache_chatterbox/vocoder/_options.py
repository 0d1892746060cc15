"""How the vocoder runs, as a value."""

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from kvcache import InputError
from kvcache.models import Precision
from kvcache_chatterbox.vocoder._flow import LEAST_REFERENCE

Weights = Literal["own", "meanflow"]


@dataclass(frozen=True)
class VocoderOptions:
    """How S3Gen runs. By default it computes what upstream computes; what changes the sound says so.

    Attributes:
        weights: ``"own"``, the model's. ``"meanflow"``, which changes the sound: those that upstream distilled to two steps for
            Turbo (MeanFlow, arXiv:2505.13447). They read the same speech tokens, and the flow takes an eighth of the time. They
            are looked for in upstream's Turbo repository; or give their file, the folder that it lies in, or an
            ``S3Gen(meanflow=True)``.
        steps: of Euler's method, which change the sound; by default 10, or 2 of distilled weights.
        guidance: strength of classifier-free guidance, which changes the sound; by default upstream's 0.7. 0 runs one row in
            place of two, and halves the flow's time. Distilled weights have none.
        reference_seconds: of the voice's clip that the flow hears, its first ones, which change the sound; by default all, at
            most 10. Every run goes over all of them.
        precision: ``"bf16"``, ``"fp16"`` or ``"int8"``: of the flow's linear layers, see `kvcache.models.quantize_linear`, and of all
            convolutions but those of the pitch, which with ``"int8"`` compute in bf16 where a CPU does so fast. By default as
            the model is.
        compiled: let torch's compiler fuse what lies between the large kernels. The first runs take a minute, see
            `ChatterboxEngine.warm_up`.
        lookahead: a chunk's last three tokens are heard by those before, as in a whole text, and said with the next chunk.
            False says all of them at once, as upstream's `inference` does with what it is given.

    Raises:
        InputError: if a value is none of these.
    """

    weights: Weights | str | os.PathLike[str] | nn.Module = "own"
    steps: int | None = None
    guidance: float | None = None
    reference_seconds: float | None = None
    precision: Precision | None = None
    compiled: bool = False
    lookahead: bool = True

    def __post_init__(self) -> None:
        precisions = ", ".join(map(repr, get_args(Precision)))
        for name, fits, wanted in (
            (
                "weights",
                self.weights in ("own", "meanflow") or _exists(self.weights) or _distilled(self.weights),
                "'own', 'meanflow', a file or folder that exists, or an S3Gen(meanflow=True)",
            ),
            ("steps", _whole(self.steps, 1, 1000), "a whole number from 1 to 1000"),
            ("guidance", _finite(self.guidance, 0, 100), "a number from 0 to 100"),
            (
                "reference_seconds",
                _finite(self.reference_seconds, LEAST_REFERENCE, 3600),
                f"at least {LEAST_REFERENCE:g} s, as less does not tell a voice",
            ),
            ("precision", self.precision in (None, *get_args(Precision)), f"one of {precisions}, or None"),
            ("compiled", isinstance(self.compiled, bool), "True or False"),
            ("lookahead", isinstance(self.lookahead, bool), "True or False"),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)!r:.200} must be {wanted}")
        if not self.own and self.guidance:
            raise InputError(
                f"guidance={self.guidance:g}: distilled weights have it in them already; leave it out with 'meanflow'"
            )

    @property
    def own(self) -> bool:
        """Whether the weights are the model's."""
        return isinstance(self.weights, str) and self.weights == "own"


def _exists(weights: Any) -> bool:
    return isinstance(weights, str | os.PathLike) and os.path.exists(weights)  # which takes any name


def _distilled(weights: Any) -> bool:
    return isinstance(weights, nn.Module) and bool(getattr(weights, "meanflow", False))


def _whole(value: Any, least: int, most: int) -> bool:
    return value is None or (type(value) is int and least <= value <= most)


def _finite(value: Any, least: float, most: float) -> bool:
    if value is None:
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most
