"""Decodings of small models, run as their owner runs them, and what `generate` says to the same prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcache import CacheGeometry, KVCacheManager
from kvcache.decoding import Decoding, Sampler, Sampling, StaticKV, decoder_copy
from kvcache.models import exact_windows, geometry_of, kv_layers
from support.families import VOCABULARY
from support.inside.decoding import TRANSFORMERS, Compiled, run_by

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0, repetition_penalty=1)
DRAWING = Sampling(0.9, 0.9, 0.02, 20, 1.3)
DRAWS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.9,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.02,
    "repetition_penalty": 1.3,
}


def decoding_of(
    model: Any, rows: int, slots: int, backend: str = "eager", dtype: torch.dtype | None = None, **options: Any
) -> Decoding:
    """A decoding of a language model; "aot_eager" is torch's compiler without its slow half."""
    kv = StaticKV(geometry_of(model), rows, slots, dtype=dtype)
    decoder = decoder_copy(model)

    def forward(tokens: Tensor, made: Tensor, given: Any) -> Tensor:
        several = tokens.dim() == 2  # a draft
        logits: Tensor = decoder(input_ids=tokens if several else tokens[:, None], **given).logits
        return logits if several else logits[:, -1]

    named: Any = "eager" if backend == "aot_eager" else backend
    decoding = Decoding(forward, kv, Sampler(rows, VOCABULARY, TRANSFORMERS, CPU), named, **options)
    if backend == "aot_eager":
        run_by(decoding, Compiled(CPU, compiler="aot_eager"))
    return decoding


@torch.no_grad()
def begin(
    decoding: Decoding,
    manager: KVCacheManager,
    ids: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator | None] | None = None,
    first: int = 0,
) -> Tensor:
    """Prefill and the first token ``[rows, 1]``."""
    cache = manager.new_cache(ids.shape[0])
    with exact_windows(manager.model):
        logits = manager.model(ids, past_key_values=cache).logits[:, -1]
    decoding.load(first, kv_layers(cache))
    rows = ids.shape[0]
    start = decoding.start(first, logits, [sampling] * rows, generators or [None] * rows, list(ids))
    return start[:, None]


def say(
    decoding: Decoding, manager: KVCacheManager, ids: Tensor, sampling: Sampling, tokens: int, seed: int = 0
) -> Tensor:
    torch.manual_seed(seed)
    said = [begin(decoding, manager, ids, sampling)]
    while (left := tokens - sum(one.shape[1] for one in said)) > 0:
        said.append(decoding.chunk(min(left, 37)))
    return torch.cat(said, 1)


def generated(manager: KVCacheManager, ids: Tensor, tokens: int, seed: int = 0, **drawing: Any) -> Tensor:
    torch.manual_seed(seed)
    said: Tensor = manager.generate(ids, max_new_tokens=tokens, **(drawing or {"do_sample": False}))
    return said[:, ids.shape[1] :]


def streamed(manager: KVCacheManager, ids: Any, backend: Any, seed: int = 0, **given: Any) -> tuple[Tensor, Tensor]:
    """The tokens of a stream, and the state of torch's generator behind them."""
    torch.manual_seed(seed)
    tokens = torch.cat(list(manager.stream(ids, backend=backend, **given)), 1)
    return tokens, torch.get_rng_state()


def guided_decoding(model: Any, slots: int, requests: int, backend: Any) -> Decoding:
    kv = StaticKV(geometry_of(model), 2 * requests, slots)
    decoder = decoder_copy(model)

    def forward(tokens: Tensor, made: Tensor, given: Any) -> Tensor:
        logits: Tensor = decoder(input_ids=tokens[:, None].repeat_interleave(2, 0), **given).logits
        return logits[:, -1]

    return Decoding(forward, kv, Sampler(requests, VOCABULARY, TRANSFORMERS, CPU, guided=True), backend)


def scripted(script: Tensor, ahead: int = 64) -> Decoding:
    """A decoding whose requests say what the script says, ``[requests, tokens]``; its first token is made already."""
    requests, vocabulary = script.shape[0], 10

    def forward(tokens: Tensor, made: Tensor, given: Any) -> Tensor:
        return torch.nn.functional.one_hot(script.gather(1, made[:, None])[:, 0], vocabulary).float()

    kv = StaticKV(CacheGeometry(1, 1, 2, 2), requests, 8)
    decoding = Decoding(forward, kv, Sampler(requests, vocabulary, TRANSFORMERS, CPU), ahead=ahead)
    first = torch.nn.functional.one_hot(script[:, 0], vocabulary).float()
    decoding.start(0, first, [GREEDY] * requests, [None] * requests, [torch.zeros(0, dtype=torch.long)] * requests)
    return decoding
