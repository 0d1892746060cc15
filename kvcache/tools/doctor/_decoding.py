"""Ways to decode, each tried on a tiny model; the compiler, and the steps that it has made."""

import logging
import os
import shutil
import subprocess
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch

from kvcache.decoding import BackendName, ProgramFiles, kernel_reason, runs_on
from kvcache.errors import InputError
from kvcache.manager import KVCacheManager
from kvcache.tools.doctor._finding import ELSEWHERE, Finding
from kvcache.tools.doctor._packages import installed


def backends(device: torch.device, compiling: bool) -> Iterator[Finding]:
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
        if not runs_on(name, device):
            yield Finding("back ends", name, "missing", f"there are no graphs on {device.type!r}")
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
        if installed("triton") is None:
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


def programs() -> Finding:
    """Steps that earlier processes have compiled."""
    files = ProgramFiles()
    try:
        held, reason = files.held(), files.unsupported_reason()
    except InputError as error:
        return Finding("back ends", "compiled steps", "note", str(error), ELSEWHERE)
    if reason is not None:
        return Finding(
            "back ends", "compiled steps", "note", f"none are read or kept: {reason}", "mend that, or see KVCACHE_HOME"
        )
    size = sum(size for _, size in held) / 2**20
    said = f"{len(held)} kept for the next process in {files.folder}, {size:.1f} MiB; it is always safe to remove them"
    return Finding("back ends", "compiled steps", "ok", said)
