"""Beginnings of prompts: run as `generate` would, and whether what was computed of one can be continued by others."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kvcache.models._compat import cache_kwarg
from kvcache.models._probe import TOKENS, Probe, alike, closeness, parameters
from kvcache.models._spy import layers_of, spying_cache

_SHIFT = 7  # what is added to the numbers that a request has left behind


def run_prefix(model: Any, given: Mapping[str, Tensor], cache: Any, start: int) -> None:
    """Run a part of a prefix on a cache, at the positions that `generate` would give it.

    Args:
        given: ``input_ids`` ``[1, tokens]`` or ``inputs_embeds`` ``[1, tokens, width]``.
        start: tokens before it.
    """
    body = getattr(model, "base_model", model)  # without the head: nobody asks for a prefix's logits
    body(**_behind(given, start, body), **cache_kwarg(body, cache), use_cache=True)


def _behind(given: Mapping[str, Tensor], start: int, body: Any) -> dict[str, Tensor]:
    states = next(iter(given.values()))
    if "position_ids" not in parameters(body):
        return dict(given)
    return {**given, "position_ids": torch.arange(start, start + states.shape[1], device=states.device)[None]}


def left_behind(model: Any) -> tuple[tuple[str, str], ...] | str:
    """A prompt in one go, and the same behind a beginning that is known, after another request; within `untouched`.

    Returns:
        Attributes of modules that a prompt leaves behind for its later tokens, each by module and attribute; or why a
        beginning cannot be continued.
    """
    probe = Probe(model)
    ids = probe.ids[None, :TOKENS]
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    whole, keys = _generated(probe, ids, spying_cache(model, sliding=True))
    left = tuple(
        (name, attribute)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor) and value is not before[name].get(attribute)
    )
    for name, attribute in left:
        module = model.get_submodule(name)
        setattr(module, attribute, getattr(module, attribute) + _SHIFT)
    cache = spying_cache(model, sliding=True)
    for name, attribute in left:
        setattr(model.get_submodule(name), attribute, None)
    half = TOKENS // 2
    run_prefix(model, probe.given(ids[:, :half]), cache, 0)
    for i, states in keys.items():
        mine = layers_of(cache)[i].keys
        if mine is None or mine.shape[2] != half or not alike(mine, states[:, :, :half]):
            return "what it computes of a beginning is not what it computes of a whole prompt"
        if closeness(model, states.dtype) is not None:
            break  # deeper layers differ by rounding, and a mixture of experts by more
    for name, attribute in left:
        setattr(model.get_submodule(name), attribute, None)
    behind, _ = _generated(probe, ids, cache)
    if not alike(behind, whole, closeness(model, whole.dtype)):
        return "behind a beginning that is known, its positions are others than in a whole prompt"
    return left


def _generated(probe: Probe, ids: Tensor, cache: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """The logits of the next token, or of a model without a head its last states, and all keys."""
    model = probe.model
    if not hasattr(model, "generation_config"):
        seen = int(cache.get_seq_length())  # a body alone is given what follows, where `generate` is given all
        given = _behind(probe.given(ids[:, seen:]), seen, model)
        out = model(**given, **cache_kwarg(model, cache), use_cache=True)[0]
        return out[:, -1], {i: layer.keys for i, layer in enumerate(layers_of(cache))}
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=1, do_sample=False, use_cache=True, return_dict_in_generate=True
    )
    settings.output_logits, settings.pad_token_id = True, 0
    mask = torch.ones(ids.shape, dtype=torch.long, device=ids.device)  # as a request with a prefix has one
    out = model.generate(
        **probe.given(ids), attention_mask=mask, **cache_kwarg(model, cache), generation_config=settings
    )
    return out.logits[0], {i: layer.keys for i, layer in enumerate(layers_of(cache)) if layer.keys is not None}
