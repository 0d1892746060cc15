"""Models that run without numbers: what they allocate, and shapes of what they make, on torch's meta device.

There tensors have shapes and no numbers. What a model does by the numbers it finds (tokens sorted by the expert that takes
them, masks looked at) is answered for the worst case: so bytes are never fewer than they can be.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakSet, finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this block, counts the bytes of the tensors that are made on the meta device.

    Attributes:
        live: bytes held now.
        peak: the most that were held.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: WeakSet[Any] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        came = storages((args, kwargs))
        self._known.update(came)  # what comes in has been counted, or was there before
        answer = _ANSWERS.get(func) if came else None
        out = func(*args, **kwargs) if answer is None else answer(*args, **kwargs)
        for storage in storages(out):
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                finalize(storage, self._let_go, storage.nbytes())
        # Fused attention holds no scores, but a mask of booleans it first turns into numbers.
        mask = _mask(args, kwargs) if func is _ATTENTION else None
        self.peak = max(self.peak, self.live + (0 if mask is None else mask.numel() * args[0].element_size()))
        return out

    def _let_go(self, nbytes: int) -> None:
        self.live -= nbytes


@contextmanager
def without_numbers() -> Iterator[Watch]:
    """Within this block all that is made is made on the meta device, and counted.

    What is made on the host, such as masks, is made there as well when a model is served: all of it counts on a CPU.
    """
    with ExitStack() as block:
        block.enter_context(meta_without_autocast())
        block.enter_context(torch.inference_mode())
        watch = block.enter_context(Watch())
        block.enter_context(torch.device("meta"))
        yield watch


@contextmanager
def meta_without_autocast() -> Iterator[None]:
    """Within this block torch says that nothing is cast on the meta device, of which it knows no more than that.

    Older releases of transformers (5.2 does, 5.23 does not) ask whenever they turn keys, and torch raises.
    """
    asked = torch.is_autocast_enabled

    def enabled(*device: str) -> bool:
        return device != ("meta",) and asked(*device)

    with patch.object(torch, "is_autocast_enabled", enabled):
        yield


def storages(tree: Any) -> list[Any]:
    """The storages of the meta tensors in nested containers."""
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_meta]


def _mask(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    mask: Tensor | None = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    return mask if mask is not None and mask.dtype == torch.bool else None


# ---------------------------------------------------------------------- what asks for numbers


def _number(given: Tensor) -> bool | int | float:
    """A mask hides nothing, a count or position is 0."""
    return True if given.dtype == torch.bool else 0.0 if given.is_floating_point() else 0


def _found(given: Tensor) -> Tensor:
    """As if none were zero."""
    return given.new_empty((given.numel(), given.dim()), dtype=torch.long)


def _selected(given: Tensor, mask: Tensor) -> Tensor:
    """As if the mask hid nothing."""
    return given.new_empty((given.expand_as(mask) if mask.numel() > given.numel() else given).numel())


def _picked(given: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Indexing, where a mask of booleans hides nothing."""
    plain: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        plain += list(_found(index).unbind(1)) if masks and index is not None else [index]
    found: Tensor = torch.ops.aten.index.Tensor(given, plain)
    return found


def _grouped(
    given: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,  # noqa: ARG001  # as torch's own
    bias: Tensor | None = None,  # noqa: ARG001
    out_dtype: Any = None,
) -> Tensor:
    """Groups of rows, each multiplied with a matrix of its own. Torch's kernel for the meta device wants bf16; others do not."""
    return given.new_empty((*given.shape[:-1], weight.shape[-1]), dtype=out_dtype)


def _wave(given: Tensor, n_fft: int, hop_length: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """The signal of a spectrum, centred: its own function compares its window with zeros, which has no answer here."""
    hop = n_fft // 4 if hop_length is None else hop_length
    return given.new_empty((*given.shape[:-2], hop * (given.shape[-1] - 1)), dtype=given.dtype.to_real())


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._local_scalar_dense.default: _number,
    torch.ops.aten.item.default: _number,
    torch.ops.aten.is_nonzero.default: lambda given: bool(_number(given)),
    torch.ops.aten.nonzero.default: _found,
    torch.ops.aten.argwhere.default: _found,
    torch.ops.aten.nonzero_numpy.default: lambda given: list(_found(given).unbind(1)),
    torch.ops.aten.where.default: lambda given: list(_found(given).unbind(1)),
    torch.ops.aten.masked_select.default: _selected,
    torch.ops.aten.index.Tensor: _picked,
    torch.ops.aten.istft.default: _wave,
}
if hasattr(torch.ops.aten, "_grouped_mm"):  # from torch 2.7 on
    _ANSWERS[torch.ops.aten._grouped_mm.default] = _grouped
