"""Each token of a chunk sees what its layer's policy says: masks, one for each layer, for the time of one forward.

Transformers makes one causal mask for all layers, from the tokens that are kept at the start of a chunk. That is exact for
single tokens; but in a chunk longer than what is left of the window its later tokens would see more than the window, and
layers with policies of their own would get a mask of the wrong width. Here each module that attends (see `ModelFacts.seats`)
gets the mask of its own layer. Its hook lives for one call of that module.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from kvcache.cache import LayerCache, schedule
from kvcache.errors import PolicyError
from kvcache.models._probe import parameters, replaced
from kvcache.models._seats import Seat
from kvcache.models._spy import cache_among, layers_of

_tokens: ContextVar[Tensor | None] = ContextVar("kvcache_tokens", default=None)
"""Which tokens are seen, ``[rows, tokens]``, in a forward of which not only pads on the left are hidden."""

_unattended: ContextVar[bool] = ContextVar("kvcache_unattended", default=False)


@contextmanager
def unattended() -> Iterator[None]:
    """Within this block tokens go into caches without a forward: nothing attends to them, and no mask is missed."""
    before = _unattended.set(True)
    try:
        yield
    finally:
        _unattended.reset(before)


class Windows:
    """The masks of one cache.

    Args:
        model: that the cache is for.
        seats: its modules that attend, see `ModelFacts.seats`.
        layers: of the cache, ours and the model's own.
    """

    def __init__(self, model: Any, seats: Sequence[Seat], layers: Sequence[Any]) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)
        self._seats = seats
        self._layers = layers
        self._hooks: list[Any] = []
        self._masked: dict[int, int] = {}  # by layer: for how many tokens its module has been given a mask
        self._exact: dict[int, Tensor | None] = {}  # the masks of this forward, by layer
        self._waiting = 0  # modules that have not been given theirs yet
        self._outside = False  # whether the forward that runs was announced by `exact_windows`

    def __deepcopy__(self, memo: dict[int, Any]) -> "Windows":
        new = copy.copy(self)
        memo[id(self)] = new  # its layers lead back to it
        new._layers = copy.deepcopy(self._layers, memo)
        new._model = self._model
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Elsewhere there is no model: there `announced` says which one runs."""
        return {"_seats": self._seats, "_layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = _nobody
        self._hooks, self._masked, self._exact, self._waiting, self._outside = [], {}, {}, 0, False

    def begin(self, fresh: int) -> None:
        """A forward of so many tokens begins, says its cache: give the modules their masks, if nothing has done so."""
        model = self._model()
        if self._outside or model is None or torch.compiler.is_dynamo_compiling():
            return
        self.end()
        if self._differ(fresh):
            self._arm(model, self._seats, strict=True)
        elif any(map(_moved, self._by_age())):  # a mask that hides more than pads would meet other slots
            self._arm(model, self._seats[:1], strict=True)

    def announce(self, model: Any, fresh: int, tokens: Tensor | None) -> None:
        """The same, before the model begins.

        Args:
            model: that runs: the cache's own, or a copy of it.
            fresh: how many tokens.
            tokens: see `_tokens`.
        """
        self.end()
        self._outside = True
        if tokens is not None or self._differ(fresh) or any(kv.holds_pads for kv in self._by_age()):
            self._arm(model, self._seats, strict=False)

    def end(self) -> None:
        """Take away the hooks that have not been used."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._masked.clear()
        self._exact.clear()
        self._outside = False

    def check(self, layer: Any, fresh: int) -> None:
        """Raise `PolicyError` if a layer is about to be given tokens that would see more than their window."""
        kv: LayerCache = layer.kv
        masked = self._masked.pop(next(i for i, one in enumerate(self._layers) if one is layer), None)
        if (
            fresh < 2
            or kv.by_head
            or _unattended.get()
            or masked == fresh
            or schedule(kv.policy, kv.stored, fresh)[-1] == kv.retained + fresh
        ):
            return
        raise PolicyError(
            f"{fresh} tokens at once run past {kv.policy!r}: each of them sees a window of its own, and the model was given "
            "no mask that says so; run it by manager.generate() or within kvcache.models.exact_windows(model), or give it fewer "
            "tokens at once"
        )

    def _by_age(self) -> list[LayerCache]:
        return [layer.kv for layer in self._layers if _managed(layer) and not layer.kv.by_head]

    def _differ(self, fresh: int) -> bool:
        """Whether the mask that transformers makes for the first of the layers is not that of all of them."""
        if len({layer.kv.retained for layer in self._layers if _managed(layer)}) > 1:
            return True
        return fresh > 1 and any(
            schedule(kv.policy, kv.stored, fresh)[-1] != kv.retained + fresh for kv in self._by_age()
        )

    def _arm(self, model: Any, seats: Sequence[Seat], strict: bool) -> None:
        own = self._model()
        for seat in seats:
            module = None if own is None else own.get_submodule(seat.module)
            if module is None or (model is not own and not any(module is part for part in model.modules())):
                module = _in_copy(model, seat.module)
            used: list[Any] = []  # its own handle: a hook is for one call
            used.append(module.register_forward_pre_hook(self._hook(seat, strict, used), with_kwargs=True))
            self._hooks.append(used[0])
        self._waiting = len(self._hooks)

    def _hook(self, seat: Seat, strict: bool, used: list[Any]) -> Callable[..., Any]:
        mine = threading.get_ident()

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if kwargs is None:  # another thread's call, while it is being removed
                return None
            given = {**dict(zip(parameters(module), args, strict=False)), **kwargs}
            layer, cache = self._layers[seat.layer], cache_among(given)
            if threading.get_ident() != mine or not _managed(layer) or layer.kv.by_head:
                return args, kwargs
            # Those that share another's keys need not be given the cache.
            ours = (
                any(one is layer for one in layers_of(cache)) if cache is not None else not seat.cached and self._exact
            )
            if not ours:
                return args, kwargs
            used[0].remove()
            self._waiting -= 1
            hidden: Tensor = given[seat.hidden]
            if seat.layer not in self._exact:  # the first to attend is the one that will store the new tokens
                mask: Tensor | None = given.get(seat.mask)
                if strict and mask is not None:
                    _check_order(layer.kv, hidden.shape[1], mask)
                self._exact[seat.layer] = exact_mask(layer.kv, mask, hidden, seat.additive)
                self._masked[seat.layer] = hidden.shape[1]
            exact = self._exact[seat.layer]
            if self._waiting == 0:  # masks can be as large as caches, and are of this forward alone
                self._exact.clear()
            if exact is None:
                return args, kwargs
            # Where layers share keys, those behind may run the last tokens only.
            return replaced(module, args, kwargs, seat.mask, exact[:, :, -hidden.shape[1] :])

        return hook


def _in_copy(model: nn.Module, name: str) -> nn.Module:
    """The module of a copy that has this name in the model, which may run it behind `torch.compile`."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return modules[name if name in modules else ".".join(part for part in name.split(".") if part != "_orig_mod")]


def _nobody() -> None:
    """In place of a model that is not here."""


def _moved(kv: LayerCache) -> bool:
    """Whether, with the next token, some that it holds are no longer in the places that a mask counts on."""
    return kv.evicted > 0 or kv.retained < kv.stored


def _managed(layer: Any) -> bool:
    return isinstance(getattr(layer, "kv", None), LayerCache)


@contextmanager
def announced(model: nn.Module) -> Iterator[None]:
    """Within this block, what the model is given is known before its caches are asked."""
    names = ("attention_mask", "decoder_attention_mask")
    running: list[tuple[Windows, Any]] = []
    mine = threading.get_ident()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or threading.get_ident() != mine:
            return None
        given = {**dict(zip(parameters(module), args, strict=False)), **kwargs}
        cache = cache_among(given)
        windows = None if cache is None else _windows_of(cache)
        if windows is None:
            return None
        mask = given.get(names[isinstance(cache, EncoderDecoderCache)])
        tokens = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and _scattered(mask) else None
        token = _tokens.set(tokens)
        windows.announce(module, _fresh(given), tokens)
        running.append((windows, token))
        return None

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if threading.get_ident() == mine and running:
            windows, token = running.pop()
            windows.end()
            _tokens.reset(token)

    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _windows_of(cache: Any) -> "Windows | None":
    found = (getattr(layer, "windows", None) for layer in layers_of(cache))
    return next((windows for windows in found if windows is not None), None)


def _fresh(given: dict[str, Any]) -> int:
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    tokens = (given.get(name) for name in names)
    return next((int(states.shape[1]) for states in tokens if isinstance(states, Tensor)), 1)


def _scattered(mask: Tensor) -> bool:
    """Whether a mask hides more than tokens on the left of a row."""
    return bool((mask.bool().int().diff(dim=1) < 0).any())


def _check_order(kv: LayerCache, fresh: int, mask: Tensor) -> None:
    """Refuse a mask that hides other tokens than the pads that the cache knows of, once slots are not in their order.

    Raises:
        PolicyError: before this layer has changed.
    """
    if kv.evicted == 0 and schedule(kv.policy, kv.stored, fresh)[-1] == kv.stored + fresh:
        return
    if hides_more(mask, kv.seen, fresh, kv.padding):
        raise PolicyError(
            f"the mask hides more than the pads on the left that the cache was made for, and under {kv.policy!r} tokens have "
            "left their places; give attention_mask to new_cache(), run it by manager.generate(), or use KeepAll()"
        )


def hides_more(mask: Tensor, seen: int, fresh: int, padding: Tensor | None) -> bool:
    """Whether a causal mask ``[rows or 1, heads or 1, fresh, columns]`` hides a token that is no pad on the left.

    Args:
        mask: its columns are the last tokens, the newest to the right.
        seen: tokens before these.
        fresh: these.
        padding: pads on the left of each row, ``[rows]``; None for none.
    """
    visible = mask if mask.dtype == torch.bool else mask == 0
    at = torch.arange(seen + fresh - mask.shape[-1], seen + fresh, device=mask.device)
    query = torch.arange(seen, seen + fresh, device=mask.device)[:, None]
    pads = 0 if padding is None else padding[:, None, None, None].to(mask.device)
    return bool(((at < query) & (at >= pads) & ~visible).any())


def shows_later(mask: Tensor, fresh: int) -> bool:
    """Whether a mask lets a token see one that comes after it: a prompt, or an image, that attends both ways."""
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(visible[..., -fresh:].triu(1).any())


def exact_mask(kv: LayerCache, mask: Tensor | None, hidden: Tensor, additive: bool) -> Tensor | None:
    """The mask ``[batch or 1, 1, fresh, retained + fresh]`` for the tokens that come next; None where the given one serves.

    Args:
        mask: that the model made, True or 0 for "sees".
        hidden: the states of these tokens, ``[batch, fresh, width]``.
        additive: whether a mask is added to the scores.
    """
    fresh = hidden.shape[1]
    width = kv.retained + fresh
    whole = schedule(kv.policy, kv.stored, fresh)[-1] == width
    tokens = _tokens.get()
    if tokens is not None and (_moved(kv) or not whole):
        columns = kv.columns(fresh).to(tokens.device).expand(tokens.shape[0], -1)
        itself = columns[:, None] == torch.arange(kv.seen, kv.seen + fresh, device=tokens.device)[:, None]
        # A hidden token sees itself: a row of the softmax without any key would be NaN.
        seen = (tokens.gather(1, columns)[:, None] | itself)[:, None].to(hidden.device)
        exact = kv.mask(fresh).to(hidden.device) & seen
        return _both(None, exact, width, hidden.dtype, additive)
    # Where transformers makes no mask, because the first layer holds no pads, this one may.
    if whole and (not kv.holds_pads if mask is None else mask.shape[-1] == width):
        return None
    return _both(mask, kv.mask(fresh).to(hidden.device), width, hidden.dtype, additive)


def _both(mask: Tensor | None, exact: Tensor, width: int, dtype: torch.dtype, additive: bool) -> Tensor:
    """What both masks let through, as the attention takes it."""
    if mask is not None:
        shorter = width - mask.shape[-1]  # rows are right-aligned: what the mask lacks on the left is older tokens
        mask = (
            mask[..., -width:]
            if shorter <= 0
            else nn.functional.pad(mask, (shorter, 0), value=mask.dtype == torch.bool)
        )
    if additive and (mask is None or mask.dtype == torch.bool):
        allowed = exact if mask is None else exact & mask
        return torch.zeros(allowed.shape, dtype=dtype, device=exact.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
    if mask is None:
        return exact
    return mask & exact if mask.dtype == torch.bool else mask.masked_fill(~exact, torch.finfo(mask.dtype).min)
