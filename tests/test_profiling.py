"""Where time and memory go: parts that add up, a slow part that is found, bytes that are counted twice."""

from dataclasses import replace

import pytest
import torch
from support.clocks import Ticking
from support.families import build
from support.inside.decoding import StaticLayer
from support.inside.tools import AUDIO, LanguageRunner, LanguageTarget, part_of, weight_bytes
from torch import nn
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvcache import InputError
from kvcache.decoding import Setting
from kvcache.models import LINEAR, ManagedLayer, has_half, quantize_linear, structural_copy
from kvcache.tools import MEMORY, PARTS, Watch, plot, profile

CONTEXT, TOKENS = 30, 20
SLOW = 1.0  # second, of the test's clock; beside it its ticks are nothing


class Given(LanguageTarget):
    """A model that is there already."""

    def __init__(self, model):
        self.name, self._given = "given", model

    def load(self, device="cpu"):
        return self._given

    def prepared(self, setting, device="cpu"):
        return LanguageRunner(self._given, setting)


@pytest.fixture
def clock(monkeypatch):
    """The one that time is measured by."""
    ticking = Ticking()
    monkeypatch.setattr("time.perf_counter", ticking)
    return ticking


def slower(model, chosen, clock):
    """A copy of a model in which time passes before some modules run."""

    def slow(name, module):
        if not chosen(name):
            return None
        new = type("Slow" + type(module).__name__, (type(module),), {"forward": _slowly(type(module).forward, clock)})
        copy = module.__class__.__new__(new)
        copy.__dict__.update(module.__dict__)
        return copy

    return structural_copy(model, slow)


def _slowly(forward, clock):
    def slow(self, *args, **kwargs):
        clock.go_on(SLOW)
        return forward(self, *args, **kwargs)

    return slow


