"""What a model takes while it serves, found without its weights: the code that serves runs on torch's meta device.

So the caches, the decode engine and the model's own forward pass say themselves what they allocate and when they let go of
it; there is no second account of them that could differ from what happens. See `kvcache.models.without_numbers`.
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from kvcache.cache import LayerCache
from kvcache.decoding import Decoding, Drawing, StaticKV
from kvcache.generation import GenerateCall
from kvcache.manager import KVCacheManager
from kvcache.models import (
    PackedLinear,
    Watch,
    cache_layers,
    encoder_input,
    kv_layers,
    reads_text,
    report_of,
    run_blank,
    without_numbers,
)

if TYPE_CHECKING:
    from kvcache.decoding import Setting


@dataclass(frozen=True)
class Moment:
    """What is held at a moment at which it may be most, in bytes; weights and prefixes come on top.

    Attributes:
        name: ``"voice"``, ``"encode"``, ``"prefill"``, ``"handover"``, ``"step"`` or ``"audio"``.
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
class VocoderFootprint:
    """What making audio of tokens takes.

    Attributes:
        modules: what holds its weights, on the meta device: as loaded, and what is made of them to run.
        voice: bytes of what it keeps of a voice.
        workspace: bytes that its largest run takes at most, beside these.
    """

    modules: tuple[nn.Module, ...]
    voice: int
    workspace: int


@dataclass(frozen=True)
class Footprint:
    """What requests take on a model, beside its weights.

    Attributes:
        moments: of a request, in their order.
        kv: bytes that the cache holds in the end, exactly as its report says.
        prefixes: bytes of what is known of voices, which stays.
        modules: what holds weights, on the meta device.
        fallback: why it is not decoded as asked; None if it is.
        vocoder: what makes audio of the tokens; None if that was not asked for.
    """

    moments: tuple[Moment, ...]
    kv: int
    prefixes: int
    modules: tuple[nn.Module, ...]
    fallback: str | None = None
    vocoder: VocoderFootprint | None = None


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def buffers(layers: Sequence[LayerCache]) -> int:
    """Bytes of these layers, written to or not: what a C library hands out again has been written to before."""
    return sum(kv.nbytes for kv in layers)


def written_static(kv: StaticKV, tokens: int, rows: int, device: str) -> int:
    """Bytes of the decode engine's cache that memory counts, with `tokens` in each of its first rows.

    On a CPU these are the pages that have been written to, elsewhere all.
    """
    if device != "cpu":
        return kv.nbytes
    total = 0
    for buffer in (*kv.keys[:1], *kv.values[:1]):
        _, heads, slots, dim = buffer.shape
        row = dim * buffer.element_size()  # a head's tokens lie together, then come its slots that are free
        total += _pages(rows * heads, slots * row, min(tokens, slots) * row) * mmap.PAGESIZE * len(kv.keys)
    return total


