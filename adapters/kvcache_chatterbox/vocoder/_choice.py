"""Which of the vocoders runs a model's."""

from typing import Any

import torch

from kvcache import InputError
from kvcache.decoding import Programs
from kvcache.events import Event, emit
from kvcache_chatterbox.vocoder._options import VocoderOptions
from kvcache_chatterbox.vocoder._plain import PlainVocoder
from kvcache_chatterbox.vocoder._run import Vocoder
from kvcache_chatterbox.vocoder._s3gen import S3GenVocoder, why_plain


def vocoder_of(
    s3gen: Any,
    options: VocoderOptions | None,
    device: torch.device,
    programs: Programs | None = None,
    onednn: bool = True,
) -> Vocoder:
    """What runs a model's vocoder: its parts, where it is upstream's S3Gen as it came; else its own `inference`.

    Args:
        s3gen: upstream's, or what stands in for it.
        options: how it runs; None is as upstream does.
        device: of speech tokens.
        programs: where what is compiled is kept; by default in the user's cache.
        onednn: see `S3GenVocoder`.

    Raises:
        InputError: if options are given that this vocoder does not have, or that cannot be.
    """
    options = options or VocoderOptions()
    reason = why_plain(s3gen)
    if reason is None:
        return S3GenVocoder(s3gen, options, programs, onednn)
    if options != VocoderOptions():
        raise InputError(f"{options}: {reason}, which has no such settings; leave them out, or give upstream's S3Gen")
    if hasattr(s3gen, "flow"):  # else nothing was to be expected
        emit(Event("fell_back", "S3Gen's parts to its inference", reason=reason))
    return PlainVocoder(s3gen, device)
