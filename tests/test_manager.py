"""The manager's face: what it reports, what it leaves behind, what a stream does when its consumer is slow or leaves."""

import asyncio
import copy
import gc
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import holding
from support.families import FAMILIES, SEQ2SEQ, build, dynamic_cache, logits, tiny, token_ids
from support.inside.decoding import WORKER_QUEUE
from support.inside.models import NEW_CACHE
from support.searching import examples
from support.waiting import until
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from kvcache import (
    H2O,
    AdaKV,
    CapacityError,
    GeometryError,
    InputError,
    KeepAll,
    KVCacheError,
    KVCacheManager,
    KVLayer,
    MaxBytes,
    MaxTokens,
    Pinned,
    PolicyError,
    SizePolicy,
    SlidingWindow,
    SnapKV,
)
from kvcache import models as hf
from kvcache.memory import resident_bytes
from kvcache.models import get_cache

GREEDY: dict[str, Any] = {"do_sample": False}

KINDS: dict[str, dict[str, Any]] = {
    "growing": {},
    "bounded": {"max_cache_length": 310},
    "static": {"max_cache_length": 310, "static": True},
    "window": {"policy": SlidingWindow(150)},
    "window-at-once": {"policy": SlidingWindow(150, sinks=4), "static": True},
    "small-window": {"policy": SlidingWindow(8, sinks=4)},
    "rerotated": {"policy": SlidingWindow(140, sinks=6), "positions": "rerotated"},
    "rerotated-at-once": {"policy": SlidingWindow(40, sinks=6), "positions": "rerotated", "static": True},
    "max-tokens": {"policy": MaxTokens(200, low_water=60)},
    "max-bytes": {"policy": MaxBytes("150KB")},
    "max-bytes-at-once": {"policy": MaxBytes("150KB", low_water=0.5), "static": True},
    "max-bytes-rerotated": {"policy": Pinned(5, MaxBytes("150KB")), "positions": "rerotated"},
    "pinned": {"policy": Pinned(20, MaxTokens(120))},
    "pinned-for-good": {"policy": Pinned(20, KeepAll())},
    "per-layer": {"policy": (SlidingWindow(150), KeepAll()), "max_cache_length": 310},
    "per-layer-rerotated": {"policy": (SlidingWindow(150, sinks=3), SlidingWindow(30)), "positions": "rerotated"},
}


def feed(model: Any, held: Any, tokens: int, rows: int, chunks: tuple[int, ...] | None = None) -> None:
    with hf.exact_windows(model):
        logits(model, token_ids(rows, tokens), held, chunks)


def bytes_found(held: Any) -> int:
    """Bytes of the storages of all keys and values found by walking everything that a cache refers to."""
    # [batch, heads, tokens, head_dim]; not the few numbers of a rotation or of pads.
    return holding.bytes_held(held, lambda tensor: tensor.dim() == 4)


# ---------------------------------------------------------------------- bytes


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_estimated_are_bytes_reported_are_bytes_held(kind: str, rows: int) -> None:
    model, kv = tiny("llama"), KVCacheManager(tiny("llama"), **KINDS[kind])
    held, tokens = kv.new_cache(rows), 0
    assert kv.report(held).nbytes == bytes_found(held) == 0
    for chunk in (1, 7, 120, 1, 5, 100, 1, 1, 64):
        feed(model, held, chunk, rows)
        tokens += chunk
        assert kv.estimate(tokens, rows) == kv.report(held).nbytes == bytes_found(held), tokens


