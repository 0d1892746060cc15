"""Attention that tells caches what is looked at, and lets each KV head see its own tokens.

A model's own attention is used for the sums; beside it, layers that rank tokens by attention are told the queries, and only
they. No layer is forced to eager attention, and the model itself is not changed: a copy of its structure that shares its
weights runs in its place.
"""

import copy
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from kvcache.cache import Attended, LayerCache, attend
from kvcache.errors import PolicyError
from kvcache.models._compat import get_cache
from kvcache.models._copies import structural_copy
from kvcache.models._signature import signature_of
from kvcache.models._windows import hides_more, shows_later

ATTENTION = "kvcache_observed"
_BASE = "sdpa"
# What attention is told, of transformers 5.2 to 5.24, that changes nothing where each token sees what its mask says.
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "is_causal", "labels", "logits_to_keep",
    "max_length_k", "max_length_q", "num_items_in_batch", "position_ids", "return_dict", "use_cache",
}  # fmt: skip

# The layer that stored the keys which the next attention of this thread is given, and all that these attend to.
_stored: ContextVar[tuple[LayerCache, Attended] | None] = ContextVar("kvcache_stored", default=None)
_observing: ContextVar[int] = ContextVar("kvcache_observing", default=0)  # models that run, one inside the other
_looked_at: ContextVar[Tensor | None] = ContextVar("kvcache_looked_at", default=None)  # the mask that was checked last


def observing() -> bool:
    """Whether the model that is running in this thread tells its cache what is attended to."""
    return _observing.get() > 0


def stored(layer: LayerCache, attended: Attended) -> None:
    """Say that a layer has just returned this, for the attention that follows."""
    if _observing.get():
        _stored.set((layer, attended))


def observed_copy(model: Any) -> Any:
    """A copy of a model that shares its tensors and tells our caches what it attends to.

    Raises:
        PolicyError: if its attention cannot be told apart from the rest of it.
    """
    implementation = getattr(model.config, "_attn_implementation", "eager")
    name = type(model).__name__
    instead = "use a policy by age, such as SlidingWindow"
    if not getattr(model, "_supports_attention_backend", False):
        raise PolicyError(f"{name} brings its own attention, which cannot tell its cache what it attends to; {instead}")
    if implementation != _BASE:
        raise PolicyError(
            f"{name} has {implementation!r} attention, which cannot tell its cache what it attends to; load it with "
            f"attn_implementation='sdpa' where it has that, or {instead}"
        )
    if (own := own_attention(model)) is not None:
        raise PolicyError(
            f"{name} attends by {own!r}, which is none of transformers' own ways and cannot tell its cache what it attends "
            f"to; {instead}"
        )
    if (why := signature_of(model).why_no_copy) is not None:
        raise PolicyError(f"{name} cannot be copied to tell its cache what it attends to: {why}; {instead}")
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[_BASE])
    new = structural_copy(model, lambda name, module: None)
    configs: dict[int, Any] = {}
    for module in new.modules():
        config = module.__dict__.get("config")
        if config is not None and getattr(config, "_attn_implementation", None) == _BASE:
            if id(config) not in configs:
                configs[id(config)] = copy.copy(config)
                configs[id(config)]._attn_implementation_internal = ATTENTION
            module.config = configs[id(config)]
    # Which of its parts is called depends: OPT's head calls its base model's decoder, and PEFT's wrapper generates with the
    # model inside it.
    for body in {new, *(part for part in new.modules() if isinstance(part, PreTrainedModel))}:
        body.register_forward_pre_hook(_begin, with_kwargs=True)
        body.register_forward_hook(_end, always_call=True)
    return new


def own_attention(model: Any) -> str | None:
    """The name of an attention, or of its mask, that somebody has registered: a copy would attend in another way."""
    configs = [model.config, *(module.__dict__.get("config") for module in model.modules())]
    # Not a set: so the same name is told each time.
    for name in dict.fromkeys(getattr(config, "_attn_implementation", None) for config in configs):
        if name is None:
            continue
        attention, mask = _registered(ALL_ATTENTION_FUNCTIONS, name), _registered(ALL_MASK_ATTENTION_FUNCTIONS, name)
        if attention is None and name.removeprefix("paged|") != "eager":
            return str(name)
        if not all(function is None or _of_transformers(function) for function in (attention, mask)):
            return str(name)
    return None


