"""Devices that are neither a CPU nor a CUDA GPU: an "mps" that is not there, see `support.fake_device`."""

import pytest
import torch
from support.fake_device import Away, an_mps_device, moved
from support.families import build, tiny, token_ids
from support.inside.decoding import check_backend, default_generator

from kvcache import (
    H2O,
    AdaKV,
    InputError,
    KVCacheManager,
    KVQuantization,
    MemoryStore,
    SlidingWindow,
    SnapKV,
    SpeakerCache,
)
from kvcache.cache import KeyRotation
from kvcache.decoding import RECORDERS, backend_for, backend_on, kernel_reason
from kvcache.models import looks_on
from kvcache.testing import traced_graphs

XPU = torch.device("xpu", 0)
GREEDY = {"max_new_tokens": 12, "do_sample": False}
DRAWN = {
    "max_new_tokens": 12,
    "do_sample": True,
    "temperature": 1.2,
    "top_k": 30,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
}


@pytest.fixture
def mps():
    with an_mps_device() as device:
        yield device


@pytest.fixture
def model(mps):
    return moved(build("llama"))


def memory():
    return SpeakerCache(MemoryStore())


def run(manager, ids, how, **settings):
    torch.manual_seed(3)
    if how == "generate":
        return manager.generate(ids, **settings)[:, ids.shape[1] :].cpu()
    return torch.cat([chunk.cpu() for chunk in manager.stream(ids, backend=how, chunk_size=5, **settings)], 1)


def test_the_double_is_as_strict_as_the_device(mps):
    away = torch.ones(3).to(mps)
    assert away.device == mps == torch.zeros(2, device="mps").device and isinstance(away + 1, Away)
    assert (away + torch.tensor(1)).cpu().tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="same device"):
        away + torch.ones(3)
    with pytest.raises(TypeError, match="float64"):
        away.double()
    with pytest.raises(TypeError, match="numpy"):
        away.numpy()


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("how", ["generate", "off", "eager", "auto"])
@pytest.mark.parametrize("policy", [None, SlidingWindow(16, sinks=2)], ids=str)
def test_the_same_tokens_as_on_a_cpu(model, mps, how, settings, policy):
    expected = run(KVCacheManager(tiny("llama"), policy, prefix_cache=memory()), token_ids(), how, **settings)
    manager = KVCacheManager(model, policy, prefix_cache=memory())
    assert torch.equal(run(manager, token_ids().to(mps), how, **settings), expected)
    report = manager.report()
    assert report.fallback is None
    assert report.backend == ("eager" if how in ("eager", "auto") else None)


@pytest.mark.parametrize("how", ["generate", "off", "eager"])
def test_an_end_token_ends_a_text_where_it_stands(model, mps, how):
    """There `generate` looks a step behind, and takes one token too many back from the cache: a limit has to hold that one."""
    expected = run(KVCacheManager(tiny("llama"), prefix_cache=memory()), token_ids(1), how, **GREEDY)
    end = int(expected[0, 5])
    manager = KVCacheManager(model, prefix_cache=memory())
    said = run(manager, token_ids(1).to(mps), how, eos_token_id=end, **GREEDY)
    stop = expected[0].tolist().index(end) + 1
    assert torch.equal(said, expected[:, :stop])
    if how != "eager":
        assert manager.report().seen == 20 + stop - 1


@pytest.mark.parametrize("how", ["generate", "eager"])
def test_prefixes_live_there(model, mps, how):
    prefix = token_ids(1, 9, seed=4)
    here, there = KVCacheManager(tiny("llama"), prefix_cache=memory()), KVCacheManager(model, prefix_cache=memory())
    for manager, ids in ((here, prefix), (there, prefix.to(mps))):
        manager.add_prefix("before", ids)
    expected = run(here, token_ids(), how, prefix="before", **GREEDY)
    assert torch.equal(run(there, token_ids().to(mps), how, prefix="before", **GREEDY), expected)
    cache = there.new_cache(2, prefix="before")
    assert cache.layers[0].keys.device == mps