@pytest.mark.grid(49)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in FAMILIES
        for kind in ("growing", "static", "window", "max-tokens", "max-bytes", "pinned")
        if FAMILIES[name].evicts or kind in ("growing", "static")
    ],
)
def test_the_estimate_is_exact_for_every_family(name: str, kind: str) -> None:
    model, kv = tiny(name), KVCacheManager(tiny(name), **KINDS[kind])
    for tokens, chunks in ((5, None), (200, (130, 70)), (200, (20,) * 10)):
        held = kv.new_cache(2)
        feed(model, held, tokens, 2, chunks)
        encoder = {"encoder_tokens": 9} if name in SEQ2SEQ else {}
        assert kv.estimate(tokens, batch_size=2, **encoder) == kv.report(held).nbytes == bytes_found(held)
        ours = sum(layer.nbytes for layer in hf.kv_layers(held, some=False))
        assert (kv.report(held).nbytes == ours) != (FAMILIES[name].hybrid or name in SEQ2SEQ)


@pytest.mark.parametrize("copies", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["growing", "static", "max-bytes", "rerotated"])
def test_the_estimate_of_a_request(kind: str, copies: int) -> None:
    kv = KVCacheManager(tiny("llama"), **KINDS[kind])
    kv.generate(token_ids(2, 150), max_new_tokens=31, num_beams=copies, **GREEDY)
    assert kv.report().nbytes == kv.estimate(180, batch_size=2 * copies)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("budget", ["60KB", "150KB", "1MB"])
def test_a_budget_in_bytes_is_never_exceeded_and_well_used(budget: str, rows: int) -> None:
    model, kv = tiny("llama"), KVCacheManager(tiny("llama"), MaxBytes(budget), static=True)
    most = int(budget[:-2]) * 10 ** (3 if budget[-2] == "K" else 6)
    held = kv.new_cache(rows)
    for chunk in (1, 200, 1, 1):
        feed(model, held, chunk, rows)
        assert most - rows * kv.geometry.token_bytes < bytes_found(held) <= most


def test_the_report_counts() -> None:
    model, kv = tiny("llama"), KVCacheManager(tiny("llama"), (SlidingWindow(8, sinks=2), MaxTokens(12, 6)))
    held = kv.new_cache(2)
    feed(model, held, 30, 2)
    report = kv.report(held)
    assert [(layer.seen, layer.stored, layer.evicted) for layer in report.layers] == [(30, 10, 20), (30, 9, 21)]
    assert [layer.policy for layer in report.layers] == [
        "SlidingWindow(window=8, sinks=2)",
        "MaxTokens(limit=12, low_water=6)",
    ]
    assert (report.seen, report.stored, report.evicted) == (30, 10, 41)
    assert report.layers[0].capacity * 2 * 2 * (16 + 16) * 4 == report.layers[0].nbytes  # rows, heads, head_dim, fp32
    assert "30 tokens seen, 10 kept" in str(report)


def test_the_report_of_a_hybrid_counts_the_models_own_layers() -> None:
    kv = KVCacheManager(tiny("gemma3"), SlidingWindow(16, sinks=2))
    kv.generate(token_ids(), max_new_tokens=20, **GREEDY)
    own, ours = kv.report().layers[0], kv.report().layers[-1]
    assert own.policy == "the model's own DynamicSlidingWindowLayer"
    assert (own.seen, own.stored) == (39, 7)  # the window of 8 counts the token to come
    assert (ours.seen, ours.stored, ours.evicted) == (39, 18, 21)


def test_the_report_is_that_of_the_last_run_even_if_it_failed() -> None:
    kv = KVCacheManager(tiny("llama"), max_cache_length=24)
    assert kv.report().layers == ()
    kv.generate(token_ids(), max_new_tokens=3, **GREEDY)
    assert kv.report().seen == 22
    with pytest.raises(CapacityError):
        kv.generate(token_ids(), max_new_tokens=12, **GREEDY)
    assert kv.report().seen == 24
    kv.enabled = False
    kv.generate(token_ids(), max_new_tokens=3, **GREEDY)
    assert "disabled" in str(kv.report())


def test_a_dtype_is_counted() -> None:
    model = build("llama").to(torch.bfloat16)
    kv, full = KVCacheManager(model), KVCacheManager(tiny("llama"))
    held = kv.new_cache(1)
    feed(model, held, 20, 1)
    assert held.layers[0].keys.dtype == torch.bfloat16
    assert kv.estimate(20) == bytes_found(held) == full.estimate(20) // 2