def _registered(registry: Mapping[str, Callable[..., Any]], name: str) -> Callable[..., Any] | None:
    """What stands under a name; None where each model has one of its own."""
    return registry.get(name, registry.get(name.removeprefix("paged|")))


def _of_transformers(function: Callable[..., Any]) -> bool:
    # By its globals: `functools.wraps` copies the name of a module.
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("transformers.")


def told_more(dropout: float = 0.0, **told: Any) -> str | None:
    """Names of what an attention is told beside queries, keys, values, mask and scale that changes what it computes."""
    changes = (
        name for name in told if name not in _HARMLESS and not name.startswith("output_")
    )  # what a model is to tell
    more = [name for name in changes if told[name] is not None]
    return ", ".join([*more, "dropout"] if dropout else more) or None


def _begin(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    _observing.set(_observing.get() + 1)  # first: what is refused ends as well
    if _observing.get() == 1:
        _check_mask(kwargs)


def _check_mask(given: dict[str, Any]) -> None:
    """Refuse a mask that hides more than the pads which the cache knows of: heads of their own have their own masks."""
    cache, name = get_cache(given), "attention_mask"
    if (decoders := getattr(cache, "self_attention_cache", None)) is not None:
        cache, name = decoders, "decoder_attention_mask"
    held = (getattr(layer, "kv", None) for layer in getattr(cache, "layers", ()))
    kv = next((kv for kv in held if kv is not None and kv.by_head), None)
    mask = given.get(name)
    if kv is None or mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise PolicyError(f"under {kv.policy!r} each head has a mask of its own; give {name} [batch, tokens], or none")
    padding = mask.new_zeros(1, 1) if kv.padding is None else kv.padding[:, None].to(mask.device)
    pads = torch.arange(mask.shape[1], device=mask.device) < padding
    if pads.shape[0] not in (1, mask.shape[0]) or not bool((mask.bool() != pads).all()):
        raise PolicyError(
            f"{name} hides more than the pads on the left that the cache was made for, which {kv.policy!r} cannot; "
            "give it to new_cache(), too, or use a policy by age"
        )


def _end(_module: nn.Module, _args: Any, _output: Any) -> None:
    _observing.set(max(0, _observing.get() - 1))
    _stored.set(None)
    _looked_at.set(None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The model's own attention; for our layers, that of heads over their own tokens."""
    held = _stored.get()
    _stored.set(None)
    if held is None:
        base = ALL_ATTENTION_FUNCTIONS[_BASE]
        return base(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0], None
    if (more := told_more(**kwargs)) is not None:
        raise PolicyError(
            f"the attention of {type(module).__name__} depends on {more}, which heads that see tokens of their own do not "
            "compute; use a policy by age, such as SlidingWindow"
        )
    layer, attended = held
    if attended.keys is not key or attended.values is not value:
        raise PolicyError(
            f"{type(module).__name__} attends to other keys or values than its cache returned, so heads cannot see tokens of "
            "their own; use a policy by age, such as SlidingWindow"
        )
    if attention_mask is not None and _looked_at.get() is not attention_mask:
        _check_causal(layer, attention_mask, query.shape[2], type(module).__name__)
    return attend(query, attended.spans, scaling).transpose(1, 2), None


def _check_causal(layer: LayerCache, mask: Tensor, fresh: int, name: str) -> None:
    """Refuse a mask that is not the causal one with the pads that the cache knows of: each head makes its own."""
    if mask.is_meta:  # says nothing
        return
    seen = layer.seen - (0 if getattr(layer, "rehearsing", False) else fresh)
    if hides_more(mask, seen, fresh, layer.padding) or shows_later(mask, fresh):
        raise PolicyError(
            f"{name} is given a mask that is not causal, or hides more than pads on the left, which {layer.policy!r} cannot "
            "honour: each head sees its own tokens; use a policy by age, such as SlidingWindow"
        )
    _looked_at.set(mask)
