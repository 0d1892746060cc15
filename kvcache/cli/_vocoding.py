"""Options of the commands that say how a model's vocoder runs."""

import math
from typing import Annotated, get_args

import typer

from kvcache.cli._common import at_least
from kvcache.decoding import VocoderSetting
from kvcache.errors import InputError
from kvcache.models import Precision

Vocoder = Annotated[
    str,
    typer.Option(help="Of a model that speaks: none, own, or other weights that its adapter knows, such as meanflow."),
]
VocoderPrecision = Annotated[
    str | None, typer.Option(help="Of its vocoder: fp32, bf16, fp16 or int8. Others than as loaded change the sound.")
]
ReferenceSeconds = Annotated[
    float | None, typer.Option(help="Of a voice's clip that its vocoder hears. Fewer than all change the sound.")
]
MaxChunk = Annotated[int | None, typer.Option(help="Most speech tokens that become audio at once.")]


def vocoder_setting(
    weights: str,
    precision: str | None = None,
    reference_seconds: float | None = None,
    max_chunk: int | None = None,
) -> VocoderSetting | None:
    """How the options of a command let the vocoder run; None for ``--vocoder none``.

    Raises:
        InputError: for what cannot be, or goes with a vocoder only.
    """
    given = {
        "--vocoder-precision": precision,
        "--reference-seconds": reference_seconds,
        "--max-chunk": max_chunk,
    }
    if weights == "none":
        for option, value in given.items():
            if value is not None:
                raise InputError(f"{option} {value}: it goes with a vocoder; give --vocoder own as well")
        return None
    if precision not in (None, *get_args(Precision)):
        raise InputError(f"--vocoder-precision {precision}: give one of {', '.join(get_args(Precision))}")
    at_least("--max-chunk", max_chunk, 1)
    if reference_seconds is not None and not 0 < reference_seconds < math.inf:
        raise InputError(f"--reference-seconds {reference_seconds:g}: give a number of seconds above 0")
    return VocoderSetting(weights, precision, reference_seconds=reference_seconds, max_chunk=max_chunk)  # type: ignore[arg-type]
