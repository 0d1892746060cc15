"""A long text in few tokens, and Chatterbox models with the stand-in's vocoder."""

import torch

from kvcache_chatterbox.testing import stand_in
from support.t3_models import tiny_t3

TEXT = (
    "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. "
    "It is easy to tell the depth of a well. These days a chicken leg is a rare dish. "
    "Rice is often served in round bowls. The juice of lemons makes fine punch."
)
SHORT = {"segment_characters": 90, "max_new_tokens": 30, "seed": 3}  # three segments


def audio(stream):
    return torch.cat([torch.zeros(1, 0), *stream], 1)


class Watermarker:
    def apply_watermark(self, audio, sample_rate):
        assert sample_rate == 24000
        return audio + 1.0


def tts(kind):
    model = stand_in(tiny_t3(kind))
    model.watermarker = Watermarker()
    return model
