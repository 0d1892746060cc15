"""What `generate` was asked for, as far as the decode engine can do it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from kvcache.decoding.sampler import Sampling

_KNOWN = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "transformers_version", "decoder_start_token_id",
}  # fmt: skip
_INPUTS = {"inputs", "input_ids", "inputs_embeds", "attention_mask"}


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of a generation, and why the decode engine cannot follow them.

    Attributes:
        sampling: how tokens are drawn.
        max_new_tokens, max_length: one of them bounds the length.
        ends: tokens that end a row.
        pad: what stands behind an end.
        prefill: the same as a generation of one token, whose logits and cache it returns.
        why_not: None if the engine can.
    """

    sampling: Sampling
    max_new_tokens: int | None
    max_length: int
    ends: tuple[int, ...]
    pad: int
    prefill: GenerationConfig
    why_not: str | None

    @classmethod
    def of(cls, model: Any, given: Mapping[str, Any]) -> "GenerationSettings":
        """As `model.generate` would find them in its keyword arguments."""
        arguments = {name: value for name, value in given.items() if name != "generation_config"}
        config, others = model._prepare_generation_config(given.get("generation_config"), **arguments)
        defaults = {**type(config)().to_dict(), **config._get_default_generation_params()}
        odd = [
            name
            for name, value in config.to_dict().items()
            if name not in _KNOWN and not name.startswith("_") and value not in (None, False, defaults.get(name))
        ]
        odd += [
            name for name, value in others.items() if name not in _INPUTS and value is not None and value is not False
        ]
        why_not = f"the decode engine does not know {', '.join(sorted(odd))}" if odd else None
        if config.use_cache is False:
            why_not = "use_cache=False"
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = [int(end) for end in ends if end is not None]
        pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
        sampling = Sampling(
            temperature=float(config.temperature) if config.do_sample else 0.0,
            top_p=1.0 if config.top_p is None else float(config.top_p),
            min_p=float(config.min_p or 0),
            top_k=int(config.top_k or 0),
            repetition_penalty=float(config.repetition_penalty or 1),
        )
        first = copy.deepcopy(config)
        first.update(
            max_new_tokens=1, max_length=None, do_sample=False, temperature=1.0, top_k=50, top_p=1.0, min_p=None, repetition_penalty=1.0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return cls(sampling, config.max_new_tokens, config.max_length, tuple(ends), pad, first, why_not)

    def new_tokens(self, prompt: int) -> int:
        """How many tokens may follow a prompt of so many."""
        return self.max_new_tokens if self.max_new_tokens is not None else max(1, self.max_length - prompt)
