"""Which KV heads of a model need the far past, measured once and saved."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcache.cache import KeepAll, PerHead, RankingPolicy, ScoringContext, SizePolicy, SlidingWindow
from kvcache.errors import CorruptError, InputError, said
from kvcache.io import write_given
from kvcache.models._attention import observed_copy
from kvcache.models._cache import new_cache
from kvcache.models._compat import cache_kwarg
from kvcache.models._fingerprint import model_fingerprint
from kvcache.models._operations import kv_layers

_FORMAT = "kvcache-heads"


@dataclass(frozen=True)
class _Watching(RankingPolicy):
    """Keeps everything, and every query, to be looked at afterwards."""

    query_window: ClassVar[int] = 2**31 - 1

    def score(self, seen: ScoringContext) -> Tensor:
        return torch.zeros_like(seen.positions, dtype=torch.float32)


@dataclass(frozen=True)
class RetrievalHeadProfile:
    """How much each KV head looks beyond its sinks and a window: measured once per model, saved as JSON.

    Heads that hardly do can forget what is there (DuoAttention, Xiao et al., arXiv:2410.10819, which trains gates to find
    them; here the attention itself is measured).

    Attributes:
        model: its fingerprint.
        sinks, window: what a head sees without looking far.
        tokens: of the sample that it was measured on.
        far: of each layer and KV head, the mean share of attention that goes beyond, from 0 to 1.
    """

    model: str
    sinks: int
    window: int
    tokens: int
    far: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.far or not all(self.far) or len({len(layer) for layer in self.far}) != 1:
            raise InputError("a head profile needs the same number of heads in each layer, at least one")
        if not all(isinstance(share, float) and 0 <= share <= 1 for layer in self.far for share in layer):
            raise InputError("a head profile's shares must be numbers from 0 to 1")
        if self.tokens < 1:
            raise InputError(f"a head profile of {self.tokens} tokens; it is measured on at least one")
        SlidingWindow(self.window, sinks=self.sinks)

    def policies(self, share: float, far: SizePolicy | None = None) -> list[SizePolicy]:
        """A policy per layer under which only some heads see the far past.

        Args:
            share: of all heads, from 0 to 1: those that look there most.
            far: their policy, by default `KeepAll`.

        Raises:
            InputError: if `share` is no share.
        """
        if not 0 <= share <= 1:
            raise InputError(f"share={share} must be from 0 to 1: of the heads that keep the far past")
        near = SlidingWindow(self.window, sinks=self.sinks)
        far = KeepAll() if far is None else far
        ranked = sorted(((s, i, h) for i, layer in enumerate(self.far) for h, s in enumerate(layer)), reverse=True)
        chosen = {(i, h) for _, i, h in ranked[: round(share * len(ranked))]}
        policies: list[SizePolicy] = []
        for i, layer in enumerate(self.far):
            heads = tuple(far if (i, h) in chosen else near for h in range(len(layer)))
            policies.append(heads[0] if len(set(heads)) == 1 else PerHead(heads))
        return policies

    def save(self, path: Path | str) -> None:
        """Write it as JSON; a file that is there is replaced at once or not at all.

        Raises:
            InputError: if a folder, a device or the like is there.
        """
        content = {"format": _FORMAT, "version": 1, **self.__dict__}
        write_given(path, f"{json.dumps(content, indent=1)}\n".encode(), private=False)

    @classmethod
    def load(cls, path: Path | str, model: str | None = None) -> "RetrievalHeadProfile":
        """Read it, checked.

        Args:
            model: the fingerprint that it must be of, see `kvcache.model_fingerprint`.

        Raises:
            CorruptError: if that is no profile.
            InputError: if it is another model's.
        """
        try:
            content = json.loads(Path(path).read_text())
            version = content.pop("version")
            if content.pop("format") != _FORMAT or type(version) is not int or version != 1:
                raise CorruptError(
                    f"{path} is no head profile of version 1; measure it again with profile_retrieval_heads()"
                )
            far = content["far"]
            if not isinstance(far, list) or not all(isinstance(layer, list) for layer in far):
                raise TypeError("its shares are no lists")
            if any(type(share) not in (int, float) for layer in far for share in layer):
                raise TypeError("its shares are no numbers")
            content["far"] = tuple(tuple(float(share) for share in layer) for layer in far)
            for name in ("sinks", "window", "tokens"):
                if type(content[name]) is not int:
                    raise TypeError(f"{name} is {content[name]!r}")
            if not isinstance(content["model"], str):
                raise TypeError(f"model is {content['model']!r}")
            profile = cls(**content)
        except CorruptError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptError(
                f"{path} is no head profile: {said(error)}; measure it again with profile_retrieval_heads()"
            ) from error
        if model is not None and profile.model != model:
            raise InputError(f"{path} was measured on another model; measure this one with profile_retrieval_heads()")
        return profile


def far_shares(layers: Sequence[Any], sinks: int, window: int) -> list[list[float]]:
    """Of each layer and head, the mean share of attention beyond sinks and window, over queries for which there is such."""
    result = []
    for layer in layers:
        seen = layer.seen_all()
        total, count = torch.zeros(seen.keys.shape[1]), 0
        for weights, at in seen.parts():
            chosen = at >= sinks + window
            if not bool(chosen.any()):
                continue
            far = (seen.positions[:, :, None] >= sinks) & (seen.positions[:, :, None] <= at[:, None] - window)
            share = (seen.per_kv_head(weights) * far)[:, :, chosen].sum(3)
            total += share.sum((0, 2)).cpu()
            count += share.shape[0] * share.shape[2]
        result.append([min(1.0, value / max(1, count)) for value in total.tolist()])
    return result


@torch.no_grad()
def profile_retrieval_heads(
    model: Any, batches: Sequence[Tensor], *, sinks: int = 4, window: int = 256
) -> RetrievalHeadProfile:
    """Measure how much each KV head of a model looks beyond its sinks and a window.

    Args:
        model: a transformers model with sdpa attention.
        batches: samples of what it will read, token ids ``[rows, tokens]`` without pads, longer than sinks and window.
        sinks, window: what a head sees without looking far.

    Raises:
        InputError: if a sample is too short to look far in.
        PolicyError: if the model cannot tell what it attends to.
    """
    near = sinks + window
    if not batches or any(ids.dim() != 2 or ids.shape[1] <= near for ids in batches):
        shapes = [list(ids.shape) for ids in batches]
        raise InputError(f"samples of {shapes} tokens: give at least one of [rows, more than {near}]")
    SlidingWindow(window, sinks=sinks)
    runner = observed_copy(model)
    body = getattr(runner, "base_model", runner)
    sums: list[list[float]] = []
    tokens = sum(ids.numel() for ids in batches)
    for ids in batches:
        room = ids.shape[1] + _Watching.window_size + _Watching.sinks
        cache = new_cache(model, _Watching(limit=room, low_water=room))
        body(ids.to(model.device), **cache_kwarg(body, cache), use_cache=True)
        layers = [kv for kv in kv_layers(cache) if kv.by_head]
        shares = far_shares(layers, sinks, window)
        weight = ids.numel() / tokens
        sums = [
            [old + weight * new for old, new in zip(*pair, strict=True)]
            for pair in zip(sums or [[0.0] * len(layer) for layer in shares], shares, strict=True)
        ]
    far = tuple(tuple(min(1.0, share) for share in layer) for layer in sums)
    return RetrievalHeadProfile(model_fingerprint(model), sinks, window, tokens, far)
