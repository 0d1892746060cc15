"""Where the time of a running model goes: every part of it told from the others while it runs.

Hooks on all modules of the process switch a clock from part to part, so that each moment belongs to exactly one. They are
torch's own for such ends, are there only inside ``with watch:``, and find the copies that run on the decode engine as well
as the model itself, which is not touched. Nothing else should run models meanwhile.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from kvcache.models import LINEAR, is_attention

PARTS: Mapping[str, str] = {
    "attention_products": "attention: products for queries, keys, values and output",
    "attention_scores": "attention: queries against the cache, or a state that is mixed in",
    "cache_update": "cache update",
    "mlp": "MLP",
    "norms": "norms",
    "positions": "positions: rotary turns and shapes before the cache",
    "embeddings": "embeddings",
    "head": "head",
    "glue": "the model's other code: sums, masks, Python",
    "sampling": "sampling: torch between two passes",
    "host": "host: Python between two passes, waits",
    "vocoder_mel": "vocoder: tokens to a mel",
    "vocoder_wave": "vocoder: mel to a waveform",
    "watermark": "watermark",
    "vocoder": "vocoder: all else of it",
}
"""The parts of a step, and what is in them."""

AUDIO = ("vocoder_mel", "vocoder_wave", "watermark", "vocoder")
"""Those that a model has which speaks. The last is what the others do not tell apart: all, where they tell nothing."""

# What a module on the stack is, where that is not a part's name: told apart for what is inside it.
_PASS, _ATTENTION, _LAYER = "pass", "attention", "layer"
_SAID = {_PASS: "glue", _ATTENTION: "positions", _LAYER: "glue"}
_WRITES = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")
# Layers that hold states are no subclasses of the others, and are not in the first releases.
_STATES: list[type] = [
    vars(cache_utils)[name] for name in ("LinearAttentionCacheLayerMixin",) if name in vars(cache_utils)
]
_ASKED = ("host", "glue", _PASS, _LAYER, _ATTENTION, "attention_scores")  # what has parts of another kind in it


def part_of(module: nn.Module, inside: str) -> str | None:
    """What a module is.

    Args:
        module: of a transformers decoder, or of what is around it.
        inside: what the module is that it was found in; ``"host"`` for none.

    Returns:
        A name in `PARTS`, or ``"pass"`` (a whole decoder, with or without what is around it), ``"layer"`` (one of its
        layers) or ``"attention"``; None if it is what it is in.
    """
    if inside not in _ASKED:
        return None
    name = type(module).__name__.lower()
    if "norm" in name:
        return "norms"
    if "rotary" in name:
        return "positions"
    if inside in (_ATTENTION, "attention_scores"):
        return "attention_products" if isinstance(module, LINEAR) else None
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if any(_attends(part) for part in module.modules()):
        if _attends(module):
            return _ATTENTION
        if any(_attends(part) for part in module.children()):
            return _LAYER
        return _PASS if inside == "host" else None
    if inside == _LAYER and any(weight.dim() > 1 for weight in module.parameters()):  # experts are no linear layers
        return "mlp"
    if not any(isinstance(part, LINEAR) for part in module.modules()):
        return None
    if inside == _LAYER:
        return "mlp"
    return "head" if isinstance(module, LINEAR) else "glue"


def _attends(module: nn.Module) -> bool:
    return _is_attention(module) and not any(_is_attention(part) for part in module.children())


def _is_attention(module: nn.Module) -> bool:
    if is_attention(module):
        return True
    # T5's calls its mask otherwise.
    return isinstance(getattr(module, "layer_idx", None), int) and "attention" in type(module).__name__.lower()


@dataclass(frozen=True)
class Pass:
    """From where a model begins to run some tokens to where it begins to run the next.

    Attributes:
        tokens: of each row; 1 in a decode step, 0 for what was before the first pass.
        seconds: of each part.
    """

    tokens: int
    seconds: Mapping[str, float]


class Watch:
    """Tells the parts of a model's passes apart, within its ``with`` block and between `start` and `stop`.

    On a GPU it is the time line of the device that is divided, by events: to a part belongs what its kernels take and
    what the device waits for them.

    Args:
        device: where the model runs.
        entered: is called where each pass begins.
    """

    def __init__(self, device: torch.device, entered: Callable[[], None] = lambda: None) -> None:
        self._cuda = device.type == "cuda"
        self._now: Callable[[], Any] = _event if self._cuda else time.perf_counter
        self._entered = entered
        self._parts: dict[int, tuple[nn.Module, str | None]] = {}
        self._mixers: set[int] = (
            set()
        )  # attention that writes no keys: to states, or to another layer's, or an encoder's
        self._open = ExitStack()
        self._running = False
        self._clear()

    def _clear(self) -> None:
        self._thread: int | None = None  # the one that runs the model, which may not be the caller's
        self._stack = ["host"]
        self._log: list[tuple[Any, str]] = []  # from when on it is whose turn
        self._begun: list[int] = []  # where in the log each pass begins
        self._tokens: list[int] = []
        self._functions = _Functions(self)

    def __enter__(self) -> "Watch":
        with ExitStack() as undo:
            for hook in (
                modules.register_module_forward_pre_hook(self._before),
                modules.register_module_forward_hook(self._after, always_call=True),
            ):
                undo.callback(hook.remove)
            undo.enter_context(self._updates())
            self._open = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._running = False
        self._functions.rest()
        self._open.close()

    def start(self) -> None:
        """Forget what was, and begin with what is before the first pass."""
        self._clear()
        self._log.append((self._now(), "host"))
        self._running = True

    def stop(self) -> list[Pass]:
        """All passes, the last of them until now; the first entry is what was before any."""
        if self._running:
            self._running = False
            self._log.append((self._now(), "host"))
            self._functions.rest()
        times = self._seconds()
        ends = [*self._begun, len(self._log) - 1]
        found = []
        for tokens, first, last in zip([0, *self._tokens], [0, *self._begun], ends, strict=True):
            seconds = dict.fromkeys(PARTS, 0.0)
            for i in range(first, last):
                part = self._log[i][1]
                seconds[_SAID.get(part, part)] += times[i + 1] - times[i]
            found.append(Pass(tokens, seconds))
        return found

    def _seconds(self) -> list[float]:
        if not self._cuda:
            return [mark for mark, _ in self._log]
        torch.cuda.synchronize()
        return [self._log[0][0].elapsed_time(mark) / 1e3 for mark, _ in self._log]

    # ------------------------------------------------------------------ while it runs

    def enter(self, part: str) -> None:
        """It is this part's turn, within the one before."""
        self._stack.append(part)
        self._log.append((self._now(), part))

    def leave(self) -> None:
        """It is the turn of the part before again."""
        self._stack.pop()
        self._log.append((self._now(), self._stack[-1]))

    @property
    def between(self) -> bool:
        """Whether what is watched runs, and none of its modules."""
        return self._running and len(self._stack) == 1

    def _here(self) -> bool:
        """Whether this is what is watched: the thread of the first module that runs."""
        if self._thread is None:
            self._thread = get_ident()
        return self._running and self._thread == get_ident()

    def _part(self, module: nn.Module) -> str | None:
        found = self._parts.get(id(module))
        if found is None:  # the module is kept, so that its id stays its own
            found = self._parts[id(module)] = module, part_of(module, self._stack[-1])
        return found[1]

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._here() or (part := self._part(module)) is None:
            return
        if self.between:
            self._functions.rest()
            if part == _PASS:
                self._begun.append(len(self._log))
                self._tokens.append(0)
                self._entered()
        elif part == "attention_products" and self._tokens and not self._tokens[-1]:
            self._tokens[-1] = args[0].shape[-2]
        self.enter("attention_scores" if part == _ATTENTION and id(module) in self._mixers else part)

    def _after(self, module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if not self._here() or self._part(module) is None:
            return
        if self._stack[-1] == _ATTENTION:  # nothing came between its shapes and its end
            self._mixers.add(id(module))
        self.leave()
        if self.between and self._begun:
            self._functions.listen()

    @contextmanager
    def _updates(self) -> Iterator[None]:
        """Within this block cache layers of all kinds, a model's own as well as ours, say when they are written to.

        What follows in attention are the scores, or what a state is mixed with.
        """
        plain = {(kind, name): vars(kind)[name] for kind in _kinds() for name in _WRITES if name in vars(kind)}

        def watched(update: Callable[..., Any]) -> Callable[..., Any]:
            def timed(layer: Any, *args: Any, **kwargs: Any) -> Any:
                if not self._here():
                    return update(layer, *args, **kwargs)
                self.enter("cache_update")
                try:
                    return update(layer, *args, **kwargs)
                finally:
                    if self._stack[-2] == _ATTENTION:
                        self._stack[-2] = "attention_scores"
                    self.leave()

            return timed

        try:
            for (kind, name), update in plain.items():
                setattr(kind, name, watched(update))
            yield
        finally:
            for (kind, name), update in plain.items():
                setattr(kind, name, update)


def _kinds() -> list[type]:
    """All classes of cache layers that there are now, each once."""
    found: list[type] = []
    left: list[type] = [CacheLayerMixin, *_STATES]
    while left:
        kind = left.pop()
        if kind not in found:
            found.append(kind)
            left += kind.__subclasses__()
    return found


class _Functions(TorchFunctionMode):
    """Tells what torch does between two passes from the Python around it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._thread: int | None = None  # where it listens

    def listen(self) -> None:
        """From now on; not within another mode's block, whose end would take this one off in its place."""
        if self._thread is None and _get_current_function_mode() is None:  # type: ignore[no-untyped-call]
            self._thread = get_ident()
            self.__enter__()  # type: ignore[no-untyped-call]

    def rest(self) -> None:
        """Listen no more: inside a pass it would cost time. Under another mode it stays, and only looks on."""
        if self._thread == get_ident() and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self._thread = None
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._watch.between:
            return func(*args, **(kwargs or {}))
        self._watch.enter("sampling")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._watch.leave()


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
