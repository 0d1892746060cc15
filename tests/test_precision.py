"""Linear layers in fewer bits against the same layers in fp32, and what a converted copy shares, keeps and lets go."""

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import build, tiny, token_ids
from support.inside.models import HAS_HALF, packed_kernels
from support.searching import search
from torch import nn
from transformers.pytorch_utils import Conv1D

from kvcache import InputError
from kvcache.models import PackedLinear, check_precision, closeness, model_fingerprint, planned, quantize_linear

pytestmark = pytest.mark.one_release

CPU = torch.device("cpu")


def can(precision):
    try:
        check_precision(precision, CPU)
    except InputError:
        return False
    return True


LEVELS = 127 if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() else 63
NARROW = [
    pytest.param(name, marks=pytest.mark.skipif(not can(name), reason=f"this CPU has no fast {name}"))
    for name in ("bf16", "fp16", "int8")
]
STEP = {"bf16": 2**-8, "fp16": 2**-11}  # half a unit in the last place, of a number's own size


def error_bound(precision, weight, states):
    """How far an output may be from the exact one, ``[tokens, out]``, in float64; `weight` is ``[out, in]``."""
    weight, states = weight.abs().double(), states.abs().double()
    product = states @ weight.t()
    if precision != "int8":
        # Each factor is rounded, and the sum; what is too small for fp16 is off by up to 2^-25.
        small = 2**-25 * (states.sum(-1, keepdim=True) + weight.sum(-1)) if precision == "fp16" else 0
        return 3.1 * STEP[precision] * product + small
    # Half a step of each weight (1/127 of its row's largest); of each activation a step, of 1/127 or 1/63 of its token's
    # largest: half of it is rounding, half where a range that is not symmetric begins. Then fp32.
    rows, tokens = weight.amax(-1) / 254, states.amax(-1, keepdim=True) / LEVELS
    by_weights, by_states = states.sum(-1, keepdim=True) * rows, tokens * weight.sum(-1)
    return by_weights + by_states + weight.shape[1] * tokens * rows + 1e-6 * (product + 255 * by_states)


def rows_out(layer):
    return (layer.weight.t() if isinstance(layer, Conv1D) else layer.weight).detach()


def assert_close(found, layer, precision, states):
    exact = states.double() @ rows_out(layer).double().t()
    exact = exact if layer.bias is None else exact + layer.bias.double()
    bound = error_bound(precision, rows_out(layer), states) + 1e-6 * exact.abs()
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= bound).all())


def layer_of(kind, inputs, outputs, bias, seed):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        layer = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=bias)
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.requires_grad_(False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- one layer


@pytest.mark.parametrize("precision", NARROW)
@search(30)
@given(
    kind=st.sampled_from(["linear", "conv1d"]),
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 80),
    tokens=st.integers(1, 9),
    bias=st.booleans(),
    scale=st.sampled_from([1e-3, 1, 100]),
    seed=st.integers(0, 2**20),
)
def test_a_layer_is_as_close_as_its_bits_allow(precision, kind, inputs, outputs, tokens, bias, scale, seed):
    layer = layer_of(kind, inputs, outputs, bias, seed)
    states = random(tokens, inputs, seed=seed) * scale
    packed = PackedLinear([layer], precision)
    assert_close(packed(states), layer, precision, states)
    assert torch.equal(packed(states[None])[0], packed(states))


@pytest.mark.parametrize("precision", NARROW)
def test_a_token_is_not_ruined_by_a_larger_one(precision):
    layer = layer_of("linear", 64, 48, True, 3)
    states = random(6, 64)
    states[2] *= 1000
    packed = PackedLinear([layer], precision)
    together = packed(states)
    assert_close(together, layer, precision, states)  # each token within the bound of its own size
    for token in range(6):
        alone = packed(states[token : token + 1])[0]
        # The same products of the same rounded numbers; sums in another order.
        torch.testing.assert_close(together[token], alone, atol=1e-5 * float(alone.abs().max()), rtol=0)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("precision", NARROW)
