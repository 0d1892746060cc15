"""`no_leaks`: that a block leaves nothing behind: no hook on a model, no tensor, thread or open file."""

import gc
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

from kvcache.cache import LayerCache

_FILES = Path("/proc/self/fd")
_GRACE = 2.0  # seconds that threads on their way out have


@contextmanager
def no_leaks(*models: nn.Module, allow: Callable[[object], bool] | None = None, files: bool = True) -> Iterator[None]:
    """Raise if something is left after the block that was not there before it.

    What is looked for: hooks on the modules of `models`, and modules or tensors of theirs that were replaced; tensors and
    cache layers that are alive after garbage collection; threads that still run after two seconds; files, sockets and
    pipes that are open (where the system has ``/proc``: Linux; elsewhere they are not looked at). What other threads make
    meanwhile counts too, so let nothing else run.

    What a library makes once and keeps looks like a leak: run a first request before the block. What the block is meant to
    leave behind is either a variable that was made before it and is changed in place, or named by `allow`.

    Args:
        *models: whose hooks and parts must be as before.
        allow: is asked for each tensor, `LayerCache` and thread that is left whether it may be.
        files: whether to look at open files.

    Raises:
        AssertionError: with a line for each of what is left: type, shape, and who holds it. An error of the block itself
            comes through, and nothing is looked for.
    """
    before = _Snapshot(models, files)
    yield
    found = before.left(models, allow)
    if found:
        raise AssertionError("left behind:\n" + "\n".join(f"  {line}" for line in found))


class _Snapshot:
    """What there is now."""

    def __init__(self, models: Iterable[nn.Module], files: bool) -> None:
        gc.collect()
        self.hooks = {id(model): _hooks(model) for model in models}
        self.parts = {id(model): _parts(model) for model in models}
        self.alive = {id(held): weakref.ref(held) for held in _held()}
        self.threads = set(threading.enumerate())
        self.files = _open_files() if files and _FILES.is_dir() else None

    def left(self, models: Iterable[nn.Module], allow: Callable[[object], bool] | None) -> list[str]:
        """A line for each thing that is there now and was not then."""
        allowed = allow or (lambda held: False)
        found = []
        for model in models:
            name = type(model).__name__
            for where, hook in _hooks(model).items():
                if where not in self.hooks[id(model)]:
                    found.append(f"a hook on {name}: {where[0] or 'the model itself'}, {where[1]}: {hook}")
            now, then = _parts(model), self.parts[id(model)]
            changed = sorted(part for part in now.keys() | then.keys() if now.get(part) != then.get(part))
            found += [f"a part of {name} that is another: {part or 'the model itself'}" for part in changed]
        found += [f"a thread: {thread.name}" for thread in self._threads() if not allowed(thread)]
        gc.collect()
        new = [held for held in _held() if not self._was_there(held)]
        told = [held for held in new if not allowed(held) and not _of_a_layer(held, new)]
        found += [f"{_described(held)}, held by {_holder(held, {id(new), id(told)})}" for held in told]
        if self.files is not None:
            found += [f"an open file: {what}" for what in (_open_files() - self.files).elements()]
        return found

    def _was_there(self, held: Any) -> bool:
        then = self.alive.get(id(held))
        return then is not None and then() is held

    def _threads(self) -> list[threading.Thread]:
        until = time.monotonic() + _GRACE
        while True:
            left = [thread for thread in threading.enumerate() if thread not in self.threads and thread.is_alive()]
            if not left or time.monotonic() > until:
                return left
            time.sleep(0.01)


def _hooks(model: nn.Module) -> dict[tuple[str, str, int], str]:
    """All hooks by module, kind and number."""
    found = {}
    for name, module in model.named_modules():
        for kind, hooks in vars(module).items():
            if isinstance(hooks, dict) and kind.endswith("_hooks"):
                for number, hook in hooks.items():
                    found[name, kind.strip("_"), number] = getattr(hook, "__qualname__", repr(hook))
    return found


def _parts(model: nn.Module) -> dict[str, int]:
    """Modules, parameters and buffers by name, as which object they are."""
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return modules | {name: id(tensor) for name, tensor in tensors}


def _held() -> list[Tensor | LayerCache]:
    """All tensors and cache layers that are alive and that the collector knows."""
    # By type, not isinstance: some objects pretend to be what they are not, and import things when they are asked.
    kinds = (Tensor, LayerCache)
    return [held for held in gc.get_objects() if issubclass(type(held), kinds)]


def _of_a_layer(one: Tensor | LayerCache, new: Iterable[Tensor | LayerCache]) -> bool:
    """Whether the layer whose tensor it is says so already."""
    return any(isinstance(held, LayerCache) and id(one) in _inside(held) for held in new if held is not one)


def _inside(layer: LayerCache) -> set[int]:
    """Which objects a layer is made of, through containers and what else `kvcache.cache` holds tokens in."""
    found, left = set[int](), list[object](vars(layer).values())
    while left:
        held = left.pop()
        if id(held) in found:
            continue
        found.add(id(held))
        if isinstance(held, dict):
            left.extend(held.values())
        elif isinstance(held, list | tuple):
            left.extend(held)
        elif type(held).__module__.startswith("kvcache.cache."):
            left.extend(getattr(held, "__dict__", {}).values())
    return found


def _described(held: Tensor | LayerCache) -> str:
    if isinstance(held, LayerCache):
        return f"a {type(held).__name__}: {held.policy!r}, {held.stored} tokens, {held.nbytes} bytes"
    return f"a {type(held).__name__} {list(held.shape)} of {held.dtype} on {held.device}"


def _holder(held: object, mine: set[int]) -> str:
    """Who refers to it: the way down to it from the first object or module above that is no mere container."""
    path = ""
    for _ in range(8):
        above = [one for one in gc.get_referrers(held) if id(one) not in mine and not isinstance(one, FrameType)]
        mine |= {id(above), id(held)}
        if not above:
            break
        owner = above[0]
        names = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
        name = _name_of(held, names)
        if isinstance(owner, dict) and "__spec__" in owner:
            return f"{owner.get('__name__')}{name}{path}"
        if not isinstance(owner, dict | list | tuple | set):
            kind = owner.__qualname__ if isinstance(owner, type) else f"a {type(owner).__qualname__}"
            return f"{kind}{name}{path}"
        path, held = (name or "[…]") + path, owner
    return "a local variable, or something that the garbage collector does not know"


def _name_of(held: object, names: Mapping[Any, object]) -> str:
    for name, value in list(names.items()):  # no generator: its closure would refer to it as well
        if value is held:
            return f".{name}"
    return ""


def _open_files() -> Counter[str]:
    """What this process has open, and how often."""
    found: Counter[str] = Counter()
    for name in os.listdir(_FILES):
        with suppress(OSError):  # that of the listing itself, which is closed by now
            found[os.readlink(_FILES / name)] += 1
    return found
