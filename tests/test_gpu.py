"""On a GPU: real captures, no look at the host during replays, no memory taken while decoding."""

import importlib.util
import sys

import pytest
import torch
from support.families import build, token_ids
from support.inside.decoding import KERNEL_REASON

from kvcache import KVCacheManager, MaxTokens, SlidingWindow
from kvcache.decoding import Decoding

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*TRITON_DEFAULT_FP_FUSION.*"),  # triton's own, at its first compilation
]
# Imported whole, it would want its audio stack; and once its parts are loaded alone, it has no spec.
CHATTERBOX = "chatterbox" in sys.modules or importlib.util.find_spec("chatterbox") is not None
BACKENDS = ["eager", "graph", "compile", "graph+compile"]


def on_gpu(name, policy=None, dtype=torch.float32, **given):
    return KVCacheManager(build(name).to("cuda", dtype), policy, **given)


def said(manager, ids, backend, seed=0, **given):
    torch.manual_seed(seed)
    return torch.cat(list(manager.stream(ids.cuda(), backend=backend, **given)), 1)


@pytest.mark.parametrize("policy", [None, SlidingWindow(40, sinks=4), MaxTokens(60, 30)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_backend_says_what_generate_says(name, policy):
    manager = on_gpu(name, policy)
    for drawing in ({"do_sample": False}, {"do_sample": True, "top_p": 0.9}):
        expected = said(manager, token_ids(2, 9), "off", max_new_tokens=200, **drawing)
        for backend in BACKENDS:
            ours = said(manager, token_ids(2, 9), backend, max_new_tokens=200, **drawing)
            assert manager.report().fallback is None
            assert torch.equal(ours, expected), backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_graphs_equal_eager(dtype):
    manager = on_gpu("llama", dtype=dtype)
    expected = said(manager, token_ids(2, 9), "eager", max_new_tokens=200, do_sample=False)
    assert torch.equal(said(manager, token_ids(2, 9), "graph", max_new_tokens=200, do_sample=False), expected)


@pytest.mark.parametrize("backend", ["graph", "graph+compile"])
def test_replays_wait_for_nothing_and_take_no_memory(backend, monkeypatch):
    manager = on_gpu("llama", max_cache_length=512)
    list(manager.stream(token_ids(2, 9).cuda(), backend=backend, max_new_tokens=80, do_sample=True))  # records
    chunk, held = Decoding.chunk, []

    def watched(self, steps):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = chunk(self, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        held.append(torch.cuda.memory_allocated() - before)
        return out

    monkeypatch.setattr(Decoding, "chunk", watched)
    list(manager.stream(token_ids(2, 9).cuda(), backend=backend, max_new_tokens=300, do_sample=True, chunk_size=32))
    assert len(held) >= 9
    assert max(held) <= 2 * 32 * 8 + 512  # the tokens that are handed out


def test_without_the_kernel_it_is_the_same():
    manager = on_gpu("llama")
    expected = said(manager, token_ids(2, 9), "graph", max_new_tokens=300, do_sample=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNEL_REASON, lambda device: "not wanted")
        plain = on_gpu("llama")
        assert torch.equal(said(plain, token_ids(2, 9), "graph", max_new_tokens=300, do_sample=False), expected)


@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_chatterbox_speaks_the_same_on_every_backend(kind):
    if not CHATTERBOX:
        pytest.skip("chatterbox-tts is not installed")
    from support.t3_models import tiny_t3

    from kvcache_chatterbox import ChatterboxEngine, byte_tokens, random_conditionals

    t3 = tiny_t3(kind).cuda()
    text, cond = byte_tokens(t3, "The quick brown fox."), random_conditionals(t3)
    spoken = {}
    for backend in ("off", *BACKENDS):
        engine = ChatterboxEngine(t3, backend=backend)
        chunks = engine.inference_stream(t3_cond=cond, text_tokens=text, max_new_tokens=300, seed=1)
        spoken[backend] = torch.cat(list(chunks), 1)
        assert engine.report().fallback is None
        assert torch.equal(spoken[backend], spoken["off"]), backend
