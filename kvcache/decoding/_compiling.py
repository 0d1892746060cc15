"""A function of tensors made into a library: captured by torch's own tracer, exported for all sizes, and compiled."""

import importlib
import inspect
import os
import re
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvcache.decoding._program import SELF, STEP, at, layout, split
from kvcache.decoding._program_files import why_not_private
from kvcache.errors import KVCacheError
from kvcache.io import make_private_folder

if TYPE_CHECKING:
    from kvcache.decoding._programs import Ahead

_SIZE = re.compile(r"(L\['\w+'\].*)\.size\(\)\[(\d+)\]")


class Refused(KVCacheError):
    """Why a function is not compiled ahead of time."""


def compiled(function: "Ahead", args: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
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
            (layout(tensor) if split(name)[0] == SELF else {"dims": None})
            | ({"dims": dims, "strides": None} if moving or split(name)[0] != SELF else {})
            for name, tensor, dims, moving in zip(names, inputs, shapes, moves, strict=True)
        ]
        with tempfile.TemporaryDirectory(prefix="kvcache-") as place:
            path = torch._inductor.aoti_compile_and_package(exported, package_path=os.path.join(place, "program.pt2"))
            library = Path(path).read_bytes()
    return {"names": names, "shapes": found, "sizes": _ranges(exported, shapes)}, library


class _Stop(Exception):
    """Tracing has given what was wanted."""


def _captured(function: "Ahead", args: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The function as a graph of tensors, by torch's own tracer, and the places that its inputs come from."""
    found: list[tuple[Any, list[str]]] = []

    def take(graph: Any, _inputs: Sequence[Any]) -> Any:
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
    if begin is None or "".join(step.group() for step in STEP.finditer(name[begin.end() :])) != name[begin.end() :]:
        raise Refused(f"it reads {name}, which no path leads to")
    return (SELF if begin[1] == first else begin[1]) + name[begin.end() :]


def _resolved(root: object, args: Mapping[str, Any], name: str) -> Tensor:
    begin, path = split(name)
    tensor = at(root if begin == SELF else args[begin], path)
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


def _scratch() -> Path:
    """Where torch's compiler writes, and looks for what it wrote before."""
    compiler: Any = importlib.import_module("torch._inductor.codecache")  # takes seconds
    folder = Path(compiler.cache_dir())
    make_private_folder(folder)
    return folder
