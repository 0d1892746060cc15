"""fp32 matrix products on a CPU, by oneDNN where it is faster than what torch takes by itself.

torch multiplies fp32 matrices with MKL. For a few rows, as in a prefill whose beginning is known or in requests that decode
together, MKL spends more time on bringing the weights into shape, which it does anew at each call, than on arithmetic; oneDNN,
which torch ships as well, spends less. And MKL has its fast kernels for Intel's processors alone: on others oneDNN is two to
three times as fast for any number of rows. What it brings is a row of its own in ``benchmarks/voice_ttft.py`` and
``benchmarks/end_to_end.py``.
"""

import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FEW = range(4, 257)  # with one or two rows MKL is the faster one on its own processors, and with very many
_ALL = range(1, sys.maxsize)


@cache
def onednn_rows() -> range:
    """The numbers of rows for which oneDNN multiplies faster than torch's own choice, on this processor."""
    mkl: Any = torch.backends.mkl
    return _ALL if mkl.is_available() and _vendor() not in ("", "GenuineIntel") else _FEW


def _vendor() -> str:
    """Who made an x86 processor, as it says itself; nothing where that is not known, or it is another kind."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ""
    names = "GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls"
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = platform.processor()  # on Windows
    return next((name for name in names if name in said), "")


class _OneDNN(TorchFunctionMode):
    """Hands fp32 products to oneDNN where the number of rows makes it the faster one."""

    def __init__(self, rows: range) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs:
            if func is torch.nn.functional.linear and self._suits(args[0], args[1]):
                bias = args[2] if len(args) > 2 else None
                return torch.ops.mkldnn._linear_pointwise(args[0], args[1], bias, "none", [], "")
            # GPT-2's layers, whose weights lie the other way round.
            if func is torch.addmm and self._rows is _ALL and args[0].ndim == 1 and self._suits(args[1], args[2]):
                return torch.ops.mkldnn._linear_pointwise(args[1], args[2].t(), args[0], "none", [], "")
        return func(*args, **(kwargs or {}))

    def _suits(self, states: Tensor, weight: Tensor) -> bool:
        return (
            type(weight) in (Tensor, torch.nn.Parameter)
            and states.dtype == weight.dtype == torch.float32
            and states.device.type == "cpu"
            and weight.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")  # which would have it in half precision
            and states.numel() // max(1, states.shape[-1]) in self._rows
        )


def onednn_linear(module: torch.nn.Module, rows: int | None = None) -> AbstractContextManager[Any]:
    """Within this block, this thread's fp32 products run on oneDNN where it is faster, see `onednn_rows`.

    The same sums in another order: results differ in the last place. Nothing is patched, and nothing else is affected. For
    a module that is not on a CPU or not in fp32, or a torch without oneDNN, the block does nothing.

    Args:
        module: that is run.
        rows: of its products, where all have as many: the block does nothing where it would change none.
    """
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32 or not has_onednn():
        return nullcontext()
    if rows is not None and rows not in onednn_rows():
        return nullcontext()
    return _OneDNN(onednn_rows())


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's linear layers."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
