"""What we know of transformers' models: caches for them, their masks, their rotary embeddings, from 5.2 to the newest.

Two rules make a cache right while tokens leave it: its length is counted in tokens *seen*, and its mask sizes are
``(kept + new, seen - kept)``. What a release changed is bridged here and nowhere else.
"""

import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from kvcache import attention, export
from kvcache.arguments import check_model, check_quantization
from kvcache.errors import GeometryError, InputError, PolicyError, PositionsError
from kvcache.events import Evictions
from kvcache.geometry import CacheGeometry
from kvcache.heads import SplitLayer, chosen_by_head, layer_for, turns
from kvcache.layers import KVLayer
from kvcache.managed import ManagedCache, ManagedEncoderDecoderCache, check_rollback
from kvcache.managed import ManagedLayer as ManagedLayer
from kvcache.managed import check_positions as check_positions
from kvcache.past import handed, taken
from kvcache.policies import KeepAll, SizePolicy, check_policy, schedule
from kvcache.prefix import PrefixKey, PrefixSnapshot
from kvcache.quantized import Quantization, QuantizedLayer
from kvcache.rope import KeyRotation

TESTED = ("5.2", "5.24")
"""The lowest and the newest release of transformers that the tests have run on."""

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_CACHE = "cache" if _VERSION >= (5, 24) else "past_key_values"

_BY_LENGTH = ("dynamic", "longrope")  # RoPE whose frequencies depend on how long the text becomes
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

PositionMode = Literal["absolute", "rerotated"]

export.register()


# ---------------------------------------------------------------------- caches


def new_cache(
    model: Any,
    policy: SizePolicy | Sequence[SizePolicy] | None = None,
    *,
    max_length: int | None = None,
    preallocate: bool = False,
    positions: PositionMode = "absolute",
    rows: int | None = None,
    padding: Tensor | None = None,
    geometry: CacheGeometry | None = None,
    quantization: Quantization | None = None,
) -> Any:
    """A cache to pass as ``past_key_values`` (``cache`` from transformers 5.24 on); for an encoder-decoder, its decoder's.

    Layers that a model manages its own way (the sliding layers of Gemma3, the state-space layers of a hybrid) stay its
    own; ours take the place of the full-attention layers.

    Args:
        model: a transformers model.
        policy: which tokens stay; one for all layers or a sequence of one per layer.
        max_length: refuse to hold more tokens than this.
        preallocate: take the memory for all of them at once.
        positions: ``"rerotated"`` moves the pinned keys next to the window (needs RoPE).
        rows: refuse another batch size.
        padding: pads on the left of each row, ``[batch]``; see `left_padding`.
        geometry: the model's, where it is known already.
        quantization: hold keys and values in few bits.

    Raises:
        PositionsError, PolicyError, GeometryError: if that cannot work for this model.
    """
    check_model(model)
    check_quantization(quantization)
    if positions not in ("absolute", "rerotated"):
        raise PositionsError(f"positions={positions!r} must be 'absolute' or 'rerotated'")
    geometry = CacheGeometry.from_model(model) if geometry is None else geometry
    layers = list(DynamicCache(config=model.config).layers)[: geometry.layers]  # T5's has as many as its encoder
    layers += [_full_layer() for _ in range(geometry.layers - len(layers))]
    managed = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    policies = _policy_per_layer(policy, len(layers))
    evicting = any(policies[i].evicts for i in managed)
    if evicting or positions == "rerotated":
        geometry.check_eviction(rerotate=positions == "rerotated")
    asked = {repr(policy): any(p.evicts for p in policies), repr(quantization): quantization is not None}
    if not managed and (idle := [name for name, given in (asked | {"preallocate=True": preallocate}).items() if given]):
        raise PolicyError(
            f"{idle[0]} has no layer to work on: each of the {len(layers)} layers is managed by the model in its own way "
            f"({type(layers[0]).__name__}); leave it out, or unset config.sliding_window where the model has one"
        )
    for one in (policies[i] for i in managed if preallocate):
        if max_length is None and not one.evicts:
            raise PolicyError(
                f"preallocate=True takes the memory of all tokens at once, and under {one!r} without a limit there is no "
                "telling how many: give max_length (max_cache_length), or a policy with a limit"
            )
    if any(chosen_by_head(policies[i]) for i in managed):
        _check_latent(model, policy)
    rotation = key_rotation(model) if evicting and positions == "rerotated" else None
    turn = _turn(model, geometry, [policies[i] for i in managed])
    ours: list[KVLayer] = []
    evictions = Evictions(ours)
    for i in managed:
        given: dict[str, Any] = {"max_length": max_length, "padding": padding, "layers": len(managed), "rows": rows}
        if quantization is not None:
            kv: KVLayer = _quantized(policies[i], quantization, rotation, preallocate, geometry, given)
            ours.append(kv)
            layers[i] = ManagedLayer(kv, geometry.max_positions, ours, evictions)
            continue
        given |= {"preallocate": preallocate, "token_bytes": geometry.layer_token_bytes}
        kv = layer_for(policies[i], rotation, turn=turn, **given)
        if kv.by_head and rotation is not None:
            raise PositionsError(
                f"under {policies[i]!r} each head keeps tokens of its own, so there is no window to turn sinks towards; "
                "use positions='absolute'"
            )
        if isinstance(kv, SplitLayer) and kv.parts and len(kv.heads) != geometry.kv_heads:
            raise GeometryError(
                f"{policies[i]!r} is for {len(kv.heads)} KV heads, the model has {geometry.kv_heads}; give a policy for each"
            )
        ours.append(kv)
        layers[i] = ManagedLayer(kv, geometry.max_positions, ours, evictions)
    cache = ManagedCache(layers)
    return ManagedEncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def _check_latent(model: Any, policy: Any) -> None:
    """Refuse to rank the tokens of a cache of latents, which are made into keys only behind the cache."""
    if any(hasattr(module, "expand_kv") for module in model.modules()):
        raise PolicyError(
            f"{policy!r} ranks keys, and {type(model).__name__} caches latents that it makes into keys afterwards "
            "(multi-head latent attention); use a policy by age, such as SlidingWindow(1024, sinks=4)"
        )


