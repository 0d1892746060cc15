"""What runs when a module is called: its class's forward, one bound on the instance, hooks.

A copy of a model must run the copy's parts. A forward on an instance usually belongs to the module it was made for, so it
is told here what it comes to: the class's own (`torch.compile`, a bound method), one that only moves tensors (accelerate),
or somebody's own, which is bound anew to the copy, part by part, or cannot be.
"""

import sys
import types
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, update_wrapper
from typing import Any, Literal, TypeVar, cast

from torch import nn
from torch.nn.modules import module as everywhere

Forward = Literal["own", "moves", "offloads", "bound"]
"""The class's own; its own between moves of tensors from device to device; with weights that come only for the call; or
somebody's."""

_MARK = "_kvcache_looks_on"
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
EVERYWHERE: dict[str, dict[int, Any]] = dict(
    zip(HOOKS, (everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks), strict=True)
)
"""Torch's global hooks, which run around every module, by the name that a module's own have."""

# Hooks that look at outputs and give nothing back: this library's, and those that others leave behind for good.
_ONLOOKERS = ("kvcache", "kvcache_chatterbox", "chatterbox", "transformers.utils.output_capturing")


def wrapper(module: Any) -> bool:
    """Whether it is what `torch.compile(module)` gives."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def unwrapped(module: Any) -> Any:
    """The module behind `torch.compile(module)`; another one as it is."""
    while wrapper(module):
        module = module._modules["_orig_mod"]
    return module


def compiled(module: nn.Module) -> bool:
    """Whether hooks that are added to the modules inside may go unseen, as it runs compiled."""
    if wrapper(module) or vars(module).get("_compiled_call_impl") is not None:
        return True
    forward = vars(module).get("forward")
    return forward is not None and behind_compile(forward) is not forward


def forward_of(module: nn.Module) -> Forward | None:
    """What the forward on this instance is; None if there is none, or what `torch.compile(module)` has of its own."""
    forward = vars(module).get("forward")
    if forward is None or wrapper(module):
        return None
    return _kind(forward, module)


def _kind(forward: Any, module: nn.Module) -> Forward:
    forward = behind_compile(forward)
    if isinstance(forward, types.MethodType):
        own = forward.__self__ is module and forward.__func__ is _class_forward(type(module))
        return "own" if own else "bound"
    if not isinstance(forward, partial) or _home(forward.func) != "accelerate.hooks":
        return "bound"
    inner = _kind(vars(module).get("_old_forward"), module)
    moving = _moving(vars(module).get("_hf_hook"))
    return moving if inner == "own" or moving == "offloads" else "bound"


def _moving(hook: Any) -> Forward:
    """What one of accelerate's hooks does beside calling the forward."""
    hooks = sys.modules["accelerate.hooks"]
    if type(hook) is hooks.SequentialHook:
        kinds = {_moving(one) for one in hook.hooks}
        return "offloads" if "offloads" in kinds else "bound" if "bound" in kinds else "moves"
    if type(hook) is hooks.AlignDevicesHook:
        return "offloads" if hook.offload else "moves"
    return "moves" if type(hook) is hooks.ModelHook else "bound"


def behind_compile(forward: Any) -> Any:
    # By where the wrapper's code is from: `functools.wraps` copies the attribute to wrappers that do more.
    while _home(forward) == "torch._dynamo.eval_frame" and "_torchdynamo_orig_callable" in vars(forward):
        forward = vars(forward)["_torchdynamo_orig_callable"]
    return forward


def _home(function: Any) -> str | None:
    """The module that a function's code is from."""
    return function.__globals__.get("__name__") if isinstance(function, types.FunctionType) else None


def _class_forward(kind: type) -> Any:
    return next((vars(one)["forward"] for one in kind.__mro__ if "forward" in vars(one)), None)


def patched(kind: type) -> bool:
    """Whether a class's forward is not the one it was written with."""
    owner = next((one for one in kind.__mro__ if "forward" in vars(one)), nn.Module)
    forward = vars(owner)["forward"]
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    written = owner.__module__, f"{owner.__qualname__}.forward"
    return owner is not nn.Module and (getattr(forward, "__module__", None), forward.__qualname__) != written


def hooks_of(module: nn.Module) -> list[Any]:
    """Hooks on a module that may change what it gives, those before its forward first."""
    return [hook for kind in HOOKS for hook in list(getattr(module, kind).values()) if foreign(hook)]


Hook = TypeVar("Hook", bound=Callable[..., Any])

trying: ContextVar[bool] = ContextVar("kvcache_trying", default=False)
"""Whether the model is run to find out about it, and not for somebody."""


class _Onlooker:
    """A hook that only looks, and at nothing but what is run for somebody."""

    def __init__(self, hook: Callable[..., Any], passing: bool) -> None:
        self._hook, self.passing = hook, passing
        update_wrapper(self, hook)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not trying.get():
            self._hook(*args, **kwargs)


def looks_on(hook: Hook, passing: bool = False) -> Hook:
    """Mark a hook as one that only looks: it gives nothing back and changes nothing in place. Register what this returns.

    Models with other hooks have no prefixes and save no caches, since what they compute has no name to be kept under. It
    sees what runs on the model, and on copies of it that are made while it is there (that rank tokens, or decode in whole
    steps), but not the few tokens that are run once to find out what the model does with a cache.

    Args:
        hook: of a module.
        passing: it is there for one run: copies of the model that are made meanwhile do not have it.
    """
    setattr(getattr(hook, "__func__", hook), _MARK, True)
    return cast(Hook, _Onlooker(hook, passing))


def foreign(hook: Any) -> bool:
    """Whether a hook may change what its module is given or gives."""
    named = hook.func if isinstance(hook, partial) else hook
    if isinstance(named, _Onlooker) or getattr(named, _MARK, False):
        return False
    home = getattr(named, "__module__", None) or type(hook).__module__
    return not any(home == known or home.startswith(f"{known}.") for known in _ONLOOKERS)


def asks_training(kind: type) -> bool:
    """Whether what a class computes may depend on whether it is trained: its forward, or one behind it, asks for that."""
    classes = [one for one in kind.__mro__ if issubclass(one, nn.Module)]
    return any("training" in function.__code__.co_names for one in classes for function in reached(one))


def reached(kind: type, *beside: str) -> list[types.FunctionType]:
    """The class's forward, the methods of these names, and all methods that they call on themselves by name."""
    found: list[types.FunctionType] = []
    names = ["forward", *beside]
    seen = set(names)
    classes = [one for one in kind.__mro__ if one not in nn.Module.__mro__]
    for name in names:  # grows while it is walked
        function: Any = next((vars(one)[name] for one in classes if name in vars(one)), None)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        if isinstance(function, types.FunctionType):
            found.append(function)
            new = [name for name in function.__code__.co_names if name not in seen]
            seen.update(new)
            names += new
    return found
