"""How a transformers decoder reads and writes a `StaticKV`: its cache layers, its mask, its attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from kvcache.decoding._kernel import available, decode_attention
from kvcache.decoding._static_cache import StaticKV
from kvcache.errors import GeometryError
from kvcache.models import (
    attending_copy,
    decoding_arguments,
    facts_of,
    geometry_of,
    own_attention,
    rope_by_length,
    signature_of,
    told_more,
)

_ATTENTION = "kvcache_decode"


def unsupported_reason(model: Any) -> str | None:
    """Why a model cannot decode on a `StaticKV`; None if it can."""
    config = model.config
    text = config.get_text_config(decoder=True)
    name = type(model).__name__
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} brings its own attention, which takes no other"
    other = [layer for layer in DynamicCache(config=config).layers if type(layer) is not DynamicLayer]
    if other or getattr(model, "_is_stateful", False):
        kind = type(other[0]).__name__ if other else "state"
        return f"{name} manages layers its own way ({kind})"
    geometry = geometry_of(model)
    if geometry.positions not in ("rope", "learned"):
        return f"the positions of {name} are {geometry.positions}"
    if rope_by_length(model) is not None:
        return f"{name} has rotary positions that depend on the length"
    if getattr(text, "attn_logit_softcapping", None) or getattr(text, "qk_nope_head_dim", None):
        return f"{name} has attention of a kind of its own"
    if getattr(text, "scale_attn_by_inverse_layer_idx", False):
        return f"{name} scales its attention by layer"
    facts = facts_of(model)
    # Asked of all modules once: another function under the same name makes it another model.
    if (own := facts.once("own attention", lambda facts: own_attention(facts.model))) is not None:
        return f"{name} attends by {own!r}, which is none of transformers' own ways"
    if (why := facts.why_no_positions) is not None:
        return f"{name} cannot be told where its tokens stand: {why}"
    return signature_of(model).why_no_copy


def decoder_copy(model: Any) -> Any:
    """A copy of a decoder that shares its tensors and attends to a `StaticKV`. The model itself stays as it is.

    Raises:
        GeometryError: if this model cannot.
    """
    if (reason := unsupported_reason(model)) is not None:
        raise GeometryError(f"cannot decode on a static cache: {reason}; decode without a backend")
    return attending_copy(model, _ATTENTION, attend, _no_mask)


@dataclass(frozen=True)
class HeadWatch:
    """Attention heads whose weights a step hands on, for a model whose layers hand their arguments on to their attention.

    Attributes:
        heads: ``(layer, head)`` pairs.
        every: of the rows the first of so many is looked at: 2 with guidance.
    """

    heads: tuple[tuple[int, int], ...]
    every: int = 1


class Looks:
    """What watched heads see in the step that is running.

    Args:
        watch: which.
        seen: what each row's token may see, ``[rows, 1, 1, columns]``; None: all.

    Attributes:
        weights: of each head so far, ``[rows // every, columns]``, fp32.
    """

    def __init__(self, watch: HeadWatch, seen: Tensor | None) -> None:
        self._watch, self._seen = watch, seen
        self.weights: list[Tensor] = []

    def take(self, layer: int, query: Tensor, keys: Tensor, scaling: float | None) -> None:
        """Look at a layer's queries ``[rows, heads, 1, dim]`` and keys ``[rows, KV heads, columns, dim]``."""
        every, group = self._watch.every, query.shape[1] // keys.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        for at, head in self._watch.heads:
            if at == layer:
                scores = (keys[::every, head // group].float() * (scale * query[::every, head].float())).sum(-1)
                if self._seen is not None:
                    scores = scores.masked_fill(~self._seen[::every, 0, 0], -torch.inf)
                self.weights.append(scores.softmax(-1))


class DecodeInputs:
    """What a model is given beside the token, to decode one step on a `StaticKV`.

    Args:
        kv: the cache.
        kernel: read it in ways of our own where they are faster, see `attend`.
        watch: heads whose weights are wanted; they are in `Looks`, the argument ``looks``.
    """

    def __init__(self, kv: StaticKV, kernel: bool, watch: HeadWatch | None = None) -> None:
        self._kv = kv
        self.watch = watch
        self.own = kernel
        # Triton's, which needs neither a mask nor a bound.
        self.kernel = kernel and kernel_reason(kv.length.device) is None
        layers: list[Any] = [StaticLayer(kv, i) for i in range(len(kv.keys))]
        self._cache = Cache(layers=layers)

    def of_step(self, order: Tensor, whole: bool, fresh: int = 1) -> dict[str, Any]:
        """The arguments of the model's next call.

        Args:
            order: ``[columns]``, which are 0, 1, 2, …: so many slots are read.
            whole: every row sees all of them, so that no mask is needed.
            fresh: tokens of each row that the step runs.
        """
        kv = self._kv
        kv.begin(order.shape[0], fresh)
        if fresh > 1:
            given = decoding_arguments(self._cache, kv.length[:, None] + kv.order[:fresh])
            return {"attention_mask": kv.mask(order, fresh), **given}
        # The kernel works out itself what a row sees. A 4-D tensor is what transformers hands through untouched.
        reduces = _reduces(order)
        # A compiled step without a mask reduces: one that is not to has a mask, too, where all is seen.
        masked = not whole or (reduces and not self.own)
        seen = kv.mask(order) if masked and (self.watch is not None or not self.kernel) else None
        mask = kv.counts()[:, None, None] if self.kernel else seen
        if mask is not None and reduces and self.own and not self.kernel:
            mask = mask.float().log()  # of a logarithm the compiler makes a tensor, once for all layers
        looks = {} if self.watch is None else {"looks": Looks(self.watch, seen)}
        return {"attention_mask": mask, **looks, **decoding_arguments(self._cache, kv.length[:, None])}


class StaticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `StaticKV` as transformers sees it during a step."""

    is_sliding = False
    is_compileable = True
    is_initialized = True
    supports_early_init = False

    def __init__(self, kv: StaticKV, index: int) -> None:
        # Not super().__init__(): it would assign keys and values, which are the cache's.
        self._kv = kv
        self._index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """There is nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._kv.write(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:  # noqa: ARG002  # as transformers calls it
        return self._kv.columns, 0

    def get_seq_length(self, cache_position: Tensor | None = None) -> int:  # noqa: ARG002  # as transformers calls it
        return 0  # positions are given; a number here would be baked into a captured step

    def get_max_length(self) -> int:
        return self._kv.slots

    get_max_cache_shape = get_max_length


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask is given, or there is none."""


def attend(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    looks: Looks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one query per row and head, or of several, ``[rows, heads, n, dim]``, over the slots of a `StaticKV`.

    Counts in place of a mask are for the Triton kernel. A mask that is added, or none, is for reductions where steps are
    compiled for a CPU; all else is for torch's own attention.

    Raises:
        GeometryError: if it is told of more (sinks, a cap of its scores, a window), which would be left out.
    """
    if (more := told_more(dropout=dropout, **kwargs)) is not None:
        raise GeometryError(f"its attention depends on {more}; decode without a backend")
    if looks is not None:
        looks.take(int(module.layer_idx), query, keys, scaling)  # type: ignore[arg-type]  # a number, by transformers' convention
    rows, heads, fresh, _ = query.shape
    if attention_mask is not None and attention_mask.dtype == torch.long:
        length, stored, pinned = attention_mask[:, 0, 0].unbind(1)
        out = decode_attention(query, keys, values, length, stored, pinned, scaling)
    else:
        # The query heads of one KV head are so many queries to it: keys and values need not be repeated.
        grouped = query.reshape(rows, keys.shape[1], -1, query.shape[3]).to(keys.dtype)
        if attention_mask is not None and attention_mask.shape[1:3] != (1, 1):  # one for each head or query
            attention_mask = attention_mask.expand(rows, heads, fresh, -1).reshape(*grouped.shape[:3], -1)
        if fresh == 1 and _reduces(query) and (attention_mask is None or attention_mask.is_floating_point()):
            out = _reduced(query.view(grouped.shape), keys, values, attention_mask, scaling)
        else:
            out = nn.functional.scaled_dot_product_attention(grouped, keys, values, attention_mask, scale=scaling)
        out = out.reshape(rows, heads, fresh, -1)
    return out.transpose(1, 2).to(query.dtype), None


def _reduces(states: Tensor) -> bool:
    """Whether these are traced to be compiled for a CPU: here, and not in another thread."""
    return torch.compiler.is_dynamo_compiling() and states.device.type == "cpu"


def _reduced(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of a group of queries per KV head, ``[rows, KV heads, group, dim]``, as two reductions over what is held.

    A mask ``[rows, 1 or KV heads, 1 or group, tokens]`` is added to its scores. A step reads each key and value once, so it
    takes as long as reading them does. The compiler makes of this loops that read bfloat16 as it is held, half of the bytes of
    float32, and compute in float32; torch's own attention makes products of matrices of it, for which a single query is too
    few.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, keys, values = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, keys, values))
    scores = (keys[:, :, None] * (scale * query)[:, :, :, None]).sum(-1)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1)[..., None] * values[:, :, None]).sum(-2)


def kernel_reason(device: torch.device) -> str | None:
    """Why the Triton kernel is not used on a device; None if it is."""
    return available() if device.type == "cuda" else "it is for CUDA GPUs"
