"""Policies that rank tokens, on a model: tried once before they are trusted, and a text that is read a second time."""

from typing import Any

import torch
from torch import Tensor

from kvcache.cache import SnapKV
from kvcache.errors import GeometryError, PolicyError
from kvcache.models._cache import new_cache
from kvcache.models._compat import cache_kwarg
from kvcache.models._facts import ModelFacts, alike, facts_of
from kvcache.models._operations import kv_layers
from kvcache.models._probe import closeness


def check_ranking(model: Any, runner: Any) -> None:
    """Try a policy that ranks tokens on a few of them, of which none leaves: the answer must be the model's own.

    Args:
        runner: the model's `observed_copy`.

    Raises:
        PolicyError: with the reason, if it is not.
    """

    def unsupported_reason(facts: ModelFacts) -> str | None:
        if facts.why_not_probed is not None and model.device.type == "meta":
            return None  # nothing is computed
        try:
            ids, told = facts.trial()
        except GeometryError:
            return None  # attention itself refuses what it cannot honour
        cache = new_cache(model, SnapKV(1024))
        try:
            with facts.as_fresh(runner):
                parts = [
                    runner(part, **cache_kwarg(runner, cache), use_cache=True)[0] for part in (ids[:, :4], ids[:, 4:])
                ]
        except PolicyError as error:
            return str(error).split(";")[0]
        same = alike(torch.cat(parts, 1), told, closeness(model, told.dtype))
        return (
            None if same else f"{type(model).__name__} attends in a way of its own, which heads cannot do by themselves"
        )

    if (why := facts_of(model).once("ranking", unsupported_reason)) is not None:
        raise PolicyError(f"{why}; use a policy by age, such as SlidingWindow")


_REHEARSED = 2048  # tokens read again at a time
_LEAD = 8  # tokens before them, which say where it goes on


def rehearse(model: Any, cache: Any, ids: Tensor, instruction: Tensor | None) -> None:
    """Run a text again on a cache that holds it, whose ranked layers look at what is looked at and store nothing.

    Args:
        model: that tells the cache what it attends to; see `kvcache.models.observed_copy`.
        cache: of ours.
        ids: ``[rows, tokens]``.
        instruction: token ids ``[1, tokens]`` before each part.
    """
    layers: list[Any] = kv_layers(cache)
    body = getattr(model, "base_model", model)
    before = [layer.begin_rehearsal() for layer in layers]
    try:
        for start in range(0, ids.shape[1], _REHEARSED):
            part = ids[:, max(0, start - _LEAD) : start + _REHEARSED]
            for layer in layers:
                layer.rehearsing = range(start, min(start + _REHEARSED, ids.shape[1]))
            if instruction is not None:
                part = torch.cat([instruction.to(ids.device).expand(ids.shape[0], -1), part], 1)
            body(part, **cache_kwarg(body, cache), use_cache=True)
    except BaseException:
        for undo in before:
            undo()
        raise
    finally:
        for layer in layers:
            layer.rehearsing = None
