"""What runs a step: Python, torch's compiler, a captured graph, or both of these."""

import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from kvcache.decoding._programs import Ahead, Programs, RootSizes
from kvcache.decoding._sampler import Drawing
from kvcache.errors import InputError
from kvcache.events import Event, emit

BackendName = Literal["eager", "compile", "graph", "graph+compile"]

BUCKET = 256
"""Slots that a captured step reads, or a multiple of so many: fewer read less in vain, and are captured more often."""


class Steps(Protocol):
    """What a backend runs."""

    def step(self, order: Tensor, whole: bool, drawing: Drawing | None) -> None:
        """One token for every request. `order` is ``arange(columns)``: so many slots are read."""

    def reach(self) -> tuple[int, bool]:
        """How many slots the next step has to read, and whether every row sees all of them."""

    def state(self) -> list[Tensor]:
        """All that a step changes, but for keys and values, which it writes again to where it wrote them."""

    @property
    def order(self) -> Tensor:
        """``arange(slots)``."""

    @property
    def requests(self) -> int:
        """How many decode together."""

    def sized(self) -> Sequence[tuple[Tensor, Sequence[int]]]:
        """The tensors that are as large as there are slots, and in which dimension; their elements are in a row."""

    def program(self) -> tuple[nn.Module | None, str]:
        """What decides which operations a step runs beside its tensors: the model, None if that is none, and the rest as text."""


class Backend(Protocol):
    """Runs one step, or raises and has changed nothing."""

    @property
    def name(self) -> str: ...

    def __call__(self, steps: Steps, drawing: Drawing | None) -> None: ...


def check_backend(name: str, device: torch.device | None = None) -> None:
    """Raise `InputError` for an unknown name, or one that is not there on a device."""
    if name not in get_args(BackendName):
        known = ", ".join(map(repr, get_args(BackendName)))
        raise InputError(f"backend={name!r} must be one of {known}, 'auto' or 'off'")
    if device is not None and not runs_on(name, device):
        raise InputError(
            f"backend={name!r} records steps in a CUDA graph, and the model is on {device.type!r}, which has none; use "
            "'eager' or 'compile', or 'auto', which is eager there"
        )


def runs_on(name: str, device: torch.device) -> bool:
    """Whether a device has what a back end needs: those of graphs need a device that records some."""
    return "graph" not in name or device.type in RECORDERS


def backend_on(name: str, device: torch.device) -> BackendName | Literal["off"]:
    """What a name stands for on a device: ``"auto"`` is a graph where there are CUDA graphs, and eager elsewhere.

    Raises:
        InputError: for an unknown name, or one that is not there on this device.
    """
    if name == "off":
        return "off"
    if name == "auto":
        return "graph" if device.type == "cuda" else "eager"
    check_backend(name, device)
    return cast(BackendName, name)


def check_bucket(bucket: int) -> None:
    """Raise `InputError` for a number of slots that cannot be read."""
    if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
        raise InputError(f"bucket={bucket!r} must be a whole number of slots, at least 1; {BUCKET} is the default")


def backend_for(name: str, device: torch.device, bucket: int = BUCKET, programs: Programs | None = None) -> Backend:
    """The backend of that name.

    Args:
        bucket: see `Graph`.
        programs: see `Compiled`.

    Raises:
        InputError: for an unknown name, one that is not there on this device, or a bucket that is none.
    """
    check_backend(name, device)
    check_bucket(bucket)
    if name == "eager":
        return Eager()
    if name == "compile":
        return Compiled(device, programs=programs)
    return Graph(RECORDERS[device.type], Compiled(device) if name == "graph+compile" else None, bucket)


class Eager:
    """Python, kernel by kernel."""

    name = "eager"

    def __call__(self, steps: Steps, drawing: Drawing | None) -> None:
        columns, whole = steps.reach()
        steps.step(steps.order[:columns], whole, drawing)


