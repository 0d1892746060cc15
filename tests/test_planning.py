"""Plans against what the same model, loaded, really holds; searches against brute force."""

import os
from functools import cache

import pytest
import torch
from support.inside.tools import held
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kvcache import InputError, KeepAll, MaxBytes, MaxTokens, Pinned, PolicyError, SlidingWindow
from kvcache.cache import CacheGeometry
from kvcache.decoding import Setting, StaticKV
from kvcache.models import PackedLinear, Watch, has_half, quantize_linear
from kvcache.tools import plan, room, subject, written_static

FEWER = "bf16" if has_half("bf16") else "int8"  # where it is as fast as it can be
TINY = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama with grouped heads and a GPT-2 with tied embeddings, as folders."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        **TINY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=600, tie_word_embeddings=False,
    )  # fmt: skip
    gpt2 = GPT2Config(**TINY, n_embd=64, n_layer=2, n_head=4, n_positions=600)
    made = {}
    for name, model in (("llama", LlamaForCausalLM(llama)), ("gpt2", GPT2LMHeadModel(gpt2))):
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


SETTINGS = [
    Setting("off"),
    Setting("off", requests=3),
    Setting("off", policy=SlidingWindow(40, sinks=4)),
    Setting("off", policy=MaxTokens(150)),
    Setting("off", policy=MaxBytes(60_000), requests=2),
    Setting("off", max_length=310),
    Setting("off", quantization=8, requests=2),
    Setting("off", quantization=4, policy=SlidingWindow(100, sinks=4)),
    Setting("eager"),
    Setting("eager", requests=3),
    Setting("eager", max_length=310),
    Setting("eager", kv_dtype=torch.bfloat16, requests=2),
    Setting("eager", policy=SlidingWindow(40, sinks=4)),
    Setting("eager", policy=Pinned(5, MaxTokens(100)), requests=2),
    Setting("eager", quantization=8),  # which the token loop decodes instead
    Setting("eager", FEWER),
]


@pytest.mark.grid(9)
@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cache_is_planned_to_the_byte(folders, name, setting):
    model = subject(str(folders[name]))
    made = plan(model, setting, 303, context=131, process=0)
    served = model.prepared(setting)
    assert sum(served.stream(131, 172)) == setting.requests * 172
    report = served.report()
    assert made.kv == report.nbytes
    assert made.fallback == report.fallback


@pytest.mark.grid(6)
@pytest.mark.parametrize("kind", ["english", "gpt"])
@pytest.mark.parametrize(
    "setting",
    [
        Setting("off"), Setting("eager"), Setting("eager", requests=3), Setting("eager", FEWER, requests=2),
        Setting("eager", policy=SlidingWindow(30)), Setting("eager", policy=SlidingWindow(30), requests=2),
    ],
    ids=repr,
)  # fmt: skip
def test_speech_is_planned_to_the_byte(kind, setting):
    speech = _speech(kind)
    context, tokens = speech.shortest + 80, 60
    made = plan(speech, setting, context + tokens, context=context, process=0)
    served = speech.prepared(setting)
    assert sum(served.stream(context, tokens)) == setting.requests * tokens
    assert made.kv == served.report().nbytes
    t3 = served.engine.t3
    packed = {m.kernel: m.packed_bytes for m in t3.modules() if isinstance(m, PackedLinear)}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(t3)}
    head = (
        0
        if setting.precision is None
        else t3.dim * t3.speech_head.out_features * 2 + t3.speech_head.out_features * 4 + 32
    )
    assert made.weights.total - made.weights.originals == pytest.approx(
        sum(packed.values()) + sum(held.values()) + head, abs=8 * t3.speech_head.out_features
    )
    assert made.prefixes == served.engine.prefix_cache.stats().nbytes["memory"]


def _speech(kind):
    from support.inside.speech import ChatterboxTarget
    from support.t3_models import tiny_t3

    class Tiny(ChatterboxTarget):
        shortest = 21 + 2 if kind == "gpt" else 22 + 3 + 2
        _t3 = tiny_t3(kind)

        def skeleton(self):
            with torch.device("meta"):
                return tiny_t3(kind)

    return Tiny("tiny", "turbo" if kind == "gpt" else "english", None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_those_of_the_storages(folders, name):
    model = subject(str(folders[name]))
    loaded = model.load()
    made = plan(model, Setting(), 50, process=0)
    assert made.weights.total == _storages(loaded)
    assert made.weights.originals == 0


@pytest.mark.parametrize(
    "precision",
    ["int8", pytest.param("bf16", marks=pytest.mark.skipif(not has_half("bf16"), reason="this CPU has none"))],
)
def test_weights_in_fewer_bits_stand_beside_those_they_were_made_from(folders, precision):
    model = subject(str(folders["llama"]))
    loaded = model.load()
    copy = quantize_linear(loaded, precision)
    packed = {id(m): m for m in copy.modules() if isinstance(m, PackedLinear)}.values()
    per = {"int8": 1, "bf16": 2}[precision]
    # int8: a scale and a zero point for each output, in 4 bytes each, beside the sums, which are a buffer.
    kernels = sum(m.out_features * (m.in_features * per + (8 if precision == "int8" else 0)) for m in packed)
    both = plan(model, Setting(precision=precision), 50, process=0).weights
    alone = plan(model, Setting(precision=precision), 50, process=0, keep_loaded=False).weights
    shared = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(copy)}
    assert alone.total == sum(shared.values()) + kernels
    assert both.originals == sum(t.nbytes for t in _tensors(loaded) if t.untyped_storage().data_ptr() not in shared)
    assert both.total == alone.total + both.originals


def _tensors(module):
    return [*module.parameters(), *module.buffers()]


def _storages(module):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(module)}.values())


