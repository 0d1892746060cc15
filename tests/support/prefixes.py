"""Prefixes of small models, and what the models say behind them.

The reference is transformers on the concatenated prompt, or a cache of ours that was given all of it. Nothing here writes
outside of a test's own folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvcache import KVCacheManager, MemoryStore, PrefixKey, PrefixSnapshot, SpeakerCache, model_fingerprint
from kvcache import models as hf
from kvcache.models import looks_on
from support.families import FAMILIES, SEQ2SEQ, tiny, token_ids
from support.inside.testing import tokens

NEW = 12
PREFIX = token_ids(1, 13, seed=3)[0]  # longer than the windows of families that have their own
TEXT = token_ids(2, 9)
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
DECODERS = [name for name in FAMILIES if name not in SEQ2SEQ]
FEW = ("llama", "gemma3", "gpt2", "bloom")  # rotary, hybrid, learned and ALiBi positions


# fp32 logits of size 10: a matrix product over other rows or columns adds up in another order, which makes 3e-6 here;
# one wrong token in the cache makes 0.1.
CLOSE = 1e-4


def in_memory() -> SpeakerCache:
    return SpeakerCache(MemoryStore("64MiB"))


def manager(model: Any, policy: Any = None, prefix: Tensor = PREFIX, **options: Any) -> KVCacheManager:
    """A manager that has the prefix "p"."""
    kv = KVCacheManager(model, policy, **{"prefix_cache": in_memory(), **options})
    kv.add_prefix("p", prefix)
    return kv


def after(prefix: Tensor, text: Tensor = TEXT) -> Tensor:
    """The prefix before each row: what a prompt would be without us."""
    return torch.cat((prefix.expand(len(text), *prefix.shape), text), 1)


def snapshot_of(kv: KVCacheManager, ids: Tensor = PREFIX) -> PrefixSnapshot:
    found = kv.prefix_cache.get(PrefixKey(model_fingerprint(kv.model), ids))
    assert found is not None
    return found


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def all_bits(snapshot: PrefixSnapshot) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in snapshot.tensors().items()}


@contextmanager
def forwarded(model: Any) -> Iterator[list[int]]:
    """How many tokens each forward of the body runs."""
    counts: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given_ = args[0] if args else kwargs.get("input_ids")
        counts.append((kwargs["inputs_embeds"] if given_ is None else given_).shape[1])

    handle = model.get_decoder().register_forward_pre_hook(looks_on(count), with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def some(key: PrefixKey, layers: int = 2, dtype: torch.dtype = torch.float32, seconds: float = 1.0) -> PrefixSnapshot:
    """A snapshot of made-up numbers; as a model's, keys are of another size than values may be."""
    states = [tokens(1, len(key), seed=i, dtype=dtype)[1:] for i in range(layers)]
    return PrefixSnapshot(key, tuple((keys, values) for keys, values in states), seconds)


@cache
def plain(name: str, attention: str | None = None) -> Tensor:
    result: Tensor = tiny(name, attention).generate(after(PREFIX), **GREEDY)
    return result


MODES: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 40},
    "beams": {"do_sample": False, "num_beams": 3},
    "best-beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled-beams": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},  # which see the prefix
    "up-to": {"do_sample": False, "max_new_tokens": None, "max_length": 30},
    "without-cache": {"do_sample": False, "use_cache": False},
}


def embedded(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model.get_input_embeddings()(ids)
    return result


def voice(model: Any, seed: int = 3, n: int = 13) -> Tensor:
    """Embeddings that are no token's, of the size of a token's."""
    table = model.get_input_embeddings().weight
    noise = torch.randn(n, table.shape[1], generator=torch.Generator().manual_seed(seed))
    result: Tensor = noise * table.std()
    return result


def held_states(cache_: Any) -> list[Any]:
    return [states for layer in hf.kv_layers(cache_) for states in (layer.keys, layer.values) if states is not None]


@torch.no_grad()
def cold(model: Any, ids: Tensor) -> list[Tensor]:
    """Keys and values of a prefix, by transformers alone and at once."""
    held: Any = DynamicCache()
    model.base_model(**({"inputs_embeds" if ids.is_floating_point() else "input_ids": ids[None]}), past_key_values=held)
    return [states for layer in held.layers for states in (layer.keys, layer.values)]


def assert_holds(kv: KVCacheManager, name: str, ids: Tensor) -> None:
    got, expected = held_states(kv.new_cache(1, prefix=name)), cold(kv.model, ids)
    # 1e-4 in fp32, for values of size 10: a prefix that was computed in two parts multiplies matrices of other shapes,
    # which add up in another order.
    assert all((a - b).abs().max() < CLOSE for a, b in zip(got, expected, strict=True))


def weight(model: Any) -> Tensor:
    result: Tensor = model.model.layers[1].self_attn.v_proj.weight
    return result


@torch.no_grad()
def in_place(model: Any) -> None:
    weight(model)[3, 5] += 1e-3


@contextmanager
def unchanged(kv: KVCacheManager) -> Iterator[None]:
    """After the body, the manager is what it was, and serves as before."""

    def state() -> tuple[Any, ...]:
        # To have found what the store has is no change.
        stats = replace(kv.prefix_cache.stats(), hits={}, seconds_saved=0.0)
        return kv.prefixes, stats, kv.enabled, kv.report(), len(kv.model._forward_pre_hooks)

    before = state()
    yield
    assert state() == before