# ---------------------------------------------------------------------- what is asked wrongly


def test_what_cannot_work_is_said_at_once() -> None:
    model = tiny("llama")
    for wrong in (
        lambda: KVCacheManager(model, max_cache_length=0),
        lambda: KVCacheManager(model, max_cache_length=-1),
        lambda: KVCacheManager(model, SlidingWindow(64), max_cache_length=32),
        lambda: KVCacheManager(model, MaxBytes(16)).new_cache(),
        lambda: KVCacheManager(model, "SlidingWindow(8)"),  # type: ignore[arg-type]
        lambda: KVCacheManager(model, 1024),  # type: ignore[arg-type]
    ):
        with pytest.raises(PolicyError):
            wrong()


def test_streams_that_cannot_be_are_refused_before_anything_runs() -> None:
    kv = KVCacheManager(tiny("llama"))
    threads = threading.active_count()
    for size in (0, -1):
        with pytest.raises(InputError, match=f"chunk_size={size}"):
            kv.stream(token_ids(), chunk_size=size, max_new_tokens=4)
        with pytest.raises(InputError, match=f"chunk_size={size}"):
            kv.astream(token_ids(), chunk_size=size, max_new_tokens=4)
    with pytest.raises(InputError, match="beams"):
        kv.stream(token_ids(), num_beams=2, max_new_tokens=4)
    with pytest.raises(InputError, match="beams"):
        kv.stream(token_ids(), generation_config=GenerationConfig(num_beams=2, max_new_tokens=4))
    model = build("llama")
    model.generation_config.num_beams = 2
    with pytest.raises(InputError, match="beams"):
        KVCacheManager(model).stream(token_ids(), max_new_tokens=4)
    assert threading.active_count() == threads
    assert kv.report().layers == ()


def test_a_cache_for_other_rows_is_refused() -> None:
    kv = KVCacheManager(tiny("llama"))
    held = kv.new_cache(batch_size=3)
    with pytest.raises(GeometryError, match="3 rows"):
        kv.generate(token_ids(2), past_key_values=held, max_new_tokens=4)
    assert kv.report(held).seen == 0


# ---------------------------------------------------------------------- streams


class Steps(StoppingCriteria):
    """Counts the steps of a run."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kvcache-stream")]


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to the layers of every cache made from now on."""
    made: list[Any] = []
    original = hf.new_cache

    def recording(*args: Any, **kwargs: Any) -> Any:
        held = original(*args, **kwargs)
        made.extend(weakref.ref(layer) for layer in hf.kv_layers(held))
        return held

    monkeypatch.setattr(NEW_CACHE, recording)
    return made


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("policy", [None, SlidingWindow(8, sinks=2)], ids=["keeping", "evicting"])
def test_closing_a_stream_ends_its_run_and_frees_its_cache(policy: Any, taken: int, caches: list[Any]) -> None:
    model, steps = tiny("llama"), Steps()
    kv = KVCacheManager(model, policy)
    stream = kv.stream(
        token_ids(), chunk_size=2, max_new_tokens=150, stopping_criteria=StoppingCriteriaList([steps]), **GREEDY
    )
    for _ in range(taken):
        assert next(stream).shape == (2, 2)
    assert len(workers()) == (taken > 0)
    stream.close()
    assert workers() == []
    assert steps.count < 150
    # Its account is still there. Releases differ in whether they count a step before or after handing its token out.
    assert kv.report().seen - 20 in (steps.count - 1, steps.count) if taken else kv.report().seen == 0
    del stream
    gc.collect()
    assert len(caches) >= 2
    assert [ref() for ref in caches] == [None] * len(caches)
    assert no_hooks(model)


def test_a_stream_dropped_without_closing_ends_too() -> None:
    kv = KVCacheManager(tiny("llama"))
    stream = kv.stream(token_ids(), chunk_size=2, max_new_tokens=150, **GREEDY)
    next(stream)
    del stream
    gc.collect()
    assert workers() == []


