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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as trace_of

from kvcache.cache import CacheReport
from kvcache.decoding import Setting
from kvcache.errors import InputError, MissingDependencyError
from kvcache.io import check_given
from kvcache.memory import resident_bytes
from kvcache.models import PackedLinear
from kvcache.tools._footprint import bytes_in
from kvcache.tools._module_timer import AUDIO, PARTS, Watch, part_of
from kvcache.tools._targets import ModelTarget, Prepared, check_vocoder

MEMORY: Mapping[str, str] = {
    "attention_weights": "weights: attention",
    "mlp_weights": "weights: MLP",
    "embedding_weights": "weights: embeddings and heads",
    "other_weights": "weights: everything else of the model",
    "unused_weights": "weights as loaded, which this precision does not read",
    "vocoder_weights": "weights: vocoder",
    "kv_cache": "KV cache",
    "prefixes": "KV of prefixes and voices that are kept",
    "activations": "activations at the peak of a step",
    "rest": "the rest: Python, libraries, what allocators keep",
}
"""The parts of the memory, and what is in them."""

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


@dataclass(frozen=True)
class Times:
    """What a step, or a prefill, takes.

    Attributes:
        parts: seconds of each of `PARTS`, as the clock inside the model tells them apart.
        wall: seconds as they were measured from outside, in the same run.
    """

    parts: Mapping[str, float]
    wall: float

    @property
    def total(self) -> float:
        """The sum of the parts, in seconds."""
        return sum(self.parts.values())

    def share(self, *names: str) -> float:
        """Of the total, between 0 and 1."""
        return sum(self.parts[name] for name in names) / self.total


@dataclass(frozen=True)
class Memory:
    """What decoding holds.

    Attributes:
        parts: bytes of each of `MEMORY`. They add up to the total.
        total: bytes that the process has of the machine's memory (its resident set), or that torch has reserved of a GPU's.
        prefill: bytes that a prefill takes at its peak beside the weights and what it leaves in the cache.
        reserved: bytes of the cache with the slots that no token has been written to. On a CPU the system gives memory
            only to what has been.
        before: bytes that the process had when `profile` began; the weights are in it if the model was loaded already.
    """

    parts: Mapping[str, int]
    total: int
    prefill: int
    reserved: int
    before: int

    def share(self, *names: str) -> float:
        """Of the total, between 0 and 1."""
        return sum(self.parts[name] for name in names) / self.total