def _turn(model: Any, geometry: CacheGeometry, policies: Sequence[SizePolicy]) -> KeyRotation | None:
    """What turns the model's queries, where one of these policies does that and they carry a rotary embedding."""
    policy = next(filter(turns, policies), None)
    if policy is None or geometry.positions == "learned":
        return None
    try:
        return key_rotation(model)
    except PositionsError as error:
        reason = str(error).split(": ", 1)[-1].split(";")[0]
        raise PositionsError(
            f"{policy!r} turns queries to positions to come, which it cannot here: {reason}; rank by FarLooks or SnapKV"
        ) from error


def _quantized(
    policy: SizePolicy,
    quantization: Quantization,
    rotation: KeyRotation | None,
    preallocate: bool,
    geometry: CacheGeometry,
    given: dict[str, Any],
) -> QuantizedLayer:
    if chosen_by_head(policy):
        raise PolicyError(
            f"{policy!r} chooses tokens by head, and tokens that are quantized leave in groups; use one of the two, or a "
            "policy by age, such as SlidingWindow"
        )
    if rotation is not None:
        raise PositionsError("quantized keys cannot be re-rotated; keep positions='absolute'")
    if preallocate:
        raise PolicyError("a quantized cache grows by groups; leave preallocate out")
    return QuantizedLayer(policy, quantization, geometry=geometry, **given)


