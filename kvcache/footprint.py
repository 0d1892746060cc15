"""What a model takes while it serves, found without its weights: the code that serves runs on torch's meta device.

There tensors have shapes and no numbers. So the caches, the decode engine and the model's own forward pass say themselves
what they allocate and when they let go of it; there is no second account of them that could differ from what happens.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvcache import hf
from kvcache.decoding.cache import StaticKV
from kvcache.decoding.loop import Decoding
from kvcache.decoding.sampler import Drawing
from kvcache.layers import KVLayer
from kvcache.past import handed
from kvcache.precision import PackedLinear
from kvcache.report import account

if TYPE_CHECKING:
    from kvcache.setting import Setting

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Moment:
    """What is held at a moment at which it may be most, in bytes; weights and prefixes come on top.

    Attributes:
        name: ``"voice"``, ``"prefill"``, ``"handover"`` or ``"step"``.
        growing: caches that a prefill or the token loop fills.
        static: of the decode engine's cache, as much as memory counts.
        engine: of its other buffers, such as the noise that the sampler draws ahead.
        workspace: all else: activations, logits, masks, what a kernel lays out anew.
    """

    name: str
    growing: int = 0
    static: int = 0
    engine: int = 0
    workspace: int = 0


@dataclass(frozen=True)
class Footprint:
    """What requests take on a model, beside its weights.

    Attributes:
        moments: of a request, in their order.
        kv: bytes that the cache holds in the end, exactly as its report says.
        prefixes: bytes of what is known of voices, which stays.
        modules: what holds weights, on the meta device.
        fallback: why it is not decoded as asked; None if it is.
    """

    moments: tuple[Moment, ...]
    kv: int
    prefixes: int
    modules: tuple[nn.Module, ...]
    fallback: str | None = None


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this block, counts the bytes of the tensors that are made on the meta device.

    Attributes:
        live: bytes held now.
        peak: the most that were held.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: WeakSet[Any] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known.update(_storages((args, kwargs)))  # what comes in has been counted, or was there before
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                finalize(storage, self._let_go, storage.nbytes())
        # Fused attention holds no scores, but a mask of booleans it first turns into numbers.
        mask = _mask(args, kwargs or {}) if func is _ATTENTION else None
        self.peak = max(self.peak, self.live + (0 if mask is None else mask.numel() * args[0].element_size()))
        return out

    def _let_go(self, nbytes: int) -> None:
        self.live -= nbytes


def _storages(tree: Any) -> list[Any]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_meta]


def _mask(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    mask: Tensor | None = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    return mask if mask is not None and mask.dtype == torch.bool else None


@contextmanager
def meta_without_autocast() -> Iterator[None]:
    """Within this block torch says that nothing is cast on the meta device, of which it knows no more than that.

    Older releases of transformers (5.2 does, 5.23 does not) ask whenever they turn keys, and torch raises.
    """
    asked = torch.is_autocast_enabled

    def enabled(*device: str) -> bool:
        return device != ("meta",) and asked(*device)

    with patch.object(torch, "is_autocast_enabled", enabled):
        yield


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def buffers(layers: Sequence[KVLayer]) -> int:
    """Bytes of these layers, written to or not: what a C library hands out again has been written to before."""
    return sum(kv.nbytes for kv in layers)


def written_static(kv: StaticKV, tokens: int, rows: int, device: str) -> int:
    """Bytes of the decode engine's cache that memory counts, with `tokens` in each of its first rows: on a CPU the pages that
    have been written to, elsewhere all."""
    if device != "cpu":
        return kv.nbytes
    total = 0
    for buffer in (*kv.keys[:1], *kv.values[:1]):
        _, heads, slots, dim = buffer.shape
        row = dim * buffer.element_size()
        pages: set[int] = set()
        for stretch in range(rows * heads):  # a head's tokens lie together, then come its slots that are free
            first, last = stretch * slots * row, stretch * slots * row + min(tokens, slots) * row - 1
            pages.update(range(first // mmap.PAGESIZE, last // mmap.PAGESIZE + 1))
        total += len(pages) * mmap.PAGESIZE * len(kv.keys)
    return total


def fill(layers: Sequence[KVLayer], tokens: int) -> None:
    """Let layers on the meta device, which hold something, see so many tokens more."""
    for kv in layers:
        assert kv.keys is not None and kv.values is not None
        keys, values = ((*t.shape[:2], tokens, t.shape[3]) for t in (kv.keys, kv.values))
        kv.append(kv.keys.new_empty(keys), kv.values.new_empty(values))


@torch.inference_mode()
def step_bytes(decoding: Decoding, seen: int) -> int:
    """Bytes that a step takes in which `seen` tokens are read, beyond what is there before and after."""
    watch = Watch()
    with watch:
        # As where requests draw and are of different lengths, which takes a mask.
        decoding.step(decoding.order[: min(seen, decoding.kv.slots)], False, Drawing(0, True, True))
    return watch.peak


def onednn_bytes(modules: Iterable[nn.Module]) -> int:
    """What oneDNN takes to multiply with plain weights: it lays out a layer's weights anew at each call."""
    return max((held([m.weight]) for module in modules for m in module.modules() if type(m) is nn.Linear), default=0)


