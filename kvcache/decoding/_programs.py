"""Functions of tensors compiled ahead of time: machine code that the next process runs without tracing anything.

`torch.compile` keeps kernels, but each process traces the model's Python anew to find them, which takes most of the time. Here
torch's compiler captures a function once as a graph of tensors, with its weights among the inputs, and AOTInductor makes a
library of it. A later process loads that in milliseconds and gives it its own tensors, by the names they were captured under.

Of a file only what it says is believed, and only where nobody else can have written it: see `program_files`.
"""

import hashlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvcache.decoding._compiling import Refused, compiled
from kvcache.decoding._program import SELF, Bound, Program, load
from kvcache.decoding._program_files import ProgramFiles
from kvcache.decoding._provenance import made_by, source
from kvcache.errors import CorruptError, InputError, KVCacheError, said
from kvcache.events import Event, emit
from kvcache.models import model_program

_making = threading.Lock()  # torch's compiler makes one at a time
_loaded: dict[str, "Program"] = {}
_begun: dict[str, threading.Event] = {}
_failed: dict[str, str] = {}
_state = threading.RLock()


@dataclass(frozen=True)
class Made:
    """What a process has got.

    Attributes:
        name: of the function.
        how: ``"loaded"`` from a file, or ``"compiled"``.
        seconds: that it took.
    """

    name: str
    how: str
    seconds: float


class Programs:
    """Compiled functions of one engine, kept in files for the next process.

    Args:
        files: where; by default in the user's cache.

    Attributes:
        waits: whether a call waits until its function is compiled. Else it runs eagerly meanwhile, and a thread compiles.
        made: what was loaded or compiled for it.
    """

    def __init__(self, files: ProgramFiles | None = None) -> None:
        self.files = ProgramFiles() if files is None else files
        self.waits = True
        self.made: list[Made] = []
        self._waiting = threading.local()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which this thread's calls wait, whatever `waits` says."""
        before, self._waiting.here = getattr(self._waiting, "here", False), True
        try:
            yield
        finally:
            self._waiting.here = before

    @property
    def _waits(self) -> bool:
        return self.waits or getattr(self._waiting, "here", False)

    def program(self, function: "Ahead", args: Mapping[str, Any]) -> Program | None:
        """The program for a call; None as long as it is being made and the caller does not wait.

        Raises:
            Refused: if there is none, with the reason.
        """
        key = function.key(args)
        while True:
            with _state:
                if key in _loaded:
                    return _loaded[key]
                if key in _failed:
                    raise Refused(_failed[key])
                begun = _begun.get(key)
                if begun is None:
                    _begun[key] = threading.Event()
            if begun is None and (self._waits or self._load(function, key)):
                self._make(function, key, args)
            elif begun is None:
                like = {name: _like(value) for name, value in args.items()}
                threading.Thread(target=self._make, args=(function, key, like), daemon=True).start()
                return None
            elif self._waits:
                begun.wait()
            else:
                return None

    def _load(self, function: "Ahead", key: str) -> bool:
        """Whether the next process's part is done already: it takes milliseconds, and nobody need run eagerly for that."""
        began = time.perf_counter()
        try:
            found = self.files.read(key, made_by())
            if found is None:
                return False
            program = load(*found)
            program.bound(function.root)
        except Exception as error:  # whatever a library that does not load raises
            reason = str(error) if isinstance(error, KVCacheError) else f"it does not load: {said(error)}"
            emit(Event("fell_back", f"the compiled {function.name} from its file to compiling it", reason=reason))
            return False
        self._done(key, program)
        self.made.append(Made(function.name, "loaded", time.perf_counter() - began))
        return True

    def _make(self, function: "Ahead", key: str, args: Mapping[str, Any]) -> None:
        try:
            if key in _loaded or self._load(function, key):
                return
            began = time.perf_counter()
            with _making:
                about, library = compiled(function, args)
            program = load(about, library)
            program.bound(function.root)
            self._done(key, program)
            self.made.append(Made(function.name, "compiled", time.perf_counter() - began))
            try:
                self.files.write(key, made_by(), about, library)
            except (OSError, KVCacheError) as error:
                reason = f"the next process compiles it again: {said(error)}"
                emit(Event("fell_back", f"the compiled {function.name} to this process alone", reason=reason))
        except Exception as error:  # of torch's compiler, or a C++ compiler that is not there
            lines = said(error).strip().splitlines() or [""]
            reason = lines[0] if isinstance(error, KVCacheError) else f"{type(error).__name__}: {lines[0]}"
            with _state:
                _failed[key] = reason
        finally:
            with _state:
                _begun.pop(key).set()

    @staticmethod
    def _done(key: str, program: Program) -> None:
        with _state:
            _loaded[key] = program


