"""A model is run on a few tokens, and watched: what reads which keys, through which mask, at which positions.

Nothing here is told by a name. A cache that takes notes is handed to the model, and while it runs, what the cache returned is
followed from operation to operation until a module computes with it: that module attends for that layer. The model is
afterwards what it was: its random numbers, its training mode, its hooks and the attributes of its modules.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_outputs import BaseModelOutput

from kvcache.models._autocast import without_autocast
from kvcache.models._compat import cache_kwarg
from kvcache.models._forwards import trying
from kvcache.models._packed import PackedLinear
from kvcache.models._spy import SpyLayer, layers_of

_FEW_BITS = 0.3  # of the largest logit: what two runs of a model may be apart that rounds to few bits on its way
_LOCK = threading.RLock()  # one probe at a time: it sets modules to evaluation and back

# Operations that hand on what they are given without computing with it.
_MOVES = frozenset(
    [
        "__get__",
        "__getitem__",
        "bfloat16",
        "broadcast_to",
        "cat",
        "chunk",
        "clone",
        "concat",
        "contiguous",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "half",
        "index_select",
        "movedim",
        "narrow",
        "permute",
        "repeat",
        "repeat_interleave",
        "reshape",
        "select",
        "split",
        "squeeze",
        "stack",
        "swapaxes",
        "swapdims",
        "to",
        "transpose",
        "type",
        "type_as",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    ]
)


# ---------------------------------------------------------------------- what a run shows


@dataclass(frozen=True)
class Call:
    """A module while it runs: its name, the module and what it was given by name."""

    name: str
    module: nn.Module
    given: dict[str, Any]


@dataclass(frozen=True)
class Read:
    """An operation that computed with what a layer's cache had returned, and the modules in which it did, outermost first."""

    layer: int
    operation: str
    calls: tuple[Call, ...]


@dataclass
class Notes:
    """What one forward has shown.

    Attributes:
        output: logits, or the last hidden states of a model without a head.
        keys, values: what each layer was given and returned, ``[rows, KV heads, tokens, dim]``; the last by layer.
        updates: how often.
        reads: in order.
        outputs: of each module that was asked for, by name.
    """

    output: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    updates: dict[int, int] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _Followed(TorchFunctionMode):
    """Follows what a cache returned through operations that only move it, up to those that compute with it."""

    def __init__(self, notes: Notes, stack: list[Call]) -> None:
        super().__init__()
        self._notes, self._stack = notes, stack
        self._layer: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice

    def mark(self, layer: int, states: Tensor) -> None:
        self._layer[id(states)] = layer
        self._alive.append(states)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._layer:
            return out
        given = {self._layer[id(t)] for t in _tensors((*args, *kwargs.values())) if id(t) in self._layer}
        made = list(_tensors((out,)))
        if given and made:
            name = getattr(func, "__name__", "")
            for layer in given:
                if name in _MOVES:
                    for states in made:
                        self.mark(layer, states)
                else:
                    self._notes.reads.append(Read(layer, name, tuple(self._stack)))
        return out


def _tensors(given: Any) -> Iterator[Tensor]:
    for one in given:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)


# ---------------------------------------------------------------------- the run itself


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the model in here, in evaluation mode, without gradients and autocast; afterwards all is as it was."""
    modules = list(model.modules())
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    # Compiled parts run as they were written: hooks in them go unseen else, and shapes of a trial are worth no compiling.
    eager = torch.compiler.set_stance("force_eager")
    own = without_autocast({p.device.type for p in model.parameters()})  # what is found is kept for all callers
    with _LOCK, eager, own, torch.no_grad(), torch.random.fork_rng(devices=devices):
        before = trying.set(True)
        training = [module.training for module in modules]
        kept = [({**vars(module)}, {**module._buffers}) for module in modules]
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode, (attributes, buffers) in zip(modules, training, kept, strict=True):
                for name in set(vars(module)) - set(attributes):
                    del vars(module)[name]
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
                module.training = mode
            trying.reset(before)


@contextmanager
def _hooked(model: nn.Module, stack: list[Call], notes: Notes, wanted: Sequence[str]) -> Iterator[None]:
    """Keep the stack of modules that run, and the outputs of some."""
    mine = threading.get_ident()
    handles: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == mine:
                stack.append(Call(name, module, {**dict(zip(parameters(module), args, strict=False)), **kwargs}))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() == mine and stack:
                stack.pop()
                out = next(_tensors((output,)), None)
                if name in wanted and out is not None:
                    notes.outputs[name] = out

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's positional arguments."""
    return _parameters_of(type(module).forward)


@lru_cache(maxsize=256)
def _parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def replaced(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with one of them, which is called `name`, replaced."""
    names = parameters(module)
    if name in names and name not in kwargs and names.index(name) < len(args):
        place = names.index(name)
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def embedding_table(model: Any) -> nn.Module | None:
    """What turns a model's token ids into states; None where it has none, and is given states."""
    try:
        return model.get_input_embeddings()  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError):  # taken away, as from the GPT-2 within a larger model, or never there
        return None


