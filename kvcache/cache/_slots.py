"""Where tokens stand in a buffer of slots: arithmetic on counts, without any state.

Rows may begin with pads. ``pads`` is always ``[batch, 1]``, or ``[1, 1]`` where all rows are alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_FIRST_SLOTS = 128


def slots_for(tokens: int, bound: int | None, static: bool = False) -> int:
    """How many slots a buffer has once it held `tokens`: all of `bound`, or the next step of a fixed ladder.

    The ladder grows by half at each step, so that the copying of a growing cache stays linear in its tokens; and as it
    depends on nothing but `tokens`, memory can be told exactly before it is taken.
    """
    if static and bound is not None:
        return bound
    if isinstance(tokens, torch.SymInt):  # of a program that is exported for texts of any length
        return tokens
    slots = 0 if tokens == 0 else _FIRST_SLOTS
    while slots < tokens:
        slots += slots // 2
    return slots if bound is None else min(slots, bound)


def staying(count: int, leaving: int, pinned: int, pads: Tensor) -> Tensor:
    """Which of `count` columns in order stay when `leaving` of them go, ``[batch or 1, count - leaving]``.

    Pads go first, then what follows the row's own pinned tokens.
    """
    column = torch.arange(count - leaving)[None]
    real = column - (pads - leaving).clamp_min(0)
    gone = (leaving - pads).clamp_min(0)
    return torch.where(real < 0, column, torch.where(real < pinned, pads + real, pads + real + gone))


def overwritten(turns: Tensor, stored: int, pinned: int, pads: Tensor) -> Tensor:
    """The slot that each turn of a full buffer overwrites, ``[batch or 1, turns]``.

    A row with ``r`` pads first gives up slots r-1 … 0. Its tokens by age are then in the slots r … n-1, r-1 … 0, and
    those behind the pinned ones take turns.
    """
    age = pinned + (turns - pads) % (stored - pinned)
    return torch.where(turns < pads, pads - 1 - turns, torch.where(age < stored - pads, pads + age, stored - 1 - age))


def take(slots: Tensor, columns: Tensor) -> Tensor:
    """The chosen columns of ``[batch, heads, slots, …]``, ``[batch or 1, n]`` or, by head, ``[batch, heads, n]``."""
    columns = columns.to(slots.device)
    if columns.dim() == 2 and columns.shape[0] == 1:
        return slots.index_select(2, columns[0])
    if slots.dtype.is_floating_point and slots.dtype.itemsize == 1:  # which a CPU does not gather
        return take(slots.view(torch.uint8), columns).view(slots.dtype)
    by_head = columns if columns.dim() == 3 else columns[:, None].expand(-1, slots.shape[1], -1)
    more = slots.shape[3:]
    return slots.gather(2, by_head.reshape(*by_head.shape, *[1] * len(more)).expand(*by_head.shape, *more))


# ---------------------------------------------------------------------- the same on a device, for rows of their own


def ring_slot(positions: Tensor, pinned: Tensor, slots: int) -> Tensor:
    """The slot of a ring that each row's token at its position is written to, ``[rows]``.

    The first `pinned` tokens have slots of their own; the others share the rest, the newest in the place of the oldest.
    """
    return torch.where(positions < pinned, positions, pinned + (positions - pinned) % (slots - pinned))


def ring_sees(length: Tensor, stored: Tensor, pinned: Tensor, slots: int, columns: Tensor) -> Tensor:
    """Which columns of a ring hold a token that its row still sees, ``[rows, columns]``, True for "sees".

    Args:
        length: tokens seen, the current one among them, ``[rows]``.
        stored: how many of them stay: the pinned ones and the most recent, ``[rows]``.
        pinned: how many of the first tokens never leave, ``[rows]``.
        slots: of the whole ring.
        columns: the slots that are asked for.
    """
    newest, stored, pinned = (length - 1)[:, None], stored[:, None], pinned[:, None]
    token = newest - (newest - columns) % (slots - pinned)  # the last one written there, if there was any
    recent = (token >= pinned) & (token > newest - (stored - pinned))
    return torch.where(columns < pinned, columns <= newest, recent)


def staying_of(length: Tensor, limit: Tensor | int, low: Tensor | int) -> Tensor:
    """How many of `length` tokens a policy keeps that trims to `low` when one more than `limit` comes, ``[rows]``."""
    over = length - limit
    return torch.where(over <= 0, length, low + (over - 1) % (limit + 1 - low))


@contextmanager
def short_ladder() -> Iterator[None]:
    """Within it buffers have 4, 6, 9, 13 … slots, so that they grow within a few tokens: for tests."""
    global _FIRST_SLOTS
    before, _FIRST_SLOTS = _FIRST_SLOTS, 4
    try:
        yield
    finally:
        _FIRST_SLOTS = before