@dataclass(frozen=True)
class RootSizes:
    """Sizes that differ from root to root: one program serves all.

    Attributes:
        tensors: of the root, and which of their dimensions differ. Their elements are in a row.
        example: gives arguments like some others, in sizes that stand for all; by default those themselves.
    """

    tensors: Sequence[tuple[Tensor, Sequence[int]]] = ()
    example: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: given


class Ahead:
    """A function of a root and of tensors, compiled once for all sizes of some dimensions.

    Calling it runs the program, or the function itself where there is none (yet).

    Args:
        function: whose first argument is the root; the others, and the root's tensors, are tensors of any shape. It returns
            one tensor, or None and changes tensors in place.
        root: whose tensors are the program's inputs.
        name: for events.
        model: what decides what it computes, beside `about` and the arguments.
        about: what else does, as text.
        dynamic: by argument, the dimensions that differ from call to call. Where one of them is 1, the program is for that
            alone: torch's compiler takes no 1 for a size like others.
        programs: where programs are found.
        sizes: what of the root differs from root to root; nothing by default.

    Attributes:
        pending: whether it runs eagerly for now, as its program is being made.
        refused: why it runs eagerly; None if it does not, or only for now.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        root: object,
        *,
        name: str,
        model: nn.Module,
        about: str = "",
        dynamic: Mapping[str, Sequence[int]],
        programs: Programs,
        sizes: RootSizes | None = None,
    ) -> None:
        self._sizes = RootSizes() if sizes is None else sizes
        self.pending = False
        self.function, self.root, self.name, self.dynamic = function, root, name, dynamic
        self._programs = programs
        self._names = list(inspect.signature(function).parameters)[1:]
        self._bound: dict[Any, Bound] = {}
        self.refused: str | None = None
        try:  # here, where no request waits for it
            self._outline = f"{model_program(model)} {about} {source(function)}"
        except InputError as error:
            self._refuse(str(error))

    def __call__(self, *args: Any) -> Any:
        given = dict(zip(self._names, args, strict=True))
        bound = self._found(given)
        found = None if bound is None else bound(given)
        if found is None:
            return self.function(self.root, *args)
        return found[0] if found else None

    def _found(self, given: Mapping[str, Any]) -> Bound | None:
        if self.refused is not None:
            return None
        variant = self._variant(given)
        if variant not in self._bound:
            try:
                program = self._programs.program(self, given)
                self.pending = program is None
                if program is None:
                    return None
                self._bound[variant] = program.bound(self.root)
            except (Refused, CorruptError) as error:
                self._refuse(str(error))
                return None
        return self._bound[variant]

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        emit(Event("fell_back", f"{self.name}, compiled, to eager", reason=reason))

    def example(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments like these, in sizes that stand for all."""
        return self._sizes.example(given)

    def moving(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The dimensions of an argument, or of another input of the program, that differ from call to call."""
        held = next((dims for one, dims in self._sizes.tensors if one is tensor), ())
        return tuple(dim for dim in self.dynamic.get(name, held) if tensor.shape[dim] > 1)

    @property
    def sized(self) -> Iterator[tuple[Tensor, int]]:
        """The root's tensors that differ from root to root, with each dimension in which they do."""
        return ((tensor, dim) for tensor, _ in self._sizes.tensors for dim in self.moving(SELF, tensor))

    def _variant(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """What of the arguments one program is for."""
        said: list[Any] = []
        for name, value in given.items():
            if isinstance(value, Tensor):
                moves = self.moving(name, value)
                dims = tuple(-1 if dim in moves else size for dim, size in enumerate(value.shape))
                said.append((name, value.dtype, dims, value.device.type))
            else:
                said.append((name, repr(value)))
        return tuple(said)

    def key(self, given: Mapping[str, Any]) -> str:
        """A digest of all that decides the program, and of what makes it."""
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        text = f"{name} {self._outline} {self._variant(given)} {sorted(made_by().items())}"
        return hashlib.sha256(text.encode()).hexdigest()


def _like(value: Any) -> Any:
    """What stands for an argument while its owner goes on with it."""
    return torch.empty_like(value) if isinstance(value, Tensor) else value
