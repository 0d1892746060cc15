"""Which modules attend to which layer's keys, and whether their mask can be another: a hidden token shows it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvcache.models._probe import TOKENS, Call, Notes, Probe, alike, parameters
from kvcache.models._spy import cache_among, spying_cache

Fresh = Callable[[], AbstractContextManager[None]]
"""Gives the block in which a model runs as a fresh request would run it, see `ModelFacts.as_fresh`."""

_HIDDEN = 2  # the token that a trial hides


@dataclass(frozen=True)
class Seat:
    """A module that attends to the keys of one cache layer, and how it is given its mask.

    Attributes:
        layer: of the cache.
        module: its name in the model.
        mask: the name of the argument.
        hidden: the name of the argument that is ``[rows, tokens, width]``.
        additive: whether the mask that it takes is added to the scores, and not True for what is seen.
        cached: whether it is given the cache; one that shares another layer's keys need not be.
    """

    layer: int
    module: str
    mask: str
    hidden: str
    additive: bool
    cached: bool = True


def seats_in(notes: Notes) -> tuple[tuple[Seat, ...], str | None]:
    """Which module attends to which layer's keys, or why that cannot be said."""
    found: dict[str, Seat] = {}
    for layer in notes.keys:
        reads = [read for read in notes.reads if read.layer == layer]
        if not reads:
            return (), f"nothing attends to the keys that the cache of layer {layer} returned"
        for read in reads:
            seat = next(filter(None, (_seat(layer, call) for call in reversed(read.calls))), None)
            if seat is None:
                return (), f"no module that attends for layer {layer} is given a mask"
            if found.setdefault(seat.module, seat).layer != layer:
                return (), f"{seat.module or 'the model'} attends for more than one layer"
    return tuple(found.values()), None


def _seat(layer: int, call: Call) -> Seat | None:
    hidden = next(
        (n for n, v in call.given.items() if isinstance(v, Tensor) and v.dim() == 3 and v.shape[1] == TOKENS), ""
    )
    named = {**dict.fromkeys(parameters(call.module)), **call.given}
    masks = [n for n, v in named.items() if "mask" in n and "head" not in n and (v is None or _is_mask(v))]
    masks.sort(key=lambda n: (named[n] is None, n != "attention_mask"))
    return (
        Seat(layer, call.name, masks[0], hidden, False, cache_among(call.given) is not None)
        if masks and hidden and call.name
        else None
    )


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def named_seats(model: Any) -> tuple[Seat, ...]:
    """What is taken for attention by its name, in a model without weights, which computes nothing."""
    return tuple(
        Seat(module.layer_idx, name, "attention_mask", "hidden_states", _additive(model))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and {"attention_mask", "hidden_states"} <= set(parameters(module))
        and not any(isinstance(getattr(part, "layer_idx", None), int) for part in module.children())
    )


def masked_seats(model: Any, seats: Sequence[Seat], fresh: Fresh) -> tuple[Seat, ...] | str:
    """These seats with the kind of mask that they take, or why they take no other mask than their own."""
    reasons = []
    for additive in (_additive(model), not _additive(model)):
        tried = tuple(replace(seat, additive=additive) for seat in seats)
        if (reason := _why_not_masked(model, tried, fresh)) is None:
            return tried
        reasons.append(reason)
    return reasons[0]


def _additive(model: Any) -> bool:
    return getattr(model.config, "_attn_implementation", "eager") == "eager"


def _why_not_masked(model: Any, seats: Sequence[Seat], fresh: Fresh) -> str | None:
    """Hide a token by other masks, and change it in every second row: what hides it must not change, the rest must."""
    probe = Probe(model)
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(4, 1, -1, -1).clone()
    visible[2:, :, _HIDDEN:, _HIDDEN] = False  # from itself as well, so that other layers do not hand it on

    def edit(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = keys.clone(), values.clone()
        for states in (keys, values):
            states[1::2, :, _HIDDEN] = probe.noise(states[:1, :, _HIDDEN])
        return keys, values

    names = [seat.module for seat in seats]
    try:
        with fresh():
            ids = probe.ids[None, :TOKENS].expand(4, -1)
            masks = as_masks(model, seats, visible)
            out = probe.run(ids, spying_cache(model), edit=edit, masks=masks, wanted=names).outputs
            plain = probe.run(ids[:1], spying_cache(model), wanted=names).outputs
    except Exception as error:  # code of any model; the reason is told where it is asked for
        return f"its attention takes no other mask ({type(error).__name__})"
    for number, name in enumerate(names):
        one = out[name].transpose(0, 1) if out[name].shape[0] != 4 else out[name]
        after = one[:, _HIDDEN + 1 :]
        if not alike(after[2], after[3]):
            return f"{name} attends to more than its mask allows"
        if alike(after[0], after[1]) or alike(after[0], after[2]):
            return f"{name} computes with other keys than its cache returned"
        # Behind the first layer, half precision differs by rounding, and a mixture of experts by more.
        if (number == 0 or one.dtype == torch.float32) and not alike(one[:1], plain[name]):
            return f"{name} puts more into its mask than which token sees which"
    return None


def as_masks(model: Any, seats: Sequence[Seat], visible: Tensor) -> dict[str, tuple[str, Tensor]]:
    """Which token sees which, ``[rows, 1, tokens, tokens]``, as each seat's module takes its mask; for `Probe.run`."""
    visible = visible.to(model.device)
    added = torch.zeros(visible.shape, dtype=model.dtype, device=model.device)
    added = added.masked_fill(~visible, torch.finfo(model.dtype).min)
    return {seat.module: (seat.mask, added if seat.additive else visible) for seat in seats}
