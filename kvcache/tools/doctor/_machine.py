"""The machine: its processors, and the precisions that they compute in."""

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from kvcache.errors import InputError
from kvcache.models import Precision, check_precision, has_onednn, onednn_rows
from kvcache.tools.doctor._finding import Finding

_FEATURES = {  # as Linux calls them
    "AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 VNNI": "avx512_vnni", "AVX-512 BF16": "avx512_bf16",
    "AVX-512 FP16": "avx512_fp16", "AMX": "amx_tile", "AMX BF16": "amx_bf16", "AMX INT8": "amx_int8", "AMX FP16": "amx_fp16",
    "NEON": "asimd", "SVE": "sve", "Arm BF16": "bf16", "Arm I8MM": "i8mm",
}  # fmt: skip


def devices() -> Iterator[Finding]:
    """Processors: what they are, and how much of them this process may use."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    features = [name for name, flag in _FEATURES.items() if flag in flags]
    usable, threads = _usable_cpus(), torch.get_num_threads()
    said = f"{fields.get('model name', platform.machine())}; {usable:g} of {os.cpu_count()} CPUs usable, {threads} torch threads"
    said += f"; {', '.join(features) or 'torch runs it as'} ({torch.backends.cpu.get_cpu_capability()})"
    if threads > max(1, usable):
        advice = f"set OMP_NUM_THREADS={max(1, int(usable))}, or call torch.set_num_threads"
        yield Finding("devices", "cpu", "note", f"{said}: more threads than CPUs, which wait for each other", advice)
    else:
        yield Finding("devices", "cpu", "ok", said)
    if has_onednn():
        rows = onednn_rows()
        which = f"prefills and batches of {rows.start} to {rows.stop - 1} rows" if rows.start > 1 else "all of speech"
        yield Finding("devices", "cpu, fp32", "ok", f"oneDNN multiplies in {which}")
    else:
        said = "this torch has no oneDNN: prefills of a few rows are slower, and there is no bf16, fp16 or int8"
        yield Finding("devices", "cpu, fp32", "missing", said, "install torch from PyPI or pytorch.org")
    yield from _gpus()


def _usable_cpus() -> float:
    """CPUs that this process may use: by its affinity, and by a container's limit."""
    found = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.exists():
        quota, _, period = limit.read_text().strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            found = min(found, int(quota) / int(period))
    return found


def _gpus() -> Iterator[Finding]:
    built = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            of, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
            said = f"{of.name}, {of.major}.{of.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding("devices", f"cuda:{i}", "ok", said)
        return
    if shutil.which("nvidia-smi") is None:
        yield Finding("devices", "gpu", "missing", "no CUDA or ROCm device: everything runs on the CPU")
    elif built is None:
        said = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        yield Finding("devices", "gpu", "note", said, "install the torch for your CUDA, see pytorch.org/get-started")
    else:
        said = f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {built}) finds no device with it"
        yield Finding(
            "devices", "gpu", "note", said, "run nvidia-smi, and update the driver or take a torch for an older CUDA"
        )


def precisions(device: torch.device) -> Iterator[Finding]:
    """What linear layers can run in, on the CPU and on this device."""
    for at in dict.fromkeys((torch.device("cpu"), device)):
        for precision in get_args(Precision):
            try:
                check_precision(precision, at)
            except InputError as error:
                reason = str(error).partition(": ")[2] or str(error)
                yield Finding("precisions", f"{precision} on {at.type}", "missing", reason)
            else:
                yield Finding("precisions", f"{precision} on {at.type}", "ok", "linear layers can run in it")