def state(model):
    """What must be as before: hooks, modules, tensors, classes' methods."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    tensors = [(name, t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()]
    everywhere = len(modules._global_forward_hooks), len(modules._global_forward_pre_hooks)
    return (
        hooks,
        tensors,
        [name for name, _ in model.named_modules()],
        everywhere,
        ManagedLayer.update,
        StaticLayer.update,
    )


def profiled(model, backend="eager", **settings):
    return profile(Given(model), Setting(backend=backend, **settings), CONTEXT, TOKENS, rounds=1)


@pytest.mark.parametrize("backend", ["off", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_parts_are_the_whole_and_the_model_stays_as_it_was(family, backend):
    model = build(family)
    before = state(model)
    found = profiled(model, backend)
    assert state(model) == before
    assert torch.overrides._get_current_function_mode() is None
    for times in (found.step, found.prefill):
        assert sum(times.share(part) for part in PARTS) == pytest.approx(1)
        assert all(seconds >= 0 for seconds in times.parts.values())
    # Of these parts each is run in every step of such a model; the positions of GPT-2 are embeddings.
    assert all(found.step.parts[part] > 0 for part in PARTS if part not in AUDIO)
    assert 0 < found.cache_time < 1 and found.best_speedup == pytest.approx(1 / (1 - found.cache_time))
    assert found.outside_time == pytest.approx(
        1 - found.step.share("attention_products", "attention_scores", "cache_update")
    )
    assert sum(found.memory.parts.values()) == found.memory.total
    assert set(found.memory.parts) == set(MEMORY)


@pytest.mark.parametrize("requests", [1, 3])
def test_the_parts_add_up_to_what_is_measured_from_outside(requests, monkeypatch):
    # A clock of the test's own, which goes on by 50 in every linear layer and by 1 whenever it is looked at, so that nothing
    # the machine does meanwhile counts. The token loop runs in a thread, so there it would be up to the system when the outer
    # clock is looked at; the slow test holds a full-size model to 3 % by the real one.
    now = [0.0]

    def look():
        now[0] += 1
        return now[0]

    def linear(self, x):
        now[0] += 50
        return torch.nn.functional.linear(x, self.weight, self.bias)

    monkeypatch.setattr("time.perf_counter", look)
    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    step = profiled(build("llama"), requests=requests).step
    assert step.wall > 50 * 14, "two layers of seven products each"
    assert step.total == pytest.approx(step.wall, rel=0.01)


def test_each_moment_belongs_to_one_part(clock):
    model, came = build("llama"), []
    watch = Watch(torch.device("cpu"), lambda: came.append(clock()))
    with torch.no_grad(), watch:
        watch.start()
        for tokens in (5, 1, 1):
            model(torch.ones(1, tokens, dtype=torch.long)).logits.argmax(-1)
        passes = watch.stop()
    assert [one.tokens for one in passes] == [0, 5, 1, 1]
    for i, one in enumerate(passes[1:-1]):
        # Each is the sum of hundreds of differences of the same clock: rounding, and not one tick.
        assert sum(one.seconds.values()) == pytest.approx(came[i + 1] - came[i], abs=clock.tick / 2)


@pytest.mark.parametrize(
    ("family", "slow"),
    [
        (  # by the ends of their names: in which part they are, and how often a step of two layers runs them
            "llama",
            {
                ("mlp.act_fn",): ("mlp", 2),
                ("q_proj", "v_proj", "o_proj"): ("attention_products", 6),
                ("layernorm", "norm"): ("norms", 5),
                ("rotary_emb",): ("positions", 1),
                ("embed_tokens",): ("embeddings", 1),
                ("lm_head",): ("head", 1),
            },
        ),
        (
            "gpt2",
            {
                ("mlp.c_fc", "mlp.c_proj", "mlp.act"): ("mlp", 6),
                ("attn.c_attn",): ("attention_products", 2),
                ("ln_1", "ln_2", "ln_f"): ("norms", 5),
                ("wte", "wpe"): ("embeddings", 2),
                ("lm_head",): ("head", 1),
            },
        ),
    ],
)
def test_parts_that_are_made_slow_are_those_that_are_found(family, slow, clock):
    model, ends = build(family), tuple(end for some in slow for end in some)
    found = profiled(slower(model, lambda name: name.endswith(ends), clock)).step
    planted = {part: times * SLOW for part, times in slow.values()}
    assert found.parts == pytest.approx(dict.fromkeys(PARTS, 0.0) | planted, abs=0.01 * SLOW)


@pytest.mark.parametrize("backend", ["off", "eager"])
def test_a_slow_cache_is_found(monkeypatch, backend, clock):
    kind = StaticLayer if backend == "eager" else ManagedLayer
    update = kind.update
    model = build("llama")

    def slow(layer, *args, **kwargs):
        clock.go_on(SLOW)
        return update(layer, *args, **kwargs)

    monkeypatch.setattr(kind, "update", slow)
    found = profiled(model, backend).step
    assert found.parts["cache_update"] == pytest.approx(2 * SLOW, rel=0.01)
    assert found.share("cache_update") > 0.99
    assert kind.update is slow


def test_scores_are_told_from_products(monkeypatch, clock):
    attend = nn.functional.scaled_dot_product_attention

    def slow(*args, **kwargs):
        clock.go_on(SLOW)
        return attend(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", slow)
    found = profiled(build("llama")).step
    assert found.parts["attention_scores"] == pytest.approx(2 * SLOW, rel=0.01)
    assert found.share("attention_scores") > 0.99


def test_torch_between_two_passes_is_sampling_and_python_is_host(monkeypatch, clock):
    from kvcache.decoding import Sampler

    draw = Sampler.__call__
    model = build("llama")

    def idle(self, *args, **kwargs):
        clock.go_on(SLOW)  # Python, as far as torch knows
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(Sampler, "__call__", idle)
    found = profiled(model).step
    assert found.parts["host"] == pytest.approx(SLOW, rel=0.01) and found.parts["sampling"] < 0.01 * SLOW

    def function(logits):
        """A slow one of torch, as modes that watch functions see it."""
        if torch.overrides.has_torch_function_unary(logits):
            return torch.overrides.handle_torch_function(function, (logits,), logits)
        clock.go_on(SLOW)
        return logits

    def busy(self, logits, *args, **kwargs):
        return draw(self, function(logits), *args, **kwargs)

    monkeypatch.setattr(Sampler, "__call__", busy)
    found = profiled(model).step
    assert found.parts["sampling"] == pytest.approx(SLOW, rel=0.01) and found.parts["host"] < 0.01 * SLOW


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_c3_where_the_engine_falls_back_the_profile_is_of_what_runs(backend):
    found = profiled(build("mistral-own-window"), backend)
    (note,) = found.notes
    assert note.startswith("Not as asked: MistralForCausalLM manages layers its own way")
    assert note.endswith("those of the token loop, which runs instead.")
    assert found.asked == found.plain
    assert found.memory.parts["kv_cache"] > 0
    assert found.memory.parts["activations"] > 0


def test_c4_a_models_own_layers_are_booked_under_attention(monkeypatch, clock):
    attend, update = nn.functional.scaled_dot_product_attention, DynamicSlidingWindowLayer.update

    def slow_scores(*args, **kwargs):
        clock.go_on(SLOW)
        return attend(*args, **kwargs)

    def slow_update(layer, *args, **kwargs):
        clock.go_on(SLOW)
        return update(layer, *args, **kwargs)

    model = build("mistral-own-window")
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", slow_scores)
    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", slow_update)
    found = profiled(model, "off")
    assert DynamicSlidingWindowLayer.update is slow_update
    for part in ("attention_scores", "cache_update"):
        assert found.step.parts[part] > 1.99 * SLOW
    assert found.cache_time > 0.5  # what the headline is about
    assert found.step.parts["positions"] < SLOW


def test_c4_layers_that_write_no_keys_are_attention_as_well(monkeypatch, clock):
    """An encoder's keys are written once: each later step only looks at them."""
    attend = nn.functional.scaled_dot_product_attention

    def slow(query, *args, **kwargs):
        clock.go_on(SLOW)
        return attend(query, *args, **kwargs)

    model = build("bart")
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", slow)
    found = profiled(model).step
    assert found.parts["attention_scores"] > 5.99 * SLOW  # three layers, each to itself and to the encoder
    assert found.share("attention_scores") > 0.5


