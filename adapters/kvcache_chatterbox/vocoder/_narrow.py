"""The vocoder's networks in fewer bits: linear layers as `kvcache.models.quantize_linear` has them, and convolutions in 16 bits."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kvcache.models import LINEAR, Precision, has_half, quantize_linear, structural_copy

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}


def half_of(precision: Precision | None, device: torch.device) -> torch.dtype | None:
    """What convolutions compute in: with ``"int8"`` bf16, where the CPU computes in it fast; None as they are."""
    if precision == "int8" and not (device.type in ("cpu", "meta") and has_half("bf16")):
        return None
    return _HALF.get(precision or "")


class Narrow(nn.Module):
    """A convolution that computes in 16 bits, fp32 in and out.

    Args:
        convolution: whose weights it copies.
        dtype: in which it computes.
    """

    def __init__(self, convolution: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.convolution = copy.deepcopy(convolution).to(dtype)

    def forward(self, states: Tensor) -> Tensor:
        return torch.as_tensor(self.convolution(states.to(self._dtype))).to(states.dtype)


def narrowed(module: nn.Module, dtype: torch.dtype | None, but: str = "") -> Any:
    """A copy whose convolutions compute in `dtype`, and which shares all else.

    Args:
        dtype: None gives the module itself.
        but: those whose names begin so stay as they are; by default none.
    """
    if dtype is None:
        return module

    def narrow(name: str, part: nn.Module) -> nn.Module | None:
        if isinstance(part, LINEAR):
            return part  # weights that are packed go with the layer that packed them
        stays = bool(but) and name.startswith(but)
        return Narrow(part, dtype) if isinstance(part, nn.Conv1d | nn.ConvTranspose1d) and not stays else None

    return structural_copy(module, narrow)


def at_precision(module: nn.Module, precision: Precision | None) -> Any:
    """A copy of a part of the flow that computes in `precision`; the module itself where that is None."""
    if precision is None:
        return module
    device = next(module.parameters()).device
    made = quantize_linear(structural_copy(module, _plain), precision)
    return narrowed(made, half_of(precision, device)) if device.type in ("cpu", "meta") else made


def _plain(_name: str, part: nn.Module) -> nn.Module | None:
    """For a linear layer that could have an adapter, and has none (those of diffusers), one that is its weights alone."""
    if not (isinstance(part, nn.Linear) and getattr(part, "lora_layer", part) is None):
        return None
    plain = nn.Linear(part.in_features, part.out_features, part.bias is not None, device="meta")
    plain.weight, plain.bias = part.weight, part.bias
    return plain
