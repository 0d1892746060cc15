"""How a model turns its keys by their positions, found on the keys that it writes at two of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kvcache.cache import KeyRotation
from kvcache.models._probe import TOKENS, Probe, alike, closeness
from kvcache.models._seats import Fresh
from kvcache.models._spy import spying_cache

_SHIFT = 7  # positions between the two runs that show how keys are turned
_BY_LENGTH = ("dynamic", "longrope")  # RoPE whose frequencies depend on how long the text becomes


def rope_by_length(model: Any) -> str | None:
    """The kind of a model's rotary embedding, if its frequencies depend on how long the text becomes."""
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    return next((kind for kind in kinds if kind in _BY_LENGTH), None)


def turns_of(model: Any, fresh: Fresh) -> Mapping[int, KeyRotation | str | None]:
    """A short text at two positions: how the keys of its first token differ is how each layer turns them.

    Returns:
        By layer; None where keys carry no position, and the reason in words where they cannot be turned.
    """
    probe = Probe(model)
    try:
        with fresh():
            ids = probe.ids[None, : TOKENS // 2]
            notes = [probe.run(ids, spying_cache(model, seen=seen, sliding=True)) for seen in (0, _SHIFT)]
    except Exception as error:  # code of any model; the reason is told where it is asked for
        return {0: f"a short run failed with {type(error).__name__}: {str(error)[:200]}"}
    known = list(_rotations(model))
    found: dict[int, KeyRotation | str | None] = {}
    for i, keys in notes[0].keys.items():
        later = notes[1].keys[i]
        found[i] = _turn(i, keys[:, :, :1], later[:, :, :1], known)  # of the first, which has seen nothing but itself
        if not alike(notes[0].values[i][:, :, :1], notes[1].values[i][:, :, :1]):
            found[i] = f"what layer {i} stores beside its keys carries positions, too"
    same = alike(notes[0].output, notes[1].output, closeness(model, notes[0].output.dtype))
    if not same and not any(isinstance(turn, str) for turn in found.values()):
        return {0: "its attention is another at other positions, though distances are the same"}
    return found


def _rotations(model: Any) -> Iterator[KeyRotation]:
    """The ways in which the frequencies that a model holds could turn its keys."""
    held: list[Tensor] = []
    for module in model.modules():
        tensors = {**vars(module), **module._buffers}
        held += [t for name, t in tensors.items() if "inv_freq" in name and isinstance(t, Tensor) and t.dim() == 1]
        held += [frequencies for t in tensors.values() if (frequencies := _of_table(t)) is not None]
    distinct: list[Tensor] = []
    for frequencies in held:
        if not any(frequencies.shape == one.shape and torch.equal(frequencies, one) for one in distinct):
            distinct.append(frequencies)
    for frequencies in distinct:
        for interleaved in (False, True):
            yield KeyRotation(frequencies, interleaved)


def _of_table(table: Any) -> Tensor | None:
    """The frequencies of a table whose rows are the sines, then the cosines, of a position times them (GPT-J)."""
    if not isinstance(table, Tensor) or table.dtype != torch.float32 or table.dim() != 2:
        return None
    if table.shape[0] < 2 or table.shape[1] % 2 or table.device.type == "meta":
        return None
    (sines, cosines), (none, ones) = table[1].chunk(2), table[0].chunk(2)
    return torch.atan2(sines, cosines) if bool((none == 0).all() and (ones == 1).all()) else None


def _turn(layer: int, keys: Tensor, later: Tensor, known: list[KeyRotation]) -> KeyRotation | str | None:
    """What makes a token's keys ``[1, KV heads, 1, dim]`` those that it has `_SHIFT` positions later."""
    if alike(keys, later):
        return None
    spare = {one: keys.shape[3] - 2 * one.inv_freq.numel() for one in known}
    for one in known:
        if spare[one] >= one.first and alike(one(keys, _SHIFT), later):
            return one
    for one in known:
        behind = KeyRotation(one.inv_freq, one.interleaved, spare[one])
        if spare[one] > 0 and one.first == 0 and alike(behind(keys, _SHIFT), later):
            known.append(behind)
            return behind
    return f"the keys of layer {layer} change with their position in another way than by a rotation"