def test_experts_are_the_mlp(clock):
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    sleepy = type(model.model.layers[0].mlp.experts)

    def slow(name, module):
        if not isinstance(module, sleepy):
            return None
        copy = module.__class__.__new__(type("Slow", (sleepy,), {"forward": _slowly(sleepy.forward, clock)}))
        copy.__dict__.update(module.__dict__)
        return copy

    assert profiled(structural_copy(model, slow), "off").step.parts["mlp"] > 1.99 * SLOW


def test_the_caches_of_a_batch_are_all_counted():
    model = build("llama")
    found = profiled(model, requests=3)
    one = profiled(model)
    assert found.memory.parts["kv_cache"] == 3 * one.memory.parts["kv_cache"]


def test_a_step_that_is_recorded_is_split_as_the_eager_one():
    found = profiled(build("llama"), "graph")
    assert found.setting.backend == "graph" and found.asked > 0 and found.asked != found.plain
    assert any("cannot be divided" in sentence for sentence in found.sentences())
    assert found.step.parts["mlp"] > 0


# ---------------------------------------------------------------------- memory


def by_name(model, *ends):
    """Bytes of the parameters whose names have one of these in them, each once."""
    found = {
        t.data_ptr(): t.numel() * t.element_size()
        for name, t in model.named_parameters()
        if any(e in name for e in ends)
    }
    return sum(found.values())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_by_part(tied):
    model = build("llama", tie_word_embeddings=tied)
    if tied:
        model.tie_weights()
    found = weight_bytes(model, model)
    assert found["attention_weights"] == by_name(model, "self_attn")
    assert found["mlp_weights"] == by_name(model, "mlp")
    assert found["embedding_weights"] == by_name(model, "embed_tokens", "lm_head")
    frequencies = sum(t.numel() * t.element_size() for t in model.buffers())
    assert found["other_weights"] == by_name(model, "norm") + frequencies
    assert found["unused_weights"] == 0


@pytest.mark.skipif(not has_half("bf16"), reason="this CPU has no fast bf16")
def test_weights_in_fewer_bits_are_counted_with_those_they_were_made_of():
    model = build("llama")
    narrow = quantize_linear(model, "bf16")
    found = weight_bytes(narrow, model)
    digests = sum(t.numel() for name, t in narrow.named_buffers() if name.endswith("digest"))
    layers = by_name(model, "self_attn", "mlp")
    assert found["attention_weights"] + found["mlp_weights"] == layers // 2 + digests
    assert found["unused_weights"] == layers


