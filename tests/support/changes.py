"""Changes of a model, of every kind, and the models that they are made to."""

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import MixtralConfig, MixtralForCausalLM

from support.families import VOCABULARY, build, token_ids

PREFIX, REST = token_ids(1, 24, seed=3), token_ids(1, 6, seed=4)
WHOLE = torch.cat([PREFIX, REST], 1)
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def llama() -> Any:
    return build("llama")


def mixtral() -> Any:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, sliding_window=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = MixtralForCausalLM(config)
        model = made.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1))
    model.generation_config.eos_token_id = None
    return model


def adapted() -> Any:
    """A Llama with two adapters, the first of them switched on."""
    peft = pytest.importorskip("peft")
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**given), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**given))
    fill_adapters(model, 2)
    return model.eval().requires_grad_(False)


def fill_adapters(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def hooked() -> Any:
    model = llama()
    model.handle = model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * -2)
    return model


def values(model: Any) -> Any:
    return model.model.layers[0].self_attn.v_proj


@torch.no_grad()
def in_place(model: Any) -> None:
    values(model).weight.neg_()


def through_data(model: Any) -> None:
    values(model).weight.data.neg_()  # nobody counts this


def other_data(model: Any) -> None:
    values(model).weight.data = -values(model).weight.data


def assigned(model: Any) -> None:
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states["model.layers.0.self_attn.v_proj.weight"].neg_()
    model.load_state_dict(states, assign=True)


def another_parameter(model: Any) -> None:
    values(model).weight = nn.Parameter(-values(model).weight, requires_grad=False)


def another_norm(model: Any) -> None:
    norm = copy.deepcopy(model.model.layers[0].input_layernorm)
    norm.weight.data.neg_()
    model.model.layers[0].input_layernorm = norm


def another_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def another_head(model: Any) -> None:
    model.lm_head = nn.Linear(64, VOCABULARY, bias=False).requires_grad_(False)
    model.lm_head.weight.data = torch.randn(VOCABULARY, 64, generator=torch.Generator().manual_seed(5))


def another_attention(model: Any) -> None:
    attention = copy.deepcopy(model.model.layers[0].self_attn)
    attention.v_proj.weight.data.neg_()
    model.model.layers[0].self_attn = attention


def another_class(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.__class__ = NegatedMLP


class NegatedMLP(type(build("llama").model.layers[0].mlp)):  # type: ignore[misc]
    def forward(self, states: Tensor) -> Tensor:
        return cast(Tensor, -super().forward(states))


def forward_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * -2)


def pre_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, given: (given[0] * -2,))


def hook_that_holds_the_model(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out - mlp.act_fn(out) * 3)


def unhooked(model: Any) -> None:
    model.handle.remove()


def hooks_replaced(model: Any) -> None:
    for module in model.modules():
        module._forward_hooks = type(module._forward_hooks)()


def backward_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_full_backward_hook(lambda module, into, out: None)


def compiled_in_place(model: Any) -> None:
    model.model.layers[0].mlp.compile(backend="eager")


def compiled_forward(model: Any) -> None:
    model.model.layers[0].forward = torch.compile(model.model.layers[0].forward, backend="eager")


def compiled_whole_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_layer(model: Any) -> None:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")


