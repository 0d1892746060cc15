"""What runs a step: Python, torch's compiler, a captured graph, or both of these."""

import time
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from kvcache.errors import InputError
from kvcache.events import Event, emit

BackendName = Literal["eager", "compile", "graph", "graph+compile"]

_BUCKET = 256


class Steps(Protocol):
    """What a backend runs."""

    def step(self, order: Tensor, whole: bool, draws: bool) -> None:
        """One token for every request. `order` is ``arange(columns)``: so many slots are read."""

    def reach(self) -> tuple[int, bool]:
        """How many slots the next step has to read, and whether every row sees all of them."""

    def state(self) -> list[Tensor]:
        """All that a step changes, but for keys and values, which it writes again to where it wrote them."""

    @property
    def order(self) -> Tensor:
        """``arange(slots)``."""


class Backend(Protocol):
    """Runs one step, or raises and has changed nothing."""

    @property
    def name(self) -> str: ...

    def __call__(self, steps: Steps, draws: bool) -> None: ...


def check_backend(name: str) -> None:
    """Raise `InputError` for an unknown name."""
    if name not in get_args(BackendName):
        known = ", ".join(map(repr, get_args(BackendName)))
        raise InputError(f"backend={name!r} must be one of {known}, 'auto' or 'off'")


def backend_for(name: str, device: torch.device) -> tuple[Backend, str | None]:
    """The backend of that name, and what is missing of it on this device, if anything.

    Raises:
        InputError: for an unknown name.
    """
    check_backend(name)
    if name == "eager":
        return Eager(), None
    if name == "compile":
        return Compiled(device), None
    if device.type == "cpu":
        if name == "graph":
            return Graph(traced), None
        return Compiled(device), "there are no graphs on a CPU to capture the compiled step in"
    return Graph(cuda_graph, Compiled(device) if name == "graph+compile" else None), None


class Eager:
    """Python, kernel by kernel."""

    name = "eager"

    def __call__(self, steps: Steps, draws: bool) -> None:
        columns, whole = steps.reach()
        steps.step(steps.order[:columns], whole, draws)


class Compiled:
    """torch's compiler, once for all lengths; on a CPU with all of the step in C++, calls between kernels too."""

    name = "compile"

    def __init__(self, device: torch.device, compiler: str = "inductor") -> None:
        self._options: dict[str, Any] = {"cpp_wrapper": True} if device.type == "cpu" and compiler == "inductor" else {}
        if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):  # releases that know this option
            self._options["guard_filter_fn"] = _changing
        self._compiler = compiler
        self._compiled: tuple[Steps, Callable[[Tensor, bool, bool], None]] | None = None

    def __call__(self, steps: Steps, draws: bool) -> None:
        columns, whole = steps.reach()
        self.run(steps, steps.order[:columns], whole, draws)

    def run(self, steps: Steps, order: Tensor, whole: bool, draws: bool) -> None:
        if self._compiled is None or self._compiled[0] is not steps:
            self._compiled = (steps, self._compile(steps))
        if order.shape[0] > 1:  # of one slot there is only one, which a compiler would not take for many
            torch._dynamo.maybe_mark_dynamic(order, 0)
        self._compiled[1](order, whole, draws)

    def _compile(self, steps: Steps) -> Callable[[Tensor, bool, bool], None]:
        step = type(steps).step
        # A code object of its own: the compiler counts recompilations by code, and another cache is none of ours.
        own = types.FunctionType(
            step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__
        )
        compiled = torch.compile(own, fullgraph=True, backend=self._compiler, options=self._options or None)
        return lambda order, whole, draws: compiled(steps, order, whole, draws)


def _changing(guards: Sequence[Any]) -> list[bool]:
    """What may change between two steps, and is worth a look at each: not what hangs on the steps themselves."""
    return ["self" not in guard.name and not guard.name.startswith("G[") for guard in guards]


class Graph:
    """A step recorded once for each length that is read, and replayed.

    Args:
        record: `cuda_graph` or `traced`.
        compiled: records what this makes of a step.
    """

    def __init__(self, record: "Recorder", compiled: Compiled | None = None) -> None:
        self._record = record
        self._compiled = compiled
        self._recorded: dict[tuple[int, bool], Callable[[], Any]] = {}
        self._of: Steps | None = None
        self.name = "graph" if compiled is None else "graph+compile"

    def __call__(self, steps: Steps, draws: bool) -> None:
        if self._of is not steps:  # its tensors are others: what was recorded would write to those of before
            self._recorded, self._of = {}, steps
        slots = steps.order.shape[0]
        columns = min(-(-steps.reach()[0] // _BUCKET) * _BUCKET, slots)
        if (columns, draws) not in self._recorded:
            began = time.perf_counter()
            self._recorded[columns, draws] = self._recording(steps, steps.order[:columns], draws)
            emit(Event("captured", self.name, {"columns": columns, "seconds": time.perf_counter() - began}))
        self._recorded[columns, draws]()

    def _recording(self, steps: Steps, order: Tensor, draws: bool) -> Callable[[], Any]:
        state = steps.state()
        before = [tensor.clone() for tensor in state]

        def step() -> None:
            if self._compiled is None:
                steps.step(order, False, draws)
            else:
                self._compiled.run(steps, order, False, draws)

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


def traced(step: Callable[[], None], restore: Callable[[], None]) -> Callable[[], Any]:
    """Record a step as the list of its operators, with every Python number baked in, as a capture bakes it in."""
    return make_fx(step)()