def prefix_cache(model: Any) -> Any:
    """A cache that keeps everything in every layer, also where the model has a window of its own: to compute a prefix on.

    What a layer's window hides, its mask hides; so any cache can begin with what this one holds.

    Raises:
        InputError: for an encoder-decoder, whose decoder depends on the encoder's input.
        GeometryError: for a model with layers that keep a state instead of keys and values.
        PositionsError: for a model whose rotation of the first keys depends on how many follow.
    """
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder: what its decoder computes depends on the encoder's input, "
            "so no prefix can be reused; keep the encoder's output instead"
        )
    layers = DynamicCache(config=model.config).layers
    other = next((layer for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)), None)
    if other is not None:
        raise GeometryError(
            f"{type(model).__name__} has a {type(other).__name__}, which keeps no keys and values to reuse; "
            "prefixes need attention in every layer"
        )
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    # Up to 5.13 such layers do not show in a cache.
    if getattr(model, "_is_stateful", False) or not kinds <= _ATTENTION:
        raise GeometryError(
            f"{type(model).__name__} has a layer with a state, which keeps no keys and values to reuse; "
            "prefixes need attention in every layer"
        )
    if (rope_type := rope_by_length(model)) is not None:
        raise PositionsError(
            f"no prefix can be reused: {rope_type!r} RoPE turns the first keys by how many tokens follow; "
            "use a model with another rope_type"
        )
    return ManagedCache([ManagedLayer(KVLayer()) for _ in layers])


def extend_prefix(
    run: Callable[[Tensor], Any], key: PrefixKey, start: PrefixSnapshot | None, cache: Any, device: torch.device
) -> PrefixSnapshot:
    """The snapshot of `key`, computed on an empty cache.

    Args:
        run: runs ``[1, tokens]`` ids or ``[1, tokens, dim]`` embeddings on that cache.
        key: of what.
        start: a beginning of it that is known and need not be run; None if nothing is.
        cache: of ours, which keeps everything; see `prefix_cache`.
        device: where the model wants its input.
    """
    began, known, spent = time.perf_counter(), 0, 0.0
    if start is not None:
        start.to(device).fork(cache)
        known, spent = len(start), start.build_seconds
    run(key.content[None, known:].to(device))
    return PrefixSnapshot.of(kv_layers(cache), key, build_seconds=spent + time.perf_counter() - began)


def _full_layer() -> DynamicLayer:
    return DynamicLayer()  # type: ignore[no-untyped-call]


def _policy_per_layer(policy: SizePolicy | Sequence[SizePolicy] | None, layers: int) -> list[SizePolicy]:
    if policy is None or isinstance(policy, SizePolicy):
        return [policy or KeepAll()] * layers
    if not isinstance(policy, Sequence) or isinstance(policy, str) or len(policy) != layers:
        raise PolicyError(
            f"policy={policy!r} must be one SizePolicy, or a sequence of one for each of the {layers} layers"
        )
    for one in policy:
        check_policy(one)
    return list(policy)


def decoding_arguments(cache: Any, positions: Tensor) -> dict[str, Any]:
    """How a model is given a cache, and the positions of one token per row, ``[rows, 1]``, by a tensor on its device."""
    # Up to 5.3 models take it for the slots of their cache, which ours know better, and GPT-2 counts it out on the host
    # where it is missing.
    given = {_CACHE: cache, "use_cache": True, "position_ids": positions}
    return given | ({"cache_position": positions[0]} if _VERSION < (5, 4) else {})


def cache_layers(cache: Any) -> list[Any]:
    """The self-attention layers of a cache, ours and the model's own."""
    return list(cache.self_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else cache.layers)


def kv_layers(cache: Any, some: bool = True) -> list[KVLayer]:
    """The layers of a cache that kvcache manages.

    Raises:
        GeometryError: if there are none, because the cache is not ours, and `some` must be.
    """
    managed = [layer.kv for layer in cache_layers(cache) if isinstance(layer, ManagedLayer)]
    if not managed and some:
        raise GeometryError(
            f"{type(cache).__name__} has no layer that kvcache manages; make the cache with new_cache()"
        )
    return managed


def check_ours(cache: Any) -> None:
    """Raise `GeometryError` for something else than one of our caches, or None."""
    own = getattr(cache, "self_attention_cache", cache)
    if own is not None and not isinstance(own, ManagedCache):
        raise GeometryError(f"{type(cache).__name__} is no cache of ours: make one with new_cache(), or give none")


