"""`MemoryTimeline`: what memory a run takes over time: the cache's bytes, the process's, the GPU's."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from typing_extensions import Self

from kvcache.cache import CacheReport, layer_bytes
from kvcache.errors import InputError
from kvcache.io import canvas, html_table, text_table
from kvcache.memory import resident_bytes
from kvcache.models import cache_layers


@runtime_checkable
class Reporting(Protocol):
    """A manager, an engine, a batch: what gives an account of its cache."""

    def report(self) -> CacheReport:
        """The account."""


@dataclass(frozen=True)
class Sample:
    """Memory at one moment.

    Attributes:
        seconds: since the timeline began.
        kv: bytes of the caches that are watched.
        resident: bytes of this process in main memory; None where the system does not tell; see
            `kvcache.memory.resident_bytes`.
        allocated, reserved: bytes of tensors on the GPU, and of what torch holds there for them; None without one in use.
        label: what was happening, where `MemoryTimeline.sample` was told.
    """

    seconds: float
    kv: int
    resident: int | None
    allocated: int | None
    reserved: int | None
    label: str = ""


_NAMES = {"kv": "KV cache", "resident": "process", "allocated": "GPU tensors", "reserved": "GPU, held by torch"}


class MemoryTimeline:
    """Samples of memory while a ``with`` block runs, by a thread of its own, and wherever `sample` is called.

    Args:
        *watched: caches of `KVCacheManager.new_cache`, anything with a ``report()`` (a manager, a `Decoding`, an engine),
            or functions that give bytes; their sum is the KV cache's.
        every: seconds between two samples; None samples only where `sample` is called, for example once a chunk.

    Raises:
        InputError: for something that cannot be watched, or an interval that is not above zero.
    """

    def __init__(self, *watched: Any, every: float | None = 0.05) -> None:
        if every is not None and not every > 0:
            raise InputError(f"every={every} must be above 0 seconds; None samples only where sample() is called")
        self._sources = [_source(one) for one in watched]
        self._every = every
        self._samples: list[Sample] = []
        self._began = time.perf_counter()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._samples)} samples, every={self._every})"

    @property
    def samples(self) -> tuple[Sample, ...]:
        """So far, in order of time."""
        return tuple(self._samples)

    def __enter__(self) -> Self:
        self._samples.clear()
        self._over.clear()
        self._began, self._error = time.perf_counter(), None
        self.sample()
        if self._every is not None:
            self._thread = threading.Thread(target=self._watch, name="kvcache-timeline", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if error is None:
            self.sample()
            if self._error is not None:
                raise self._error

    def sample(self, label: str = "") -> Sample:
        """Take one now."""
        gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        taken = Sample(
            time.perf_counter() - self._began,
            sum(source() for source in self._sources),
            resident_bytes(),
            torch.cuda.memory_allocated() if gpu else None,
            torch.cuda.memory_reserved() if gpu else None,
            label,
        )
        self._samples.append(taken)
        return taken

    def _watch(self) -> None:
        try:
            while not self._over.wait(self._every):
                self.sample()
        except BaseException as error:  # raised where somebody sees it: at the end of the block
            self._error = error

    # ------------------------------------------------------------------ to look at

    def peak(self, name: str = "kv") -> int | None:
        """The most bytes of a field of `Sample`; None where it was never known.

        Raises:
            InputError: for an unknown name.
        """
        return max(self._known(name), default=None)

    def to_dict(self) -> dict[str, Any]:
        """All samples as JSON has them."""
        return {"samples": [asdict(sample) for sample in self._samples]}

    def __str__(self) -> str:
        return text_table(self._title(), ("MiB", "at first", "at most", "at last"), self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._title(), ("MiB", "at first", "at most", "at last"), self._rows())

    def plot(self, file: str | PathLike[str] | None = None) -> Any:
        """The curves over time; what is far larger than the cache has an axis of its own.

        Args:
            file: to write it to, by its suffix as ``.png`` or ``.svg``.

        Returns:
            The figure of matplotlib.

        Raises:
            InputError: without matplotlib, or before there are samples.
        """
        if not self._samples:
            raise InputError("there are no samples yet; use the timeline as: with MemoryTimeline(manager) as timeline:")
        figure, axes = canvas()
        at = [sample.seconds for sample in self._samples]
        axes.step(at, [kv / 2**20 for kv in self._known("kv")], where="post", color="C0", label=_NAMES["kv"])
        axes.set(xlabel="seconds", ylabel="KV cache, MiB", ylim=(0, _above(self._known("kv"))))
        rest = axes.twinx()
        for i, name in enumerate(("resident", "allocated", "reserved"), 1):
            points = [
                (sample.seconds, value) for sample in self._samples if (value := getattr(sample, name)) is not None
            ]
            if points:
                rest.plot([t for t, _ in points], [v / 2**20 for _, v in points], color=f"C{i}", label=_NAMES[name])
        most = [value for name in _NAMES if name != "kv" for value in self._known(name)]
        rest.set(ylabel="process and GPU, MiB", ylim=(0, _above(most)))
        for sample in self._samples:
            if sample.label:
                axes.axvline(sample.seconds, color="0.7", linewidth=0.8)
                axes.annotate(
                    sample.label, (sample.seconds, 1), (3, -4), ("data", "axes fraction"), "offset points",
                    rotation=90, va="top", fontsize=8, color="0.35",
                )  # fmt: skip
        lines = [*axes.get_lines(), *rest.get_lines()]
        figure.legend(handles=[line for line in lines if not line.get_label().startswith("_")], loc="outside upper center", ncols=4)  # fmt: skip
        if file is not None:
            figure.savefig(file)
        return figure

    def _title(self) -> str:
        last = self._samples[-1].seconds if self._samples else 0.0
        return f"{len(self._samples)} samples in {last:.2f} s"

    def _known(self, name: str) -> list[int]:
        if name not in _NAMES:
            raise InputError(f"{name!r} is no field of bytes; there are {', '.join(map(repr, _NAMES))}")
        return [value for sample in self._samples if (value := getattr(sample, name)) is not None]

    def _rows(self) -> list[tuple[str, ...]]:
        found = [(field.name, self._known(field.name)) for field in fields(Sample) if field.name in _NAMES]
        return [
            (_NAMES[name], *(f"{count / 2**20:.1f}" for count in (known[0], max(known), known[-1])))
            for name, known in found
            if known
        ]


def _above(values: Sequence[int]) -> float:
    """In MiB, a little more than the most of them."""
    return 1.1 * max(values, default=0) / 2**20 or 1.0


def _source(watched: Any) -> Callable[[], int]:
    if isinstance(watched, Reporting):
        return lambda: watched.report().nbytes
    if callable(watched):
        counted: Callable[[], int] = watched
        return counted
    try:
        cache_layers(watched)
    except AttributeError:
        raise InputError(
            f"{type(watched).__name__} cannot be watched; give a cache, a manager, or a function that gives bytes"
        ) from None
    return lambda: sum(layer_bytes(layer) for layer in cache_layers(watched))
