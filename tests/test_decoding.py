"""The decode engine: its back ends against `generate`, whether a step can be captured, settings that change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import CPU, DRAWING, DRAWS, GREEDY, begin, decoding_of, generated, guided_decoding, say
from support.families import FAMILIES, RELEASE, ROPE_BY_LENGTH, VOCABULARY, build, tiny, token_ids
from support.inside import decoding as inside
from support.searching import search
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from kvcache import GeometryError, KeepAll, KVCacheManager, MaxTokens, SlidingWindow
from kvcache.decoding import (
    Decoding,
    Drawing,
    Pool,
    Sampler,
    Sampling,
    StaticKV,
    decoder_copy,
    unsupported_reason,
)
from kvcache.models import geometry_of, kv_layers
from kvcache.testing import traced

# ---------------------------------------------------------------------- backends against generate


@pytest.mark.grid(4)
@pytest.mark.parametrize("backend", ["eager", "graph", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gpt2"])
def test_tokens_are_those_of_generate(name, backend):
    model = tiny(name)
    manager = KVCacheManager(model)
    ids = token_ids(2, 9)
    decoding = decoding_of(model, 2, 128, backend)
    for sampling, drawing in ((GREEDY, {}), (DRAWING, DRAWS)):
        expected = generated(manager, ids, 120, seed=3, **drawing)
        assert torch.equal(say(decoding, manager, ids, sampling, 120, seed=3), expected)
        assert torch.equal(decoding.token, expected[:, -1])
    assert decoding.fallback is None
    assert decoding.backend == ("compile" if backend == "aot_eager" else backend)
    report = decoding.report()
    assert (report.backend, report.fallback, report.layers[0].seen) == (decoding.backend, None, 128)


WINDOWS = [(SlidingWindow(12, sinks=3), 9), (SlidingWindow(7, sinks=1), 20), (MaxTokens(24, 15), 9)]


@pytest.mark.grid(4)
@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize(("policy", "prompt"), WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_windows_say_what_the_manager_says(name, policy, prompt, backend):
    model = tiny(name)
    manager = KVCacheManager(model, policy)
    ids = token_ids(1, prompt)
    decoding = decoding_of(model, 1, policy.limit, backend)
    for sampling, drawing in ((GREEDY, {}), (DRAWING, DRAWS)):
        expected = generated(manager, ids, 120, seed=1, **drawing)
        assert torch.equal(say(decoding, manager, ids, sampling, 120, seed=1), expected)
    assert decoding.report().layers[0].stored == manager.report().layers[0].stored


@pytest.mark.slow
def test_a_compiled_window_says_what_the_manager_says():
    model, policy = tiny("llama"), SlidingWindow(12, sinks=3)
    manager = KVCacheManager(model, policy)
    decoding = decoding_of(model, 1, 15, "aot_eager")
    expected = generated(manager, token_ids(1, 9), 60)
    assert torch.equal(say(decoding, manager, token_ids(1, 9), GREEDY, 60), expected)
    assert decoding.fallback is None


@pytest.mark.one_release
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, at the compiler's import
def test_inductors_tokens_are_those_of_generate():
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model)
    expected = generated(manager, token_ids(1, 9), 40)
    decoding = decoding_of(model, 1, 64, "compile")
    assert torch.equal(say(decoding, manager, token_ids(1, 9), GREEDY, 40), expected)
    assert (decoding.backend, decoding.fallback) == ("compile", None)


def test_rows_of_different_lengths_and_generators_say_what_each_says_alone():
    model = tiny("llama")
    manager = KVCacheManager(model)
    texts = [token_ids(1, n, seed=n) for n in (3, 11, 7)]
    alone = []
    for i, ids in enumerate(texts):
        one = decoding_of(model, 1, 80)
        start = begin(one, manager, ids, [DRAWING, GREEDY, DRAWING][i], [torch.Generator().manual_seed(i)])
        alone.append(torch.cat([start, one.chunk(40)], 1))
    together = decoding_of(model, 3, 80, "graph")
    starts = [
        begin(together, manager, ids, [DRAWING, GREEDY, DRAWING][i], [torch.Generator().manual_seed(i)], first=i)
        for i, ids in enumerate(texts)
    ]
    said = torch.cat([torch.cat(starts), together.chunk(40)], 1)
    assert torch.equal(said, torch.cat(alone))


def test_a_bf16_cache_of_an_fp32_model_is_close():
    model = tiny("llama")
    manager = KVCacheManager(model)
    wide, narrow = (decoding_of(model, 1, 64, dtype=dtype) for dtype in (None, torch.bfloat16))
    seen = []
    for decoding in (wide, narrow):
        begin(decoding, manager, token_ids(1, 20), GREEDY)
        decoding.kv.settle()
        given = inside.inputs_of_step(decoding, 21)
        with torch.no_grad():
            seen.append(inside.forward_of(decoding)(torch.tensor([5]), decoding.made, given))
    assert narrow.kv.nbytes * 2 == wide.kv.nbytes
    # Keys and values rounded to 8 bits: the logits, of some units, move by some hundredths.
    torch.testing.assert_close(seen[1], seen[0], atol=0.02 * float(seen[0].abs().max()), rtol=0)


# ---------------------------------------------------------------------- whether a step can be captured


@pytest.mark.parametrize("policy", [KeepAll(), SlidingWindow(10, sinks=3), MaxTokens(20, 9)], ids=str)
def test_one_recorded_step_replayed_is_the_eager_one(policy):
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model, policy)
    slots = policy.limit or 220
    recorded = decoding_of(model, 1, slots, "graph")
    expected = say(decoding_of(model, 1, slots), manager, token_ids(1, 9), DRAWING, 202, seed=5)
    assert torch.equal(say(recorded, manager, token_ids(1, 9), DRAWING, 202, seed=5), expected)
    assert len(inside.recorded(inside.backend_of(recorded))) == 1
    assert recorded.fallback is None


@pytest.mark.parametrize("whole", [True, False])
def test_the_compiler_makes_one_graph_for_all_lengths(whole):
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model)
    rows = 1 if whole else 2
    decoding = decoding_of(model, rows, 128)
    counter = CompileCounterWithBackend("eager")
    inside.run_by(decoding, inside.Compiled(CPU, compiler=counter))
    for row in range(rows):  # rows of different lengths need a mask
        begin(decoding, manager, token_ids(1, 5 + row), DRAWING, first=row)
    assert decoding.kv.reach()[1] == whole
    for _ in range(4):
        decoding.chunk(25)
    assert decoding.fallback is None
    assert counter.frame_count == 1


def fake_decoding(model, plant):
    kv = StaticKV(geometry_of(model), 2, 16)
    decoder = decoder_copy(model)

    def forward(tokens, made, given):
        if plant and int(made[0]) > 3:  # a look at the host
            tokens = tokens + 1
        return decoder(input_ids=tokens[:, None], **given).logits[:, -1]

    sampler = Sampler(2, VOCABULARY, inside.TRANSFORMERS, CPU)
    for request in range(2):
        sampler.set(request, DRAWING)
    return Decoding(forward, kv, sampler)


@pytest.mark.parametrize("plant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_asks_the_host_nothing(name, plant, monkeypatch):
    # The system's own pages cannot be faked.
    monkeypatch.setattr(inside.ZEROS, lambda shape, dtype, device: torch.zeros(shape, dtype=dtype))
    family = FAMILIES[name]
    with FakeTensorMode(), torch.no_grad():
        model = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[name](family.config(**family.settings)).eval()
        decoding = fake_decoding(model, plant)
        drawing = Drawing(64, True, True)
        for whole, wanted in ((True, drawing), (False, drawing), (False, None)):
            if plant:
                with pytest.raises(DataDependentOutputException):
                    decoding.step(decoding.order[:7], whole, wanted)
            else:
                decoding.step(decoding.order[:7], whole, wanted)


# ---------------------------------------------------------------------- settings that change


@st.composite
def requests_of(draw):
    """Requests: how many at once, slots, prompt, and settings for each chunk."""
    one = st.builds(
        Sampling,
        temperature=st.sampled_from([0, 0.7, 1.1]),
        top_p=st.sampled_from([0.8, 1]),
        min_p=st.sampled_from([0, 0.05]),
        top_k=st.sampled_from([0, 12]),
        repetition_penalty=st.sampled_from([1, 1.4]),
        cfg_weight=st.sampled_from([0, 0.5, 1.5]),
    )
    request = st.tuples(
        st.integers(1, 2),
        st.sampled_from([24, 40, 60]),
        st.integers(1, 8),
        st.lists(st.tuples(one, st.integers(1, 5)), min_size=1, max_size=3),
        st.integers(0, 100),
    )
    return draw(st.lists(request, min_size=2, max_size=4))


def run_request(decoding, manager, prompt, chunks, seed, requests):
    ids = token_ids(2 * requests, prompt, seed=seed)
    cache = manager.new_cache(2 * requests)
    with torch.no_grad():
        logits = manager.model(ids, past_key_values=cache).logits[:, -1]
    decoding.load(0, kv_layers(cache))
    generators = [torch.Generator().manual_seed(seed + i) for i in range(requests)]
    said = [decoding.start(0, logits, [chunks[0][0]] * requests, generators, list(ids[::2]))[:, None]]
    for sampling, steps in chunks:
        for request in range(requests):
            decoding.sampler.set(request, sampling)
        said.append(decoding.chunk(steps))
    return torch.cat(said, 1)


@search(6)
@given(script=requests_of())
def test_whatever_changes_between_chunks_and_requests_the_graph_follows(script):
    model = MODELS["guided"]
    manager = KVCacheManager(model)
    pool = Pool()
    for requests, slots, prompt, chunks, seed in script:

        def make(slots, requests=requests):
            return guided_decoding(model, slots, requests, "graph")

        fresh = guided_decoding(model, slots, requests, "eager")
        expected = run_request(fresh, manager, prompt, chunks, seed, requests)
        with pool.lent(requests, slots, make) as decoding:
            assert torch.equal(run_request(decoding, manager, prompt, chunks, seed, requests), expected)
            assert decoding.fallback is None


MODELS = {"guided": build("llama", num_hidden_layers=1)}


def test_a_backend_that_gets_another_cache_records_anew():
    model = MODELS["guided"]
    manager = KVCacheManager(model)
    backend = inside.Graph(traced)
    for slots in (30, 50):
        decoding = decoding_of(model, 1, slots)
        inside.run_by(decoding, backend)
        expected = say(decoding_of(model, 1, slots), manager, token_ids(1, 5), GREEDY, 20)
        assert torch.equal(say(decoding, manager, token_ids(1, 5), GREEDY, 20), expected)
        assert inside.owner_of(backend) is decoding and len(inside.recorded(backend)) == 1


def test_longer_caches_record_one_step_a_bucket():
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model)
    decoding = decoding_of(model, 1, 300, "graph")
    expected = say(decoding_of(model, 1, 300), manager, token_ids(1, 240), DRAWING, 40)
    assert torch.equal(say(decoding, manager, token_ids(1, 240), DRAWING, 40), expected)
    drawing = decoding.sampler.drawing_of(slice(1))
    assert sorted(inside.recorded(inside.backend_of(decoding))) == [(256, drawing), (300, drawing)]


# ---------------------------------------------------------------------- the model


REASONS = {
    "mistral-own-window": "manages layers its own way",
    "gemma2": "manages layers its own way",
    "gemma3": "manages layers its own way",
    "bart": "is an encoder-decoder",
    "t5": "is an encoder-decoder",
    **({"gptj": "brings its own attention"} if RELEASE < (5, 24) else {}),
    "bloom": "brings its own attention",
    "mpt": "brings its own attention",
    "falcon-alibi": "brings its own attention",
    "whisper-decoder": "brings its own attention",
}


@pytest.mark.parametrize("name", REASONS)
def test_models_that_cannot_are_refused_and_told_why(name):
    model = tiny(name)
    assert REASONS[name] in unsupported_reason(model)
    with pytest.raises(GeometryError, match=REASONS[name]):
        decoder_copy(model)


def test_more_models_that_cannot():
    for rope in ROPE_BY_LENGTH:
        assert "depend on the length" in unsupported_reason(
            build("llama", rope_parameters=rope, max_position_embeddings=64)
        )
    assert "scales its attention" in unsupported_reason(build("gpt2", scale_attn_by_inverse_layer_idx=True))


def snapshot(model):
    hooks = [
        {name: dict(held) for name, held in vars(module).items() if name.endswith("_hooks")}
        for module in model.modules()
    ]
    tensors = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    own = [sorted(vars(module)) for module in model.modules()]
    ids = [(name, id(module), id(vars(module).get("config"))) for name, module in model.named_modules()]
    return hooks, tensors, own, ids, model.config.to_dict(), model.config._attn_implementation


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_the_model_itself_stays_as_it_is(name, attention):
    model = build(name, attention)
    manager = KVCacheManager(model)
    before, said = snapshot(model), generated(manager, token_ids(1, 9), 20)
    decoder = decoder_copy(model)
    assert snapshot(model) == before
    for a, b in zip(decoder.parameters(), model.parameters(), strict=True):
        assert a is b
    for a, b in zip(decoder.modules(), model.modules(), strict=True):
        assert a is not b and type(a) is type(b)
    assert decoder.config._attn_implementation != model.config._attn_implementation
    say(decoding_of(model, 1, 64, "graph"), manager, token_ids(1, 9), GREEDY, 20)
    assert snapshot(model) == before
    assert torch.equal(generated(manager, token_ids(1, 9), 20), said)