# ---------------------------------------------------------------------- language models


@torch.inference_mode()
def language_footprint(manager: Any, setting: "Setting", context: int, tokens: int, device: str) -> Footprint:
    """What requests of a language model take.

    Args:
        manager: a `KVCacheManager` around a model on the meta device.
        setting: how it decodes.
        context: tokens of a request before those it makes.
        tokens: that it makes.
        device: ``"cpu"`` or ``"cuda"``: what is planned for.
    """
    model, rows = manager.model, setting.requests
    seen = context + tokens - 1  # the last token drawn is never run
    request = {"max_new_tokens": tokens, "attention_mask": torch.ones(1, 1)}
    reason = None if setting.backend == "off" else manager._why_not(None, None, request)
    keeps = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def run(count: int) -> tuple[int, Tensor]:
        ids = torch.empty(rows, count, dtype=torch.long, device="meta")
        # What is made on the host, such as masks, is made there as well when it is served: all of it counts on a CPU.
        with Watch() as watch, torch.device("meta"), manager._exactly():
            # Some models look for pads among token ids, which have no numbers here.
            embeds = model.get_input_embeddings()(ids)
            out = manager.runner(inputs_embeds=embeds, **handed(model, cache), use_cache=True, **keeps)
        return watch.peak, out.logits

    cache = manager.new_cache(rows)
    layers = hf.kv_layers(cache)
    peak, logits = run(context)
    first = buffers(layers)
    # `generate` hands out the logits of the last position once more, in fp32.
    last = rows * logits.shape[-1] * 4
    moments = [Moment("prefill", first, workspace=max(0, peak - account(hf.cache_layers(cache)).nbytes) + last)]
    if setting.backend == "off" or reason is not None:
        if seen > context:
            fill(layers, seen - context - 1)
            before = account(hf.cache_layers(cache)).nbytes
            peak, _ = run(1)
            grown = account(hf.cache_layers(cache)).nbytes - before
            moments.append(Moment("step", buffers(layers), workspace=max(0, peak - grown) + last))
        kv = account(hf.cache_layers(cache)).nbytes
        return Footprint(tuple(moments), kv, 0, (model,), reason)

    policy, stored = layers[0].policy, layers[0].stored
    with Watch() as watch:
        needed = manager._decoder.needed(policy, stored, tokens)
        decoding = manager._decoder.decoding(policy, rows, needed, logits.shape[-1], setting.backend)
    static = decoding.kv
    fixed = watch.live - static.nbytes  # noise, marks, counters
    moments.append(Moment("handover", first, written_static(static, context, rows, device), fixed, last))
    step = step_bytes(decoding, seen)
    moments.append(Moment("step", 0, written_static(static, seen, rows, device), fixed, last + step))
    return Footprint(tuple(moments), static.nbytes, 0, (model,))


# ---------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, by what they are for.

    Attributes:
        attention: projections of queries, keys, values and what comes of them.
        mlp: of the feed-forward layers.
        embeddings: of tokens and positions, and the head.
        other: norms, what encodes a voice, and what has no name that says more.
        originals: of the layers that decode in fewer bits, as they were loaded: they are there as long as the loaded
            model is.
    """

    attention: int
    mlp: int
    embeddings: int
    other: int
    originals: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.mlp + self.embeddings + self.other + self.originals


_PARTS = {  # by the innermost name that says something
    "other": ("norm", "ln_", "rotary"),
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "fc1", "fc2"),
    "embeddings": ("embed", "emb", "wte", "wpe", "head"),
}


def weights_of(modules: Sequence[nn.Module], loaded: nn.Module, keep_loaded: bool) -> Weights:
    """Bytes of the storages that these modules hold, and of those that only the loaded model has.

    Args:
        modules: what decodes.
        loaded: as it was loaded.
        keep_loaded: whether it is kept.
    """
    done: set[int] = set()
    parts = dict.fromkeys((*_PARTS, "originals"), 0)
    packed: set[int] = set()
    for module in modules:
        for name, inside in module.named_modules():
            part = _part(name)
            for tensor in (*inside.parameters(recurse=False), *inside.buffers(recurse=False)):
                parts[part] += _once(tensor, done)
            if isinstance(inside, PackedLinear) and inside.kernel not in packed:  # copies of a module share it
                packed.add(inside.kernel)
                parts[part] += inside.packed_bytes
    if keep_loaded:
        parts["originals"] = sum(_once(tensor, done) for tensor in (*loaded.parameters(), *loaded.buffers()))
    return Weights(**parts)


def _part(name: str) -> str:
    names = name.lower().split(".")
    for inner in reversed(names):
        for part, marks in _PARTS.items():
            if any(mark in inner for mark in marks):
                return part
    return "other"


def _once(tensor: Tensor, done: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage._cdata in done:
        return 0
    done.add(storage._cdata)
    return int(storage.nbytes())
