"""What a compiled program is made by: versions, the processor, and the code itself."""

import hashlib
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("kvcache", "torch", "transformers", "chatterbox-tts", "diffusers")


def made_by() -> dict[str, str]:
    """The versions and the processor that a program is for."""
    return {**_made_by(), "threads": str(torch.get_num_threads())}


@cache
def _made_by() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    flags = ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    of = f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()} {flags}"
    versions["torch"] += f" {torch.version.git_version}"
    return {**versions, "processor": f"{platform.machine()} {hashlib.sha256(of.encode()).hexdigest()[:12]}"}


@cache
def _package_source(name: str) -> str:
    """A digest of a package's own code, which may be a checkout that is being worked on."""
    digest = hashlib.sha256()
    places = getattr(sys.modules.get(name), "__path__", [])
    for place in places:
        for path in sorted(Path(place).rglob("*.py")):
            digest.update(f"{path.relative_to(place)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def source(function: Any) -> str:
    own = {__name__.partition(".")[0], str(function.__module__).partition(".")[0]}
    return " ".join(_package_source(name) for name in sorted(own))
