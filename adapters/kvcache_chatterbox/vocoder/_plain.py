"""A vocoder of which nothing is known but its `inference`: a stand-in, a replacement of one's own, or an S3Gen with hooks."""

from collections.abc import Sequence
from typing import Any

import torch

from kvcache_chatterbox.checks import without_autocast
from kvcache_chatterbox.units import SAMPLES_PER_TOKEN
from kvcache_chatterbox.vocoder._run import Run, Waveform
from kvcache_chatterbox.voices import Voice


class PlainVocoder:
    """Calls ``inference(speech_tokens=, ref_dict=)``, run by run.

    Args:
        s3gen: what has it.
        device: of its tokens.
    """

    lookahead = 0
    nbytes = 0

    def __init__(self, s3gen: Any, device: torch.device) -> None:
        self.s3gen, self.device = s3gen, device

    def check(self, voice: Voice) -> None:
        """Nothing is known of what it needs."""

    def before(self, voice: Voice) -> int:
        tokens = voice.gen.get("prompt_token")
        return 0 if tokens is None else int(torch.as_tensor(tokens).shape[-1])

    def waves(self, runs: Sequence[Run]) -> list[Waveform]:
        return [self._wave(run) for run in runs]

    def _wave(self, run: Run) -> Waveform:
        steps = {"n_cfm_timesteps": 2} if getattr(self.s3gen, "meanflow", False) else {}
        reference = dict(run.voice.gen)  # it writes into it
        with without_autocast(self):
            audio, _ = self.s3gen.inference(speech_tokens=run.tokens.to(self.device), ref_dict=reference, **steps)
        audio = torch.as_tensor(audio).squeeze(0).detach().cpu()
        new = (run.tokens.numel() - run.known) * SAMPLES_PER_TOKEN
        return Waveform(audio[audio.numel() - new - run.lead :].clone())
