"""Parts of the vocoder compiled: ahead of time and for the next process too on a CPU, by `torch.compile` elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from kvcache.decoding import Ahead, Programs


def compiled_over(
    function: Callable[..., Any],
    module: nn.Module,
    dynamic: Mapping[str, Sequence[int]],
    name: str,
    programs: Programs | None,
) -> Callable[..., Any]:
    """A function of a module and of contiguous tensors, without the module, compiled for all sizes of some dimensions.

    Args:
        dynamic: by argument, those dimensions.
        name: for events.
        programs: where what was compiled is kept; by default in the user's cache.
    """
    device = next(module.parameters()).device
    if device.type != "cpu":
        return torch.compile(partial(function, module), dynamic=True)
    programs = Programs() if programs is None else programs
    return Ahead(function, module, name=name, model=module, dynamic=dynamic, programs=programs)
