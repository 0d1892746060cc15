"""A compiled function of tensors: what it is called with, and with whose tensors."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcache.errors import CorruptError

SELF = "self"
STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+)\]|\['([^'\\]*)'\]")


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
            begin, path = split(name)
            if begin != SELF:
                held.append(None)
                given.append((place, begin, shape["dims"]))
                continue
            tensor = at(root, path)
            if not isinstance(tensor, Tensor) or not self._suits(tensor, shape, known):
                raise CorruptError(f"it was made for a {name} of {shape}; it is made anew")
            held.append(tensor.detach())
        return Bound(self._library, held, given, self._sizes, known)

    def _suits(self, tensor: Tensor, shape: Mapping[str, Any], known: dict[str, int]) -> bool:
        if shape["strides"] is not None:
            return layout(tensor) == shape
        alike = layout(tensor) | {"dims": shape["dims"], "strides": None} == shape
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


def load(about: Mapping[str, Any], library: bytes) -> Program:
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


# ---------------------------------------------------------------------- paths and layouts


def split(name: str) -> tuple[str, str]:
    begin = re.match(r"\w+", name)
    assert begin is not None
    return begin[0], name[begin.end() :]


def at(root: object, path: str) -> Any:
    """What a path leads to; None if it leads nowhere."""
    found: Any = root
    try:
        for step in STEP.finditer(path):
            attribute, index, key = step.groups()
            if attribute is not None:
                found = getattr(found, attribute)
            else:
                found = found[int(index) if index is not None else key]
    except (AttributeError, LookupError, TypeError):
        return None
    return found


def layout(tensor: Tensor) -> dict[str, Any]:
    return {
        "dims": list(tensor.shape),
        "strides": list(tensor.stride()),
        "dtype": str(tensor.dtype),
        "device": tensor.device.type,
    }
