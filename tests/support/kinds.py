"""Every policy in every variant: what the laws of layers are held to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from hypothesis import given

from kvcache import (
    KeepAll,
    KVLayer,
    LayerCache,
    MaxBytes,
    MaxTokens,
    Pinned,
    SizePolicy,
    SlidingWindow,
)
from kvcache.cache import held_bytes as held_bytes_of
from support.inside.testing import (
    HEADS,
    KEY_DIM,
    VALUE_DIM,
    layer_of,
    scenarios,
    tokens,
)
from support.searching import search
from support.storages import STORAGES, exact_in


@dataclass(frozen=True)
class Halving(SizePolicy):
    """A user's own policy, as the documentation writes it."""

    limit: int

    def keep(self, count: int) -> int:
        return count if count <= self.limit else self.limit // 2


POLICIES: dict[str, Any] = {  # or made of the bytes of a token
    "all": KeepAll(),
    "window": SlidingWindow(5),
    "one": SlidingWindow(1),
    "sinks": SlidingWindow(4, sinks=2),
    "max": MaxTokens(8),
    "max-low": MaxTokens(9, low_water=3),
    "max-one": MaxTokens(4, low_water=1),
    "max-full": MaxTokens(6, low_water=6),
    "own": Halving(7),
    "bytes": lambda token: MaxBytes(14 * token),  # of the bytes of a token in all rows and layers
    "bytes-low": lambda token: MaxBytes(12 * token + 1, low_water=0.5),
}
POLICIES |= {
    f"pinned-{name}": (lambda token, p=p: Pinned(3, p(token))) if callable(p) else Pinned(3, p)
    for name, p in POLICIES.items()
}
VARIANTS = ("plain", "padded", "rerotated")


@dataclass(frozen=True)
class Kind:
    """A policy and a variant; makes layers, of a broken class where a mutant is asked for."""

    name: str
    variant: str
    layer: type[KVLayer] = KVLayer
    storage: str = "plain"

    @property
    def tolerance(self) -> float:
        """Pinned keys that are turned are quantized anew: what is attended to is off by half a scale."""
        return 1e-9 if self.storage != "plain" and self.variant == "rerotated" else 0.0

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}-{self.storage}"

    def tokens(self, rows: int, count: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
        queries, keys, values = tokens(rows, count, seed, dtype)
        storage = STORAGES[self.storage]
        return [queries, exact_in(storage, keys, "keys"), exact_in(storage, values, "values")]

    def policy(self, rows: int, dtype: torch.dtype = torch.float32, layers: int = 1) -> SizePolicy:
        policy = POLICIES[self.name]
        one = sum(held_bytes_of(STORAGES[self.storage], (HEADS, KEY_DIM, VALUE_DIM, dtype)))
        if self.storage != "plain" and self.variant == "rerotated":
            # Pinned keys are kept as they were, too, and a budget has to hold them where rows are repeated.
            one += HEADS * KEY_DIM * dtype.itemsize // 2
        token = layers * rows * one
        return cast(SizePolicy, policy(token) if callable(policy) else policy)

    def __call__(
        self, padding: list[int], dtype: torch.dtype = torch.float32, layers: int = 1, **options: Any
    ) -> LayerCache:
        policy = self.policy(len(padding), dtype, layers)
        make = partial(self.layer, storage=STORAGES[self.storage])
        return layer_of(make, policy, self.variant, padding, dtype, layers, **options)


KINDS = [
    Kind(name, variant, storage=storage)
    for storage in STORAGES
    for name in POLICIES
    for variant in VARIANTS
    if variant != "rerotated" or name == "sinks" or (name.startswith("pinned") and name != "pinned-all")
]


def hold(law: Callable[..., None], kind: Kind, examples: int, **options: Any) -> None:
    """Search for a scenario in which `kind` breaks `law`."""
    given(scenarios(kind.variant))(search(examples, **options)(lambda s: law(kind, s)))()
