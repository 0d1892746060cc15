"""`EngineOptions`: what an engine is made with, as one checked value."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import Self, TypedDict

from kvcache import InputError, SizePolicy
from kvcache.cache import PositionMode
from kvcache.decoding import BackendName, TuningProfile
from kvcache.models import Precision
from kvcache_chatterbox.checks import check_names
from kvcache_chatterbox.speech import DecoderOptions
from kvcache_chatterbox.vocoder import VocoderOptions, options_of
from kvcache_chatterbox.voices import Reuse


class EngineFields(TypedDict, total=False):
    """The fields of `EngineOptions` as keywords."""

    policy: SizePolicy | None
    max_cache_length: int
    positions: PositionMode
    double_bos: bool
    reuse: Reuse
    onednn: bool
    backend: BackendName | Literal["auto", "off"]
    precision: Precision | None
    kv_dtype: torch.dtype | None
    tf32: bool
    bucket: int
    vocoder: VocoderOptions | None


@dataclass(frozen=True)
class EngineOptions(DecoderOptions):
    """What an engine is made with: how T3 decodes, see `kvcache_chatterbox.speech.DecoderOptions`, and how the vocoder runs.

    Attributes:
        vocoder: how the vocoder runs; None: as upstream's does.

    Raises:
        InputError, PolicyError: for a value that cannot be.
    """

    vocoder: VocoderOptions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocoder is not None and not isinstance(self.vocoder, VocoderOptions):
            raise InputError(f"vocoder={self.vocoder!r:.80} must be VocoderOptions, or None")

    @classmethod
    def of(cls, options: "EngineOptions | SizePolicy | None", given: Mapping[str, Any]) -> "EngineOptions":
        """The options that an engine's arguments stand for.

        Args:
            options: all of them, or the policy.
            given: keywords.

        Raises:
            InputError, PolicyError: for an unknown keyword, a value that cannot be, or keywords beside options.
        """
        check_names(given, [one.name for one in fields(cls)] + ["prefix_cache"], "ChatterboxEngine()")
        if isinstance(options, EngineOptions):
            if given:
                raise InputError(
                    f"EngineOptions and {', '.join(given)} are given; put them into the options with dataclasses.replace()"
                )
            return options
        if options is not None and "policy" in given:
            raise InputError(f"two policies are given, {options!r:.80} and {given['policy']!r:.80}; give one")
        return cls(**given) if options is None else cls(policy=options, **given)

    @classmethod
    def of_profile(cls, model: Any, path: str | os.PathLike[str], given: Mapping[str, Any]) -> Self:
        """The options that `kvcache tune` found for a model, see `ChatterboxEngine.from_profile`.

        Args:
            given: keywords, which go before what the profile says.
        """
        check_names(given, [one.name for one in fields(cls)] + ["prefix_cache"], "ChatterboxEngine.from_profile()")
        found = TuningProfile.load(Path(path), getattr(model, "t3", model)).arguments
        if "storage" in found:
            raise InputError(f"{path} has a quantized cache, which Chatterbox's engine has not; tune with kvcache tune")
        vocoder = found.pop("vocoder", None)
        if vocoder is not None and hasattr(model, "s3gen"):
            found["vocoder"] = options_of(vocoder)
        return cls(**{**found, **given})
