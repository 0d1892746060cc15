"""Where a model's time and memory go while it decodes, and how much of it any cache could save.

A step is run plain and watched, in turn, each round in the same way: the plain one says how long a step takes, the watched
one what in it takes how long (`kvcache.tools._module_timer`). Memory is counted from the tensors that are held; what a pass takes in
between is read from the allocations that torch's profiler records.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as trace_of

from kvcache.cache import CacheReport
from kvcache.decoding import Setting
from kvcache.errors import InputError
from kvcache.memory import resident_bytes
from kvcache.models import PackedLinear
from kvcache.tools._footprint import bytes_in
from kvcache.tools._module_timer import AUDIO, PARTS, Watch, part_of
from kvcache.tools._profile import Memory, Profile, Times, shown_seconds
from kvcache.tools._target import ModelTarget, Prepared, check_vocoder

_WEIGHTS = {
    "attention": "attention_weights",
    "attention_products": "attention_weights",
    "mlp": "mlp_weights",
    "embeddings": "embedding_weights",
    "head": "embedding_weights",
}
_CHUNK = 8  # tokens between two looks at the clock from outside
_TRACED = 4  # tokens
_SPOKEN = 75  # tokens, three seconds of speech
_LONG = 60.0  # seconds after which no third time is waited for
_MARK = "kvcache: a pass begins"


def profile(
    subject: ModelTarget,
    setting: Setting | None = None,
    context: int = 500,
    tokens: int = 40,
    *,
    device: str = "cpu",
    rounds: int = 3,
) -> Profile:
    """Decode some tokens and say where time and memory went. Nothing else should run in the process meanwhile.

    Args:
        subject: the model.
        setting: how it decodes. A compiled or captured step cannot be divided: the split is then that of the eager step.
        context: tokens before the first that is decoded.
        tokens: that are decoded in each run.
        device: where.
        rounds: runs of each kind, in turn; what is given is of the one with the median time.

    Raises:
        InputError: if there are too few tokens to divide, or the model has no attention that can be told apart.
        KVCacheError: if the model cannot decode so.
    """
    setting = Setting() if setting is None else setting
    _check(subject, setting, context, tokens, rounds)
    run, place, before = _Run(context, tokens, setting.requests), torch.device(device), resident_bytes() or 0
    runs, prepared, notes = _prepared(subject, setting, device, run)
    asked: _Asked | None = None
    if runs.backend not in ("off", "eager"):  # it cannot be divided; first and alone, so that its memory is its own
        asked = _Asked([run.timed(prepared) for _ in range(rounds + 1)][1:], prepared.report(), prepared.module)
        prepared.release()
        prepared = subject.prepared(replace(runs, backend="eager"), device)
    if not any(part_of(one, "layer") == "attention" for one in prepared.module.modules()):
        raise InputError(f"{subject.name}: its attention cannot be told from the rest of it; profile another model")
    step, prefill, plain = _rounds(prepared, run, Watch(place), rounds)
    asked = _Asked(plain, prepared.report(), prepared.module) if asked is None else asked
    peaks = _workspace(prepared, context, place)
    step = _with_vocoder(step, prepared, place)
    own, wanted = _median(plain), _median(asked.timed)
    held = {
        **weight_bytes(asked.module, subject.load(device)),
        "vocoder_weights": 0 if prepared.vocoder is None else bytes_in([prepared.vocoder]),
        "kv_cache": _touched(asked.report) if place.type == "cpu" else asked.report.nbytes,
        "prefixes": prepared.kept,
        "activations": peaks[1],
    }
    prepared.release()
    if asked.timed is not plain:
        notes.append(
            f"A step on {runs.backend} cannot be divided: it takes {shown_seconds(wanted)} in all. The parts, and the "
            f"activations, are those of the eager step, which takes {shown_seconds(own)}."
        )
    if asked.report.fallback is not None:
        notes.append(f"Not as asked: {asked.report.fallback}.")
    if subject.speaks and not step.share(*AUDIO):
        notes.append("There is no vocoder in this model.")
    if not (total := asked.resident(place)):
        total = sum(held.values())
        notes.append("This system does not tell what a process holds: the total is what is known by itself.")
    memory = Memory({**held, "rest": total - sum(held.values())}, total, peaks[0], asked.report.nbytes, before)
    return Profile(
        model=subject.name,
        setting=setting,
        device=device,
        threads=torch.get_num_threads(),
        context=context,
        tokens=tokens,
        step=step,
        prefill=prefill,
        plain=own,
        asked=wanted,
        memory=memory,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Asked:
    """Runs on the back end that was asked for, which nobody watches.

    Attributes:
        timed: of each run, seconds of a step and the most resident bytes.
        report: of the cache.
        module: what ran.
    """

    timed: list[tuple[float, int]]
    report: CacheReport
    module: nn.Module

    def resident(self, device: torch.device) -> int:
        """The most bytes that the process had of the machine's memory, or that torch has reserved of a GPU's."""
        if device.type == "cpu":
            return max(resident for _, resident in self.timed)
        return torch.cuda.memory_reserved(device)


def _check(subject: ModelTarget, setting: Setting, context: int, tokens: int, rounds: int) -> None:
    if tokens < 8 or rounds < 1:
        raise InputError(
            f"tokens={tokens}, rounds={rounds}: give at least 8 tokens and 1 round, to have steps to compare"
        )
    if setting.requests < 1:
        raise InputError(f"requests={setting.requests}: give at least 1")
    check_vocoder(subject, setting)
    if context < subject.shortest:
        raise InputError(
            f"context={context}: a request of {subject.name} has {subject.shortest} tokens or more; give as many"
        )


def _prepared(subject: ModelTarget, setting: Setting, device: str, run: "_Run") -> tuple[Setting, Prepared, list[str]]:
    """The setting that runs, the model set up so, and what is to be known of that."""
    prepared = subject.prepared(setting, device)
    if setting.backend == "off":
        return setting, prepared, []
    run.timed(prepared)
    report = prepared.report()
    if report.fallback is None or report.backend is not None:
        return setting, prepared, []
    note = f"Not as asked: {report.fallback}. The figures are those of the token loop, which runs instead."
    prepared.release()
    setting = replace(setting, backend="off")
    return setting, subject.prepared(setting, device), [note]


# ---------------------------------------------------------------------- time


def _rounds(prepared: Prepared, run: "_Run", watch: Watch, rounds: int) -> tuple[Times, Times, list[tuple[float, int]]]:
    """The median step and the median prefill while they are watched, and all runs that nobody watched."""
    run.watched(prepared, watch)  # what is set up at the first call
    plain, watched, prefills = [], [], []
    for _ in range(rounds):
        prefills.append(run.prefilled(prepared, watch))
        watched.append(run.watched(prepared, watch))
        plain.append(run.timed(prepared))  # last, so that the cache's account is its own
    step, prefill = (sorted(found, key=lambda one: one.wall)[rounds // 2] for found in (watched, prefills))
    return step, prefill, plain


def _median(timed: Sequence[tuple[float, int]]) -> float:
    return sorted(seconds for seconds, _ in timed)[len(timed) // 2]


class _Run:
    """The same tokens decoded again and again, with a look at the clock after each chunk.

    Steps are counted from the first chunk, which has the prefill in it, to the last but one, after which the run has not
    yet begun to end.
    """

    def __init__(self, context: int, tokens: int, requests: int) -> None:
        self._context, self._tokens, self._requests = context, tokens, requests
        self._chunk = min(_CHUNK, tokens // 4)

    def _stream(self, prepared: Prepared) -> tuple[float, range, int]:
        """Seconds of a step, which steps these were, and the most resident bytes."""
        came, made, resident = [], [0], 0
        for count in prepared.stream(self._context, self._tokens, self._chunk):
            came.append(time.perf_counter())
            made.append(made[-1] + count)
            resident = max(resident, resident_bytes() or 0)
        # The first token of a request comes from its prefill.
        steps = range(made[1] // self._requests - 1, made[-2] // self._requests - 1)
        return (came[-2] - came[0]) / len(steps), steps, resident

    def timed(self, prepared: Prepared) -> tuple[float, int]:
        """Seconds of a step that nobody watches, and the most resident bytes."""
        seconds, _, resident = self._stream(prepared)
        return seconds, resident

    def watched(self, prepared: Prepared, watch: Watch) -> Times:
        """What a step takes."""
        with watch:
            watch.start()
            wall, steps, _ = self._stream(prepared)
            passes = watch.stop()
        decoded = [one for one in passes[2:] if one.tokens == 1][steps.start : steps.stop]
        return Times({part: sum(one.seconds[part] for one in decoded) / len(steps) for part in PARTS}, wall)

    def prefilled(self, prepared: Prepared, watch: Watch) -> Times:
        """What comes before the first token, of all requests."""
        with watch:
            start = time.perf_counter()
            watch.start()
            for _ in prepared.stream(self._context, 1, 1):
                pass
            wall = time.perf_counter() - start
            passes = watch.stop()
        return Times({part: sum(one.seconds[part] for one in passes) for part in PARTS}, wall)


def _with_vocoder(step: Times, prepared: Prepared, device: torch.device) -> Times:
    """The step with a token's share of the vocoder's time, for all requests."""
    taken: list[tuple[float, Mapping[str, float]]] = []
    begun = time.perf_counter()
    while len(taken) < 3 and (len(taken) < 2 or time.perf_counter() - begun < _LONG):  # the first sets something up
        start = time.perf_counter()
        if (parts := prepared.vocode(_SPOKEN)) is None:
            return step
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - start, parts))
    whole, told = min(taken, key=lambda one: one[0])
    told = {**told, "vocoder": max(0.0, whole - sum(told.values()))}
    shares = {part: seconds / _SPOKEN for part, seconds in told.items()}
    return Times({**step.parts, **shares}, step.wall + whole / _SPOKEN)


# ---------------------------------------------------------------------- memory


def weight_bytes(module: nn.Module, loaded: nn.Module) -> dict[str, int]:
    """Bytes of the weights that run, by the parts of `MEMORY`, and of those that were loaded and do not.

    Args:
        module: what runs.
        loaded: the model as it was loaded.
    """
    found = dict.fromkeys((*_WEIGHTS.values(), "other_weights", "unused_weights"), 0)
    seen: set[int] = set()

    def visit(part: nn.Module, inside: str) -> None:
        inside = part_of(part, inside) or inside
        kind = _WEIGHTS.get(inside, "other_weights")
        for place, size in _own_storages(part).items():
            if place not in seen:
                seen.add(place)
                found[kind] += size
        for child in part.children():
            visit(child, inside)

    visit(module, "host")
    found["unused_weights"] = sum(size for place, size in _storages(loaded).items() if place not in seen)
    return found


def _own_storages(module: nn.Module) -> dict[int, int]:
    """Bytes of a module's own tensors, by where they are: what two share is there once."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return found | ({id(module): module.packed_bytes} if isinstance(module, PackedLinear) else {})


