"""Matrix products with few rows, on a CPU.

A prefill whose beginning is known, or requests that decode together, run some or some dozens of rows. There torch's fp32 linear layers spend more time on bringing
the weights into shape, which MKL does anew at each call, than on arithmetic; oneDNN, which torch ships as well, spends less.
With one or two rows it is the other way round. What it brings is a row of its own in ``benchmarks/voice_ttft.py``.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEWEST = 4
_MOST = 256


class _OneDNN(TorchFunctionMode):
    """Hands fp32 linear layers to oneDNN where the number of rows makes it the faster one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs and _suits(*args[:2]):
            bias = args[2] if len(args) > 2 else None
            return torch.ops.mkldnn._linear_pointwise(args[0], args[1], bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def few_rows(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """Within this block, this thread's fp32 linear layers of 4 to 256 rows run on oneDNN.

    The same sums in another order: results differ in the last place. Nothing is patched, and nothing else is affected. For
    a model that is not on a CPU or not in fp32, or a torch without oneDNN, the block does nothing.
    """
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32 or not has_few_rows():
        return nullcontext()
    return _OneDNN()


def has_few_rows() -> bool:
    """Whether this build of torch has oneDNN's linear layers."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _suits(states: Tensor, weight: Tensor) -> bool:
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and states.dtype == weight.dtype == torch.float32
        and states.device.type == "cpu"
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")  # which would have it in half precision
        and FEWEST <= states.numel() // max(1, states.shape[-1]) <= _MOST
    )
