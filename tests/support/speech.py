"""A long text in few tokens, and Chatterbox models with the stand-in's vocoder."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kvcache_chatterbox.testing import stand_in
from support.t3_models import tiny_t3

TEXT = (
    "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. "
    "It is easy to tell the depth of a well. These days a chicken leg is a rare dish. "
    "Rice is often served in round bowls. The juice of lemons makes fine punch."
)
SHORT: dict[str, Any] = {"segment_characters": 90, "max_new_tokens": 30, "seed": 3}  # three segments


def audio(stream: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(1, 0), *stream], 1)


class Watermarker:
    def apply_watermark(self, audio: Any, sample_rate: int) -> Any:
        assert sample_rate == 24000
        return audio + 1.0


def tts(kind: str) -> Any:
    model: Any = stand_in(tiny_t3(kind))
    model.watermarker = Watermarker()
    return model
