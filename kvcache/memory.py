"""What caches take: an exact estimate before, an account after, and memory that is taken as it is written to."""

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcache import views
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
        return views.report_text(self)

    def __rich__(self) -> Any:
        return views.report_rich(self)

    def _repr_html_(self) -> str:
        return views.report_html(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: ``nbytes``, ``seen``, ``stored``, ``evicted``, … and ``layers``, one by one."""
        return views.report_dict(self)


def account(layers: Sequence[Any]) -> CacheReport:
    """The report of a cache's layers, as `kvcache.hf.cache_layers` lists them."""
    return CacheReport(tuple(_layer_report(layer) for layer in layers))


def _layer_report(layer: Any) -> LayerReport:
    if (kv := getattr(layer, "kv", None)) is not None:
        heads = getattr(kv, "heads", ())
        return LayerReport(repr(kv.policy), kv.seen, kv.stored, kv.evicted, kv.capacity, kv.nbytes, heads)
    tensors = _tensors(layer)
    seen = layer.get_seq_length() if tensors else 0
    stored = tensors[0].shape[-2] if tensors and tensors[0].dim() == 4 else 0
    return LayerReport(
        f"the model's own {type(layer).__name__}", seen, stored, seen - stored, stored, layer_bytes(layer)
    )


def layer_bytes(layer: Any) -> int:
    """Bytes of what a layer holds, ours or the model's own."""
    if (kv := getattr(layer, "kv", None)) is not None:
        return int(kv.nbytes)
    # The model's own layers may hold a slice of a larger tensor: what counts is the storage behind it.
    held = [t.untyped_storage() for t in _tensors(layer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def _tensors(layer: Any) -> list[Tensor]:
    return [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]


def resident_bytes() -> int:
    """Bytes of the machine's memory that this process has now; where the system does not tell, the most it ever had."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


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