def test_nothing_times_anything_is_the_bias(precision, flush):
    layer = layer_of("linear", 16, 8, True, 0)
    layer.weight[3] = 0
    packed = PackedLinear([layer], precision)
    torch.set_flush_denormal(flush)
    try:
        assert torch.equal(packed(torch.zeros(2, 16)), layer.bias.expand(2, -1))
        assert bool((packed(random(2, 16))[:, 3] == layer.bias[3]).all())
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
def test_layers_computed_together_are_those_computed_apart(precision, biases):
    layers = [
        layer_of("linear", 40, width, bias, i) for i, (width, bias) in enumerate(zip((24, 8), biases, strict=True))
    ]
    together = PackedLinear(layers, precision)
    states = random(3, 40)
    for part, layer in zip(together(states).split([24, 8], -1), layers, strict=True):
        apart = PackedLinear([layer], precision)(states)
        torch.testing.assert_close(part, apart, atol=1e-5 * float(apart.abs().max()), rtol=0)


# ---------------------------------------------------------------------- a model


def linear(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


@torch.no_grad()
def inputs_and_outputs(model, names, ids):
    """What each of these layers was given and gave in one forward."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0].clone(), out.clone())})
        )
        for name in names
    ]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_every_layer_of_a_model_is_close(name, precision):
    model = tiny(name)
    new = quantize_linear(model, precision)
    before = linear(model)
    packed = [name for name in before if name != "lm_head"]
    assert set(linear(new)) == {"lm_head"}
    for layer, (states, out) in inputs_and_outputs(new, packed, token_ids(2, 12)).items():
        assert_close(out.flatten(0, 1), before[layer], precision, states.flatten(0, 1))
    with torch.no_grad():
        ours, theirs = (m(token_ids(2, 12)).logits for m in (new, model))
    assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.99


def test_fp32_is_the_model_itself():
    assert quantize_linear(tiny("llama"), "fp32") is tiny("llama")


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize(
    "modules_to_not_convert", [["mlp.down_proj"], ["layers.0.mlp.down_proj"], ["k_proj", "layers.1.mlp.up_proj"]]
)
def test_wide_layers_stay_as_they_are(precision, modules_to_not_convert):
    model = tiny("llama")
    new = quantize_linear(model, precision, modules_to_not_convert=modules_to_not_convert)
    before, after = linear(model), linear(new)
    ends = tuple(modules_to_not_convert)
    named = {n for n in before if any(n == end or n.endswith("." + end) for end in ends)}
    assert set(after) == named | {"lm_head"}
    for name in after:
        assert after[name].weight is before[name].weight
    seen = inputs_and_outputs(new, [n for n in before if n not in after], token_ids(1, 9))
    assert seen.keys() == before.keys() - after.keys()  # those beside a wide one are computed apart
    for name, (states, out) in seen.items():
        assert_close(out[0], before[name], precision, states[0])


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_untouched_and_what_stays_is_shared(name, precision):
    model = build(name)
    with torch.no_grad():
        logits = model(token_ids(1, 9)).logits
    tensors = {n: (t.data_ptr(), t._version) for n, t in model.state_dict().items()}
    modules = [(n, id(m), sorted(vars(m)), sorted(m._modules)) for n, m in model.named_modules()]
    print_before, config = model_fingerprint(model), model.config.to_dict()
    new = quantize_linear(model, precision)
    with torch.no_grad():
        new(token_ids(1, 9))
        assert torch.equal(model(token_ids(1, 9)).logits, logits)
    assert {n: (t.data_ptr(), t._version) for n, t in model.state_dict().items()} == tensors
    assert [(n, id(m), sorted(vars(m)), sorted(m._modules)) for n, m in model.named_modules()] == modules
    assert (model_fingerprint(model), model.config.to_dict()) == (print_before, config)
    packed = tuple(n + "." for n in linear(model) if n != "lm_head")
    shared = [n for n in tensors if not n.startswith(packed)]
    assert any("norm" in n or "ln_" in n for n in shared) and any("emb" in n or "wte" in n for n in shared)
    theirs = new.state_dict()
    assert all(theirs[n].data_ptr() == tensors[n][0] for n in shared)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fingerprints_tell_precisions_and_weights_apart(name):
    names = [n for n in ("bf16", "fp16", "int8") if can(n)]
    model = build(name)
    prints = {"fp32": model_fingerprint(model)} | {n: model_fingerprint(quantize_linear(model, n)) for n in names}
    assert len(set(prints.values())) == len(prints)
    other = build(name)
    for one in names:
        assert model_fingerprint(quantize_linear(other, one)) == prints[one]
    changed = next(m for n, m in linear(other).items() if n != "lm_head")
    with torch.no_grad():
        changed.weight.view(-1)[5] += 1e-4  # too little for 8 bits to notice
    for one in names:
        assert model_fingerprint(quantize_linear(other, one)) != prints[one]


@pytest.mark.parametrize("precision", NARROW)
def test_a_deep_copy_computes_the_same(precision):
    new = quantize_linear(build("llama"), precision)
    twin = copy.deepcopy(new)
    ids = token_ids(2, 9)
    with torch.no_grad():
        expected = new(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        del new
        gc.collect()
        assert torch.equal(twin(ids).logits, expected)  # the kernels live as long as either


@pytest.mark.grid(3)
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_weights_die_with_the_copy(name, precision):
    gc.collect()
    model, before = build(name), len(packed_kernels)
    new = quantize_linear(model, precision)
    held = len(packed_kernels) - before
    assert held == sum(isinstance(m, PackedLinear) for m in new.modules()) == 8
    with torch.no_grad():
        new(token_ids(1, 5))
    del new
    gc.collect()
    assert len(packed_kernels) == before


# ---------------------------------------------------------------------- what is refused


def test_what_a_cpu_cannot_is_refused(monkeypatch):
    monkeypatch.setattr(HAS_HALF, lambda precision: False)
    for precision in ("bf16", "fp16"):
        with pytest.raises(InputError, match=f"precision='{precision}': this CPU has no fast {precision}"):
            quantize_linear(tiny("llama"), precision)
    check_precision("fp32", CPU)


def test_what_a_gpu_cannot_is_refused():
    cuda = torch.device("cuda")
    with pytest.raises(InputError, match="runs on CPUs; on cuda use 'bf16'"):
        check_precision("int8", cuda)
    for precision in ("fp32", "bf16", "fp16"):
        check_precision(precision, cuda)


def test_a_whole_model_is_cast_elsewhere_but_for_its_frequencies():
    model = copy.deepcopy(build("llama")).to("meta")
    cuda = torch.device("cuda")
    new = planned(model, "bf16", cuda)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in new.named_buffers() if "inv_freq" in n} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert planned(new, "bf16", cuda) is new
    with pytest.raises(InputError, match="on cuda use"):
        planned(model, "int8", cuda)


def test_names_that_are_none_are_refused():
    for name in ("int4", "float32", "", "BF16"):
        with pytest.raises(InputError, match="must be one of 'fp32', 'bf16', 'fp16', 'int8'"):
            quantize_linear(tiny("llama"), name)
    for end in ("mlp.nothing", "own_proj", "embed_tokens", ""):
        with pytest.raises(InputError, match="no linear layer's name ends so"):
            quantize_linear(tiny("llama"), "int8", modules_to_not_convert=[end])


@pytest.mark.parametrize("precision", ["fp32", *NARROW])
def test_on_a_cpu_the_model_must_be_fp32(precision):
    model = copy.deepcopy(build("llama")).to(torch.bfloat16)
    with pytest.raises(InputError, match=r"the model is torch.bfloat16: .* starts from fp32"):
        quantize_linear(model, precision)


def test_what_rounds_to_few_bits_is_compared_as_such():
    model = tiny("llama")
    assert closeness(model, torch.float32) is None and closeness(model, torch.bfloat16) == 0.3
    assert closeness(quantize_linear(model, "int8"), torch.float32) == 0.3
