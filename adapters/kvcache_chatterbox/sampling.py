"""From logits to the next speech token, with the processors and the order of upstream's two loops."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from typing_extensions import TypedDict

from kvcache import InputError


class SamplingOptions(TypedDict, total=False):
    """How speech tokens are drawn. What is left out is as upstream has it for the variant."""

    temperature: float
    top_p: float
    min_p: float
    top_k: int
    repetition_penalty: float
    cfg_weight: float


@dataclass(frozen=True)
class Sampling:
    """How speech tokens are drawn.

    Attributes:
        temperature: above 0; 0 takes the most likely token.
        top_p: nucleus of this probability (Holtzman et al., arXiv:1904.09751), in (0, 1].
        min_p: least share of the best token's probability (Nguyen et al., arXiv:2407.01082), in [0, 1].
        top_k: how many of the best tokens stay; 0 for all.
        repetition_penalty: above 0; 1 is none (Keskar et al., arXiv:1909.05858).
        cfg_weight: classifier-free guidance, ``cond + weight * (cond - uncond)``; 0 runs one row instead of two.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.2
    cfg_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is all)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("cfg_weight", self.cfg_weight >= 0, "at least 0 (0 is without guidance)"),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)} must be {wanted}")

    @classmethod
    def of(cls, is_gpt: bool, options: SamplingOptions) -> "Sampling":
        """Upstream's defaults for a variant, with `options` in their place where given."""
        upstream = cls(top_k=1000) if is_gpt else cls(min_p=0.05, cfg_weight=0.5)
        return replace(upstream, **options)

    def processors(self, is_gpt: bool) -> list[LogitsProcessor]:
        """Upstream's processors in upstream's order, those that change nothing left out."""
        greedy = self.temperature == 0
        penalty = (
            RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)) if self.repetition_penalty != 1 else None
        )
        temperature = TemperatureLogitsWarper(float(self.temperature)) if self.temperature not in (0, 1) else None
        top_k = TopKLogitsWarper(self.top_k) if self.top_k and not greedy else None
        top_p = TopPLogitsWarper(float(self.top_p)) if self.top_p < 1 and not greedy else None
        min_p = MinPLogitsWarper(float(self.min_p)) if self.min_p > 0 and not greedy else None
        gpt, llama = (temperature, top_k, top_p, min_p, penalty), (penalty, temperature, top_k, min_p, top_p)
        return [processor for processor in (gpt if is_gpt else llama) if processor is not None]


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token ``[1, 1]`` from processed logits ``[1, vocabulary]``, by upstream's one `multinomial` a token."""
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1, generator=generator)
