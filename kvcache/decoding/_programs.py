"""Functions of tensors compiled ahead of time: machine code that the next process runs without tracing anything.

`torch.compile` keeps kernels, but each process traces the model's Python anew to find them, which takes most of the time. Here
torch's compiler captures a function once as a graph of tensors, with its weights among the inputs, and AOTInductor makes a
library of it. A later process loads that in milliseconds and gives it its own tensors, by the names they were captured under.

Of a file only what it says is believed, and only where nobody else can have written it: see `program_files`.
"""

import hashlib
import importlib
import inspect
import os
import platform
import re
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcache.decoding._program_files import ProgramFiles, why_not_private
from kvcache.errors import CorruptError, InputError, KVCacheError, said
from kvcache.events import Event, emit
from kvcache.io import make_private_folder
from kvcache.models import model_program

_PACKAGES = ("kvcache", "torch", "transformers", "chatterbox-tts", "diffusers")
_SELF = "self"
_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+)\]|\['([^'\\]*)'\]")
_SIZE = re.compile(r"(L\['\w+'\].*)\.size\(\)\[(\d+)\]")

_making = threading.Lock()  # torch's compiler makes one at a time
_loaded: dict[str, "Program"] = {}
_begun: dict[str, threading.Event] = {}
_failed: dict[str, str] = {}
_state = threading.RLock()


class Refused(KVCacheError):
    """Why a function is not compiled ahead of time."""


class Program:
    """A function that was compiled, and what it is called with.

    Args:
        library: AOTInductor's.
        names: of its inputs: paths that begin at an argument or at the root.
        shapes: of each input: dimensions, which are numbers or the names of sizes that may differ; strides and dtype of those
            that belong to the root.
        sizes: what each of those names may be, least and most.
    """

    def __init__(
        self, library: Any, names: Sequence[str], shapes: Sequence[Any], sizes: Mapping[str, tuple[int, int]]
    ) -> None:
        self._library, self._names, self._shapes, self._sizes = library, names, shapes, sizes

    def bound(self, root: object) -> "Bound":
        """The program with a root's own tensors.

        Raises:
            CorruptError: if they are not those that it was made for.
        """
        held: list[Tensor | None] = []
        given: list[tuple[int, str, list[Any]]] = []
        known = dict[str, int]()
        for place, (name, shape) in enumerate(zip(self._names, self._shapes, strict=True)):
            begin, path = _split(name)
            if begin != _SELF:
                held.append(None)
                given.append((place, begin, shape["dims"]))
                continue
            tensor = _at(root, path)
            if not isinstance(tensor, Tensor) or not self._suits(tensor, shape, known):
                raise CorruptError(f"it was made for a {name} of {shape}; it is made anew")
            held.append(tensor.detach())
        return Bound(self._library, held, given, self._sizes, known)

    def _suits(self, tensor: Tensor, shape: Mapping[str, Any], known: dict[str, int]) -> bool:
        if shape["strides"] is not None:
            return _layout(tensor) == shape
        alike = _layout(tensor) | {"dims": shape["dims"], "strides": None} == shape
        return alike and tensor.is_contiguous() and fits(tensor, shape["dims"], self._sizes, known)