@pytest.mark.parametrize("backend", ["off", "eager"])
def test_the_cache_is_counted_as_far_as_it_is_written_to(backend):
    model = build("llama")
    memory = profiled(model, backend).memory
    config = model.config
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // 4)
    # The last token that is drawn is never run.
    assert memory.parts["kv_cache"] == pytest.approx((CONTEXT + TOKENS - 1) * token, rel=0.03)
    assert memory.reserved >= memory.parts["kv_cache"]


def test_activations_are_those_of_a_layer_that_makes_them():
    wide = build("llama", intermediate_size=64 * 1024, hidden_size=64)
    found = profiled(wide).memory
    # The MLP holds gate, its activation and up, of which the product needs two and its result a third; of all tokens in a
    # prefill, of one in a step.
    one = 4 * 64 * 1024
    assert 2 * one < found.parts["activations"] < 4 * one
    assert 2 * CONTEXT * one < found.prefill < 4 * CONTEXT * one


# ---------------------------------------------------------------------- around


def test_a_wrong_request_is_refused_before_anything_runs():
    subject = Given(build("llama"))
    for settings, said in (
        ({"tokens": 4}, "at least 8 tokens"),
        ({"rounds": 0}, "1 round"),
        ({"context": 0}, "has 1 tokens or more"),
        ({"setting": Setting(requests=0)}, "at least 1"),
    ):
        with pytest.raises(InputError, match=said):
            profile(subject, **settings)


def test_modules_are_told_apart_in_every_family():
    for family in (
        "llama",
        "qwen2",
        "qwen3",
        "gemma2",
        "phi3",
        "gpt2",
        "gptj",
        "gpt-neox",
        "opt",
        "stablelm",
        "cohere",
        "bloom",
        "mpt",
    ):
        model = build(family)
        kinds = {}

        def visit(module, inside, name, kinds=kinds):
            inside = part_of(module, inside) or inside
            kinds[name] = inside
            for child, part in module.named_children():
                visit(part, inside, f"{name}.{child}")

        visit(model, "host", "model")
        linear = {kinds[f"model.{name}"] for name, module in model.named_modules() if isinstance(module, LINEAR)}
        assert linear == {"attention_products", "mlp", "head"}, family
        assert list(kinds.values()).count("layer") >= model.config.num_hidden_layers, family
        assert not {"glue"} & set(kinds.values()), family


def test_a_watch_that_is_left_by_an_error_leaves_nothing():
    model = build("llama")
    before = state(model)

    def broken():
        with Watch(torch.device("cpu")) as watch:
            watch.start()
            model(torch.ones(1, 3, dtype=torch.long))
            model(torch.full((1, 1), 10**6))  # no such token

    with pytest.raises(IndexError):
        broken()
    assert state(model) == before
    assert torch.overrides._get_current_function_mode() is None


def test_a_mode_around_a_pass_ends_as_it_began():
    class Other(TorchFunctionMode):
        """As `onednn_linear` is one."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model, one = build("llama"), torch.ones(1, 1, dtype=torch.long)
    current = torch.overrides._get_current_function_mode
    with torch.no_grad(), Watch(torch.device("cpu")) as watch:
        watch.start()
        with Other():
            model(one)
        assert current() is None
        model(one)
        assert current() is not None
        with Other() as other:
            model(one)
            assert current() is other
        assert not isinstance(current(), Other)
        watch.stop()
    assert current() is None


def test_the_picture_holds_all_parts(tmp_path):
    found = profiled(build("llama"))
    plot({"one": found, "two": replace(found, model="two")}, tmp_path / "bars.svg")
    drawn = (tmp_path / "bars.svg").read_text()
    assert "KV cache" in drawn and "cache update" in drawn
    with pytest.raises(InputError, match="folder that exists"):
        plot({"one": found}, tmp_path / "no" / "bars.svg")
    with pytest.raises(InputError, match=r"\.png"):
        plot({"one": found}, tmp_path / "bars.doc")