def test_leaving_an_async_stream_ends_its_run() -> None:
    steps = Steps()
    kv = KVCacheManager(tiny("llama"))

    async def leave() -> int:
        stream = kv.astream(
            token_ids(), chunk_size=2, max_new_tokens=150, stopping_criteria=StoppingCriteriaList([steps]), **GREEDY
        )
        async for chunk in stream:
            assert chunk.shape == (2, 2)
            break
        await stream.aclose()  # type: ignore[attr-defined]
        return len(workers())

    assert asyncio.run(leave()) == 0
    assert steps.count < 150


def test_cancelling_an_async_stream_ends_its_run() -> None:
    steps = Steps()
    kv, taken = KVCacheManager(tiny("llama")), asyncio.Event()

    async def consume() -> None:
        stream = kv.astream(
            token_ids(), chunk_size=2, max_new_tokens=230, stopping_criteria=StoppingCriteriaList([steps]), **GREEDY
        )
        async for _ in stream:
            taken.set()
            await asyncio.Event().wait()  # it is busy with it, for ever

    async def cancel() -> None:
        task = asyncio.create_task(consume())
        await taken.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    until(lambda: workers() == [])
    assert steps.count < 230


def test_an_error_in_the_run_reaches_the_consumer() -> None:
    model = tiny("llama")
    kv = KVCacheManager(model, max_cache_length=26)
    stream = kv.stream(token_ids(), chunk_size=2, max_new_tokens=12, **GREEDY)
    received = []
    with pytest.raises(CapacityError, match="26 slots"):
        received.extend(stream)
    # 20 and 6 tokens are in the cache, the seventh is the answer to the sixth: three whole chunks came through.
    assert torch.equal(torch.cat(received, 1)[:, :6], model.generate(token_ids(), max_new_tokens=6, **GREEDY)[:, 20:])
    assert workers() == []

    async def consume() -> None:
        async for _ in kv.astream(token_ids(), max_new_tokens=12, **GREEDY):
            pass

    with pytest.raises(CapacityError, match="26 slots"):
        asyncio.run(consume())
    with pytest.raises(ValueError, match="no_such_setting"):
        next(kv.stream(token_ids(), max_new_tokens=4, no_such_setting=1))
    assert workers() == []
    assert [chunk.shape for chunk in kv.stream(token_ids(), max_new_tokens=2, **GREEDY)] == [
        (2, 2)
    ]  # the next one runs


def test_a_slow_consumer_holds_the_run_back(monkeypatch: pytest.MonkeyPatch) -> None:
    full = threading.Event()

    class Told(queue.Queue):  # type: ignore[type-arg]
        def put(self, *args: Any, **kwargs: Any) -> None:
            if self.full():
                full.set()
            super().put(*args, **kwargs)

    monkeypatch.setattr(WORKER_QUEUE, SimpleNamespace(Queue=Told, Full=queue.Full))
    steps, kv = Steps(), KVCacheManager(tiny("llama"))
    given = {"max_new_tokens": 230, **GREEDY}
    stream = kv.stream(token_ids(), chunk_size=1, stopping_criteria=StoppingCriteriaList([steps]), **given)
    received = [next(stream)]
    until(lambda: full.is_set() or not workers())
    assert 1 < steps.count <= 1 + 64 + 2  # taken, waiting, and in the worker's hands
    received.extend(stream)
    assert torch.equal(torch.cat(received, 1), kv.generate(token_ids(), **given)[:, 20:])


