"""Estimates against the bytes of the storages that caches really hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.inside import testing as inside
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kvcache import (
    CacheGeometry,
    CacheReport,
    CacheSpec,
    KeepAll,
    KVLayer,
    LayerReport,
    MaxBytes,
    MaxTokens,
    Pinned,
    SlidingWindow,
)
from kvcache.cache import account, slots_for
from kvcache.models import cache_layers, geometry_of, new_cache

pytestmark = pytest.mark.one_release

TINY = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def held_bytes(tensors) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize(
    ("tokens", "bound", "slots"),
    [
        (0, None, 0), (1, None, 128), (128, None, 128), (129, None, 192), (192, None, 192), (193, None, 288),
        (1000, None, 1458), (1, 50, 50), (128, 150, 128), (129, 150, 150), (150, 150, 150), (0, 150, 0),
    ],
)  # fmt: skip
def test_ladder(tokens, bound, slots):
    assert slots_for(tokens, bound) == slots


def test_preallocated_is_all_of_the_bound_at_once():
    assert slots_for(0, 150, static=True) == slots_for(150, 150, static=True) == 150
    assert slots_for(129, None, static=True) == 192


def test_estimate_by_hand():
    # 30 layers of 16 heads of 64 in half precision take 30 * 16 * (64 + 64) * 2 bytes a token.
    geometry = CacheGeometry(30, 16, 64, 64, torch.float16)
    assert geometry.token_bytes == 122_880
    assert CacheSpec().nbytes(geometry, 1000) == 1458 * 122_880
    assert CacheSpec(max_length=1200).nbytes(geometry, 1000, rows=2) == 2 * 1200 * 122_880
    assert CacheSpec(SlidingWindow(1020, sinks=4)).nbytes(geometry, 5000) == 1024 * 122_880
    assert CacheSpec(MaxBytes(1024 * 122_880)).nbytes(geometry, 5000) == 1024 * 122_880
    assert CacheSpec(max_length=500, static=True).nbytes(geometry, 10) == 500 * 122_880
    # Re-rotation keeps the keys of the four sinks a second time.
    rerotated = CacheSpec(SlidingWindow(1020, sinks=4), positions="rerotated").nbytes(geometry, 5000)
    assert rerotated == 1024 * 122_880 + 4 * 122_880 // 2


@pytest.mark.parametrize("chunk", [1, 37, 1000])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 200, 201, 500])
@pytest.mark.parametrize(
    "policy", [KeepAll(), SlidingWindow(140, sinks=3), MaxTokens(200, 130), Pinned(150, MaxTokens(50, 10))], ids=repr
)
def test_estimate_is_what_is_held_however_the_tokens_came(policy, tokens, chunk):
    layer, geometry = KVLayer(policy), CacheGeometry(1, 1, 4, 2)
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        layer.append(torch.zeros(3, 1, count, 4), torch.zeros(3, 1, count, 2))
    held = held_bytes([layer.keys, layer.values])
    assert CacheSpec(policy).nbytes(geometry, tokens, rows=3) == layer.nbytes == held


def test_layers_may_have_policies_of_their_own():
    policies = (KeepAll(), SlidingWindow(20, sinks=2), MaxTokens(150))
    geometry = CacheGeometry(3, 1, 4, 2)
    layers = [KVLayer(policy) for policy in policies]
    for layer in layers:
        layer.append(torch.zeros(1, 1, 300, 4), torch.zeros(1, 1, 300, 2))
    held = sum(held_bytes([layer.keys, layer.values]) for layer in layers)
    assert CacheSpec(policies).nbytes(geometry, 300) == held


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("positions", ["absolute", "rerotated"])
@pytest.mark.parametrize(
    "policy", [None, SlidingWindow(9, sinks=2), MaxBytes(20_000), Pinned(4, MaxBytes(20_000))], ids=repr
)
def test_estimate_for_a_model_is_what_its_cache_holds(policy, positions, rows):
    model = LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2)).eval()
    spec = CacheSpec(policy or KeepAll(), 60, positions, static=True)
    cache = new_cache(model, spec, rows=rows)
    with torch.no_grad():
        for tokens in torch.arange(24).repeat(2, 1).split([7, *[1] * 17], 1):
            model(tokens, past_key_values=cache)
    layers = [layer.kv for layer in cache_layers(cache)]
    held = sum(inside.held_bytes(kv) for kv in layers)
    geometry = geometry_of(model)
    assert account(cache_layers(cache)).nbytes == held
    assert spec.nbytes(geometry, 24, rows=2) == held
    if "MaxBytes" in repr(policy):
        assert held <= 20_000


def test_account_counts_the_storages_of_a_models_own_layers():
    model = MistralForCausalLM(MistralConfig(**TINY, num_key_value_heads=2, sliding_window=8)).eval()
    cache = new_cache(model)
    with torch.no_grad():
        model(torch.arange(20)[None], past_key_values=cache)
        model(torch.arange(1)[None], past_key_values=cache)
    report = account(cache_layers(cache))
    assert report.nbytes == sum(held_bytes([layer.keys, layer.values]) for layer in cache.layers)
    assert report.seen == 21
    assert report.stored < 21
    assert "the model's own" in str(report)


def test_report_adds_up_and_joins_equal_neighbours():
    full = LayerReport("KeepAll()", seen=30, stored=30, evicted=0, capacity=128, nbytes=2**20)
    window = LayerReport("SlidingWindow(window=8, sinks=0)", seen=30, stored=8, evicted=22, capacity=8, nbytes=2**19)
    report = CacheReport((full, full, window))
    assert (report.nbytes, report.seen, report.stored, report.evicted) == (5 * 2**19, 30, 30, 22)
    first, _, *lines = str(report).splitlines()
    assert first == "30 tokens seen, 30 kept, 2.5 MiB in 3 layers"
    assert [line.split() for line in lines] == [
        ["0-1", "30", "30", "0", "128", "2.0", "KeepAll()"],
        ["2", "30", "8", "22", "8", "0.5", "SlidingWindow(window=8,", "sinks=0)"],
    ]
    assert str(CacheReport((), enabled=False)) == "KV cache disabled: every token is recomputed"
    assert CacheReport(()).seen == CacheReport(()).nbytes == 0


def test_workers_that_are_let_go_end_and_come_again():
    """In a process of its own, as what else has run in this one decides how many there are."""
    script = """
import os, torch
from kvcache.memory import release_threads
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
work = lambda: (torch.ones(2000, 2000) * 2).sum()
assert float(work()) == 8e6
with_workers, ended = count(), release_threads()
without = count()
assert float(work()) == 8e6
print(ended, with_workers - without, count() - without)
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("the system does not tell its threads")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ended, gone, back = run.stdout.split()
    assert (ended, gone, back) in (("True", "1", "1"), ("False", "0", "0"))
    if "libgomp" in Path("/proc/self/maps").read_text():
        assert ended == "True"


def test_a_forked_process_lets_go_of_nothing_and_does_not_wait_for_its_parents_workers():
    if not hasattr(os, "fork"):
        pytest.skip("no process is forked here")
    script = """
import os, signal, torch
from kvcache.memory import release_threads
torch.set_num_threads(2)
(torch.ones(2000, 2000) * 2).sum()
if (child := os.fork()) == 0:
    signal.alarm(20)
    os._exit(int(release_threads()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "0\n"
