"""Memory and threads of this process: what it has, handing some back, and zeros that take none before they are written to."""

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_STATM = Path("/proc/self/statm")
_MAPS = Path("/proc/self/maps")
_SOFT = 1  # omp_pause_soft
_PROCESS = os.getpid()  # a forked one has another number


def resident_bytes() -> int | None:
    """Bytes of the machine's memory that this process holds now; None where the system does not tell.

    Where it tells only the most that the process ever held, as macOS does, that.
    """
    if sys.platform == "win32":
        return _working_set()
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, the others KiB


def _working_set() -> int | None:
    """What `resident_bytes` is on Windows, by its own call (psapi's PROCESS_MEMORY_COUNTERS)."""
    if (kernel32 := getattr(ctypes, "windll", None)) is None:
        return None
    kernel32 = kernel32.kernel32
    names = ("peak", "resident", "peak_paged", "paged", "peak_nonpaged", "nonpaged", "pagefile", "peak_pagefile")

    class Counters(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_uint32),
            ("faults", ctypes.c_uint32),
            *((name, ctypes.c_size_t) for name in names),
        ]

    found = Counters(size=ctypes.sizeof(Counters))
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    kernel32.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    told = kernel32.K32GetProcessMemoryInfo(kernel32.GetCurrentProcess(), ctypes.byref(found), found.size)
    return int(found.resident) if told else None


def malloc_trim() -> bool:
    """Hand back to the system what this process has let go of, such as weights that nothing holds any more; whether it can.

    glibc keeps freed memory for the next time; other C libraries, which do not, need no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return trim is not None


def release_threads() -> bool:
    """End the threads that OpenMP keeps for the calling one, which starts others with its next parallel work; whether it can.

    GNU's OpenMP, which comes with torch on Linux, lets a thread's workers wait for their next work awake only while all threads
    of the process together have no more workers than there are cores. With more they sleep after each piece of work, and a
    decode step, which has hundreds of small ones, takes up to twice as long. A second thread that decodes, where the first has
    loaded the model, is enough for that. So what has done its work lets go of its workers before another begins.

    OpenMP 5.0, ``omp_pause_resource_all``. Nothing is done with other libraries than GNU's, nor in a process that was forked: its
    library would wait for workers that only the parent has.
    """
    if os.getpid() != _PROCESS:
        return False
    ended = [pause(_SOFT) == 0 for pause in _pauses()]  # of each, also behind one that fails
    return bool(ended) and all(ended)


@cache
def _pauses() -> list[Callable[[int], int]]:
    """Of each of GNU's OpenMP libraries in this process: packages may bring their own."""
    try:
        lines = _MAPS.read_text(errors="replace").splitlines()
    except OSError:  # not on Linux
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
    found: list[Callable[[int], int]] = []
    for path in sorted(paths):
        with suppress(OSError, AttributeError):  # it was replaced meanwhile, or is no library
            found.append(ctypes.CDLL(path).omp_pause_resource_all)
    return found


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros ``[*shape]`` of which a CPU's memory holds only what has been written to; `torch.zeros` writes all at once."""
    if device.type != "cpu" or math.prod(shape) == 0:
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=dtype).view(*shape)