def test_two_streams_that_evict_share_a_model() -> None:
    """Both hand their layers masks of their own, through hooks on the same modules."""
    model, given = tiny("llama"), {"max_new_tokens": 40, **GREEDY}
    one, other = KVCacheManager(model, SlidingWindow(8, sinks=2)), KVCacheManager(model, MaxTokens(14, 9))
    expected = [kv.generate(token_ids(seed=seed), **given)[:, 20:] for seed, kv in enumerate((one, other))]

    async def collect(kv: KVCacheManager, seed: int) -> Tensor:
        return torch.cat([chunk async for chunk in kv.astream(token_ids(seed=seed), chunk_size=3, **given)], 1)

    async def both() -> list[Tensor]:
        return list(await asyncio.gather(collect(one, 0), collect(other, 1)))

    for _ in range(3):
        for ours, theirs in zip(asyncio.run(both()), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert no_hooks(model)


# ---------------------------------------------------------------------- inference mode


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it() -> None:
    model, kv = tiny("llama"), KVCacheManager(tiny("llama"), SlidingWindow(8, sinks=2))
    held, same = kv.new_cache(2), kv.new_cache(2)
    with torch.inference_mode():
        logits(model, token_ids(2, 9), held)
    logits(model, token_ids(2, 9), same)
    assert torch.equal(logits(model, token_ids(2, 9), held, (1,) * 9), logits(model, token_ids(2, 9), same, (1,) * 9))
    with torch.inference_mode():
        kv.generate(token_ids(), max_new_tokens=4, past_key_values=kv.new_cache(2), **GREEDY)


# ---------------------------------------------------------------------- the model stays what it was


_HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


def no_hooks(model: nn.Module) -> bool:
    return not any(
        getattr(module, name) for module in model.modules() for name in _HOOKS if name.startswith("_forward")
    )


def portrait(model: Any) -> dict[str, Any]:
    """Everything about a model that a wrapper could have changed."""
    modules = dict(model.named_modules())
    return {
        "attributes": dir(model),
        "own attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "modules": {name: (id(module), type(module), module.training) for name, module in modules.items()},
        "methods": {name: (type(module).forward, type(module).__call__) for name, module in modules.items()},
        "hooks": {
            name: {
                hook: list(value) if hasattr(value, "__iter__") else value
                for hook in _HOOKS
                if (value := getattr(module, hook)) is not None
            }
            for name, module in modules.items()
        },
        "weights": {
            key: (value.data_ptr(), value.dtype, value.sum().item()) for key, value in model.state_dict().items()
        },
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
    }


def everything(model: Any, evicts: bool, padded: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every operation of a manager, those that fail among them."""
    policy = SlidingWindow(8, sinks=2) if evicts else None
    kv = KVCacheManager(model, policy)
    static = KVCacheManager(model, max_cache_length=24, static=True)
    ids, given = token_ids(), {"max_new_tokens": 6, **GREEDY}
    yield "generate", lambda: kv.generate(ids, **given)
    yield "sampled", lambda: kv.generate(ids, max_new_tokens=6, do_sample=True, top_k=5)
    yield "beams", lambda: kv.generate(ids, num_beams=2, **given)
    yield "stream", lambda: list(kv.stream(ids, chunk_size=2, **given))
    yield "closed stream", lambda: close_early(kv, ids)
    yield "report", lambda: str(kv.report())
    yield "estimate", lambda: kv.estimate(1000, 2)
    yield "repr", lambda: repr(kv)
    yield "disabled", lambda: kv.generate(ids, use_cache=False, **given)
    yield "truncate", lambda: static.truncate(fed(static, model), 4)
    yield "trim", lambda: kv.trim(fed(kv, model), 5)
    yield "full", lambda: static.generate(ids, max_new_tokens=30, **GREEDY)
    yield "full stream", lambda: list(static.stream(ids, max_new_tokens=30, **GREEDY))
    yield "wrong rows", lambda: kv.generate(ids, past_key_values=kv.new_cache(5), **given)
    yield "wrong setting", lambda: kv.generate(ids, no_such_setting=1, **given)
    yield "wrong chunk size", lambda: kv.stream(ids, chunk_size=0)
    yield "wrong policy", lambda: KVCacheManager(model, [SlidingWindow(4)] * 99)
    yield "wrong trim", lambda: kv.trim(fed(kv, model), 0)
    yield "wrong positions", lambda: KVCacheManager(model, policy, positions="rerotated").generate(ids, **given)
    yield "wrong eviction", lambda: KVCacheManager(model, SlidingWindow(4)).generate(ids, **given)
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        yield "padded", lambda: kv.generate(ids, attention_mask=mask, **given)
        yield "chunked", lambda: kv.generate(ids, prefill_chunk_size=7, **given)


def close_early(kv: KVCacheManager, ids: Tensor) -> None:
    stream = kv.stream(ids, chunk_size=2, max_new_tokens=60, **GREEDY)
    next(stream)
    stream.close()


def fed(kv: KVCacheManager, model: Any) -> Any:
    held = kv.new_cache(2)
    with hf.exact_windows(model):
        logits(model, token_ids(2, 12), held)
    return held


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "cohere", "whisper-decoder", "bart", "t5", "bloom"])
def test_no_operation_changes_the_model(name: str) -> None:
    model = build(name)
    model.generate(token_ids(), max_new_tokens=2, **GREEDY)  # transformers itself settles a few things at its first run
    before, failed = portrait(model), []
    for operation, run in everything(model, FAMILIES[name].evicts, FAMILIES[name].padded):
        try:
            run()
        except (KVCacheError, ValueError):
            failed.append(operation)
        after = portrait(model)
        for part, value in before.items():
            assert after[part] == value, f"{operation} changed the model's {part}"
    assert {"full", "full stream", "wrong rows", "wrong setting", "wrong policy"} <= set(failed)
    assert not {"generate", "sampled", "beams", "stream", "closed stream", "disabled"} & set(failed)
    assert ("truncate" in failed) == FAMILIES[name].hybrid  # past the model's own window
    assert ("wrong positions" in failed) != FAMILIES[name].rope


@pytest.mark.parametrize("policy", [SnapKV(8, sinks=2, window_size=2), AdaKV(H2O(8, sinks=2, window_size=2))])
def test_ranking_tokens_changes_the_model_as_little(policy: SizePolicy) -> None:
    """It runs a copy with hooks of its own."""
    model = build("llama")
    model.generate(token_ids(), max_new_tokens=2, **GREEDY)
    before = portrait(model)
    kv = KVCacheManager(model, policy)
    kv.generate(token_ids(), max_new_tokens=6, **GREEDY)
    list(kv.stream(token_ids(), max_new_tokens=6, **GREEDY))
    assert portrait(model) == before
    assert no_hooks(model)


def test_a_disabled_cache_is_not_there_at_all() -> None:
    model, seen = build("llama"), []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append((get_cache(kwargs), kwargs["input_ids"].shape[1])),
        with_kwargs=True,
    )
    kv = KVCacheManager(model, SlidingWindow(8))
    kv.enabled = False
    seen.clear()  # of the trial that the constructor makes
    kv.generate(token_ids(), max_new_tokens=3, **GREEDY)
    assert seen == [(None, 20), (None, 21), (None, 22)]
    kv.enabled = True
    seen.clear()
    kv.generate(token_ids(), max_new_tokens=3, **GREEDY)
    assert [tokens for _, tokens in seen] == [20, 1, 1]
    assert all(held is seen[0][0] and hf.kv_layers(held)[0].seen == 22 for held, _ in seen)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_config_is_given_as_it_was_given(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, warned = build("llama"), []
    monkeypatch.setattr("transformers.generation.utils.logger.warning_once", warned.append)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    manager = KVCacheManager(model)
    manager.enabled = enabled
    out = manager.generate(token_ids(), generation_config=config)
    assert (manager.report().seen > 0) == enabled
    assert torch.equal(out, model.generate(token_ids(), generation_config=config))
    assert config.use_cache is False and warned == []


def test_importing_kvcache_changes_no_other_library() -> None:
    """In a process of its own: transformers and torch before the import and after."""
    check = """
import logging, sys, threading, warnings
import torch, transformers, transformers.cache_utils, transformers.masking_utils, transformers.modeling_utils
from transformers.generation.streamers import BaseStreamer
import transformers.generation.utils
def portrait():
    return {
        "cache": dict(vars(transformers.cache_utils)),
        "cache classes": {n: dict(vars(c)) for n, c in vars(transformers.cache_utils).items() if isinstance(c, type)},
        "masks": dict(vars(transformers.masking_utils)),
        "attention": sorted(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.keys()),
        "mask functions": sorted(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.keys()),
        "generate": dict(vars(transformers.generation.utils.GenerationMixin)),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()),
        "module": dict(vars(torch.nn.Module)),
        "warnings": list(warnings.filters),
        "logging": [(logging.root.level, list(logging.root.handlers)), logging.getLogger("transformers").level],
        "threads": threading.active_count(),
    }
before = portrait()
import kvcache
after = portrait()
for part, value in before.items():
    if part == "cache classes":  # the registry of subclasses is Python's and abc's own
        value = {n: {k: v for k, v in c.items() if not k.startswith("_abc")} for n, c in value.items()}
        after[part] = {n: {k: v for k, v in c.items() if not k.startswith("_abc")} for n, c in after[part].items()}
    assert after[part] == value, part
assert "chatterbox" not in sys.modules
"""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------------- nothing is left behind


@cache
def smallest() -> Any:
    """Two layers, as little as a Llama can be."""
    return build(
        "llama", hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=97,
        max_position_embeddings=32768,
    )  # fmt: skip


def left_behind(model: nn.Module) -> dict[str, Any]:
    gc.collect()
    return {
        "tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "hooks": sum(
            len(getattr(module, name))
            for module in model.modules()
            for name in _HOOKS
            if hasattr(getattr(module, name), "__len__")
        ),
        "managed layers": sum(type(thing) in (KVLayer, hf.ManagedLayer) for thing in gc.get_objects()),
    }


@pytest.mark.search
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_300_requests_leave_nothing_behind() -> None:
    model = smallest()
    managers = [
        KVCacheManager(model),
        KVCacheManager(model, max_cache_length=64, static=True),
        KVCacheManager(model, SlidingWindow(6, sinks=2)),
        KVCacheManager(model, MaxBytes("8KB")),
        KVCacheManager(model, SlidingWindow(6, sinks=2), positions="rerotated"),
    ]

    async def consume(kv: KVCacheManager, ids: Tensor, all_of_it: bool) -> None:
        stream = kv.astream(ids, chunk_size=2, max_new_tokens=5, **GREEDY)
        async for _ in stream:
            if not all_of_it:
                break
        await stream.aclose()  # type: ignore[attr-defined]

    def request(i: int) -> None:
        kv, ids = managers[i % len(managers)], token_ids(1 + i % 2, 10, seed=i)
        kind = i % 7
        if kind == 0:
            kv.generate(ids, max_new_tokens=4, **GREEDY)
        elif kind == 1:
            list(kv.stream(ids, chunk_size=3, max_new_tokens=4, **GREEDY))
        elif kind == 2:
            stream = kv.stream(ids, chunk_size=1, max_new_tokens=20, **GREEDY)
            next(stream)
            stream.close()
        elif kind == 3:
            kv.generate(ids, max_new_tokens=3, num_beams=2, **GREEDY)
        elif kind == 4:
            asyncio.run(consume(kv, ids, i % 2 == 0))
        elif kind == 5:
            with pytest.raises(GeometryError):
                kv.generate(ids, past_key_values=kv.new_cache(9), max_new_tokens=3, **GREEDY)
        else:
            with pytest.raises(CapacityError):
                list(managers[1].stream(ids, max_new_tokens=58, **GREEDY))

    for i in range(35):  # each kind with each manager: caches of modules and of angles are filled once
        request(i)
    before = left_behind(model)
    for i in range(examples(300)):
        request(i)
    assert left_behind(model) == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("positions", ["absolute", "rerotated"])
def test_20_000_tokens_through_a_window_of_1_024(positions: Any) -> None:
    model, tokens = smallest(), 20_000
    base, ids = model.model, token_ids(1, tokens)
    kv = KVCacheManager(model, SlidingWindow(1020, sinks=4), positions=positions)
    held, sizes, memory = kv.new_cache(1), set(), []
    singles = range(10_000, 12_500)  # in the middle and at the end one by one, the rest in hundreds
    start = 0
    with torch.no_grad(), hf.exact_windows(model):
        while start < tokens:
            end = start + (1 if start in singles or start >= tokens - 500 else 100)
            base(input_ids=ids[:, start:end], past_key_values=held, use_cache=True)
            start = end
            if start >= 1100:
                sizes.add(kv.report(held).nbytes)
            if start % 2500 == 0:
                memory.append(resident_bytes() or 0)
    assert held.get_seq_length() == tokens
    assert sizes == {kv.estimate(tokens)} == {bytes_found(held)} == {kv.estimate(1024)}
    assert [layer.stored for layer in hf.kv_layers(held)] == [1024, 1024]
    assert kv.report(held).evicted == 2 * (tokens - 1024)
    # A cache that kept everything would have grown by 1.6 MB a layer and 2,500 tokens: noise, so it is `sizes` that
    # tells; this is for whatever else might grow with the tokens.
    assert max(memory) - memory[0] < 30 * 2**20
    kept = [0, 1, 2, 3, *range(tokens - 1020, tokens)]
    first, second = hf.kv_layers(held)
    assert sorted(first.positions()[0].tolist()) == sorted(second.positions()[0].tolist()) == kept
    # The first layer's keys depend on token and position alone, so they can be made again.
    places = torch.tensor([kept]) if positions == "absolute" else torch.arange(tokens - 1024, tokens)[None]
    theirs = recomputed_keys(model, ids[:, kept], places)
    ours = first.keys[:, :, first.positions()[0].argsort()]  # type: ignore[index]
    # Of an angle of 20,000 radians fp32 holds about three decimals: what a turn from raw keys and the model's own
    # rotation may differ by.
    assert (ours - theirs).abs().max() < (1e-5 if positions == "absolute" else 5e-3) * theirs.abs().max()
    if positions == "absolute":  # a re-rotated chunk sees its sinks where its first token does
        fork, more = copy.deepcopy(held), token_ids(1, 30, seed=1)
        with hf.exact_windows(model):
            one_by_one, at_once = logits(model, more, held, (1,) * 30), logits(model, more, fork)
        assert (one_by_one - at_once).abs().max() < 2e-5  # fp32, summed in another order


def recomputed_keys(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """The keys of a first layer, which depend on token and position alone."""
    held = dynamic_cache(model)
    with torch.no_grad():
        model.model(input_ids=ids, position_ids=positions, past_key_values=held, use_cache=True)
    keys: Tensor = held.layers[0].keys
    return keys


@pytest.mark.parametrize("policy", [SlidingWindow(1020, sinks=4), MaxTokens(1024)], ids=["ring", "hysteresis"])
def test_20_000_single_tokens_through_a_layer(policy: Any) -> None:
    """Each value is its position, so what is held can be read off."""
    layer, sizes, addresses = KVLayer(policy), set(), set()
    key = torch.zeros(1, 1, 1, 2)
    for token in range(20_000):
        keys, values = layer.append(key, key + token).states
        if token >= 1024:
            sizes.add(layer.nbytes)
            addresses.add((keys.data_ptr(), values.data_ptr()))
    assert sizes == {1024 * 2 * 2 * 4}
    assert len(addresses) == 1 or isinstance(policy, MaxTokens)
    assert layer.values is not None
    held = sorted(layer.values[0, 0, :, 0].int().tolist())
    window_size = layer.stored - policy.pinned
    assert held == [*range(policy.pinned), *range(20_000 - window_size, 20_000)]
    assert torch.equal(layer.values[0, 0, :, 0].long(), layer.positions()[0])
