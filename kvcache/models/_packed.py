"""Linear layers of packed weights on a CPU: torch's kernels for bf16, fp16 and int8."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvcache.models._fingerprint import tensor_digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_TINY = torch.finfo(torch.float32).tiny
# Without VNNI kernels add pairs of products in 16 bits, where activations of 8 bits could overflow.
_LEVELS = 127 if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() else 63

# The packed weights of torch's CPU kernels are opaque to its compiler, so compiled and traced steps name them by number. That
# is a tensor: an input of what is compiled, which another process has with a number of its own.
_kernels: dict[int, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {}  # an operator, and what follows its input
_numbers = itertools.count()
_torch_library: Any = torch.library  # has no types
_library = _torch_library.Library("kvcache", "FRAGMENT")
_library.define("packed_linear(Tensor states, Tensor kernel, int out_features) -> Tensor")


def _run(states: Tensor, kernel: Tensor, _out_features: int) -> Tensor:
    operator, others = _kernels[int(kernel)]
    return operator(states, *others)


_library.impl("packed_linear", _run, "CPU")
_torch_library.register_fake(
    "kvcache::packed_linear",
    lambda states, kernel, out_features: states.new_empty(
        (*states.shape[:-1], out_features), dtype=states.dtype if states.is_floating_point() else torch.float32
    ),
    lib=_library,
)


class PackedLinear(nn.Module):
    """Linear layers of packed weights on a CPU, fp32 in and out.

    Layers that read the same input ``[..., in]`` (queries, keys and values; gate and up) are one product ``[..., out]``,
    computed by whoever asks first: fewer and larger calls. Their outputs stand side by side.

    Args:
        sources: ``nn.Linear`` layers or GPT-2's ``Conv1D`` in fp32, with the same input.
        precision: what their weights become.
    """

    ASIDE = frozenset(("kernel", "number"))  # of this process's own, which says nothing of the weights

    digest: Tensor
    bias: Tensor | None
    sums: Tensor | None

    def __init__(self, sources: Sequence[nn.Linear | Conv1D], precision: str) -> None:
        super().__init__()
        weight = torch.cat([_rows_out(source) for source in sources])
        self.widths = [_rows_out(source).shape[0] for source in sources]
        self.out_features, self.in_features = weight.shape
        self.precision = precision
        biases = [source.bias for source in sources]
        zeros = [weight.new_zeros(width) for width in self.widths]
        bias = (
            None
            if all(b is None for b in biases)
            else torch.cat([b.detach() if b is not None else z for b, z in zip(biases, zeros, strict=True)])
        )
        self.register_buffer("bias", bias)
        self.kernel = next(_numbers)
        self.number = torch.tensor(self.kernel, device="cpu")
        sums = None
        if weight.is_meta:
            self.register_buffer("digest", weight.new_empty(hashlib.sha256().digest_size, dtype=torch.uint8))
            self.register_buffer("sums", weight.new_empty(self.out_features) if precision == "int8" else None)
            return
        # So that a model's fingerprint still tells weights apart that it can no longer read.
        said = hashlib.sha256(f"{precision} {tensor_digest(weight)}".encode()).digest()
        self.register_buffer("digest", torch.tensor(list(said), dtype=torch.uint8))
        if precision == "int8":
            _kernels[self.kernel], sums = _int8(weight)
        else:
            _kernels[self.kernel] = _half(weight, precision)
        self.register_buffer("sums", sums)
        finalize(self, _kernels.pop, self.kernel, None)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights in the kernel's hands; int8 ones have a scale and a zero point for each output."""
        if self.precision == "int8":
            return self.out_features * (self.in_features + 8)
        return self.out_features * self.in_features * DTYPES[self.precision].itemsize

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.widths}, {self.precision}"

    def forward(self, states: Tensor) -> Tensor:
        if self.sums is not None:
            # Each token's numbers are told apart between its own least and greatest, and 0 stays 0: where one channel is
            # huge, all others stand close to it. What moves them to 0 and above comes back as it is a constant: times the
            # sum of each output's weights. Unsigned, as VNNI multiplies: with signed ones, oneDNN is a thousand times
            # slower on processors without AMX.
            low, high = states.amin(-1, keepdim=True).clamp_max(0), states.amax(-1, keepdim=True).clamp_min(0)
            scale = ((high - low) / (2 * _LEVELS)).clamp_min(_TINY)
            middle = ((high + low) / (2 * scale)).round()
            levels = ((states / scale).round() - (middle - _LEVELS)).clamp(0, 2 * _LEVELS)
            out = (self._product(levels.to(torch.uint8)) + (middle - _LEVELS) * self.sums) * scale
        else:
            out = self._product(states.to(DTYPES[self.precision])).to(states.dtype)
        return out if self.bias is None else out + self.bias

    def _product(self, states: Tensor) -> Tensor:
        flat = states.reshape(-1, self.in_features)  # as the kernels would do, at each call
        out = torch.ops.kvcache.packed_linear(flat, self.number, self.out_features)
        return torch.as_tensor(out).view(*states.shape[:-1], self.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        return self  # immutable, and the number stands for weights that cannot be copied


class Part(nn.Module):
    """One of several layers that are computed together."""

    def __init__(self, together: PackedLinear, index: int) -> None:
        super().__init__()
        self.together = together
        self.index = index
        self.shared: list[tuple[Tensor, tuple[Tensor, ...]] | None] = [None]

    def of(self, first: "Part") -> "Part":
        self.shared = first.shared
        return self

    def forward(self, states: Tensor) -> Tensor:
        held = self.shared[0]
        if held is None or held[0] is not states:  # also where another thread has taken the place meanwhile
            held = (states, self.together(states).split(self.together.widths, -1))
        self.shared[0] = None if self.index == len(self.together.widths) - 1 else held
        return held[1][self.index]


LINEAR = (nn.Linear, Conv1D, PackedLinear, Part)
"""What a linear layer is."""


def _rows_out(source: nn.Linear | Conv1D) -> Tensor:
    """The weights as ``[out, in]``."""
    weight = source.weight.detach()
    return weight.t() if isinstance(source, Conv1D) else weight


def _int8(weight: Tensor) -> tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], Tensor]:
    """The product with these weights, and the sum of each output's weights as they are after rounding."""
    scale = weight.abs().amax(1).clamp_min(_TINY) / 127
    rounded = (weight / scale[:, None]).round()
    packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)
    zero = torch.zeros(len(scale), dtype=torch.int32)
    others: tuple[Any, ...] = (1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return (torch.ops.onednn.qlinear_pointwise.default, others), rounded.sum(1) * scale


def _half(weight: Tensor, precision: str) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(DTYPES[precision]).contiguous())
    return torch.ops.mkldnn._linear_pointwise.default, (packed, None, "none", [], "")


def has_half(precision: str) -> bool:
    """Whether this CPU computes fast in ``"bf16"`` or ``"fp16"``."""
    able = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    return bool(torch._C._has_mkldnn and able is not None and able())


def reads_half_caches() -> bool:
    """Whether torch's attention over a bf16 cache is fast on this CPU. Without AMX it takes several times as long as over fp32."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(tiles is not None and tiles())