def _pages(count: int, stride: int, size: int) -> int:
    """Pages that `count` stretches of `size` bytes touch, of which one begins every `stride` bytes from a page's start."""

    def more(i: int) -> int:
        """Those that the stretch touches beyond the stretch before."""
        first, last = i * stride // mmap.PAGESIZE, (i * stride + size - 1) // mmap.PAGESIZE
        return last - first + (i == 0 or first != ((i - 1) * stride + size - 1) // mmap.PAGESIZE)

    if count == 0 or size == 0:
        return 0
    period = mmap.PAGESIZE // math.gcd(stride, mmap.PAGESIZE)  # after so many, one begins at a page's start again
    rounds, rest = divmod(count - 1, period)
    once = sum(map(more, range(1, period + 1))) if rounds else 0
    return more(0) + rounds * once + sum(map(more, range(1, rest + 1)))


def fill(layers: Sequence[LayerCache], tokens: int) -> None:
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
        decoding.step(
            decoding.order[: min(seen, decoding.kv.slots)],
            False,
            Drawing(0, True, True, rules=tuple(decoding.sampler.rules)),
        )
    return watch.peak


def onednn_bytes(modules: Iterable[nn.Module]) -> int:
    """What oneDNN takes to multiply with plain weights: it lays out a layer's weights anew at each call."""
    layers = (m for module in modules for m in module.modules() if type(m) is nn.Linear or type(m) is Conv1D)
    return max((held([m.weight]) for m in layers), default=0)


# ---------------------------------------------------------------------- language models


class _Blank:
    """A language model that runs without numbers, on one cache.

    Args:
        manager: around a model on the meta device.
        rows: that decode together.
        context: tokens of a request before those it makes.
    """

    def __init__(self, manager: KVCacheManager, rows: int, context: int) -> None:
        model = manager.model
        self._manager, self._rows, self.context = manager, rows, context
        self._more: dict[str, Any] = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        self.encoding = self.states = 0  # bytes that an encoder takes at most, and that its output takes
        if model.config.is_encoder_decoder:
            given = encoder_input(model, rows, context, "meta")
            self.context = 1 if reads_text(model) else context  # what the decoder begins with
            with without_numbers() as watch:
                self._more = {"encoder_outputs": model.get_encoder()(**given)}
            self.encoding = watch.peak
            self.states = held([self._more["encoder_outputs"][0]])
        self.cache = manager.new_cache(rows)
        self.layers = kv_layers(self.cache, some=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, written to or not: what a C library hands out again has been written to before."""
        return report_of(self.cache).nbytes

    def run(self, count: int) -> tuple[int, Tensor]:
        """Bytes that a pass of so many tokens takes at most, beside the cache as it was before, and the logits."""
        with without_numbers() as watch, self._manager.caches.exactly():
            out = run_blank(self._manager.observed_model, self.cache, self._rows, count, 0, "meta", **self._more)
        return watch.peak + self.states, out.logits

    def fill(self, count: int) -> None:
        """Let the cache see so many tokens more."""
        layers = cache_layers(self.cache)
        own = [i for i, layer in enumerate(layers) if isinstance(layer, DynamicLayer)]
        if any(type(layers[i]) is not DynamicSlidingWindowLayer for i in own):
            self.run(count)  # only the model knows what else belongs to a token
            return
        with without_numbers():
            fill([kv for kv in self.layers if kv.keys is not None], count)
            cache = getattr(self.cache, "self_attention_cache", self.cache)
            for i in own:
                if (held := layers[i]).keys is not None:
                    keys, values = (t.new_empty(*t.shape[:2], count, t.shape[3]) for t in (held.keys, held.values))
                    cache.update(keys, values, i)


@torch.inference_mode()
def language_footprint(
    manager: KVCacheManager, setting: "Setting", context: int, tokens: int, device: str
) -> Footprint:
    """What requests of a language model take.

    Args:
        manager: around a model on the meta device.
        setting: how it decodes.
        context: tokens of a request before those it makes: of an encoder-decoder that reads text, the encoder's.
        tokens: that it makes.
        device: ``"cpu"`` or ``"cuda"``: what is planned for.
    """
    model, rows = manager.model, setting.requests
    settings = {"max_new_tokens": tokens, "attention_mask": torch.ones(1, 1)}
    call = GenerateCall.of(model, manager.geometry, None, settings)
    reason = None if setting.backend == "off" else manager.engine.unsupported_reason(call)
    blank = _Blank(manager, rows, context)
    seen = blank.context + tokens - 1  # the last token drawn is never run
    peak, logits = blank.run(blank.context)
    first = blank.nbytes
    # `generate` hands out the logits of the last position once more, in fp32.
    last = rows * logits.shape[-1] * 4
    moments = [Moment("prefill", first, workspace=max(0, peak - first) + last)]
    if blank.encoding:
        moments.insert(0, Moment("encode", workspace=blank.encoding))
    if setting.backend == "off" or reason is not None:
        if seen > blank.context:
            if seen > blank.context + 1:
                blank.fill(seen - blank.context - 1)
            before = blank.nbytes
            peak, _ = blank.run(1)
            moments.append(Moment("step", blank.nbytes, workspace=max(0, peak - blank.nbytes + before) + last))
        return Footprint(tuple(moments), blank.nbytes, 0, (model,), reason)

    policy, stored = blank.layers[0].policy, blank.layers[0].stored
    decoder = manager.engine.decoder
    with Watch() as watch:
        needed = decoder.needed(policy, stored, tokens)
        decoding = decoder.decoding(policy, rows, needed, logits.shape[-1], setting.backend)
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


def bytes_in(modules: Iterable[nn.Module]) -> int:
    """Bytes of the storages that these modules hold, each counted once.

    They are of weights, of tables that are plain attributes, such as positions, and of what is packed for kernels.
    """
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    tensors = [
        tensor
        for part in parts
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False), *vars(part).values())
        if isinstance(tensor, Tensor)
    ]
    packed = {part.kernel: part.packed_bytes for part in parts if isinstance(part, PackedLinear)}
    return held(tensors) + sum(packed.values())


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
