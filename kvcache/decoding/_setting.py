"""`Setting`: a way to let a model decode, as it is planned for, profiled, tuned and saved."""

from dataclasses import dataclass
from typing import Literal

import torch

from kvcache.cache import SizePolicy
from kvcache.decoding._backends import BackendName
from kvcache.models import Precision

Backend = BackendName | Literal["off"]


@dataclass(frozen=True)
class VocoderSetting:
    """How the vocoder of a model that speaks runs: what it is planned with, profiled with, and chosen by tuning.

    Attributes:
        weights: by name, as the model's adapter knows them; ``"own"`` are the model's.
        precision: of its layers; None leaves them as they were loaded. Others change the sound.
        compiled: whether torch's compiler has fused what lies between its large kernels.
        reference_seconds: of a voice's clip that are heard, its first ones, which change the sound; None hears all.
        max_chunk: the most tokens that become audio at once; None is the model's own choice.
    """

    weights: str = "own"
    precision: Precision | None = None
    compiled: bool = False
    reference_seconds: float | None = None
    max_chunk: int | None = None


@dataclass(frozen=True)
class Setting:
    """A way to decode: what is planned for, profiled, and chosen by tuning.

    Attributes:
        backend: ``"off"`` is the token loop on a growing cache; the others are the decode engine's, see
            `kvcache.decoding.Decoding`.
        precision: of the linear layers; None leaves the model as it was loaded.
        kv_dtype: of the decode engine's cache; None is its own choice.
        requests: that decode together.
        policy: which tokens stay; None keeps all.
        quantization: bits of the token loop's cache; None holds it in full precision.
        max_length: the most tokens of a request; None grows or fits as needed.
        bucket: slots that a captured graph reads, or a multiple of so many; None is the engine's own choice.
        vocoder: how what makes audio of the tokens runs; None leaves it out.
    """

    backend: Backend = "eager"
    precision: Precision | None = None
    kv_dtype: torch.dtype | None = None
    requests: int = 1
    policy: SizePolicy | None = None
    quantization: int | None = None
    max_length: int | None = None
    bucket: int | None = None
    vocoder: VocoderSetting | None = None