def _storages(module: nn.Module) -> dict[int, int]:
    return {place: size for part in module.modules() for place, size in _own_storages(part).items()}


def _touched(report: CacheReport) -> int:
    """Bytes of a cache's slots that tokens have been written to."""
    return sum(
        layer.nbytes * min(layer.stored, layer.capacity) // layer.capacity if layer.capacity else layer.nbytes
        for layer in (*report.layers, *report.cross)
    )


def _workspace(prepared: Prepared, context: int, device: torch.device) -> tuple[int, int]:
    """Bytes at the peak of a prefill beside what it leaves, and at the peak of a step beside what it found."""

    def mark() -> None:
        with record_function(_MARK):
            pass

    watch = Watch(device, entered=mark)
    with _unheard(), watch, trace_of(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        watch.start()
        prepared.run(context, _TRACED)
        passes = watch.stop()[1:]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    kind = 1 if device.type == "cuda" else 0
    peaks = _peaks([event for event in events if event.get("name") in (_MARK, "[memory]")], kind)
    prefill = [peak - end for one, (_, peak, end) in zip(passes, peaks, strict=True) if one.tokens != 1]
    step = [peak - start for one, (start, peak, _) in zip(passes, peaks, strict=True) if one.tokens == 1]
    return max(prefill, default=0), max(step, default=0)


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop what is written to standard error: torch's profiler says there that it begins and ends, whatever it is told."""
    sys.stderr.flush()
    heard = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(heard, 2)
        os.close(heard)


def _peaks(events: Sequence[Mapping[str, Any]], kind: int) -> list[tuple[int, int, int]]:
    """Of each pass: bytes allocated where it begins, at its peak and at its end, counted from some point on."""
    held, found = 0, []
    for event in sorted(events, key=lambda one: float(one["ts"])):
        if event["name"] == _MARK:
            found.append((held, held, held))
        elif event["args"]["Device Type"] == kind:
            held += int(event["args"]["Bytes"])
            if found:
                start, peak, _ = found[-1]
                found[-1] = start, max(peak, held), held
    return found