def truncate(cache: Any, length: int) -> None:
    """Roll a whole cache back to its first `length` tokens; all of its layers or none.

    Raises:
        RollbackError: if one of them cannot.
    """
    layers, kept = cache_layers(cache), kv_layers(cache)
    for kv in kept:
        kv.check_truncate(length)
    check_rollback(layers, length, kept[0].seen)
    own = getattr(cache, "self_attention_cache", cache)
    if length == 0:
        own.reset()
        return
    if (removed := kept[0].seen - length) > 0:
        for layer in layers:
            if not isinstance(layer, ManagedLayer):
                layer.crop(-removed)
    for kv in kept:
        kv.truncate(length)
    count_anew(cache)


def tell_evicted(cache: Any) -> None:
    """Tell what has left a cache and was not told yet: nothing follows its last forward."""
    managed = next((layer for layer in cache_layers(cache) if isinstance(layer, ManagedLayer)), None)
    if managed is not None and managed.evictions is not None:
        managed.evictions.after()


def count_anew(cache: Any) -> None:
    """Take the tokens that have left a cache so far for told, see `kvcache.events`."""
    for layer in cache_layers(cache):
        if isinstance(layer, ManagedLayer):
            layer.count_anew()


_REHEARSED = 2048  # tokens read again at a time
_LEAD = 8  # tokens before them, which say where it goes on


def rehearse(model: Any, cache: Any, ids: Tensor, instruction: Tensor | None) -> None:
    """Run a text again on a cache that holds it, whose ranked layers look at what is looked at and store nothing.

    Args:
        model: that tells the cache what it attends to; see `kvcache.attention`.
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
            body(part, **handed(body, cache), use_cache=True)
    except BaseException:
        for undo in before:
            undo()
        raise
    finally:
        for layer in layers:
            layer.rehearsing = None


def left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """Pads on the left of each row of a 2-D attention mask, ``[batch]``; None without a mask."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return (attention_mask.cumsum(1) == 0).sum(1)


# ---------------------------------------------------------------------- exact windows


