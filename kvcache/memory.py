"""Memory of this process: what it has, handing some back, and zeros that take none before they are written to."""

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


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