def _ids_below(model: Any) -> int | None:
    """The number below which it takes ids ``[rows, tokens]``; None if it takes none of that shape."""
    known = int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 0))
    ids = torch.arange(min(known, 2), device=model.device)[None]
    try:
        with untouched(model):
            model(input_ids=ids)
    except Exception:  # code of any model: it wants its tokens in another shape
        return None
    return known


class Probe:
    """How this model is run on a few tokens of its own vocabulary.

    Args:
        model: a transformers model, with or without a head.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seq2seq = bool(model.config.is_encoder_decoder)
        generator = torch.Generator().manual_seed(0)
        table = embedding_table(model)
        known = getattr(table, "num_embeddings", None)
        if known is None and table is not None:  # of a kind of its own: it may take text as well as what it is for
            known = _ids_below(model)
        self._embeds: Tensor | None = None
        if known is None or known < 8:  # a decoder that is given embeddings, and has none of its own
            width = model.config.get_text_config(decoder=True).hidden_size
            self._embeds = torch.randn(TOKENS + 1, width, generator=generator).to(model.device, model.dtype)
            self.ids = torch.arange(TOKENS + 1)
        else:
            special = _special(model.config)
            plain = torch.tensor([i for i in range(1, min(known, 512)) if i not in special] or [0])
            self.ids = plain[torch.randperm(len(plain), generator=generator)[: TOKENS + 1] % len(plain)]
            if len(self.ids) <= TOKENS:
                self.ids = plain[torch.arange(TOKENS + 1) % len(plain)]
        self.ids = self.ids.to(model.device)
        self._generator = generator

    def given(self, ids: Tensor) -> dict[str, Any]:
        """These tokens ``[rows, n]``, as the model takes them."""
        if self._embeds is not None:
            return {"inputs_embeds": self._embeds[ids]}
        if not self.seq2seq:
            return {"input_ids": ids}
        width = self.model.config.get_text_config(encoder=True).hidden_size
        states = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(1)).to(ids.device, self.model.dtype)
        encoded = BaseModelOutput(last_hidden_state=states.expand(ids.shape[0], -1, -1))
        return {"decoder_input_ids": ids, "encoder_outputs": encoded}

    def noise(self, like: Tensor) -> Tensor:
        """Numbers of the size of these, and not these."""
        drawn = torch.randn(like.shape, generator=self._generator).to(like.device, like.dtype)
        return drawn * 4 * like.float().square().mean().sqrt().to(like.dtype)

    def run(
        self,
        ids: Tensor,
        cache: Any,
        *,
        edit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        masks: Mapping[str, tuple[str, Tensor]] | None = None,
        more: Mapping[str, Any] | None = None,
        wanted: Sequence[str] = (),
        follow: bool = False,
    ) -> Notes:
        """One forward, to be called within `untouched`.

        Args:
            ids: ``[rows, n]``.
            cache: see `spying_cache`.
            edit: what a layer returns instead of keys and values.
            masks: by name of a module, the name of its mask and another one.
            more: arguments of the model.
            wanted: modules whose outputs are kept.
            follow: note what computes with which layer's keys.
        """
        notes, stack = Notes(), list[Call]()
        followed = _Followed(notes, stack) if follow else None

        def told(index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            notes.keys[index], notes.values[index] = keys, values
            notes.updates[index] = notes.updates.get(index, 0) + 1
            if edit is not None:
                keys, values = edit(keys, values)
            if followed is not None:
                followed.mark(index, keys)
                followed.mark(index, values)
            return keys, values

        for layer in layers_of(cache):
            if isinstance(layer, SpyLayer):
                layer.told = told
        with ExitStack() as block:
            if follow or wanted:
                block.enter_context(_hooked(self.model, stack, notes, wanted))
            for name, (argument, mask) in (masks or {}).items():
                hook = _masking(argument, mask)
                handle = self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
                block.callback(handle.remove)
            if followed is not None:
                block.enter_context(followed)
            out = self.model(**self.given(ids), **cache_kwarg(self.model, cache), use_cache=True, **(more or {}))
        logits = getattr(out, "logits", None)
        notes.output = out[0] if logits is None else logits
        return notes


TOKENS = 6  # of a probe's longest prompt


def _special(config: Any) -> set[int]:
    """The tokens that a config gives a meaning: pads, ends, places of images."""
    found: set[int] = set()
    for one in (config, config.get_text_config(decoder=True)):
        for name, value in one.to_dict().items():
            if name.endswith(("_token_id", "_token_index", "token_ids")):
                found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found


def _masking(argument: str, mask: Tensor) -> Callable[..., Any]:
    mine = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replaced(module, args, kwargs, argument, mask) if threading.get_ident() == mine else (args, kwargs)

    return hook


def alike(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    """Whether two results, of any shape, are the same but for rounding."""
    if tolerance is None:
        tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 4e-2
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30))


def closeness(model: Any, dtype: torch.dtype) -> float | None:
    """How close what a model says is in runs of other shapes, for `alike`; None: but for rounding in this dtype.

    Where activations are rounded to few bits as well, rounding in float32 tips some of them over to the next level.
    """
    levels = any(isinstance(part, PackedLinear) for part in model.modules())
    levels = levels or getattr(model.config, "quantization_config", None) is not None
    return None if dtype == torch.float32 and not levels else _FEW_BITS
