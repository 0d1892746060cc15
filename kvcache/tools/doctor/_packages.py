"""Packages: what is installed, what is missing and what for."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from kvcache.installed import APART, MEND, audio_fault, torchaudio_fault
from kvcache.models import TESTED
from kvcache.tools._targets import GROUP, lacking
from kvcache.tools.doctor._finding import Finding, State

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


def installed(name: str) -> str | None:
    """The version of a package that is installed; None if it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def packages() -> Iterator[Finding]:
    """Python, kvcache with what it needs, what Chatterbox needs, and what brings models by name."""
    yield from _own()
    yield from _torchaudio()
    yield from _chatterbox()
    yield from _adapters()


def _own() -> Iterator[Finding]:
    yield Finding("packages", "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    own = installed("kvcache")
    if own is None:
        said = "found on the path, but not installed: what it needs is not known"
        yield Finding("packages", "kvcache", "note", said, "pip install kvcache")
        return
    yield Finding("packages", "kvcache", "ok", f"{own}, in {Path(__file__).parents[2]}")
    needed = [Requirement(line) for line in requires("kvcache") or []]
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _needed(requirement)
    for extra in metadata("kvcache").get_all("Provides-Extra") or []:
        if extra in _FOR_WHO_WORKS_ON_IT:
            continue
        inside = [r for r in needed if r.marker is not None and r.marker.evaluate({"extra": extra})]
        wanting = [r for r in inside if not _fits(r) and not (r.marker is None or r.marker.evaluate({"extra": ""}))]
        there = ", ".join(f"{r.name} {installed(r.name)}" for r in inside if r not in wanting)
        purpose = f"for {_FOR[extra]}" if extra in _FOR else "optional"
        if wanting:
            lacking = ", ".join(
                f"{r.name} ({installed(r.name) or 'not installed'}, needs {r.specifier})" for r in wanting
            )
            yield Finding(
                "packages", f"[{extra}]", "missing", f"{purpose}: {lacking}", f'pip install "kvcache[{extra}]"'
            )
        else:
            yield Finding("packages", f"[{extra}]", "ok", f"{purpose}: {there}")
    triton = installed("triton")
    if triton is not None:
        yield Finding("packages", "triton", "ok", f"{triton}, for kernels on a GPU")
    elif torch.version.cuda is not None or torch.version.hip is not None:
        said = "not installed: no compiled steps and no kernel of our own on a GPU"
        yield Finding("packages", "triton", "missing", said, "pip install triton")


def _fits(requirement: Requirement) -> bool:
    found = installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _needed(requirement: Requirement) -> Finding:
    name, found = requirement.name, installed(requirement.name)
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
    found = [Requirement(line) for line in requires("chatterbox-tts") or []] if installed("chatterbox-tts") else []
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def _pinned_by(name: str) -> str:
    pin = _pins().get(name)
    if pin is None or not any(part.operator == "==" for part in pin.specifier):
        return ""
    return f" (chatterbox-tts pins {name}{pin.specifier}: install that one with --no-deps)"


def _torchaudio() -> Iterator[Finding]:
    if (fault := torchaudio_fault()) is not None:
        said = f"{installed('torchaudio')} is installed and does not load ({fault}); beside it transformers fails without kvcache"
        yield Finding("packages", "torchaudio", "broken", said, MEND)


def _chatterbox() -> Iterator[Finding]:
    own = installed("chatterbox-tts")
    if own is None:
        said = "not installed: no Chatterbox models"
        yield Finding("packages", "chatterbox-tts", "missing", said, f"pip install --no-deps {APART.split()[0]}")
        return
    pins = _pins().values()
    other = [
        f"{pin.name}{pin.specifier} ({installed(pin.name)} is here)"
        for pin in pins
        if installed(pin.name) is not None and not _fits(pin)
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