@dataclass(frozen=True)
class Profile:
    """Where time and memory go.

    Attributes:
        model: its name.
        setting: how it decodes.
        device: where.
        threads: of torch.
        context: tokens before the first that is decoded.
        tokens: that were decoded in each round.
        step: what a step takes; on a compiled or captured backend, the eager step that does the same.
        prefill: what comes before the first token.
        plain: seconds of the same step while nobody watches.
        asked: seconds of a step on the backend that was asked for; as `plain` where that can be watched itself.
        memory: what is held.
        notes: what is to be known of the figures.
    """

    model: str
    setting: Setting
    device: str
    threads: int
    context: int
    tokens: int
    step: Times
    prefill: Times
    plain: float
    asked: float
    memory: Memory
    notes: tuple[str, ...] = ()

    @property
    def overhead(self) -> float:
        """What watching adds to a step, as a share of the plain one."""
        return self.step.wall / self.plain - 1

    @property
    def cache_time(self) -> float:
        """The share of a step that a cache could save at most: all that reading and writing it takes."""
        return self.step.share("attention_scores", "cache_update")

    @property
    def cache_memory(self) -> float:
        """The share of the memory that a cache could save at most: all keys and values."""
        return self.memory.share("kv_cache", "prefixes")

    @property
    def best_speedup(self) -> float:
        """How many times faster a step could be at most with a perfect cache (Amdahl's law)."""
        return 1 / (1 - self.cache_time)

    @property
    def outside_time(self) -> float:
        """The share of a step that is neither attention nor its cache."""
        return 1 - self.step.share("attention_products", "attention_scores", "cache_update")

    @property
    def outside_memory(self) -> float:
        """The share of the memory that is neither attention's weights nor keys and values."""
        return 1 - self.memory.share("attention_weights", "kv_cache", "prefixes")

    def sentences(self) -> list[str]:
        """What the figures say, in plain words."""
        said = [
            f"Outside attention and its cache are {self.outside_time:.1%} of a step's time and "
            f"{self.outside_memory:.1%} of the memory.",
            f"A perfect cache, free to write and to read, would save {self.cache_time:.1%} of a step (at most "
            f"{self.best_speedup:.2f}×) and {self.cache_memory:.1%} of the memory: no setting of the KV cache can save more.",
            self._prefix(),
        ]
        if audio := self.step.share(*AUDIO):
            told = ", ".join(
                f"{self.step.share(part):.1%} {PARTS[part].removeprefix('vocoder: ')}"
                for part in AUDIO
                if self.step.parts[part]
            )
            said.append(f"Audio is {audio:.1%} of what a token takes ({told}).")
        said.append(
            f"The parts add up to {self.step.total / self.step.wall:.1%} of the time measured from outside; being watched "
            f"made a step {self.overhead:+.1%} longer."
        )
        return [*said, *self.notes]

    def _prefix(self) -> str:
        """What a known beginning could save."""
        takes = f"{shown_seconds(self.prefill.wall)}, as long as {self.prefill.wall / self.asked:.1f} steps"
        if self.memory.parts["prefixes"]:
            return (
                f"The prefill runs behind a beginning that is known already, such as a voice: it takes {takes}, for what is "
                "each request's own."
            )
        return f"A prefix that is known saves at most the prefill: {takes}."

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and words: seconds, bytes, shares between 0 and 1."""
        setting = {name: value for name, value in asdict(self.setting).items() if value is not None}
        setting = {name: value if isinstance(value, int | str) else repr(value) for name, value in setting.items()}
        found = {**asdict(self), "setting": setting, "notes": list(self.notes)}
        for name in ("overhead", "cache_time", "cache_memory", "best_speedup", "outside_time", "outside_memory"):
            found[name] = getattr(self, name)
        for name, times in (("step", self.step), ("prefill", self.prefill)):
            found[name] |= {"total": times.total, "shares": {part: times.share(part) for part in times.parts}}
        found["memory"]["shares"] = {part: self.memory.share(part) for part in self.memory.parts}
        return {**found, "sentences": self.sentences()}


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
    run, place, before = _Run(context, tokens, setting.requests), torch.device(device), resident_bytes() or 0
    runs, prepared = setting, subject.prepared(setting, device)
    notes: list[str] = []
    if setting.backend != "off":
        run.timed(prepared)
        if (reason := prepared.report().fallback) is not None and prepared.report().backend is None:
            notes.append(f"Not as asked: {reason}. The figures are those of the token loop, which runs instead.")
            prepared.release()
            runs = replace(setting, backend="off")
            prepared = subject.prepared(runs, device)
    divisible = runs.backend in ("off", "eager")
    if not divisible:  # first and alone, so that its memory is its own
        asked = [run.timed(prepared) for _ in range(rounds + 1)][1:]
        report, module = prepared.report(), prepared.module
        prepared.release()
        prepared = subject.prepared(replace(runs, backend="eager"), device)
    if not any(part_of(one, "layer") == "attention" for one in prepared.module.modules()):
        raise InputError(f"{subject.name}: its attention cannot be told from the rest of it; profile another model")
    watch = Watch(place)
    run.watched(prepared, watch)  # what is set up at the first call
    plain, watched, prefills = [], [], []
    for _ in range(rounds):
        prefills.append(run.prefilled(prepared, watch))
        watched.append(run.watched(prepared, watch))
        plain.append(run.timed(prepared))  # last, so that the cache's account is its own
    if divisible:
        asked, report, module = plain, prepared.report(), prepared.module
    step, prefill = (sorted(found, key=lambda one: one.wall)[rounds // 2] for found in (watched, prefills))
    prefill_peak, step_peak = _workspace(prepared, context, place)
    step, vocoder, kept = _with_vocoder(step, prepared, place), prepared.vocoder, prepared.kept
    prepared.release()

    own, wanted = (sorted(seconds for seconds, _ in runs)[rounds // 2] for runs in (plain, asked))
    if not divisible:
        notes.append(
            f"A step on {runs.backend} cannot be divided: it takes {shown_seconds(wanted)} in all. The parts, and the "
            f"activations, are those of the eager step, which takes {shown_seconds(own)}."
        )
    if report.fallback is not None:
        notes.append(f"Not as asked: {report.fallback}.")
    if subject.speaks and not step.share(*AUDIO):
        notes.append("There is no vocoder in this model.")
    held = {
        **weight_bytes(module, subject.load(device)),
        "vocoder_weights": 0 if vocoder is None else bytes_in([vocoder]),
        "kv_cache": _touched(report) if place.type == "cpu" else report.nbytes,
        "prefixes": kept,
        "activations": step_peak,
    }
    total = max(resident for _, resident in asked) if place.type == "cpu" else torch.cuda.memory_reserved(place)
    if not total:
        total = sum(held.values())
        notes.append("This system does not tell what a process holds: the total is what is known by itself.")
    memory = Memory({**held, "rest": total - sum(held.values())}, total, prefill_peak, report.nbytes, before)
    return Profile(
        subject.name,
        setting,
        device,
        torch.get_num_threads(),
        context,
        tokens,
        step,
        prefill,
        own,
        wanted,
        memory,
        tuple(notes),
    )


# ---------------------------------------------------------------------- time


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


def shown_seconds(seconds: float) -> str:
    """For people: ``1.2 s``, ``34.5 ms``."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


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


