"""Copies of a model's structure that share its tensors: how a model is changed without being patched."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvcache.models._forwards import HOOKS, forward_of, unwrapped
from kvcache.models._rebound import Rebinding
from kvcache.models._walk import HELD


def structural_copy(module: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> Any:
    """A copy of a module's structure, sharing its tensors, with some of its modules replaced.

    What is bound to a module is bound to its copy: forwards on instances, hooks, references between modules. The copy runs
    eagerly where the module is compiled. Where it could not be faithful, `kvcache.models.signature_of` says why.

    Args:
        module: is not changed; hooks that it gets later are its own, those it has are the copy's as well.
        replace: is asked for each module, by name and as it is, for what takes its place; None keeps it. The children of
            one that is replaced are not asked for. Modules are named as if none were wrapped by `torch.compile`.
    """
    copies: dict[int, nn.Module] = {}
    kept: list[tuple[nn.Module, nn.Module]] = []

    def visit(name: str, given: nn.Module) -> nn.Module:
        old = unwrapped(given)
        if id(old) not in copies:
            new = replace(name, old)
            if new is None:
                # Not copy.copy, which asks for what is pickled: parametrized modules refuse that.
                new = nn.Module.__new__(type(old))
                new.__dict__.update(vars(old))
                kept.append((old, new))
                new.__dict__["_modules"] = {
                    child: None if part is None else visit(f"{name}.{child}" if name else child, part)
                    for child, part in old._modules.items()
                }
            copies[id(old)] = new
        copies[id(given)] = copies[id(old)]
        return copies[id(old)]

    root = visit("", module)
    bind = Rebinding(copies)
    devices = {tensor.device for tensor in module.parameters()}
    for old, new in kept:
        _bind(old, new, bind, one_device=len(devices) <= 1)
    return root


def attending_copy(model: Any, name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> Any:
    """A copy of a model that shares its tensors and attends in another way.

    Args:
        model: is not changed.
        name: of that attention, for transformers.
        attend: computes it, see ``transformers.AttentionInterface``.
        mask: makes its mask, see ``transformers.masking_utils.AttentionMaskInterface``.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    new = structural_copy(model, lambda name, module: None)
    configs: dict[int, Any] = {}
    for module in new.modules():
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            if id(config) not in configs:
                configs[id(config)] = copy.copy(config)
                configs[id(config)]._attn_implementation_internal = name
            module.config = configs[id(config)]
    return new


def _bind(old: nn.Module, new: nn.Module, bind: Rebinding, one_device: bool) -> None:
    """Give the copy of a module dicts of its own, and what is bound to it."""
    held = new.__dict__
    for key, value in vars(old).items():
        if key in HOOKS:
            lasting = ((number, hook) for number, hook in value.items() if not getattr(hook, "passing", False))
            held[key] = type(value)((number, bind(hook)) for number, hook in lasting)
        elif key in HELD or "_hooks" in key:  # with what torch notes of each hook beside it
            held[key] = copy.copy(value)
        elif key != "_modules":
            held[key] = bind(value)
    kind = forward_of(old)
    if kind == "own" or (kind == "moves" and one_device):
        for key in ("forward", "_old_forward", "_hf_hook"):
            held.pop(key, None)
    held["_compiled_call_impl"] = None
