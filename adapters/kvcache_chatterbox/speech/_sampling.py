"""From logits to the next speech token, with the processors and the order of upstream's two loops."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast

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
from kvcache.decoding import Sampling
from kvcache.errors import check_whole
from kvcache_chatterbox.checks import check_names, check_number

_LARGEST_K = 2**63 - 1  # what a tensor of whole numbers holds
OPTIONS = tuple(field.name for field in fields(Sampling))


class SamplingOptions(TypedDict, total=False):
    """How speech tokens are drawn. What is left out is as upstream has it for the variant."""

    temperature: float
    top_p: float
    min_p: float
    top_k: int
    repetition_penalty: float
    cfg_weight: float


def check_sampling(options: Mapping[str, Any]) -> SamplingOptions:
    """The options as the numbers that they are.

    Raises:
        InputError: for an unknown one, what is no finite number, or one out of its range.
    """
    if not isinstance(options, Mapping):
        raise InputError(f"sampling={options!r:.80} must be SamplingOptions, such as {{'temperature': 0.8}}")
    check_names(options, OPTIONS, "sampling")
    given: dict[str, Any] = dict(options)
    for name, value in given.items():
        if name == "top_k":
            check_whole(name, value, 0)
            if value > _LARGEST_K:
                raise InputError(f"top_k={value} must be at most {_LARGEST_K}; 0 keeps all tokens")
        else:
            given[name] = check_number(name, value)
    replace(Sampling(), **given)  # which knows the ranges
    return cast(SamplingOptions, given)


def sampling_of(is_gpt: bool, options: SamplingOptions) -> Sampling:
    """The defaults of upstream's `T3.inference` or `inference_turbo`, with `options` in their place where given.

    Raises:
        InputError: as `check_sampling`.
    """
    upstream = Sampling(top_k=1000) if is_gpt else Sampling(min_p=0.05, cfg_weight=0.5)
    return replace(upstream, **check_sampling(options))


def order(is_gpt: bool) -> tuple[str, ...]:
    """The order of upstream's processors, for the sampler on the device."""
    if is_gpt:
        return ("temperature", "top_k", "top_p", "min_p", "penalty")
    return ("penalty", "temperature", "top_k", "min_p", "top_p")


def processors(sampling: Sampling, is_gpt: bool) -> list[LogitsProcessor]:
    """Upstream's processors in upstream's order, those that change nothing left out."""
    greedy = sampling.greedy
    penalty, temperature = float(sampling.repetition_penalty), float(sampling.temperature)
    made = {
        "penalty": RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None,
        "temperature": TemperatureLogitsWarper(temperature) if temperature not in (0, 1) else None,
        "top_k": TopKLogitsWarper(sampling.top_k) if sampling.top_k and not greedy else None,
        "top_p": TopPLogitsWarper(float(sampling.top_p)) if sampling.top_p < 1 and not greedy else None,
        "min_p": MinPLogitsWarper(float(sampling.min_p)) if sampling.min_p > 0 and not greedy else None,
    }
    return [processor for name in order(is_gpt) if (processor := made[name]) is not None]


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token ``[1, 1]`` from processed logits ``[1, vocabulary]``, by upstream's one `multinomial` a token."""
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1, generator=generator)