def fits(tensor: Tensor, dims: Sequence[Any], sizes: Mapping[str, tuple[int, int]], known: dict[str, int]) -> bool:
    """Whether a tensor is of these dimensions, each a number or ``[times, size]``.

    Args:
        sizes: what each size may be, least and most.
        known: what each is, as far as that is settled; what this tensor settles is added.
    """
    if tensor.ndim != len(dims):
        return False
    for size, wanted in zip(tensor.shape, dims, strict=True):
        if isinstance(wanted, int):
            if size != wanted:
                return False
            continue
        times, name = wanted
        least, most = sizes[name]
        if size % times or known.setdefault(name, size // times) != size // times:
            return False
        if not least <= size // times <= most:
            return False
    return True


class Bound:
    """A program with the tensors, of any shape, of what it is a function of."""

    def __init__(
        self,
        library: Any,
        held: list[Tensor | None],
        given: list[tuple[int, str, list[Any]]],
        sizes: Mapping[str, tuple[int, int]],
        known: Mapping[str, int],
    ) -> None:
        self._library, self._held, self._given, self._sizes, self._known = library, held, given, sizes, known

    def __call__(self, args: Mapping[str, Any]) -> list[Tensor] | None:
        """Run it, if it is for arguments of these sizes; None if it is not, and nothing has run."""
        inputs, known = list(self._held), dict(self._known)
        for place, name, dims in self._given:
            if not fits(args[name], dims, self._sizes, known):
                return None
            inputs[place] = args[name].detach().contiguous()
        found: list[Tensor] = self._library.run(inputs)
        return found


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
            if begun is None and (self._waits or self._load(function, key, args)):
                self._make(function, key, args)
            elif begun is None:
                like = {name: _like(value) for name, value in args.items()}
                threading.Thread(target=self._make, args=(function, key, like), daemon=True).start()
                return None
            elif self._waits:
                begun.wait()
            else:
                return None

    def _load(self, function: "Ahead", key: str, args: Mapping[str, Any]) -> bool:
        """Whether the next process's part is done already: it takes milliseconds, and nobody need run eagerly for that."""
        began = time.perf_counter()
        try:
            found = self.files.read(key, made_by())
            if found is None:
                return False
            program = _program(*found)
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
            if key in _loaded or self._load(function, key, args):
                return
            began = time.perf_counter()
            with _making:
                about, library = compiled(function, args)
            program = _program(about, library)
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
        sized: tensors of the root, and which of their dimensions differ from root to root: one program serves all. Their
            elements are in a row.
        example: gives arguments like some others, in sizes that stand for all; by default those themselves.

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
        sized: Sequence[tuple[Tensor, Sequence[int]]] = (),
        example: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: given,
    ) -> None:
        self.example, self._sized = example, sized
        self.pending = False
        self.function, self.root, self.name, self.dynamic = function, root, name, dynamic
        self._programs = programs
        self._names = list(inspect.signature(function).parameters)[1:]
        self._bound: dict[Any, Bound] = {}
        self.refused: str | None = None
        try:  # here, where no request waits for it
            self._outline = f"{model_program(model)} {about} {_source(function)}"
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

    def moving(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The dimensions of an argument, or of another input of the program, that differ from call to call."""
        held = next((dims for one, dims in self._sized if one is tensor), ())
        return tuple(dim for dim in self.dynamic.get(name, held) if tensor.shape[dim] > 1)

    @property
    def sized(self) -> Iterator[tuple[Tensor, int]]:
        """The root's tensors that differ from root to root, with each dimension in which they do."""
        return ((tensor, dim) for tensor, _ in self._sized for dim in self.moving(_SELF, tensor))

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


# ---------------------------------------------------------------------- making one


def compiled(function: Ahead, args: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """What a program needs to be called, and its library.

    Raises:
        Refused: if it cannot be made so. What torch raises comes through.
    """
    folder = _scratch()
    if (reason := why_not_private(folder)) is not None:
        raise Refused(
            f"{reason}; torch's compiler would run what lies there: set TORCHINDUCTOR_CACHE_DIR to a private one"
        )
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        args = {name: _plain(value) for name, value in function.example(args).items()}
        graph, names = _captured(function, args)
        inputs = [_resolved(function.root, args, name) for name in names]
        moves = [function.moving(name, tensor) for name, tensor in zip(names, inputs, strict=True)]
        inputs = [tensor.clone() if tensor.is_inference() else tensor for tensor in inputs]  # as they lie
        exported, shapes = _exported(graph, names, inputs, moves)
        found = [
            (_layout(tensor) if _split(name)[0] == _SELF else {"dims": None})
            | ({"dims": dims, "strides": None} if moving or _split(name)[0] != _SELF else {})
            for name, tensor, dims, moving in zip(names, inputs, shapes, moves, strict=True)
        ]
        with tempfile.TemporaryDirectory(prefix="kvcache-") as place:
            path = torch._inductor.aoti_compile_and_package(exported, package_path=os.path.join(place, "program.pt2"))
            library = Path(path).read_bytes()
    return {"names": names, "shapes": found, "sizes": _ranges(exported, shapes)}, library


class _Stop(Exception):
    """Tracing has given what was wanted."""


def _captured(function: Ahead, args: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The function as a graph of tensors, by torch's own tracer, and the places that its inputs come from."""
    found: list[tuple[Any, list[str]]] = []

    def take(graph: Any, inputs: Sequence[Any]) -> Any:
        found.append((graph, [_source_of(node) for node in graph.graph.nodes if node.op == "placeholder"]))
        raise _Stop

    code = function.function
    # A code object of its own: the compiler counts recompilations by code.
    own = types.FunctionType(
        code.__code__.replace(), code.__globals__, code.__name__, code.__defaults__, code.__closure__
    )
    for name, value in args.items():
        for dim in function.moving(name, value) if isinstance(value, Tensor) else ():
            torch._dynamo.maybe_mark_dynamic(value, dim)
    for held, dim in function.sized:
        torch._dynamo.maybe_mark_dynamic(held, dim)
    try:
        torch.compile(own, fullgraph=True, backend=take)(function.root, *args.values())
    except Exception:
        if not found:
            raise
    if not found:
        raise Refused("it computes nothing with tensors")
    graph, names = found[0]
    first = next(iter(inspect.signature(function.function).parameters))
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = {name: node for name, node in zip(names, nodes, strict=True) if _SIZE.fullmatch(name) is None}
    for name, node in zip(names, tuple(nodes), strict=True):
        if (size := _SIZE.fullmatch(name)) is None:
            if not isinstance(node.meta.get("example_value"), Tensor):
                raise Refused(f"it depends on the number {name}")
            continue
        tensor = size[1]
        if tensor not in inputs:
            with graph.graph.inserting_after(nodes[-1]):
                inputs[tensor] = graph.graph.placeholder(re.sub(r"\W+", "_", f"sized_{tensor}"))
            nodes.append(inputs[tensor])
        with graph.graph.inserting_after(nodes[-1]):
            read = graph.graph.call_function(torch.ops.aten.sym_size.int, (inputs[tensor], int(size[2])))
        node.replace_all_uses_with(read)
        graph.graph.erase_node(node)
    graph.recompile()
    order = {node: name for name, node in inputs.items()}
    said = [order[node] for node in graph.graph.nodes if node.op == "placeholder"]
    return graph, [_named(name, first) for name in said]


def _source_of(node: Any) -> str:
    source = node.meta["grapharg"].source
    name = source.name  # a method, in earlier releases
    return str(name() if callable(name) else name)


def _named(name: str, first: str) -> str:
    """A path that begins at the root or an argument, from the tracer's own."""
    begin = re.match(r"L\['(\w+)'\]", name)
    if begin is None or "".join(step.group() for step in _STEP.finditer(name[begin.end() :])) != name[begin.end() :]:
        raise Refused(f"it reads {name}, which no path leads to")
    return (_SELF if begin[1] == first else begin[1]) + name[begin.end() :]


def _split(name: str) -> tuple[str, str]:
    begin = re.match(r"\w+", name)
    assert begin is not None
    return begin[0], name[begin.end() :]


def _at(root: object, path: str) -> Any:
    """What a path leads to; None if it leads nowhere."""
    found: Any = root
    try:
        for step in _STEP.finditer(path):
            attribute, index, key = step.groups()
            if attribute is not None:
                found = getattr(found, attribute)
            else:
                found = found[int(index) if index is not None else key]
    except (AttributeError, LookupError, TypeError):
        return None
    return found


def _resolved(root: object, args: Mapping[str, Any], name: str) -> Tensor:
    begin, path = _split(name)
    tensor = _at(root if begin == _SELF else args[begin], path)
    if not isinstance(tensor, Tensor):
        raise Refused(f"{name} is no tensor")
    return tensor


class _Flat(nn.Module):
    """A graph as a module of positional inputs."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> Any:
        return self.graph(*inputs)


def _exported(
    graph: Any, names: Sequence[str], inputs: Sequence[Tensor], moves: Sequence[Sequence[int]]
) -> tuple[Any, list[list[Any]]]:
    """The graph exported for all sizes, and each input's dimensions: numbers, or ``[times, size]``."""
    auto = torch.export.Dim.AUTO
    wanted = tuple(dict.fromkeys(dims, auto) or None for dims in moves)
    exported = torch.export.export(_Flat(graph), tuple(inputs), dynamic_shapes={"inputs": wanted}, strict=False)
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    values = values[len(values) - len(inputs) :]  # behind constants
    shapes = []
    for name, value, dims in zip(names, values, moves, strict=True):
        said = [size if isinstance(size, int) else _linear(size) for size in value.shape]
        if any(isinstance(said[dim], int) for dim in dims):
            raise Refused(f"torch's compiler takes only one size of {name}")
        shapes.append(said)
    return exported, shapes


def _linear(size: Any) -> list[Any]:
    """A symbolic size as a multiple of another."""
    found = size.node.expr
    times, rest = found.as_coeff_Mul()
    if not rest.is_Symbol:
        raise Refused(f"a size of {found} is none that a call is checked for")
    return [int(times), str(rest)]


def _ranges(exported: Any, shapes: Sequence[Sequence[Any]]) -> dict[str, tuple[int, int]]:
    """What the sizes may be that the inputs have."""
    names = {dim[1] for dims in shapes for dim in dims if not isinstance(dim, int)}
    limits = {str(symbol): found for symbol, found in exported.range_constraints.items()}
    return {name: (max(2, int(limits[name].lower)), int(min(limits[name].upper, 2**62))) for name in names}


def _plain(value: Any) -> Any:
    """A tensor that the compiler takes for one like any other: not made in inference mode, and its elements in a row."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.clone(memory_format=torch.contiguous_format) if value.is_inference() else value.contiguous()


def _like(value: Any) -> Any:
    """What stands for an argument while its owner goes on with it."""
    return torch.empty_like(value) if isinstance(value, Tensor) else value


def _layout(tensor: Tensor) -> dict[str, Any]:
    return {
        "dims": list(tensor.shape),
        "strides": list(tensor.stride()),
        "dtype": str(tensor.dtype),
        "device": tensor.device.type,
    }


def _program(about: Mapping[str, Any], library: bytes) -> Program:
    """A program that can be called, from what a file holds. The library is read from a copy in a private folder."""
    with tempfile.TemporaryDirectory(prefix="kvcache-") as place:
        path = Path(place) / "program.pt2"
        path.write_bytes(library)
        loader: Any = torch._C._aoti.AOTIModelPackageLoader  # not torch._inductor's, whose import takes seconds
        try:
            found = loader(str(path), "model", False, 1, -1)
        except TypeError:  # releases before 2.7
            found = loader(str(path), "model")
    sizes = {name: (limits[0], limits[1]) for name, limits in about["sizes"].items()}
    return Program(found, about["names"], about["shapes"], sizes)


# ---------------------------------------------------------------------- what it is made by


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


def _source(function: Any) -> str:
    own = {__name__.partition(".")[0], str(function.__module__).partition(".")[0]}
    return " ".join(_package_source(name) for name in sorted(own))


def _scratch() -> Path:
    """Where torch's compiler writes, and looks for what it wrote before."""
    compiler: Any = importlib.import_module("torch._inductor.codecache")  # takes seconds
    folder = Path(compiler.cache_dir())
    make_private_folder(folder)
    return folder
