"""A few bytes of every tensor: writes that torch itself does not count show in them."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy
import numpy.typing
import torch
from torch import Tensor

Array = numpy.typing.NDArray[Any]

_base = torch.UntypedStorage.data_ptr
_ELEMENTS = 16  # of a tensor


class Sample:
    """Some elements of tensors, spread evenly, as they are at each call.

    Args:
        tensors: plain ones. They are not held, nor is their memory: it is read only while the caller holds it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._bases = list(map(_base, _storages(tensors)))
        self._views: list[Array] = []
        self._elsewhere: list[tuple[int, int, int, int]] = []  # which, first, step, how many
        for i, tensor in enumerate(tensors):
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            total = tensor.numel()
            if total == 0 or tensor.is_meta:
                continue
            dense = extent == total
            step = max(1, total // _ELEMENTS) if dense else 1
            many = min(_ELEMENTS, total) if dense else 1
            first = (total - 1 - (many - 1) * step) // 2 if dense else 0
            if tensor.device.type == "cpu":
                self._views.append(_view(tensor, first, step, many))
            else:
                self._elsewhere.append((i, first, step, many))

    def __call__(self, tensors: Sequence[Tensor]) -> bytes | None:
        """The bytes now; None if the tensors are in other memory.

        Args:
            tensors: those that it was made for.
        """
        held = _storages(tensors)  # nothing is freed while it is read
        if list(map(_base, held)) != self._bases:
            return None
        found = b"".join(map(numpy.ndarray.tobytes, self._views))
        del held
        if self._elsewhere:
            parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for i, first, step, many in self._elsewhere:
                tensor = tensors[i].detach()
                part = tensor.as_strided((many,), (step,), tensor.storage_offset() + first)
                parts.setdefault((part.device, part.dtype), []).append(part)
            gathered = [torch.cat(some).view(torch.uint8).cpu() for some in parts.values()]
            found += b"".join(part.numpy().tobytes() for part in gathered)
        return found


def _storages(tensors: Sequence[Tensor]) -> list[torch.UntypedStorage]:
    return list(map(Tensor.untyped_storage, tensors))


def _view(tensor: Tensor, first: int, step: int, many: int) -> Array:
    size = tensor.element_size()
    memory: Any = (ctypes.c_char * (size * (first + (many - 1) * step + 1))).from_address(tensor.data_ptr())
    view: Array = numpy.ndarray((many,), f"V{size}", memory, size * first, (size * step,))
    return view
