"""Has a model changed since something was made from it? Asked at every request, so it must cost next to nothing.

A `Watch` compares flat lists of what all modules hold with what they held, in C, by identity where a value is no plain
one; tensors by identity, version counter and memory. Only where that differs, the model is walked, and what the walk finds
is compared by value: a list that was replaced by an equal one is no change.

What a forward itself writes is no change either: tensors that a module keeps as plain attributes (rotary deltas, caches),
numbers that its own code counts up. Which these are is learned: what differs at the end of a run, in the first runs after
a change, is state from then on, if it is a tensor, None or a number, and code which the forward reaches stores it. All
else that changes is a change, whenever it happens.

Not seen are writes through ``tensor.data`` to a few elements (whole tensors are, where values matter, by a sample of their
content: see `Watch.sample`), functions and values replaced in a Python module, and what objects without attributes hide.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn

from kvcache.models._forwards import EVERYWHERE, asks_training, compiled, foreign, forward_of, hooks_of, patched
from kvcache.models._glance import Glance
from kvcache.models._rebound import escape
from kvcache.models._tokens import Facts, Tokens, is_state
from kvcache.models._walk import Walk

T = TypeVar("T")
_NOTHING = ("plain", type(None), "None")  # the fact of an attribute that is None
_LOOKED_AT = 2  # runs after a change at whose end is looked for state


@dataclass(frozen=True, eq=False)
class Signature:
    """A model as it was when it was asked for. The same object is given for as long as nothing has changed.

    Attributes:
        hooked: names of modules with hooks that may change what they give; ``"every module"`` for torch's global ones.
        bound: names of modules with a forward of their own that is not their class's, or whose class's was replaced.
        compiled: names of modules that run compiled, where hooks inside go unseen.
        why_no_copy: why a copy of the model's structure would not be faithful; None if it is.
        why_no_capture: why its steps cannot be compiled or captured; None if they can.
        why_no_name: why it cannot be told from other models by what it holds, and so nothing that it computed be kept
            under its name; None if it can.
    """

    hooked: tuple[str, ...] = ()
    bound: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    why_no_copy: str | None = None
    why_no_capture: str | None = None
    why_no_name: str | None = None


def signature_of(model: nn.Module) -> Signature:
    """The signature of a model as it is now, see `Signature`.

    Cheap while somebody holds the model's `Watch`, as everything does that is made from it; else a walk.
    """
    return watch_of(model).signature()


def watch_of(model: nn.Module) -> "Watch":
    """The one watch of a model.

    It holds on to what the model held when it was last asked: keep it no longer than what was made from the model.
    """
    with _lock:
        known = _watches.get(model)
        watch = None if known is None else known()
        if watch is None:
            watch = Watch(model)
            _watches[model] = ref(watch)
        return watch


def trains(model: nn.Module) -> str | None:
    """The name of a part in training mode whose forward asks for that, as dropout does; None if there is none."""
    walk = watch_of(model).walk()
    training = (
        (name, module) for name, module in walk.modules.items() if module.training and asks_training(type(module))
    )
    return next((name or "the model" for name, _ in training), None)


class _Past:
    """What is known of a model for as long as it lives; it holds nothing of it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.tokens = Tokens()
        self.facts: Facts | None = None
        self.state: dict[str, frozenset[str]] = {}  # what its forward writes
        self.signature = Signature()
        self.to_look = 0  # runs at whose end is looked for that


_pasts: "WeakKeyDictionary[nn.Module, _Past]" = WeakKeyDictionary()
# Held by those who ask alone: a model may be held by what it holds itself, and would never be let go of.
_watches: "WeakKeyDictionary[nn.Module, ReferenceType[Watch]]" = WeakKeyDictionary()
_lock = threading.Lock()
_running: ContextVar[dict[int, Signature] | None] = ContextVar("kvcache_running", default=None)