def test_parts_of_the_weights_by_hand(folders):
    weights = plan(subject(str(folders["llama"])), Setting(), 50, process=0).weights
    assert weights.attention == 3 * 4 * (64 * 64 * 2 + 64 * 32 * 2)
    assert weights.mlp == 3 * 4 * 3 * 64 * 128
    assert weights.other >= 4 * 7 * 64  # the norms; and the rotary frequencies
    assert weights.embeddings == 2 * 4 * 97 * 64


def test_a_gpu_holds_one_copy_of_the_weights_and_all_of_a_cache(folders):
    model = subject(str(folders["llama"]))
    here, there = (
        plan(model, Setting(precision=p), 303, process=7, device=d) for p, d in ((None, "cpu"), ("fp16", "cuda"))
    )
    assert there.kv * 2 == here.kv
    assert there.weights.originals == 0
    assert there.weights.mlp * 2 == here.weights.mlp
    assert there.parts["process"] == 0
    assert here.parts["process"] == 7
    assert there.moments[-1].static == there.kv  # all of it, written to or not
    assert there.total == max(one.growing + one.static + one.engine + one.workspace for one in there.moments) + (
        there.weights.total
    )


# ---------------------------------------------------------------------- what a block allocates


def test_watch_counts_what_is_alive_and_no_view_twice():
    before = torch.empty(100, device="meta")
    with torch.inference_mode(), Watch() as watch:
        a = before + 1
        b = a.view(10, 10)[2:].t()
        before.add_(1)
        assert watch.live == 400
        c = torch.cat([a, a])
        assert (watch.live, watch.peak) == (1200, 1200)
        del a, b
        assert watch.live == 800
        del c
    assert (watch.live, watch.peak) == (0, 1200)


def test_fused_attention_holds_no_scores_but_its_mask():
    q = torch.empty(1, 2, 50, 8, device="meta")
    mask = torch.empty(1, 1, 50, 50, dtype=torch.bool, device="meta")
    with torch.inference_mode(), Watch() as watch:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert watch.peak == q.nbytes
    with torch.inference_mode(), Watch() as watch:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
    assert watch.peak == q.nbytes + 50 * 50 * 4


def test_pages_of_a_static_cache_against_the_system():
    """Resident pages behind a cache, as Linux counts them."""
    geometry = CacheGeometry(2, 3, 64, 64)
    kv = StaticKV(geometry, 2, 500)
    for buffer in (*kv.keys, *kv.values):
        buffer[:1, :, :70] = 1.0
    page, resident = os.sysconf("SC_PAGE_SIZE"), 0
    with open("/proc/self/pagemap", "rb") as pagemap:
        for t in (*kv.keys, *kv.values):
            first, last = t.data_ptr() // page, (t.data_ptr() + t.nbytes - 1) // page
            pagemap.seek(8 * first)
            entries = memoryview(pagemap.read(8 * (last + 1 - first))).cast("Q")
            resident += page * sum(entry >> 63 for entry in entries)  # the highest bit: it is in memory
    planned = written_static(kv, 70, 1, "cpu")
    assert planned == pytest.approx(resident, abs=64 * 1024)
    assert written_static(kv, 500, 2, "cpu") >= kv.nbytes
    assert written_static(kv, 70, 1, "cuda") == kv.nbytes


def test_held_counts_a_storage_once():
    x = torch.zeros(10)
    assert held([x, x[2:], x.clone()]) == 80


# ---------------------------------------------------------------------- what fits


@pytest.mark.grid(1, any_of=("backend",))
@pytest.mark.parametrize("backend", ["off", "eager"])
def test_what_fits_against_trying_all(folders, backend):
    model, setting = subject(str(folders["llama"])), Setting(backend)

    @cache
    def again(requests, length):
        return plan(model, Setting(backend, requests=requests), length, process=10_000)

    made = again(1, 16)
    for memory in (made.total - 1, made.total, again(4, 16).total + 5, again(1, 22).total):
        found = room(made, memory, again, 2, 40)
        requests = [n for n in range(1, 12) if again(n, 16).total <= memory]
        lengths = [n for n in range(2, 41) if again(1, n).total <= memory]
        assert found.fits == (made.total <= memory)
        assert found.requests == max(requests, default=0)
        assert found.length == max(lengths, default=0)
        assert found.longest == (found.length == 40)
    assert setting.requests == 1


def test_nothing_fits(folders):
    model = subject(str(folders["llama"]))
    made = plan(model, Setting(), 64, process=0)
    found = room(made, 1000, lambda r, n: plan(model, Setting(requests=r), n, process=0), 2, 100)
    assert (found.fits, found.requests, found.length) == (False, 0, 0)


# ---------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("setting", "given", "says"),
    [
        (Setting(), {"length": 1}, "at least 2"),
        (Setting(), {"length": 601}, "up to 600"),
        (Setting(max_length=50), {"length": 51}, "up to 50"),
        (Setting(), {"length": 50, "context": 50}, "1 to 49"),
        (Setting(requests=0), {"length": 50}, "requests=0"),
        (Setting(precision="int8"), {"length": 50, "device": "cuda"}, "runs on CPUs"),
        (Setting(quantization=3), {"length": 50}, "8 or 4"),
    ],
)
def test_wrong_requests_say_what_can_be(folders, setting, given, says):
    with pytest.raises(InputError, match=says):
        plan(subject(str(folders["llama"])), setting, process=0, **given)


def test_a_budget_too_small_for_a_token(folders):
    with pytest.raises(PolicyError, match="does not hold one token"):
        plan(subject(str(folders["llama"])), Setting(policy=MaxBytes(10)), 50, process=0)
    assert plan(subject(str(folders["llama"])), Setting(policy=KeepAll()), 50, process=0).kv > 0
