"""What works on this machine, what does not, and why: what `kvcache doctor` says."""

import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from kvcache.decoding import BackendName, ProgramFiles, backend_for, kernel_reason
from kvcache.errors import InputError, KVCacheError
from kvcache.installed import APART, MEND, audio_fault, torchaudio_fault
from kvcache.manager import KVCacheManager
from kvcache.models import TESTED, Precision, check_precision, has_onednn, onednn_rows
from kvcache.prefixes import PrefixKey, PrefixSnapshot
from kvcache.prefixes.stores import BlobStore, DiskStore, default_folder, open_store, shown_place, store_secret
from kvcache.tools._targets import GROUP, lacking

State = Literal["ok", "note", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: what it is about: ``"packages"``, ``"devices"``, ``"back ends"``, ``"stores"``.
        name: of the thing.
        state: ``"ok"``; ``"note"``, works but is worth a look; ``"missing"``, not there and not needed; ``"broken"``.
        said: what was found.
        advice: what to do about it; None if nothing is to be done.
    """

    section: str
    name: str
    state: State
    said: str
    advice: str | None = None


def diagnose(
    store: str | None = None, *, secret: bytes | None = None, namespace: str | None = None, compiling: bool = False
) -> list[Finding]:
    """Look at packages, devices, ways to decode and stores; nothing is changed, and what is written is removed again.

    Args:
        store: the place of one to try besides the default one, see `kvcache.prefixes.stores.open_store`.
        secret, namespace: of that store.
        compiling: also compile a decode step, which takes up to minutes.

    Raises:
        InputError: if `store` cannot be the place of one.
    """
    asked = any(given is not None for given in (store, secret, namespace))
    opened = open_store(store, secret=secret, namespace=namespace) if asked else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        *_packages(),
        *_torchaudio(),
        *_chatterbox(),
        *_adapters(),
        *_devices(),
        *_precisions(device),
        *_backends(device, compiling),
    ]
    found.append(_programs())
    found.append(_default_store())
    if opened is not None:
        with opened:
            found.append(_round_trip(opened, shown_place(store), secret))
    return found


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing that is needed is broken."""
    return all(finding.state != "broken" for finding in findings)


# ---------------------------------------------------------------------- packages

_FOR = {
    "audio": "Chatterbox's audio",
    "bench": "the benchmarks of a checkout, and .gguf files",
    "chatterbox": "Chatterbox",
    "cli": "this command",
    "metrics": "metrics for Prometheus",
    "plot": "plots",
    "ray": "replicas on Ray",
    "redis": "RedisStore: voices shared by a fleet",
    "remote": "RemoteStore: S3, GCS, SSH and what else fsspec reaches",
    "server": "the HTTP server of the examples",
}
_FOR_WHO_WORKS_ON_IT = {"docs", "test"}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    yield Finding("packages", "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    own = _installed("kvcache")
    if own is None:
        said = "found on the path, but not installed: what it needs is not known"
        yield Finding("packages", "kvcache", "note", said, "pip install kvcache")
        return
    yield Finding("packages", "kvcache", "ok", f"{own}, in {Path(__file__).parent}")
    needed = [Requirement(line) for line in requires("kvcache") or []]
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _needed(requirement)
    for extra in metadata("kvcache").get_all("Provides-Extra") or []:
        if extra in _FOR_WHO_WORKS_ON_IT:
            continue
        inside = [r for r in needed if r.marker is not None and r.marker.evaluate({"extra": extra})]
        wanting = [r for r in inside if not _fits(r) and not (r.marker is None or r.marker.evaluate({"extra": ""}))]
        there = ", ".join(f"{r.name} {_installed(r.name)}" for r in inside if r not in wanting)
        purpose = f"for {_FOR[extra]}" if extra in _FOR else "optional"
        if wanting:
            lacking = ", ".join(
                f"{r.name} ({_installed(r.name) or 'not installed'}, needs {r.specifier})" for r in wanting
            )
            yield Finding(
                "packages", f"[{extra}]", "missing", f"{purpose}: {lacking}", f'pip install "kvcache[{extra}]"'
            )
        else:
            yield Finding("packages", f"[{extra}]", "ok", f"{purpose}: {there}")
    triton = _installed("triton")
    if triton is not None:
        yield Finding("packages", "triton", "ok", f"{triton}, for kernels on a GPU")
    elif torch.version.cuda is not None or torch.version.hip is not None:
        said = "not installed: no compiled steps and no kernel of our own on a GPU"
        yield Finding("packages", "triton", "missing", said, "pip install triton")


def _fits(requirement: Requirement) -> bool:
    found = _installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _needed(requirement: Requirement) -> Finding:
    name, found = requirement.name, _installed(requirement.name)
    if not _fits(requirement):
        said = f"{found or 'not installed'}; kvcache needs {requirement.specifier}"
        return Finding(
            "packages", name, "broken", said + _pinned_by(name), f'pip install "{name}{requirement.specifier}"'
        )
    if name == "transformers" and found is not None and Version(found).release[:2] > Version(TESTED[1]).release:
        said = f"{found}: newer than what the tests have run on, {TESTED[0]} to {TESTED[1]}; whether it works is told below"
        return Finding("packages", name, "note", said)
    return Finding("packages", name, "ok", str(found))


def _pins() -> dict[str, Requirement]:
    """What chatterbox-tts asks for here, by name; nothing if it is not installed."""
    found = [Requirement(line) for line in requires("chatterbox-tts") or []] if _installed("chatterbox-tts") else []
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def _pinned_by(name: str) -> str:
    pin = _pins().get(name)
    if pin is None or not any(part.operator == "==" for part in pin.specifier):
        return ""
    return f" (chatterbox-tts pins {name}{pin.specifier}: install that one with --no-deps)"


def _torchaudio() -> Iterator[Finding]:
    if (fault := torchaudio_fault()) is not None:
        said = f"{_installed('torchaudio')} is installed and does not load ({fault}); beside it transformers fails without kvcache"
        yield Finding("packages", "torchaudio", "broken", said, MEND)


def _chatterbox() -> Iterator[Finding]:
    own = _installed("chatterbox-tts")
    if own is None:
        said = "not installed: no Chatterbox models"
        yield Finding("packages", "chatterbox-tts", "missing", said, f"pip install --no-deps {APART.split()[0]}")
        return
    pins = _pins().values()
    other = [
        f"{pin.name}{pin.specifier} ({_installed(pin.name)} is here)"
        for pin in pins
        if _installed(pin.name) is not None and not _fits(pin)
    ]
    said, advice = own, None
    if other:
        said += f"; it pins {', '.join(other)}, which T3 does not need here"
        advice = "install and upgrade it with pip's --no-deps, or these are replaced"
    yield Finding("packages", "chatterbox-tts", "ok", said, advice)
    if (fault := audio_fault()) is None:
        yield Finding("packages", "Chatterbox's audio", "ok", "its vocoder and its watermarker load")
    else:
        state: State = "missing" if fault[0].startswith("not installed") else "broken"
        yield Finding("packages", "Chatterbox's audio", state, f"{fault[0]}; speech tokens need none of it", fault[1])


def _adapters() -> Iterator[Finding]:
    """What brings models by name, loaded."""
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            entry.load()
        except ModuleNotFoundError as error:
            said = f"{entry.value} needs a package that is not installed: {error.name}"
            yield Finding(
                "packages", f"models of {entry.name}", "missing", said, f'pip install "{lacking(entry, error)}"'
            )
        except Exception as error:  # whatever an adapter's import raises
            said = f"{entry.value} does not load: {type(error).__name__}: {error}"
            yield Finding("packages", f"models of {entry.name}", "broken", said, "install what it needs, or remove it")
        else:
            yield Finding("packages", f"models of {entry.name}", "ok", f"known by name to the commands, {entry.value}")


# ---------------------------------------------------------------------- devices

_FEATURES = {  # as Linux calls them
    "AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 VNNI": "avx512_vnni", "AVX-512 BF16": "avx512_bf16",
    "AVX-512 FP16": "avx512_fp16", "AMX": "amx_tile", "AMX BF16": "amx_bf16", "AMX INT8": "amx_int8", "AMX FP16": "amx_fp16",
    "NEON": "asimd", "SVE": "sve", "Arm BF16": "bf16", "Arm I8MM": "i8mm",
}  # fmt: skip


def _devices() -> Iterator[Finding]:
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


def _precisions(device: torch.device) -> Iterator[Finding]:
    for at in dict.fromkeys((torch.device("cpu"), device)):
        for precision in get_args(Precision):
            try:
                check_precision(precision, at)
            except InputError as error:
                reason = str(error).partition(": ")[2] or str(error)
                yield Finding("precisions", f"{precision} on {at.type}", "missing", reason)
            else:
                yield Finding("precisions", f"{precision} on {at.type}", "ok", "linear layers can run in it")


# ---------------------------------------------------------------------- ways to decode


def _backends(device: torch.device, compiling: bool) -> Iterator[Finding]:
    """Each is tried on a tiny model, whose tokens are known from `generate` without any of ours."""
    try:
        tried = _trial(device)
    except Exception as error:  # of transformers or a driver: whatever it is, nothing works then
        said = f"a tiny model does not run on {device}: {type(error).__name__}: {error}"
        yield Finding("back ends", "transformers", "broken", said, "check the versions above")
        return
    yield _tried("the cache in generate", partial(tried, "off"))
    compiler = _no_compiler(device)
    for name in get_args(BackendName):
        missing = backend_for(name, device)[1]
        if missing is not None:
            yield Finding("back ends", name, "missing", f"{missing}; compile is used instead")
        elif "compile" in name and compiler is not None:
            yield Finding("back ends", name, "missing", *compiler)
        elif "compile" in name and not compiling:
            said = "its compiler is there; whether it compiles a step takes a minute to see"
            yield Finding("back ends", name, "ok", said, "kvcache doctor --compile")
        else:
            yield _tried(name, partial(tried, name))
    reason = kernel_reason(device)
    said = "reads the cache in each step" if reason is None else f"not used on this machine: {reason}"
    yield Finding("back ends", "Triton kernel", "ok" if reason is None else "missing", said)


def _trial(device: torch.device) -> Callable[[str], str | None]:
    """What decodes a tiny model by a back end, and gives None if its tokens are right, else what is wrong."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, tokens = 64, 24
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model = model.eval().to(device)
    prompt = torch.arange(8, device=device)[None]
    asked: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "max_new_tokens": tokens,
        "eos_token_id": vocabulary,  # no token: only the length ends it
        "pad_token_id": vocabulary,
    }
    expected = _quietly(model.generate)(prompt, **asked)[:, prompt.shape[1] :]

    @_quietly
    def tried(backend: str) -> str | None:
        manager = KVCacheManager(model)
        got = torch.cat(list(manager.stream(prompt, backend=backend, **asked)), -1).reshape(1, -1)  # type: ignore[arg-type]
        fallback = manager.report().fallback
        manager.release()
        if fallback is not None:
            return f"was not used: {fallback}"
        return (
            None if torch.equal(got, expected) else f"gave {got.tolist()}, and generate without it {expected.tolist()}"
        )

    return tried


def _quietly(call: Callable[..., Any]) -> Callable[..., Any]:
    """What transformers warns of is not what was asked."""

    def quiet(*args: Any, **kwargs: Any) -> Any:
        log = logging.getLogger("transformers")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return call(*args, **kwargs)
        finally:
            log.setLevel(level)

    return quiet


def _tried(name: str, attempt: Callable[[], str | None]) -> Finding:
    began = time.perf_counter()
    try:
        wrong = attempt()
    except Exception as error:  # of a compiler, a driver or transformers: whatever it is, this way does not work
        lines = str(error).strip().splitlines() or [""]
        wrong = f"failed: {type(error).__name__}: {lines[0]}"
    if wrong is not None:
        return Finding("back ends", name, "broken", wrong, "check the versions above; backend='off' does without")
    took = time.perf_counter() - began
    return Finding("back ends", name, "ok", f"a tiny model's tokens are those of plain generate ({took:.1f} s)")


def _no_compiler(device: torch.device) -> tuple[str, str] | None:
    """What torch's compiler lacks to make code for a device, and what to do; None if it lacks nothing that can be told."""
    if device.type != "cpu":
        if _installed("triton") is None:
            return "torch's compiler makes Triton kernels on a GPU, and triton is not installed", "pip install triton"
        names, source = [os.environ.get("CC"), "cc", "gcc", "clang"], "#include <Python.h>\n"
    else:
        names, source = [os.environ.get("CXX"), "g++", "clang++", "c++"], "#include <Python.h>\n#include <omp.h>\n"
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        return (
            "torch's compiler needs a C++ compiler, and there is none on the path",
            "install g++ (apt install g++), or set CXX",
        )
    language = "c" if device.type != "cpu" else "c++"
    command = [compiler, "-fsyntax-only", "-fopenmp", f"-I{sysconfig.get_path('include')}", "-x", language, "-"]
    try:
        ran = subprocess.run(command, input=source, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} does not run: {error}", "install g++, or set CXX"
    if ran.returncode:
        said = next((line for line in ran.stderr.splitlines() if "error" in line), ran.stderr.strip()[:200])
        return (
            f"{compiler} cannot compile what torch's compiler writes: {said}",
            "install Python's headers (apt install python3-dev)",
        )
    return None


def _programs() -> Finding:
    """Steps that earlier processes have compiled."""
    files = ProgramFiles()
    try:
        held, reason = files.held(), files.unsupported_reason()
    except InputError as error:
        return Finding("back ends", "compiled steps", "note", str(error), _ELSEWHERE)
    if reason is not None:
        return Finding(
            "back ends", "compiled steps", "note", f"none are read or kept: {reason}", "mend that, or see KVCACHE_HOME"
        )
    size = sum(size for _, size in held) / 2**20
    said = f"{len(held)} kept for the next process in {files.folder}, {size:.1f} MiB; it is always safe to remove them"
    return Finding("back ends", "compiled steps", "ok", said)


# ---------------------------------------------------------------------- stores


_ELSEWHERE = "set KVCACHE_HOME to a folder that may be written to"


def _default_store() -> Finding:
    """The folder of the default store, tried: by a round trip if it is there, else by making a folder where it would be."""
    try:
        folder = default_folder()
    except InputError as error:
        return Finding("stores", "default", "broken", str(error), _ELSEWHERE)
    if str(folder).startswith("~"):
        said = f"KVCACHE_HOME is {folder}, and no shell has put your home there: it is a folder of that name in {Path.cwd()}"
        return Finding("stores", "default", "broken", said, f"set KVCACHE_HOME={folder.expanduser()}")
    try:
        if folder.is_dir():
            tried = _round_trip(DiskStore(folder, None), str(folder), None, "default", _ELSEWHERE)
            return tried if tried.state == "broken" else _with_room(tried.said, shutil.disk_usage(folder).free)
        if folder.exists():
            return Finding("stores", "default", "broken", f"{folder} is a file, and no folder", _ELSEWHERE)
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        os.rmdir(tempfile.mkdtemp(prefix="kvcache-doctor-", dir=parent))
    except OSError as error:
        said = f"{folder} cannot be made or read: {error.strerror or error}"
        return Finding("stores", "default", "broken", said, _ELSEWHERE)
    return _with_room(f"{folder} is made when it is first used", shutil.disk_usage(parent).free)


def _round_trip(
    store: BlobStore,
    place: str,
    secret: bytes | None,
    name: str | None = None,
    advice: str = "check that it is up and may be written to",
) -> Finding:
    """Put a snapshot of one made-up token, read it back, remove it."""
    states = torch.zeros(1, 1, 1, 8)
    key = PrefixKey("kvcache doctor", torch.tensor([time.time_ns()]))
    data = PrefixSnapshot(key, ((states, states.clone()),)).to_bytes(store_secret(secret))
    name, began = name or store.name, time.perf_counter()
    try:
        held = len(store.entries())
        address = store.add(data)
        try:
            back = store.peek(address)
        finally:
            store.remove(address)
    except (KVCacheError, OSError) as error:
        return Finding("stores", name, "broken", f"{place}: {error}", advice)
    if back != data:
        return Finding("stores", name, "broken", f"{place}: what was written did not come back as it was", advice)
    took = time.perf_counter() - began
    said = f"{place}: {held} there; listed, written, read back and removed in {1000 * took:.1f} ms"
    return Finding("stores", name, "ok", said)


def _with_room(said: str, free: int) -> Finding:
    said, budget = f"{said}; {free / 2**30:.1f} GiB free", DiskStore().max_bytes or 0
    if free < budget:
        advice = "make room, set KVCACHE_HOME to another disk, or give DiskStore a smaller budget"
        return Finding("stores", "default", "note", f"{said}, less than its budget of {budget / 2**30:.0f}", advice)
    return Finding("stores", "default", "ok", said)