@contextmanager
def exact_windows(model: nn.Module) -> Iterator[None]:
    """Within this block, each token of a chunk sees what its layer's policy says, and no more.

    Transformers makes one causal mask for all layers, from the tokens kept at the start of the chunk. That is exact for
    single tokens; but in a chunk longer than what is left of the window, its later tokens would see more than the
    window, and layers with policies of their own would get a mask of the wrong width. Here each attention module gets
    its own layer's mask. The hooks look at our caches only, and are gone after the block.
    """
    implementation = getattr(model.config, "_attn_implementation", "eager")
    if implementation not in ("sdpa", "eager", attention.ATTENTION):
        raise PositionsError(
            f"eviction inside a chunk needs a 4-D mask, which {implementation!r} attention does not take; "
            "call model.set_attn_implementation('sdpa')"
        )
    handles = [
        module.register_forward_pre_hook(_exact_mask, with_kwargs=True)
        for module in model.modules()
        if is_attention(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_attention(module: nn.Module) -> bool:
    """Whether a module is the attention of a layer, or one that hands its mask to it."""
    return isinstance(getattr(module, "layer_idx", None), int) and "attention_mask" in _parameters(module)


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return _parameters_of(type(module).forward)


@lru_cache(maxsize=256)
def _parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _exact_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if kwargs is None:  # another thread's hook, called while it is being removed; this thread's own does the work
        return None
    given = {**dict(zip(_parameters(module), args, strict=False)), **kwargs}
    cache = taken(given)
    crossing = given.get("key_value_states") is not None or given.get("encoder_hidden_states") is not None
    if not isinstance(cache, Cache | EncoderDecoderCache) or crossing:
        return args, kwargs
    layer = cache_layers(cache)[module.layer_idx]  # type: ignore[index]
    hidden: Tensor = given["hidden_states"]
    mask: Tensor | None = given.get("attention_mask")
    if not isinstance(layer, ManagedLayer) or layer.kv.by_head:
        return args, kwargs
    fresh = hidden.shape[1]
    width = layer.kv.retained + fresh
    whole = schedule(layer.kv.policy, layer.kv.stored, fresh)[-1] == width
    # Where transformers makes no mask, because the first layer holds no pads, this one may.
    if whole and (not layer.kv.holds_pads if mask is None else mask.shape[-1] == width):
        return args, kwargs
    exact = layer.kv.mask(fresh).to(hidden.device)
    if mask is not None:
        shorter = width - mask.shape[-1]  # rows are right-aligned: what the mask lacks on the left is older tokens
        mask = (
            mask[..., -width:]
            if shorter <= 0
            else nn.functional.pad(mask, (shorter, 0), value=mask.dtype == torch.bool)
        )
    if module.config._attn_implementation == "eager" and (mask is None or mask.dtype == torch.bool):  # type: ignore[union-attr]
        lowest = torch.finfo(hidden.dtype).min
        mask = (
            torch.zeros(exact.shape, dtype=hidden.dtype, device=hidden.device)
            if mask is None
            else torch.where(mask, 0.0, lowest)
        )
    if mask is None:
        mask = exact
    else:
        mask = mask & exact if mask.dtype == torch.bool else mask.masked_fill(~exact, torch.finfo(mask.dtype).min)
    if "attention_mask" in kwargs or len(args) <= (place := _parameters(module).index("attention_mask")):
        return args, {**kwargs, "attention_mask": mask}
    return (*args[:place], mask, *args[place + 1 :]), kwargs


# ---------------------------------------------------------------------- rotary embeddings


def rope_by_length(model: Any) -> str | None:
    """The kind of a model's rotary embedding, if its frequencies depend on how long the text becomes."""
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    return next((kind for kind in kinds if kind in _BY_LENGTH), None)


def key_rotation(model: Any) -> KeyRotation:
    """How to turn this model's keys, checked against the model's own rotary embedding.

    Raises:
        PositionsError: if it has none, or one whose keys cannot be turned.
    """
    if getattr(model.config.get_text_config(decoder=True), "qk_nope_head_dim", None) is not None:
        raise PositionsError(
            "keys cannot be re-rotated: latent attention keeps its rotary channels apart; keep positions='absolute'"
        )
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    frequencies = None
    if rotary is not None:
        frequencies = getattr(rotary, "inv_freq", getattr(rotary, "full_attention_inv_freq", None))
    if rotary is None or not isinstance(frequencies, Tensor):
        raise PositionsError(
            "keys cannot be re-rotated: the model has no rotary_emb with inv_freq; keep positions='absolute'"
        )
    rope_type = getattr(rotary, "rope_type", "default")
    if rope_type in _BY_LENGTH:
        raise PositionsError(
            f"keys cannot be re-rotated: {rope_type!r} RoPE changes its frequencies with the length; keep positions='absolute'"
        )
    for interleaved in (False, True):
        rotation = KeyRotation(frequencies, interleaved)
        if _turns_like(rotary, rotation):
            return rotation
    raise PositionsError(
        f"keys cannot be re-rotated: {type(rotary).__name__} does not turn keys in a way kvcache knows; keep positions='absolute'"
    )


def _turns_like(rotary: nn.Module, rotation: KeyRotation) -> bool:
    """Whether turning a key by 7 positions gives the model's own key 7 positions on."""
    apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    frequencies = rotation.inv_freq
    keys = torch.linspace(-1, 1, 2 * frequencies.numel(), device=frequencies.device)[None, None, None]
    extra = {"layer_type": "full_attention"} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    placed = []
    with torch.no_grad():
        for position in (3, 10):
            cos, sin = rotary(keys, torch.tensor([[position]], device=keys.device), **extra)
            if cos.shape[-1] != keys.shape[-1]:
                return False
            placed.append(apply(keys, keys, cos, sin)[1])
    return torch.allclose(rotation(placed[0], 7), placed[1], atol=1e-4)
