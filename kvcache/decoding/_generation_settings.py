"""What `generate` was asked for, read by `generate` itself, as far as the decode engine can do it."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from kvcache.decoding._drafts import Drafts
from kvcache.decoding._processors import read_processors
from kvcache.decoding._sampler import Sampling
from kvcache.decoding._token_rules import TokenRules
from kvcache.errors import InputError

_KNOWN = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "transformers_version", "decoder_start_token_id",
    "num_return_sequences", "cache_implementation", "prompt_lookup_num_tokens", "max_matching_ngram_size",
}  # fmt: skip
# What `generate` makes processors and criteria of, which are looked at themselves. The prefill is done without.
_MADE_OF: dict[str, Any] = {
    **dict.fromkeys((
        "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id",
        "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "guidance_scale",
        "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "watermarking_config", "stop_strings", "max_time",
    )),
    "remove_invalid_values": False,
    "renormalize_logits": False,
}  # fmt: skip
_INPUTS = {
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "logits_processor", "stopping_criteria", "tokenizer",
    "negative_prompt_ids", "negative_prompt_attention_mask", "prefix_allowed_tokens_fn",
}  # fmt: skip


_LONGEST_DRAFT = 31  # tokens; of longer ones nearly all are wrong, and each is run


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of a generation, and why the decode engine cannot follow them.

    Attributes:
        sampling: how tokens are drawn.
        rules: what else changes their scores.
        criteria: what else ends a row, of transformers.
        drafts: how tokens are guessed; None: they are not.
        new_tokens: the most that follow the prompt.
        copies: sequences for each row of the prompt.
        ends: tokens that end a row.
        pad: what stands behind an end; None where no token ends a row, and one that is over goes on, as in `generate`.
        unpenalized: how many tokens at the start of each row the repetition penalty is not about.
        prefill: the same as a generation of one token, whose logits and cache it returns.
        unsupported_reason: None if the engine can.
    """

    sampling: Sampling
    rules: TokenRules
    criteria: tuple[Any, ...]
    drafts: Drafts | None
    new_tokens: int
    copies: int
    ends: tuple[int, ...]
    pad: int | None
    unpenalized: tuple[int, ...]
    prefill: GenerationConfig
    unsupported_reason: str | None

    @classmethod
    def of(cls, model: Any, inputs: Tensor | None, given: Mapping[str, Any]) -> "GenerationSettings":
        """As `model.generate` finds them: it prepares a run, which ends before anything has been computed.

        Args:
            model: whose `generate` is transformers' own.
            inputs: token ids ``[rows, tokens]``, or None where they are among `given`.
            given: its other arguments.

        Raises:
            InputError: for what `generate` refuses.
        """
        arguments = {name: value for name, value in given.items() if name != "generation_config"}
        try:
            config, others = model._prepare_generation_config(given.get("generation_config"), **arguments)
            first = _prefill_of(config)
            if odd := _unknown(config, others):
                reason = f"the decode engine does not know {', '.join(sorted(odd))}"
            else:
                reason = "use_cache=False" if config.use_cache is False else ""
                for name in ("stop_strings", "prompt_lookup_num_tokens"):
                    if getattr(model.generation_config, name, None):
                        reason = f"{name} is among the model's own settings; give it to the call"
            if reason:
                return cls(Sampling(), TokenRules(), (), None, 1, 1, (), None, (), first, reason)
            return _read(cls, first, _Prepared.by(model, inputs, given, config.stop_strings))
        except (ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"generate refuses these settings: {error}") from error


def _prefill_of(config: GenerationConfig) -> GenerationConfig:
    first: Any = copy.deepcopy(config)
    first.update(
        max_new_tokens=1, max_length=None, do_sample=False, temperature=1.0, top_k=50, top_p=1.0, min_p=None, repetition_penalty=1.0,
        num_return_sequences=1, cache_implementation=None, return_dict_in_generate=True, output_logits=True,
        prompt_lookup_num_tokens=None,
        **{name: value for name, value in _MADE_OF.items() if hasattr(config, name)},
    )  # fmt: skip
    return first  # type: ignore[no-any-return]