KINDS = {
    "re-rotated": {"policy": SlidingWindow(16, sinks=2), "positions": "rerotated"},
    "few bits": {"storage": KVQuantization(8)},
    "ranked": {"policy": H2O(16, window_size=8)},
    "by head": {"policy": AdaKV(SnapKV(16, window_size=6))},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_caches_live_there(model, mps, kind):
    expected = run(
        KVCacheManager(tiny("llama"), prefix_cache=memory(), **KINDS[kind]), token_ids(), "generate", **GREEDY
    )
    manager = KVCacheManager(model, prefix_cache=memory(), **KINDS[kind])
    assert torch.equal(run(manager, token_ids().to(mps), "generate", **GREEDY), expected)


def test_a_cache_is_saved_there_and_goes_on(model, mps):
    manager = KVCacheManager(model, prefix_cache=memory())
    cache = manager.new_cache()
    first = manager.generate(token_ids(1).to(mps), past_key_values=cache, **GREEDY)
    loaded = manager.load(manager.save(cache))
    more = torch.cat([first, token_ids(1, 3, seed=2).to(mps)], 1)
    assert torch.equal(
        manager.generate(more, past_key_values=loaded, **GREEDY).cpu(),
        manager.generate(more, past_key_values=cache, **GREEDY).cpu(),
    )
    assert loaded.layers[0].keys.device == mps


@pytest.mark.parametrize("name", ["graph", "graph+compile"])
def test_graphs_are_refused_with_the_reason_before_anything_runs(model, mps, name):
    why = f"backend='{name.replace('+', '.')}' records steps in a CUDA graph, and the model is on 'mps'"
    with pytest.raises(InputError, match=why):
        KVCacheManager(model, prefix_cache=memory(), backend=name)
    model.model.register_forward_pre_hook(looks_on(lambda *given: pytest.fail("nothing runs")))
    manager = KVCacheManager(model, prefix_cache=memory())
    with pytest.raises(InputError, match=why):
        manager.stream(token_ids().to(mps), backend=name, **GREEDY)
    with pytest.raises(InputError, match=why):
        backend_for(name, mps)


@pytest.mark.parametrize("name", ["graph", "graph+compile"])
def test_a_cpu_has_no_graphs_unless_they_are_traced(monkeypatch, name):
    model = build("llama")
    assert torch.equal(
        run(KVCacheManager(model), token_ids(), "graph", **GREEDY),
        run(KVCacheManager(model), token_ids(), "generate", **GREEDY),
    )
    monkeypatch.delitem(RECORDERS, "cpu")
    before = dict(RECORDERS)
    with pytest.raises(
        InputError, match="records steps in a CUDA graph, and the model is on 'cpu', which has none; use 'eager'"
    ):
        KVCacheManager(model, backend=name)
    with traced_graphs():
        assert backend_for("graph", torch.device("cpu")).name == "graph"
    assert before == RECORDERS


def test_what_each_device_decodes_with():
    cpu, cuda, mps = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
    assert [backend_on("auto", device) for device in (cpu, cuda, mps, XPU)] == ["eager", "graph", "eager", "eager"]
    assert [backend_on("off", device) for device in (cpu, cuda, mps, XPU)] == ["off"] * 4
    for device in (mps, XPU):
        assert [backend_on(name, device) for name in ("eager", "compile")] == ["eager", "compile"]
        assert kernel_reason(device) == "it is for CUDA GPUs"
        with pytest.raises(InputError, match="'auto', which is eager there"):
            check_backend("graph", device)
    assert backend_for("graph", cuda).name == "graph"


def test_draws_come_from_the_devices_own_generator(mps, monkeypatch):
    assert default_generator(mps) is torch.mps._get_default_mps_generator()
    first, second = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.xpu, "init", lambda: None)
    monkeypatch.setattr(torch.xpu, "current_device", lambda: 1)
    monkeypatch.setattr(torch.xpu, "default_generators", (first, second), raising=False)
    assert default_generator(XPU) is first and default_generator(torch.device("xpu")) is second
    assert default_generator(torch.device("cpu")) is torch.default_generator


def test_angles_are_reckoned_in_double_where_there_is_a_double(mps):
    frequencies, keys = torch.rand(8), torch.rand(1, 2, 3, 16)
    here, there = KeyRotation(frequencies), KeyRotation(frequencies.to(mps))
    assert torch.equal(there(keys.to(mps), 100_000).cpu(), here(keys, 100_000))
    distance = torch.arange(3)
    assert torch.equal(there.ahead(keys.to(mps), distance.to(mps), 4).cpu(), here.ahead(keys, distance, 4))
