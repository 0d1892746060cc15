"""Keys and values in 8 or 4 bits: the setting, the numbers, and the storage that quantizes each token by itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcache.cache._storage import Side, Storage
from kvcache.errors import GeometryError, InputError

_CHANNELS = 32  # of a token in 4 bits share a scale, where the head is a multiple of them


@dataclass(frozen=True)
class KVQuantization(Storage):
    """Keys and values in few bits.

    Where the oldest tokens leave first, neighbouring tokens are quantized together, after KIVI (Liu et al.,
    arXiv:2402.02750): keys per channel over a group of tokens, values per token. Where tokens leave one by one, as under
    `SnapKV`, and with ``group_size=None``, each token is quantized by itself: in 8 bits with one scale, in 4 bits with one
    for each 32 channels.

    8 bits are symmetric around zero; 4 bits count from the smallest value, two numbers to a byte. Scales and minima have
    the dtype of the states, so that a large one does not overflow; those of fp32 states are bf16. What is read is off by
    at most half a scale, and its rounding to that dtype.

    Attributes:
        keys: bits of the keys, 8 or 4.
        values: bits of the values, 8 or 4; by default those of the keys.
        group_size: tokens that share the scale of a key channel; at least 8, and even. None: each token by itself.

    Raises:
        InputError: for anything else.
    """

    keys: int
    values: int | None = None
    group_size: int | None = 64

    def __post_init__(self) -> None:
        if self.values is None:
            object.__setattr__(self, "values", self.keys)
        for name, bits in (("keys", self.keys), ("values", self.values)):
            if isinstance(bits, bool) or bits not in (8, 4):
                raise InputError(f"{name}={bits!r} must be 8 or 4 bits; for full precision give no quantization")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 8 or size % 2):
            raise InputError(
                f"group_size={size!r} must be an even number of tokens, at least 8, such as 32 or 64; or None, to quantize "
                "each token by itself"
            )

    def by_token(self) -> "KVQuantization":
        return replace(self, group_size=None)

    def bits(self, side: Side) -> int:
        """Of keys, or of values."""
        bits = self.keys if side == "keys" else self.values
        assert bits is not None
        return bits

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Raise `GeometryError` for states ``[batch, heads, tokens, head_dim]`` that are no floating-point numbers of one dtype."""
        if not keys.is_floating_point() or keys.dtype != values.dtype:
            raise GeometryError(
                f"keys are {keys.dtype} and values {values.dtype}; to be quantized both must be of one floating-point dtype"
            )

    # ------------------------------------------------------------------ each token by itself

    def encode(self, states: Tensor, side: Side) -> dict[str, Tensor]:
        bits = self.bits(side)
        grouped = torch.unflatten(states, 3, (-1, _channels(states.shape[3], bits)))
        found = quantized(grouped, bits, -1)
        codes = found["codes"].flatten(3)
        if bits == 4:
            found = {name: part[..., 0] for name, part in found.items()}
            codes = pad(codes, (0, codes.shape[3] % 2))
            first, second = codes.chunk(2, -1)
            return found | {"codes": first | second << 4}
        return {"codes": codes, "scale": found["scale"][..., 0]}

    def decode(self, held: Mapping[str, Tensor], side: Side, like: Tensor) -> Tensor:
        dim, bits, codes = like.shape[3], self.bits(side), held["codes"]
        out = like.new_empty((*codes.shape[:3], dim))
        if bits == 8:
            return out.copy_(codes).mul_(held["scale"])
        half = codes.shape[3]
        out[..., :half].copy_(codes & 15)
        out[..., half:].copy_((codes >> 4)[..., : dim - half])
        grouped = torch.unflatten(out, 3, (-1, _channels(dim, bits)))
        grouped.mul_(held["scale"][..., None]).add_(held["low"][..., None])
        return out


def _channels(dim: int, bits: int) -> int:
    return _CHANNELS if bits == 4 and dim % _CHANNELS == 0 else dim


# ---------------------------------------------------------------------- the numbers


def quantized(states: Tensor, bits: int, dim: int) -> dict[str, Tensor]:
    """Codes, scales and, for 4 bits, minima of states; scales and minima are shared along `dim`.

    Args:
        states: of any shape.
        bits: 8: codes are int8 from -127 to 127. 4: they are uint8 from 0 to 15, one to a byte.
        dim: of the states.
    """
    exact, dtype = states.float(), scale_dtype(states.dtype)
    levels = 127 if bits == 8 else 15
    low = _rounded_down(exact.amin(dim, keepdim=True), dtype) if bits == 4 else None
    spread = exact.abs().amax(dim, keepdim=True) if low is None else exact.amax(dim, keepdim=True) - low
    # Rounded to nearest, a scale below fp16's normal numbers could be much too small: so it is rounded up, to be off by
    # no more than half. And 0 is no scale; nor is one by which the largest value would come back as infinity.
    info = torch.finfo(dtype)
    least = info.smallest_normal * (info.eps if dtype == torch.float16 else 1)
    most = (info.max - (torch.zeros_like(spread) if low is None else low.clamp_min(0))) / levels * (1 - info.eps)
    up = 1 + torch.finfo(dtype).eps / 2 if states.dtype != dtype else 1
    scale = (spread / levels * up + least / 2).clamp(max=most)  # NaN stays NaN
    scale = scale.masked_fill_(spread.isinf(), torch.nan).to(dtype).clamp_min_(least)
    codes = exact / scale.float() if low is None else (exact - low).div_(scale.float())
    codes.round_().nan_to_num_(0).clamp_(-127 if low is None else 0, levels)
    if low is None:
        return {"codes": codes.to(torch.int8), "scale": scale}
    return {"codes": codes.to(torch.uint8), "scale": scale, "low": low.to(dtype)}


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of scales and minima: 16 bits. Those of fp32 states have its range."""
    return torch.bfloat16 if dtype.itemsize > 2 else dtype


def _rounded_down(low: Tensor, dtype: torch.dtype) -> Tensor:
    """The next number of a 16-bit dtype that is not above, in fp32."""
    rounded = low.to(dtype)
    lower = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where((rounded.float() > low) & lower.isfinite(), lower, rounded).float()


def check_storage(storage: Any) -> None:
    """Raise `InputError` for what is no `Storage`."""
    if not isinstance(storage, Storage):
        raise InputError(
            f"storage={storage!r} must be a Storage, such as KVQuantization(8) or KVQuantization(4); leave it out to hold "
            "keys and values as they come"
        )