def compiled_model(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def accelerated(model: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    for module in (model, model.model, model.model.layers[0]):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(io_same_device=True))


def offloaded(model: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def own_forward_bound(model: Any) -> None:
    model.model.forward = types.MethodType(type(model.model).forward, model.model)


def method_bound(model: Any) -> None:
    def negated(self: Any, states: Tensor) -> Tensor:
        return cast(Tensor, -type(self).forward(self, states))

    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(negated, mlp)


def closure_bound(model: Any) -> None:
    old = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *given, **named: -old(*given, **named)


class Negating:
    """A callable that holds on to what it wraps, in a way nobody can turn to a copy."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, *given: Any, **named: Any) -> Any:
        return -self.inner(*given, **named)


def object_bound(model: Any) -> None:
    model.model.layers[0].forward = Negating(model.model.layers[0].forward)


def epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 5.0


def scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 4.0  # a negative one makes NaN of what a causal mask hides


def config_value(model: Any) -> None:
    model.config.num_hidden_layers = 1  # the forward runs so many


def layers_dropped(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def router(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(values(model), "weight", Negative())


class Negative(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


@torch.no_grad()
def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(3)


def hot_swapped(model: Any) -> None:
    from peft.utils import hotswap

    states = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)) * 0.3
        for i, (name, tensor) in enumerate(model.state_dict().items())
        if ".one." in name
    }
    config = copy.deepcopy(model.peft_config["one"])
    hotswap.hotswap_adapter_from_state_dict(model, states, "one", config)


def rescaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["one"] *= -2


def unloaded(model: Any) -> Any:
    return model.merge_and_unload()


def adapters_added(model: Any) -> None:
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    fill_adapters(peft.get_peft_model(model, given).eval().requires_grad_(False), 7)


@dataclass(frozen=True)
class Change:
    """What is changed, and what each feature does then: ``=`` the right answer, ``r`` refused.

    Attributes:
        make: the model before.
        change: changes it; gives what takes its place, or None.
        expected: of generate, prefix, engine, ranking, saved.
        matters: whether another text follows.
    """

    make: Callable[[], Any]
    change: Callable[[Any], Any]
    expected: str = "====="
    matters: bool = True


CHANGES = {
    "a weight in place": Change(llama, in_place),
    "a weight through .data": Change(llama, through_data),
    "a weight's data": Change(llama, other_data),
    "loaded by assignment": Change(llama, assigned),
    "another parameter": Change(llama, another_parameter),
    "another norm": Change(llama, another_norm),
    "another activation": Change(llama, another_activation),
    "another head": Change(llama, another_head),
    "another attention module": Change(llama, another_attention),
    "another class": Change(llama, another_class),
    "a forward hook": Change(llama, forward_hook, "=r==r"),
    "a pre-forward hook": Change(llama, pre_hook, "=r==r"),
    "a hook that holds the model": Change(llama, hook_that_holds_the_model, "=r==r"),
    "a hook removed": Change(hooked, unhooked),
    "all hooks replaced": Change(hooked, hooks_replaced),
    "a full backward hook": Change(llama, backward_hook, matters=False),
    "a part compiled in place": Change(llama, compiled_in_place, matters=False),
    "a layer's forward compiled": Change(llama, compiled_forward, matters=False),
    "the model's forward compiled": Change(llama, compiled_whole_forward, matters=False),
    "a layer compiled": Change(llama, compiled_layer, matters=False),
    "the model compiled": Change(llama, compiled_model, matters=False),
    "accelerate's hooks": Change(llama, accelerated, matters=False),
    "weights offloaded": Change(llama, offloaded, "=r=rr", matters=False),
    "its own forward bound": Change(llama, own_forward_bound, matters=False),
    "a method bound": Change(llama, method_bound, "=r==r"),
    "a closure bound": Change(llama, closure_bound, "=r==r"),
    "an object bound": Change(llama, object_bound, "=r=rr"),
    "epsilon of a norm": Change(llama, epsilon),
    "attention's scaling": Change(llama, scaling),
    "a value of the config": Change(llama, config_value),
    "layers dropped": Change(llama, layers_dropped),
    "the router's top k": Change(mixtral, router),
    "a parametrization": Change(llama, parametrized),
    "a buffer in place": Change(llama, buffer),
    "another dtype": Change(llama, lambda model: model.double() and None, matters=False),
    "another attention implementation": Change(
        llama, lambda model: model.set_attn_implementation("eager"), "===r=", matters=False
    ),
    "another adapter": Change(adapted, lambda model: model.set_adapter("two")),
    "adapters disabled": Change(adapted, lambda model: model.base_model.disable_adapter_layers()),
    "an adapter merged": Change(adapted, lambda model: model.merge_adapter(), matters=False),
    "an adapter hot-swapped": Change(adapted, hot_swapped),
    "an adapter's scaling": Change(adapted, rescaled),
    "adapters unloaded": Change(adapted, unloaded, matters=False),
    "adapters added": Change(llama, adapters_added),
}


def said(model: Any, ids: Tensor = WHOLE) -> Tensor:
    """The reference: what the model says without kvcache."""
    return cast(Tensor, model.generate(input_ids=ids, **GREEDY)[:, ids.shape[1] :])