class Watch:
    """Tells whether a model has changed, and what it is now. See `watch_of`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._past = _pasts.setdefault(model, _Past())
        self._glance: Glance | None = None

    def signature(self) -> Signature:
        """The model's, as it is now; within `running`, as it was when that began."""
        running = _running.get()
        if running is not None and (known := running.get(id(self))) is not None:
            return known
        with self._past.lock:
            if self._glance is None or not self._glance.same():
                self._look()
            return self._past.signature

    def now(self) -> tuple[Signature, Facts]:
        """The model as it is now, for `changed_since`. It holds nothing of the model."""
        with self._past.lock:
            signature = self.signature()
            return signature, self._past.facts or {}

    def changed_since(self, then: tuple[Signature, Facts]) -> bool:
        """Whether something is other than it was. What was None may have been filled by a run since, and does not count."""
        signature, facts = self.now()
        if signature is then[0]:
            return False
        return any(fact != _NOTHING and facts.get(place) != fact for place, fact in then[1].items()) or any(
            place not in then[1] for place in facts
        )

    def sample(self) -> bytes:
        """Some bytes of every parameter and buffer, to be compared where their values matter.

        It shows what was written through ``tensor.data``, which torch does not count, if that was more than a few
        elements of a tensor.
        """
        with self._past.lock:
            found = None if self._glance is None else self._glance.sample()
            if found is None:
                self._look()
                assert self._glance is not None
                found = self._glance.sample()
            return b"" if found is None else found

    def forget(self) -> None:
        """Take the model for another at the next question."""
        with self._past.lock:
            self._glance, self._past.facts = None, None

    def walk(self) -> Walk:
        """All that the model holds, without what its forward writes itself."""
        return Walk(self._root(), self._past.state)

    @contextmanager
    def running(self, learns: bool = True) -> Iterator[Signature]:
        """A block for which the model is one: one question at its begin, and the same answer throughout, in this thread.

        Args:
            learns: whether the block runs the model. What that has changed of itself by the end is learned, see the module.
        """
        before = _running.get() or {}
        signature = self.signature()
        if id(self) in before:
            yield signature
            return
        token = _running.set({**before, id(self): signature})
        try:
            yield signature
        finally:
            _running.reset(token)
            with self._past.lock:
                if learns and self._past.to_look and signature is self._past.signature:
                    self._past.to_look -= 1
                    self._learn()

    # ------------------------------------------------------------------ inside

    def _root(self) -> nn.Module:
        model = self._model()
        assert model is not None  # who asks has it
        return model

    def _look(self) -> None:
        """Walk the model: a new signature if it is another one."""
        walk = self.walk()
        facts = self._past.tokens.facts(walk)
        if facts != self._past.facts:
            self._past.signature = _judged(walk)
            self._past.to_look = _LOOKED_AT
        self._past.facts, self._glance = facts, Glance(walk, self._past.state)

    def _learn(self) -> None:
        """Take what has changed since for state, where it is what a forward writes."""
        if self._glance is None or self._past.facts is None or self._glance.same():
            return
        walk = self.walk()
        written = is_state(self._past.facts, self._past.tokens.facts(walk), walk)
        if not written:
            return
        for name, attribute in written:
            self._past.state[name] = self._past.state.get(name, frozenset()) | {attribute}
        self._past.facts = {place: fact for place, fact in self._past.facts.items() if place[:2] not in written}
        self._past.to_look = _LOOKED_AT
        walk = self.walk()
        if self._past.tokens.facts(walk) == self._past.facts:
            self._glance = Glance(walk, self._past.state)
        else:
            self._glance = None  # something else has changed as well: told at the next question


class Following(Generic[T]):
    """What is made from a model, made anew when the model has changed.

    Args:
        model: whose.
        make: makes it.
    """

    def __init__(self, model: nn.Module, make: Callable[[], T]) -> None:
        self.watch = watch_of(model)
        self._make = make
        self._made: tuple[Signature, T] | None = None
        self._lock = threading.Lock()

    def now(self) -> T:
        """What it is for the model as it is now. What `make` raises is raised, and tried again at the next question."""
        signature = self.watch.signature()
        with self._lock:
            if self._made is None or self._made[0] is not signature:
                self._made = None  # its memory first
                self._made = signature, self._make()
            return self._made[1]


def _judged(walk: Walk) -> Signature:
    """What a walk says about copies, captures and names."""
    inside = {id(module) for module in walk.modules.values()}
    hooked = [name for name, module in walk.modules.items() if hooks_of(module)]
    if any(foreign(hook) for hooks in EVERYWHERE.values() for hook in list(hooks.values())):
        hooked.append("every module")
    kinds = {name: kind for name, module in walk.modules.items() if (kind := forward_of(module)) is not None}
    bound = [name for name, kind in kinds.items() if kind == "bound"]
    altered = [name for name, module in walk.modules.items() if patched(type(module))]
    offloaded = [name for name, kind in kinds.items() if kind == "offloads"]
    copying = next(filter(None, (_copies(name, module, inside) for name, module in walk.modules.items())), None)
    capturing = None
    if hooked:
        capturing = f"hooks on {_names(hooked)} run in Python"
    elif bound or "moves" in kinds.values():
        capturing = f"a forward of its own on {_names(bound or list(kinds))} runs in Python"
    naming = None
    if hooked:
        naming = f"hooks on {_names(hooked)} may change what it computes; remove them, or mark with looks_on those that do not"
    elif bound or altered:
        naming = f"{_names(bound or altered)} has a forward that is not its class's, which no name can tell from others"
    elif offloaded:
        naming = f"weights of {_names(offloaded)} are offloaded, and cannot be read; load the whole model on one device"
    return Signature(
        tuple(hooked),
        (*bound, *altered),
        tuple(name for name, module in walk.modules.items() if compiled(module)),
        copying,
        capturing,
        naming,
    )


def _copies(name: str, module: nn.Module, inside: set[int]) -> str | None:
    """Why a copy of this module would not do what it does; None if it would."""
    if isinstance(module, torch.jit.ScriptModule):
        return f"{_names([name])} is TorchScript, which has no parts to copy"
    if any(type(tensor).__name__ == "DTensor" for tensor in module._parameters.values()):
        return f"the weights of {_names([name])} are divided among processes"
    kind = forward_of(module)
    if kind == "offloads":
        return f"the weights of {_names([name])} are offloaded, and come to the device only while it runs itself"
    if kind != "bound":
        return None
    parts = [value for key in ("forward", "_old_forward") if (value := vars(module).get(key)) is not None]
    why = next((found for part in parts if (found := escape(part, inside)) is not None), None)
    return None if why is None else f"the forward on {_names([name])} {why}"


def _names(names: Sequence[str]) -> str:
    first = [name or "the model itself" for name in names[:2]]
    return ", ".join(first) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