# ---------------------------------------------------------------------- a picture

_COLORS = {
    "attention_products": "#08519c",
    "attention_weights": "#08519c",
    "attention_scores": "#d94801",
    "cache_update": "#fd8d3c",
    "kv_cache": "#d94801",
    "prefixes": "#fd8d3c",
    "mlp": "#3182bd",
    "mlp_weights": "#3182bd",
    "norms": "#4a9a5d",
    "positions": "#74b884",
    "embeddings": "#a3d2ae",
    "embedding_weights": "#a3d2ae",
    "head": "#c7e6cd",
    "glue": "#dff2e2",
    "other_weights": "#dff2e2",
    "unused_weights": "#9e9ac8",
    "vocoder_weights": "#dadaeb",
    "sampling": "#8c8c8c",
    "host": "#bdbdbd",
    "vocoder_mel": "#9e9ac8",
    "vocoder_wave": "#bcbddc",
    "watermark": "#efedf5",
    "vocoder": "#dadaeb",
    "activations": "#8c8c8c",
    "rest": "#d9d9d9",
}


def plot(profiles: Mapping[str, Profile], file: str | Path) -> None:
    """Stacked bars, by label, of a step's time and of the memory; what a cache could save is orange.

    Args:
        profiles: at least one.
        file: PNG, PDF or SVG.

    Raises:
        InputError: without matplotlib, or for a file that it cannot write.
    """
    pyplot = check_plot(file)
    labels = list(profiles)
    size = 11, 2.6 + 0.8 * len(labels)
    figure, axes = pyplot.subplots(2, 1, figsize=size, layout="constrained")
    panels: list[tuple[Any, Mapping[str, str], list[Mapping[str, float]], str]] = [
        (
            axes[0],
            PARTS,
            [{part: 1e3 * s for part, s in one.step.parts.items()} for one in profiles.values()],
            "ms a step",
        ),
        (
            axes[1],
            MEMORY,
            [{part: n / 2**20 for part, n in one.memory.parts.items()} for one in profiles.values()],
            "MiB",
        ),
    ]
    for axis, names, bars, unit in panels:
        left = [0.0] * len(labels)
        for part, name in names.items():
            widths = [max(0.0, bar[part]) for bar in bars]
            if any(widths):
                axis.barh(labels, widths, left=left, color=_COLORS[part], edgecolor="white", linewidth=0.5, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel(unit)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {file}: {error}; name a .png, .pdf or .svg in a folder that exists") from error
    finally:
        pyplot.close(figure)


def check_plot(file: str | Path) -> Any:
    """Matplotlib's pyplot; raises what `plot` would, as far as it can be known before.

    Raises:
        InputError: without matplotlib, or for a file that it cannot write.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError('a plot needs matplotlib; run: pip install "kvcache[plot]"') from error
    path = Path(file)
    if path.suffix not in (".png", ".pdf", ".svg") or not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {file}: name a .png, .pdf or .svg in a folder that exists")
    check_given(path)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