class Compiled:
    """torch's compiler, once for all lengths; on a CPU with all of the step in C++, calls between kernels too.

    On a CPU steps are compiled ahead of time and kept for the next process, see `kvcache.decoding.Programs`; where that cannot
    be, and elsewhere, by `torch.compile`.

    Args:
        device: of the model.
        compiler: of `torch.compile`.
        programs: where compiled steps are kept; by default in the user's cache.
    """

    name = "compile"

    def __init__(self, device: torch.device, compiler: str = "inductor", programs: Programs | None = None) -> None:
        self._ahead_of_time = device.type == "cpu" and compiler == "inductor"
        self._options: dict[str, Any] = {"cpp_wrapper": True} if self._ahead_of_time else {}
        if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):  # releases that know this option
            self._options["guard_filter_fn"] = _changing
        self._compiler = compiler
        self._programs = Programs() if programs is None else programs
        self._compiled: tuple[Steps, Callable[[Tensor, bool, Drawing | None], None]] | None = None
        self._ahead: tuple[Steps, Ahead | None] | None = None

    @property
    def pending(self) -> bool:
        """Whether steps run eagerly for now, as they are being compiled."""
        ahead = None if self._ahead is None else self._ahead[1]
        return ahead is not None and ahead.pending

    def __call__(self, steps: Steps, drawing: Drawing | None) -> None:
        columns, whole = steps.reach()
        # Several are of one length by chance, and not for long: it would be another program.
        self.run(steps, steps.order[:columns], whole and steps.requests == 1, drawing)

    def run(self, steps: Steps, order: Tensor, whole: bool, drawing: Drawing | None) -> None:
        ahead = self._kept(steps)
        if ahead is not None and ahead.refused is None:
            ahead(order, whole, drawing)
            return
        if ahead is not None and not self._programs.waits:
            steps.step(order, whole, drawing)
            return
        if self._compiled is None or self._compiled[0] is not steps:
            self._compiled = (steps, self._compile(steps))
        if order.shape[0] > 1:  # of one slot there is only one, which a compiler would not take for many
            torch._dynamo.maybe_mark_dynamic(order, 0)
        self._compiled[1](order, whole, drawing)

    def _kept(self, steps: Steps) -> Ahead | None:
        if not self._ahead_of_time:
            return None
        if self._ahead is None or self._ahead[0] is not steps:
            model, about = steps.program()
            ahead = None
            if model is not None:

                def example(given: Mapping[str, Any]) -> Mapping[str, Any]:
                    return {**given, "order": steps.order[: max(2, steps.order.shape[0] // 2)]}

                ahead = Ahead(
                    type(steps).step,
                    steps,
                    name=f"step of {type(model).__name__}",
                    model=model,
                    about=about,
                    dynamic={"order": (0,)},
                    programs=self._programs,
                    sizes=RootSizes(steps.sized(), example),
                )
            self._ahead = steps, ahead
        return self._ahead[1]

    def _compile(self, steps: Steps) -> Callable[[Tensor, bool, Drawing | None], None]:
        step = type(steps).step
        # A code object of its own: the compiler counts recompilations by code, and another cache is none of ours.
        own = types.FunctionType(
            step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__
        )
        compiled = torch.compile(own, fullgraph=True, backend=self._compiler, options=self._options or None)
        return lambda order, whole, drawing: compiled(steps, order, whole, drawing)


def _changing(guards: Sequence[Any]) -> list[bool]:
    """What may change between two steps, and is worth a look at each: not what hangs on the steps themselves."""
    return ["self" not in guard.name and not guard.name.startswith("G[") for guard in guards]


class Graph:
    """A step recorded once for each length that is read, and replayed.

    Args:
        record: `cuda_graph`, or another of `RECORDERS`.
        compiled: records what this makes of a step.
        bucket: lengths are rounded up to a multiple of so many slots, and so few are recorded.
    """

    def __init__(self, record: "Recorder", compiled: Compiled | None = None, bucket: int = BUCKET) -> None:
        self._record = record
        self._compiled = compiled
        self._bucket = bucket
        self._recorded: dict[tuple[int, Drawing | None], Callable[[], Any]] = {}
        self._of: Steps | None = None
        self.name = "graph" if compiled is None else "graph+compile"

    def __call__(self, steps: Steps, drawing: Drawing | None) -> None:
        if self._of is not steps:  # its tensors are others: what was recorded would write to those of before
            self._recorded, self._of = {}, steps
        slots = steps.order.shape[0]
        columns = min(-(-steps.reach()[0] // self._bucket) * self._bucket, slots)
        if (columns, drawing) not in self._recorded:
            began = time.perf_counter()
            self._recorded[columns, drawing] = self._recording(steps, steps.order[:columns], drawing)
            emit(Event("captured", self.name, {"columns": columns, "seconds": time.perf_counter() - began}))
        self._recorded[columns, drawing]()

    def _recording(self, steps: Steps, order: Tensor, drawing: Drawing | None) -> Callable[[], Any]:
        state = steps.state()
        before = [tensor.clone() for tensor in state]

        def step() -> None:
            if self._compiled is None:
                steps.step(order, False, drawing)
            else:
                self._compiled.run(steps, order, False, drawing)

        def restore() -> None:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        try:
            return self._record(step, restore)
        finally:
            restore()


Recorder = Callable[[Callable[[], None], Callable[[], None]], Callable[[], Any]]
"""Takes a step and what undoes it; gives what replays the step. The step may have run in between, and must be undone."""


def cuda_graph(step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], Any]:
    """Record a step in a CUDA graph, after it ran three times: libraries set themselves up at their first calls."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
            restore()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
        step()
    return graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph, "meta": cuda_graph}
"""What records a step, by the type of its device: one without a recorder has no graphs. A model on ``meta`` is planned for
a GPU, and records nothing."""