def _unknown(config: GenerationConfig, others: Mapping[str, Any]) -> list[str]:
    """The settings and inputs, by name, that say something and are not known here."""
    defaults = {**type(config)().to_dict(), **config._get_default_generation_params()}
    odd = [
        name
        for name, value in config.to_dict().items()
        if name not in _KNOWN
        and name not in _MADE_OF
        and not name.startswith("_")
        and not (value is None or value is False)
        and (type(value), value) != (type(defaults.get(name)), defaults.get(name))  # 0 is a token, False is none
    ]
    return odd + [
        name for name, value in others.items() if name not in _INPUTS and value is not None and value is not False
    ]


@dataclass(frozen=True)
class _Prepared:
    """A run of `generate` as it stands before its first forward: what it has made of its arguments."""

    config: GenerationConfig
    rows: int
    prompt: int
    processors: Sequence[Any]
    criteria: Sequence[Any]

    @classmethod
    def by(cls, model: Any, inputs: Tensor | None, given: Mapping[str, Any], strings: Any) -> "_Prepared":
        """As `generate` prepares it.

        Args:
            model, inputs, given: see `GenerationSettings.of`.
            strings: that end a text. `generate` loses the tokenizer on this way, so their criterion is made here.
        """
        more = []
        if strings and given.get("tokenizer") is not None:
            more = [StopStringCriteria(given["tokenizer"], strings)]
            given = {name: value for name, value in given.items() if name not in ("tokenizer", "stop_strings")}
            if (config := given.get("generation_config")) is not None:
                given["generation_config"] = copy.deepcopy(config)
                given["generation_config"].stop_strings = None
        found: list[_Prepared] = []

        def stop_here(model: Any,  # noqa: ARG001  # transformers gives it by name
                      input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
                      generation_config: Any, **model_kwargs: Any) -> Tensor:  # fmt: skip
            rows, tokens = input_ids.shape[:2]
            found.append(cls(generation_config, rows, tokens, logits_processor, [*stopping_criteria, *more]))
            return input_ids

        first = () if inputs is None else (inputs,)
        model.generate(*first, **given, custom_generate=stop_here)
        return found[0]


def _read(kind: type[GenerationSettings], first: GenerationConfig, run: _Prepared) -> GenerationSettings:
    config, total, odd = run.config, run.config.max_length - run.prompt, []
    ends: list[int] = []
    criteria = []
    for one in run.criteria:
        if type(one) is MaxLengthCriteria:
            total = min(total, one.max_length - run.prompt)
        elif type(one) is EosTokenCriteria:
            ends += one.eos_token_id.flatten().tolist()
        else:
            criteria.append(one)
    drawn = read_processors(run.processors, run.prompt, bool(config.do_sample))
    if any(pads > run.prompt for pads in drawn.unpenalized):
        odd.append("a repetition penalty on embeddings with pads")
    lookup = config.prompt_lookup_num_tokens
    drafts = None  # which are about speed alone
    if lookup is not None and run.rows == 1 and drawn.rules.why_host is None:
        drafts = Drafts(min(lookup, _LONGEST_DRAFT), config.max_matching_ngram_size or Drafts.longest)
    stops = [] if config._eos_token_tensor is None else config._eos_token_tensor.flatten().tolist()
    pad = (stops or [0])[0] if config._pad_token_tensor is None else int(config._pad_token_tensor)
    return kind(
        drawn.sampling,
        drawn.rules,
        tuple(criteria),
        drafts,
        max(1, math.ceil(total)),
        config.num_return_sequences or 1,
        tuple(ends),
        pad if any(hasattr(one, "eos_token_id") for one in run.criteria) else None,
        drawn.unpenalized,
        first,
        f"the decode engine does not know {', '.join(odd)}" if odd else None,
    )
