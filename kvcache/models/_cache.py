"""What we know of transformers' models: caches for them, their masks, their rotary embeddings, from 5.2 to the newest.

Two rules make a cache right while tokens leave it: its length is counted in tokens *seen*, and its mask sizes are
``(kept + new, seen - kept)``. What a release changed is bridged here and nowhere else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
)

from kvcache.cache import (
    CacheGeometry,
    CacheShape,
    CacheSpec,
    Expected,
    KeyRotation,
    LayerCache,
    SizePolicy,
    Token,
    budgeted,
    chosen_by_head,
    spec_of,
    turns,
)
from kvcache.errors import PolicyError, PositionsError
from kvcache.events import Evictions
from kvcache.models import _attention as attention
from kvcache.models import _export as export
from kvcache.models._arguments import check_model
from kvcache.models._compat import MADE_AS
from kvcache.models._facts import facts_of, geometry_of
from kvcache.models._managed import Crossed, ManagedCache, ManagedEncoderDecoderCache
from kvcache.models._managed_layer import ManagedLayer
from kvcache.models._probe import parameters
from kvcache.models._shapes import cache_shape
from kvcache.models._windows import Windows, announced

TESTED = ("5.2", "5.24")
"""The lowest and the newest release of transformers that the tests have run on."""

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

export.register()


# ---------------------------------------------------------------------- caches


def new_cache(
    model: Any,
    spec: CacheSpec | SizePolicy | Sequence[SizePolicy] | None = None,
    *,
    rows: int | None = None,
    padding: Tensor | None = None,
    geometry: CacheGeometry | None = None,
    crossing: bool | None = None,
) -> Any:
    """A cache to pass as ``past_key_values`` (``cache`` from transformers 5.24 on); for an encoder-decoder, its decoder's.

    Layers that a model manages its own way (the sliding layers of Gemma3, the state-space layers of a hybrid) stay its
    own; ours take the place of the full-attention layers.

    Args:
        model: a transformers model.
        spec: what is asked of the cache; a policy alone is a spec with nothing else.
        rows: refuse another batch size.
        padding: pads on the left of each row, ``[batch]``; see `left_padding`.
        geometry: the model's, where it is known already.
        crossing: whether the model attends to an encoder, whose keys and values need a place of their own; by default
            whether it is an encoder-decoder.

    Raises:
        PositionsError, PolicyError, GeometryError: if that cannot work for this model.
    """
    check_model(model)
    spec = spec_of(spec)
    geometry = geometry_of(model) if geometry is None else geometry
    layers = list(DynamicCache(config=model.config).layers)[: geometry.layers]  # T5's has as many as its encoder
    layers += [_full_layer() for _ in range(geometry.layers - len(layers))]
    managed = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    policies = spec.policies(len(layers))
    ours = [policies[i] for i in managed]
    _check_spec(model, geometry, spec, ours, padding)
    if not managed and (any(policy.evicts for policy in policies) or not spec.storage.plain):
        raise PolicyError(
            f"{spec!r} has no layer to work on: each of the {len(layers)} layers is managed by the model in its own way "
            f"({type(layers[0]).__name__}); leave it out, or unset config.sliding_window where the model has one"
        )
    windows = Windows(model, facts_of(model).seats, layers) if _by_age(ours) and any(p.evicts for p in ours) else None
    shape = shape_of(model) if any(budgeted(p) and not chosen_by_head(p) for p in ours) else None
    held: list[LayerCache] = []
    evictions = Evictions(held) if any(policy.evicts for policy in ours) else None
    for i in managed:
        counted = shape is not None and budgeted(policies[i]) and not chosen_by_head(policies[i])
        expected = Expected(rows, _token(geometry, i), shape.whole() if shape is not None and counted else None)
        kv = spec.layer(
            policies[i],
            rotation=facts_of(model).rotation(i) if spec.rerotated and policies[i].evicts else None,
            turn=_turn(model, geometry, policies[i], i),
            padding=padding,
            expected=expected,
        )
        held.append(kv)
        layers[i] = ManagedLayer(kv, geometry.max_positions, held, evictions, windows)
    if shape is not None and rows is None:
        for kv in held:
            kv.share(shape.whole())  # says now what does not hold one row
    cache = ManagedCache(layers)
    crossing = model.config.is_encoder_decoder if crossing is None else crossing
    return ManagedEncoderDecoderCache(cache, Crossed(held, shape)) if crossing else cache


def _token(geometry: CacheGeometry, layer: int) -> Token:
    own = geometry.of(layer)
    return own.kv_heads, own.head_dim, own.value_dim, own.dtype


def _by_age(policies: Sequence[SizePolicy]) -> bool:
    """Whether the oldest tokens leave first in any of these layers."""
    return not all(map(chosen_by_head, policies))


def _check_spec(
    model: Any, geometry: CacheGeometry, spec: CacheSpec, policies: Sequence[SizePolicy], padding: Tensor | None
) -> None:
    """Refuse what cannot work for this model, whose managed layers have these policies."""
    evicting = [policy for policy in policies if policy.evicts]
    if evicting or spec.rerotated:
        _check_eviction(model, geometry, policies if evicting else [], spec.rerotated)
    for one in policies if spec.static else ():
        if spec.max_length is None and not one.evicts:
            raise PolicyError(
                f"static=True takes the memory of all tokens at once, and under {one!r} without a limit there is no "
                "telling how many: give max_length (max_cache_length), or a policy with a limit"
            )
    if any(map(chosen_by_head, policies)):
        _check_latent(model, spec.policy)
    if spec.rerotated and evicting and padding is not None and bool((padding > 0).any()):
        raise PositionsError(
            "re-rotated positions need rows without padding; run the rows apart, or keep positions='absolute'"
        )


def shape_of(model: Any) -> CacheShape:
    """What a cache of this model holds of each row, see `kvcache.models.shape_of`.

    Raises:
        GeometryError: if it cannot be found out.
    """
    return cache_shape(model, new_cache)


def _check_eviction(model: Any, geometry: CacheGeometry, policies: Sequence[SizePolicy], rerotated: bool) -> None:
    """Refuse what a model's positions or its attention would make silently wrong.

    Raises:
        PositionsError: with the reason.
    """
    geometry.check_eviction(rerotate=rerotated)
    if not policies:
        return
    facts = facts_of(model)
    if (why := facts.why_no_eviction) is not None:
        raise PositionsError(
            f"tokens cannot be evicted from this model's cache: {why}; use KeepAll(), with a max_length"
        )
    by_age = next((policy for policy in policies if not chosen_by_head(policy)), None)
    if by_age is not None and (why := facts.why_no_long_prompt) is not None:
        raise PositionsError(
            f"under {by_age!r} a prompt can be longer than the window, and its tokens cannot each see their own: {why}; use "
            "KeepAll(), with a max_length, or another attn_implementation"
        )


def _check_latent(model: Any, policy: Any) -> None:
    """Refuse to rank the tokens of a cache of latents, which are made into keys only behind the cache."""
    if any(hasattr(module, "expand_kv") for module in model.modules()):
        raise PolicyError(
            f"{policy!r} ranks keys, and {type(model).__name__} caches latents that it makes into keys afterwards "
            "(multi-head latent attention); use a policy by age, such as SlidingWindow(1024, sinks=4)"
        )


def _turn(model: Any, geometry: CacheGeometry, policy: SizePolicy, layer: int) -> KeyRotation | None:
    """What turns the queries of a layer, where its policy does that and they carry a rotary embedding."""
    if not turns(policy) or geometry.positions == "learned":
        return None
    try:
        return facts_of(model).rotation(layer)
    except PositionsError as error:
        reason = str(error).split(": ", 1)[-1].split(";")[0]
        raise PositionsError(
            f"{policy!r} turns queries to positions to come, which it cannot here: {reason}; rank by LongRangeAttention or SnapKV"
        ) from error


def _full_layer() -> DynamicLayer:
    return DynamicLayer()  # type: ignore[no-untyped-call]


def decoding_arguments(cache: Any, positions: Tensor) -> dict[str, Any]:
    """How a model is given a cache, and the positions of one token per row, ``[rows, 1]``, by a tensor on its device."""
    # Up to 5.3 models take it for the slots of their cache, which ours know better, and GPT-2 counts it out on the host
    # where it is missing.
    given = {MADE_AS: cache, "use_cache": True, "position_ids": positions}
    return given | ({"cache_position": positions[0]} if _VERSION < (5, 4) else {})


# ---------------------------------------------------------------------- masks, and rotary embeddings


@contextmanager
def exact_windows(model: nn.Module) -> Iterator[None]:
    """Within this block, each token of a chunk sees what its layer's policy says, whatever else the mask hides.

    A cache of `new_cache` sees to its windows itself where a model asks it for the sizes of its mask, as nearly all do. Here
    it is told before the model begins; what more that gives is: models with masks of their own making, and rows in which
    more is hidden than pads on the left. The hooks look at our caches only, and are gone after the block.

    Raises:
        PositionsError: for an attention that takes no 4-D mask.
    """
    implementation = getattr(model.config, "_attn_implementation", "eager")
    if implementation not in ("sdpa", "eager", attention.ATTENTION):
        raise PositionsError(
            f"eviction inside a chunk needs a 4-D mask, which {implementation!r} attention does not take; "
            "call model.set_attn_implementation('sdpa')"
        )
    with announced(model):
        yield


def is_attention(module: nn.Module) -> bool:
    """Whether a module is the attention of a layer, or one that hands its mask to it."""
    return isinstance(getattr(module, "layer_idx", None), int) and "attention_mask" in parameters(module)


def key_rotation(model: Any) -> KeyRotation:
    """How to turn this model's keys, found on the keys that it writes; layers without a rotation are left out.

    Raises:
        PositionsError: if it has none, or one whose keys cannot be turned.
    """
    facts = facts_of(model)
    turns = [facts.rotation(i) for i in facts.shapes]
    found = [turn for turn in turns if turn is not None]
    if not found:
        raise PositionsError("keys cannot be re-rotated: they carry no rotation; keep positions='absolute'")
    if len(set(map(id, found))) > 1:
        raise PositionsError("keys cannot be re-rotated by one rotation: layers turn theirs differently")
    return found[0]
