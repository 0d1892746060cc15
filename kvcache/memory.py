"""What caches take: an exact estimate before, an account after, and memory that is taken as it is written to."""

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcache.geometry import CacheGeometry
from kvcache.policies import KeepAll, SizePolicy
from kvcache.slots import slots_for


def estimate_bytes(
    geometry: CacheGeometry,
    tokens: int,
    *,
    rows: int = 1,
    policy: SizePolicy | Sequence[SizePolicy] | None = None,
    max_length: int | None = None,
    preallocate: bool = False,
    rerotate: bool = False,
) -> int:
    """Bytes that a cache holds once `tokens` have gone through it, exactly.

    Counts the layers that kvcache manages; those a model manages its own way are not in it.

    Args:
        geometry: of the model; for a hybrid, with only its full-attention layers counted.
        tokens: per row, pads among them.
        rows: batch size.
        policy, max_length, preallocate: as the cache will have them.
        rerotate: whether positions are re-rotated, which keeps the pinned keys twice.
    """
    policies = (
        [KeepAll() if policy is None else policy] * geometry.layers if not isinstance(policy, Sequence) else policy
    )
    key_bytes, value_bytes = (rows * size for size in geometry.layer_token_bytes)
    total = 0
    for given in policies:
        twice = given.pinned * key_bytes * len(policies) if rerotate else 0
        resolved = given.resolve((key_bytes + value_bytes) * len(policies), twice, max_length)
        limit = resolved.limit
        bound, stored = (max_length, tokens) if limit is None else (limit, min(tokens, limit))
        total += (key_bytes + value_bytes) * slots_for(stored, bound, preallocate)
        if rerotate and limit is not None:
            total += key_bytes * resolved.pinned
    return total


@dataclass(frozen=True)
class LayerReport:
    """One layer's account. `evicted` counts tokens that have left, per row; `capacity` counts slots.

    `heads` says how many tokens each KV head holds, where they differ; the other counts are then the fullest head's.
    """

    policy: str
    seen: int
    stored: int
    evicted: int
    capacity: int
    nbytes: int
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class CacheReport:
    """The account of a cache: what it has seen, what it holds and what that takes.

    Attributes:
        layers: one by one.
        enabled: False where everything is recomputed, and there is no cache.
        backend: what runs the decode steps, where that is the decode engine.
        fallback: why it is not what was asked for; None if it is.
    """

    layers: tuple[LayerReport, ...] = field(repr=False)
    enabled: bool = True
    backend: str | None = None
    fallback: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, over all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def seen(self) -> int:
        """Tokens that went through, per row."""
        return max((layer.seen for layer in self.layers), default=0)

    @property
    def stored(self) -> int:
        """Tokens that the fullest layer holds, per row."""
        return max((layer.stored for layer in self.layers), default=0)

    @property
    def evicted(self) -> int:
        """Evictions, summed over the layers."""
        return sum(layer.evicted for layer in self.layers)

    def __str__(self) -> str:
        if not self.enabled:
            return "KV cache disabled: every token is recomputed"
        lines = [
            f"{self.seen} tokens seen, {self.stored} kept, {self.nbytes / 2**20:.1f} MiB in {len(self.layers)} layers"
        ]
        lines.append(f"{'layers':>8} {'seen':>8} {'kept':>8} {'evicted':>8} {'slots':>8} {'MiB':>8}  policy")
        start = 0
        for i, layer in enumerate(self.layers):
            if i + 1 == len(self.layers) or self.layers[i + 1] != layer:  # equal neighbours share a line
                span = f"{start}" if start == i else f"{start}-{i}"
                size = layer.nbytes * (i + 1 - start) / 2**20
                lines.append(
                    f"{span:>8} {layer.seen:>8} {layer.stored:>8} {layer.evicted:>8} {layer.capacity:>8} {size:>8.1f}  {layer.policy}"
                )
                start = i + 1
        if self.backend is not None:
            lines.append(f"decoded by: {self.backend}")
        if self.fallback is not None:
            lines.append(f"not as asked: {self.fallback}")
        return "\n".join(lines)


def account(layers: Sequence[Any]) -> CacheReport:
    """The report of a cache's layers, as `kvcache.hf.cache_layers` lists them."""
    return CacheReport(tuple(_layer_report(layer) for layer in layers))


def _layer_report(layer: Any) -> LayerReport:
    if (kv := getattr(layer, "kv", None)) is not None:
        heads = getattr(kv, "heads", ())
        return LayerReport(repr(kv.policy), kv.seen, kv.stored, kv.evicted, kv.capacity, kv.nbytes, heads)
    tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]
    seen = layer.get_seq_length() if tensors else 0
    stored = tensors[0].shape[-2] if tensors and tensors[0].dim() == 4 else 0
    # The model's own layers may hold a slice of a larger tensor: what counts is the storage behind it.
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return LayerReport(
        f"the model's own {type(layer).__name__}", seen, stored, seen - stored, stored, sum(held.values())
    )


def give_back() -> bool:
    """Hand back to the system what this process has let go of, such as weights that nothing holds any more; whether it can.

    glibc keeps freed memory for the next time; other C libraries, which do not, need no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return trim is not None


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of which a CPU's memory holds only what has been written to; `torch.zeros` writes all of them at once."""
    if device.type != "cpu" or math.prod(shape) == 0:
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=dtype).view(*shape)
