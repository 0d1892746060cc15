"""Which tokens a cache keeps, by layer and KV head, as data and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from kvcache.cache import LayerCache
from kvcache.errors import InputError
from kvcache.io import canvas


def positions_by_head(layer: LayerCache) -> list[tuple[tuple[int, ...] | None, Tensor]]:
    """The positions that a layer holds, in slot order: ``[batch or 1, heads or 1, stored]`` for some of its KV heads.

    Returns:
        Pairs of which heads, None for all of them, and their positions.
    """
    found = []
    for heads, part in layer.parts():
        at = part.positions()
        found.append((None if heads is None else tuple(heads), at if at.dim() == 3 else at[:, None]))
    return found


@dataclass(frozen=True)
class Occupancy:
    """Which positions are kept.

    Attributes:
        layers: of each layer ``[rows, KV heads, seen]``, True where the token at that position is kept; ``[1, …]`` where
            all rows are alike, ``[…, 1, …]`` where all heads are. Positions count from 0, pads too.
        names: what each layer keeps by: its policy, or that it is the model's own.
    """

    layers: tuple[Tensor, ...]
    names: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Occupancy({len(self.layers)} layers, {self.seen} tokens seen, {self.share:.0%} of them kept)"

    @property
    def seen(self) -> int:
        """Tokens that went through."""
        return max((layer.shape[2] for layer in self.layers), default=0)

    @property
    def share(self) -> float:
        """How much of what was seen is kept, over all layers, from 0 to 1."""
        shares = [float(layer.float().mean()) for layer in self.layers if layer.numel()]
        return sum(shares) / len(shares) if shares else 0.0

    def kept(self, layer: int, row: int = 0, head: int = 0) -> list[int]:
        """The positions that one KV head of one row keeps, in order.

        Raises:
            InputError: if there is no such layer, row or head.
        """
        if not -len(self.layers) <= layer < len(self.layers):
            raise InputError(f"layer={layer}: there are {len(self.layers)} layers")
        return [int(p) for p in self._of(self.layers[layer], row, head).nonzero()[:, 0]]

    def map(self, row: int = 0) -> Tensor:
        """Layers × positions: the share of a layer's KV heads that keep each token of this row, ``[layers, seen]``."""
        made = torch.zeros(len(self.layers), self.seen)
        for line, layer in zip(made, self.layers, strict=True):
            line[: layer.shape[2]] = self._rows(layer, row).float().mean(0)
        return made

    def plot(self, file: str | PathLike[str] | None = None, *, row: int = 0) -> Any:
        """The map as a picture: dark is kept by every head, white by none.

        Args:
            file: to write it to, by its suffix as ``.png`` or ``.svg``.
            row: of the batch.

        Returns:
            The figure of matplotlib.

        Raises:
            InputError: without matplotlib, or where nothing has been seen.
        """
        if not self.seen:
            raise InputError("nothing has been seen yet: there is nothing to draw; run some tokens first")
        figure, axes = canvas(height=max(2.0, min(8.0, 1.4 + 0.14 * len(self.layers))))
        image = axes.imshow(
            self.map(row).tolist(), aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1
        )
        axes.set(xlabel="position", ylabel="layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title("tokens kept: " + (self.names[0] if len(set(self.names)) == 1 else "layers of their own"))
        figure.colorbar(image, label="share of KV heads that keep it")
        if file is not None:
            figure.savefig(file)
        return figure

    @staticmethod
    def _rows(layer: Tensor, row: int) -> Tensor:
        if not -layer.shape[0] <= row < layer.shape[0] and layer.shape[0] != 1:
            raise InputError(f"row={row}: there are {layer.shape[0]} rows")
        return layer[0 if layer.shape[0] == 1 else row]

    @classmethod
    def _of(cls, layer: Tensor, row: int, head: int) -> Tensor:
        heads = cls._rows(layer, row)
        if not -heads.shape[0] <= head < heads.shape[0] and heads.shape[0] != 1:
            raise InputError(f"head={head}: there are {heads.shape[0]} KV heads")
        return heads[0 if heads.shape[0] == 1 else head]


def occupancy(cache: Any) -> Occupancy:
    """Which tokens a cache keeps now.

    Args:
        cache: what `KVCacheManager.new_cache` made, or a sequence of `LayerCache`.

    Raises:
        InputError: for anything else.
    """
    if isinstance(cache, Sequence) and all(isinstance(layer, LayerCache) for layer in cache):
        layers: list[Any] = list(cache)
    else:
        from kvcache.models import cache_layers  # which needs this module's neighbours first

        try:
            layers = [getattr(layer, "kv", layer) for layer in cache_layers(cache)]
        except AttributeError:
            raise InputError(
                f"{type(cache).__name__} is no cache: give what new_cache() made, or a list of LayerCache"
            ) from None
    kept = tuple(_kept(layer) for layer in layers)
    return Occupancy(kept, tuple(_name(layer) for layer in layers))


def _kept(layer: Any) -> Tensor:
    if isinstance(layer, LayerCache):
        seen, parts = layer.seen, positions_by_head(layer)
    else:  # the model's own: a window, or all
        keys = getattr(layer, "keys", None)
        seen = layer.get_seq_length() if isinstance(keys, Tensor) else 0
        stored = min(seen, keys.shape[-2]) if isinstance(keys, Tensor) and keys.dim() == 4 else 0
        parts = [(None, torch.arange(seen - stored, seen)[None, None])]
    rows = max((at.shape[0] for _, at in parts), default=1)
    heads = sum(at.shape[1] if which is None else len(which) for which, at in parts)
    made = torch.zeros(rows, max(1, heads), seen, dtype=torch.bool)
    for which, at in parts:
        columns = list(range(at.shape[1])) if which is None else list(which)
        ones = torch.zeros(rows, len(columns), seen, dtype=torch.bool)
        made[:, columns] = ones.scatter(2, at.expand(rows, len(columns), -1).long(), True)
    return made


def _name(layer: Any) -> str:
    return repr(layer.policy) if isinstance(layer, LayerCache) else f"the model's own {type(layer).__name__}"
