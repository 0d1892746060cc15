"""Signatures: what counts as a change of a model, what does not, what copies hold, and what nobody holds."""

import copy
import gc
import os
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.changes import CHANGES, GREEDY, PREFIX, REST, WHOLE, hooked, in_place, llama, said
from support.families import build
from support.inside.decoding import LANGUAGE_COPY
from support.inside.models import stored_by
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvcache import (
    TOVA,
    DiskStore,
    InputError,
    KVCacheManager,
    MemoryStore,
    PolicyError,
    SlidingWindow,
    SpeakerCache,
    model_fingerprint,
)
from kvcache.decoding import decoder_copy
from kvcache.models import (
    Following,
    PackedLinear,
    exact_windows,
    forget,
    looks_on,
    quantize_linear,
    signature_of,
    structural_copy,
    watch_of,
)

# ---------------------------------------------------------------------- what is a change

UNCOUNTED = (
    "a weight through .data",
    "an adapter hot-swapped",
    "a full backward hook",
)  # for the sample to see, or nothing


@pytest.mark.filterwarnings("ignore")  # of the wrappers that are tried
@pytest.mark.parametrize("name", [name for name in CHANGES if name not in (*UNCOUNTED, "the model compiled")])
def test_a_change_is_another_signature(name: str) -> None:
    model = CHANGES[name].make()
    watch = watch_of(model)
    before = watch.signature()
    assert signature_of(model) is before
    CHANGES[name].change(model)
    after = signature_of(model)
    assert after is not before
    assert signature_of(model) is after


@pytest.mark.filterwarnings("ignore")  # torch's own, at the compiler's import
def test_what_a_compiler_notes_on_weights_is_no_change() -> None:
    model = llama()
    watch = watch_of(model)
    before, named = watch.signature(), model_fingerprint(model)
    torch.compile(model, backend="eager", dynamic=True)(WHOLE)
    assert any("_dynamo_static_input_type" in vars(weight) for weight in model.parameters())
    watch.forget()
    assert model_fingerprint(model) == named
    assert signature_of(model).why_no_copy is before.why_no_copy


def test_an_attribute_in_place_of_one_that_does_not_count_is_seen() -> None:
    model = llama()
    watch = watch_of(model)
    model.warnings_issued = {}
    before = watch.signature()
    del model.warnings_issued
    model.scale = 2.0
    assert watch.signature() is not before


def test_what_a_tensor_holds_beside_its_numbers_counts() -> None:
    model = llama()
    weight = model.get_input_embeddings().weight
    weight.scale = 1.0
    watch = watch_of(model)
    before, named = watch.signature(), model_fingerprint(model)
    assert watch.signature() is before
    weight.scale = 2.0
    assert watch.signature() is not before
    assert model_fingerprint(model) != named


def test_what_is_as_before_is_no_change() -> None:
    model = llama()
    watch = watch_of(model)
    before = watch.signature()
    said(model)
    model.config.rope_parameters = dict(model.config.rope_parameters)
    model.model.norm.variance_epsilon = float(str(model.model.norm.variance_epsilon))
    model.generation_config = copy.deepcopy(model.generation_config)
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    handle.remove()
    with exact_windows(model):  # this library's own hooks, for as long as a call
        assert signature_of(model) is before
    model.requires_grad_()
    assert signature_of(model) is before
    # What took the place of something equal is watched as that was.
    model.config.rope_parameters["rope_theta"] = 1.0
    assert signature_of(model) is not before


def test_hooks_in_a_dict_that_took_anothers_place_are_seen() -> None:
    model = llama()
    watch = watch_of(model)
    before = watch.signature()
    CHANGES["all hooks replaced"].change(model)
    assert watch.signature() is before
    model.model.norm.register_forward_hook(lambda *_: None)
    assert watch.signature().hooked == ("model.norm",)


def test_a_model_that_is_asked_without_a_manager_is_known_again() -> None:
    model = llama()
    before = signature_of(model)
    gc.collect()
    assert signature_of(model) is before
    in_place(model)
    assert signature_of(model) is not before


def test_the_sample_sees_whole_tensors_and_not_every_element() -> None:
    model = llama()
    watch = watch_of(model)
    before, signature = watch.sample(), watch.signature()
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data[0, 0] += 1
    assert watch.sample() == before  # as documented
    weight.data.mul_(1.5)
    assert watch.sample() != before
    assert watch.signature() is signature
    model.half()
    assert len(watch.sample()) < len(before)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_every_module_are_a_change(register: Any) -> None:
    model = llama()
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore()))
    manager.add_prefix("p", PREFIX)
    before = signature_of(model)
    acting = register(lambda module, *given: None)
    try:
        assert signature_of(model).hooked == ("every module",)
        with pytest.raises(InputError, match="hooks on every module"):
            manager.generate(REST, prefix="p", **GREEDY)
    finally:
        acting.remove()
    now = signature_of(model)
    assert now is not before and not now.hooked
    looking = register(looks_on(lambda module, *given: None))
    try:
        assert signature_of(model) is now
    finally:
        looking.remove()


# ---------------------------------------------------------------------- code


class Gained(nn.Module):
    gain = 1.0

    def forward(self, states: Tensor) -> Tensor:
        return self._scaled(states)

    @torch.no_grad()
    def _scaled(self, states: Tensor) -> Tensor:
        return states * self.gain


def gained() -> Any:
    model = llama()
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Gained())
    return model


CODE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a class attribute": lambda patch: patch.setattr(Gained, "gain", -2.0),
    "a new class attribute": lambda patch: patch.setattr(Gained, "more", 1, raising=False),
    "a method": lambda patch: patch.setattr(Gained, "_scaled", lambda self, states: -states),
    "a method's code": lambda patch: patch.setattr(
        Gained._scaled.__wrapped__,  # type: ignore[attr-defined]  # torch.no_grad's
        "__code__",
        (lambda self, states: -states).__code__,
    ),
    "a method of a class of transformers": lambda patch: patch.setattr(
        type(llama().model.norm), "extra_repr", lambda self: "another"
    ),
}


@pytest.mark.parametrize("change", CODE)
def test_code_and_values_of_classes_count(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gained()
    watch = watch_of(model)
    before, named = watch.signature(), model_fingerprint(model)
    assert watch.signature() is before
    CODE[change](monkeypatch)
    now = watch.signature()
    assert now is not before
    assert model_fingerprint(model) != named
    assert watch.signature() is now
    monkeypatch.undo()
    assert model_fingerprint(model) == named


SCRIPT = """
import functools, torch
GAINS = {"a": {gain}}
def helped(states): return states * GAINS["a"]
class Scripted(torch.nn.Module):
    names = frozenset({"x", "y", "z"})
    def forward(self, states, more={more}):
        return helped(states) {sign} more
def activation(states): return helped(states)
"""


def scripted(kind: str, **parts: Any) -> str:
    """The fingerprint of a model with a part from a script, in a module of its own."""
    module = types.ModuleType("script")
    text = SCRIPT
    for name, value in {"gain": 1.0, "more": 0, "sign": "+", **parts}.items():
        text = text.replace("{" + name + "}", str(value))
    exec(compile("\n" * parts.get("lines", 0) + text, f"at {parts}", "exec"), vars(module))
    held = nn.Module()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "script", module)
        held.part = module.Scripted() if kind == "class" else module.activation
        return model_fingerprint(held)


@pytest.mark.parametrize("kind", ["class", "function"])
def test_an_edited_script_is_another_model(kind: str) -> None:
    before = scripted(kind)
    assert scripted(kind) == scripted(kind, lines=7) == before  # where it is written does not matter
    edits = [{"gain": -2.0}] if kind == "function" else [{"gain": -2.0}, {"more": 1}, {"sign": "-"}]
    assert len({before, *(scripted(kind, **edit) for edit in edits)}) == 1 + len(edits)


@pytest.mark.slow
def test_code_has_the_same_digest_in_every_process() -> None:
    ask = "import test_signature; print(test_signature.scripted('class'))"
    said_ = [
        subprocess.run(
            [sys.executable, "-c", ask],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said_[0] == said_[1] == f"{scripted('class')}\n"


def plain_attention(*args: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(*args, **kwargs)


def negative_attention(*args: Any, **kwargs: Any) -> Any:
    return -sdpa_attention_forward(*args, **kwargs)[0], None


def test_another_attention_under_the_same_name_is_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", plain_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("mine")
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore()))
    manager.add_prefix("p", PREFIX)

    def behind() -> Tensor:
        return manager.generate(REST, prefix="p", **GREEDY)[:, WHOLE.shape[1] :]

    before, named, first = signature_of(model), model_fingerprint(model), said(model)
    assert torch.equal(behind(), first)
    AttentionInterface.register("mine", negative_attention)
    assert signature_of(model) is not before
    assert model_fingerprint(model) != named
    assert torch.equal(behind(), said(model))
    assert not torch.equal(first, said(model))
    AttentionInterface.register("mine", lambda *args, **kwargs: plain_attention(*args, **kwargs))
    with pytest.raises(InputError, match=r"functions by name\.mine"):  # which nothing tells from another
        behind()


# ---------------------------------------------------------------------- what a forward writes


class Writing(nn.Module):
    """Keeps what it saw, as some models do: a tensor, a number it counts, tables by length."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas: Tensor | None = None
        self.calls = 0
        self.tables: dict[int, Tensor] = {}
        self.factor = 1.0

    def forward(self, states: Tensor) -> Tensor:
        self.deltas = states.mean()
        self.calls += 1
        self._table(states.shape[1])
        return states * self.factor

    def _table(self, length: int) -> None:
        self.tables[length] = torch.arange(length)


def writing() -> Any:
    model = llama()
    model.model.layers[0].mlp.act_fn = nn.Sequential(model.model.layers[0].mlp.act_fn, Writing())
    return model


def test_what_a_forward_writes_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = writing(), []
    monkeypatch.setattr(LANGUAGE_COPY, lambda model: made.append(1) or decoder_copy(model))
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore()))

    def stream(length: int) -> Tensor:
        return torch.cat(list(manager.stream(WHOLE[:, :length], backend="eager", **GREEDY)), 1)

    for length in (30, 30, 20):
        assert torch.equal(stream(length), said(model, WHOLE[:, :length]))
    manager.add_prefix("p", PREFIX)
    settled, known = signature_of(model), model_fingerprint(model)
    made.clear()
    for length in (10, 25, 30):
        stream(length)
        assert signature_of(model) is settled
        assert model_fingerprint(model) == known
    assert made == []
    model.model.layers[0].mlp.act_fn[1].factor = 2.0  # which no forward writes
    assert signature_of(model) is not settled
    assert torch.equal(stream(30), said(model))


class Steering(nn.Module):
    """Adds what it is told to; it stores nothing itself, though it writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.vector: Tensor | None = torch.zeros(64)
        self.vectors: dict[str, Tensor] = {}

    def forward(self, states: Tensor) -> Tensor:
        states = states.clone()
        for vector in (self.vector, *self.vectors.values()):
            if vector is not None:
                states[:, :] += vector
        return states


@torch.no_grad()
def written_into(steering: Any, vector: Tensor) -> None:
    steering.vector.copy_(vector)


STEERS: dict[str, Callable[[Any, Tensor], None]] = {
    "set": lambda steering, vector: setattr(steering, "vector", vector),
    "in place": written_into,
    "in a dict": lambda steering, vector: steering.vectors.update(a=vector),
    "set and taken away": lambda steering, vector: setattr(
        steering, "vector", vector if steering.vector is None else None
    ),
}


@pytest.mark.parametrize("steer", STEERS)
def test_what_somebody_sets_while_tokens_come_is_no_state(steer: str) -> None:
    model, drawn = llama(), torch.Generator().manual_seed(0)
    steering = Steering()
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, steering)
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore()))
    manager.add_prefix("p", PREFIX)

    class Schedule:
        def put(self, tokens: Tensor) -> None:
            STEERS[steer](steering, torch.randn(64, generator=drawn))

        def end(self) -> None:
            pass

    manager.generate(WHOLE, streamer=Schedule(), **GREEDY)
    for _ in range(2):
        STEERS[steer](steering, 5 * torch.randn(64, generator=drawn))
        found = manager.generate(REST, prefix="p", **GREEDY)[:, WHOLE.shape[1] :]
        assert torch.equal(found, said(model))


def test_what_code_stores_is_read_from_it() -> None:
    def code(self: Any, states: Any) -> Any:
        self.assigned = self.counted.deep = 1
        self.added += self.read
        self.entries[states.shape[0]] = torch.arange(3, device=self.read.device)
        self.tensor[:, self.read : self.read + 2] += self.read[0]
        self.nested["a"][3] = self.read
        self.listed.append(self.read.mean(dim=self.read))
        self.filled.copy_(self.read)
        local = self.by_way
        local[0] = self.read
        states[:, -1] += self.read
        out = torch.cat([self.read, states])
        out[0] = self.read + 1
        out.add_(self.read)
        return [self.inner.pop(one) for one in self.read]

    expected = {"assigned", "deep", "added", "entries", "tensor", "nested", "listed", "filled", "by_way", "inner"}
    assert stored_by([code]) == expected  # type: ignore[list-item]  # of functions


def test_what_somebody_changes_during_a_run_is_no_state() -> None:
    model = llama()
    manager = KVCacheManager(model)

    class Changing:
        def put(self, tokens: Tensor) -> None:
            model.model.norm.variance_epsilon += 1.0
            model.model.layers[0].self_attn.scaling += 1.0

        def end(self) -> None:
            pass

    for _ in range(4):
        before = signature_of(model)
        manager.generate(WHOLE, streamer=Changing(), **GREEDY)
        assert signature_of(model) is not before


def test_a_change_under_a_running_stream_counts_from_the_next_request_on() -> None:
    model, changed = llama(), llama()
    CHANGES["another parameter"].change(changed)
    manager = KVCacheManager(model)
    expected, then = said(model), said(changed)
    assert not torch.equal(expected, then)
    stream = manager.stream(WHOLE, backend="eager", chunk_size=2, **GREEDY)
    first = next(stream)
    CHANGES["another parameter"].change(model)
    assert torch.equal(torch.cat([first, *stream], 1), expected)  # it ends as it began
    assert torch.equal(torch.cat(list(manager.stream(WHOLE, backend="eager", **GREEDY)), 1), then)
    late = manager.stream(WHOLE, backend="eager", **GREEDY)  # a request begins with its first token
    CHANGES["another parameter"].change(model)
    assert torch.equal(torch.cat(list(late), 1), expected)


# ---------------------------------------------------------------------- what is made from a model


def test_what_follows_is_made_once_and_again_after_a_change() -> None:
    model, made = llama(), []
    following = Following(model, lambda: made.append(1) or len(made))
    assert [following.now(), following.now()] == [1, 1]
    in_place(model)
    assert [following.now(), following.now()] == [2, 2]


def test_what_cannot_be_made_is_tried_again() -> None:
    model = llama()
    manager = KVCacheManager(model, TOVA(200))
    model.set_attn_implementation("eager")
    for _ in range(2):
        with pytest.raises(PolicyError, match="'eager' attention"):
            manager.generate(WHOLE, **GREEDY)
    model.set_attn_implementation("sdpa")
    assert torch.equal(manager.generate(WHOLE, **GREEDY)[:, WHOLE.shape[1] :], said(model))


@pytest.mark.parametrize("cycle", [False, True])
def test_a_model_is_let_go_of_with_its_manager(cycle: bool) -> None:
    model = llama()
    if cycle:  # it holds itself
        model.forward = types.MethodType(type(model).forward, model)
        model.model.norm.register_forward_hook(partial(lambda model, *_: None, model))
    manager = KVCacheManager(model)
    list(manager.stream(WHOLE, backend="eager", **GREEDY))
    gone = weakref.ref(model)
    del manager, model
    gc.collect()
    assert gone() is None


def test_weights_that_a_model_lets_go_of_are_free() -> None:
    model = llama()
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore()))
    manager.add_prefix("p", PREFIX)
    head = model.lm_head
    old = weakref.ref(head.weight.untyped_storage()), weakref.ref(head.weight)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    gc.collect()
    assert [one() for one in old] == [None, None]


@pytest.mark.parametrize("change", ["half", "loaded"])
def test_parameters_of_a_model_that_is_watched_can_be_swapped(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """`torch.utils.swap_tensors` refuses tensors with weak references."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model, other = llama(), llama()
    in_place(other)
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore()))
    manager.add_prefix("p", PREFIX)
    before, named = signature_of(model), model_fingerprint(model)
    if change == "half":
        model.half()
    else:
        model.load_state_dict(other.state_dict())
    assert signature_of(model) is not before
    assert model_fingerprint(model) != named
    found = manager.generate(REST, prefix="p", **GREEDY)[:, WHOLE.shape[1] :]
    assert torch.equal(found, said(model))


@pytest.mark.parametrize("backend", ["graph", "compile"])
def test_hooks_keep_steps_in_python(backend: Any) -> None:
    model = hooked()
    manager = KVCacheManager(model)
    assert torch.equal(torch.cat(list(manager.stream(WHOLE, backend=backend, **GREEDY)), 1), said(model))
    report = manager.report()
    assert (report.backend, report.fallback) == ("eager", "hooks on model.layers.0.mlp run in Python")


def test_an_engine_that_cannot_be_copied_falls_back_with_the_reason() -> None:
    model = llama()
    CHANGES["an object bound"].change(model)
    manager = KVCacheManager(model)
    assert torch.equal(torch.cat(list(manager.stream(WHOLE, backend="eager", **GREEDY)), 1), said(model))
    assert "the forward on model.layers.0 is a Negating" in str(manager.report().fallback)
    with pytest.raises(PolicyError, match=r"cannot be copied .* is a Negating"):
        KVCacheManager(model, TOVA(20))


def test_windows_reach_into_compiled_parts() -> None:
    """Masks come by hooks, which a compiled module need not run: a window's model is run as a copy that is not."""
    plain, model = llama(), llama()
    CHANGES["a layer compiled"].change(model)
    expected, found = (KVCacheManager(one, SlidingWindow(8)).generate(WHOLE, **GREEDY) for one in (plain, model))
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------- copies


def copied(module: nn.Module) -> Any:
    return structural_copy(module, lambda name, part: None)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.listed = [self.second]
        self.collected: list[Tensor] = []

    def forward(self, states: Tensor) -> Tensor:
        return self.listed[0](self.first(states))


BOUND: dict[str, Callable[[Any], Any]] = {
    "a method": lambda m: types.MethodType(lambda self, states: self.second(states) * 2, m),
    "a partial": lambda m: partial(lambda self, states: self.second(states) * 2, m),
    "a closure": lambda m: lambda states: m.second(states) * 2,
    "a closure over its forward": lambda m, old=None: (lambda old: lambda states: old(states) * 2)(m.forward),
}


@pytest.mark.parametrize("kind", BOUND)
def test_what_is_bound_to_a_module_is_bound_to_its_copy(kind: str) -> None:
    module, states = Pair(), torch.randn(2, 3)
    module.forward = BOUND[kind](module)
    assert signature_of(module).why_no_copy is None
    new = copied(module)
    assert torch.equal(new(states), module(states))
    new.second.weight = nn.Parameter(torch.zeros(3, 3))  # of the copy alone
    assert not torch.equal(new(states), module(states))


def test_a_copy_holds_its_own_parts_and_shares_what_hooks_collect() -> None:
    module, seen = Pair(), []
    module.first.register_forward_hook(lambda _, given, out: seen.append(module.second) or module.collected.append(out))
    new = copied(module)
    assert new.listed[0] is new.second is not module.second
    new(torch.randn(2, 3))
    assert seen == [new.second]
    assert new.collected is module.collected
    assert len(new.collected) == 1


HIDING: Any = None


def through_a_global(states: Tensor) -> Tensor:
    return HIDING.second(states)


def test_what_is_hidden_is_a_reason() -> None:
    global HIDING
    module = HIDING = Pair()
    module.forward = through_a_global
    assert "global name 'HIDING'" in str(signature_of(module).why_no_copy)
    module.forward = lambda states, held=module: held.second(states)
    assert "as a default" in str(signature_of(module).why_no_copy)
    held = [module]
    module.forward = lambda states: held[0].second(states)
    assert "in a list" in str(signature_of(module).why_no_copy)
    HIDING = None


def test_a_parametrized_model_is_copied() -> None:
    module, states = Pair(), torch.randn(2, 3)
    parametrize.register_parametrization(module.first, "weight", nn.Tanh())
    assert torch.equal(copied(module)(states), module(states))


# ---------------------------------------------------------------------- names


def test_a_model_with_hooks_has_no_name(tmp_path: Any) -> None:
    prefix_cache = SpeakerCache(DiskStore(tmp_path, "1GiB"))
    manager = KVCacheManager(hooked(), prefix_cache=prefix_cache)
    for ask in (
        lambda: manager.add_prefix("p", PREFIX),
        lambda: manager.save(manager.new_cache()),
        lambda: model_fingerprint(manager.model),
    ):
        with pytest.raises(InputError, match=r"hooks on model\.layers\.0\.mlp may change what it computes"):
            ask()
    assert prefix_cache.stats().built == 0
    prefix_cache.close()


def test_a_hook_that_is_marked_as_an_onlooker_changes_nothing() -> None:
    model, seen = llama(), []
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore()))
    manager.add_prefix("p", PREFIX)
    before = signature_of(model), model_fingerprint(model)
    model.model.norm.register_forward_hook(looks_on(lambda module, given, out: seen.append(out.shape[1])))
    model.model.norm.register_forward_hook(looks_on(Onlooker().see))
    assert (signature_of(model), model_fingerprint(model)) == before
    found = manager.generate(REST, prefix="p", **GREEDY)
    assert torch.equal(found[:, WHOLE.shape[1] :], said(model))
    assert seen[0] == REST.shape[1]


class Onlooker:
    def see(self, module: nn.Module, given: Any, out: Tensor) -> None:
        """Nothing to do."""


def test_a_class_whose_forward_was_replaced_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before, watch = model_fingerprint(model), watch_of(model)
    kind = type(model.model.layers[0].mlp)
    old = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, states: -old(self, states))
    assert signature_of(model) is watch.signature()
    with pytest.raises(InputError, match="not its class's"):
        model_fingerprint(model)
    monkeypatch.undo()
    assert model_fingerprint(model) == before


def test_attributes_are_part_of_the_name_or_refused() -> None:
    def named(value: Any) -> str:
        module = nn.Linear(2, 2)
        module.weight.data.zero_()
        module.bias.data.zero_()
        module.kept = value
        return model_fingerprint(module)

    values = [1, 2.0, "a", [1], [1, 2], {"a": 1}, {"a": 2}, {3, 4}, torch.relu, nn.functional.silu, nn.Linear]
    values += [torch.float16, torch.ones(2), torch.zeros(2), partial(nn.functional.silu, inplace=True), named.__class__]
    assert len({named(value) for value in values}) == len(values)
    assert named({4, 3}) == named({3, 4})
    for value in (lambda x: x, object(), torch.Generator()):
        with pytest.raises(InputError, match="kept is a"):
            named(value)


@pytest.mark.filterwarnings("ignore")  # torch's own quantization is to go
def test_packed_weights_of_torch_are_part_of_the_name() -> None:
    def quantized(seed: int) -> str:
        torch.manual_seed(seed)
        return model_fingerprint(torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}))

    assert quantized(1) == quantized(1) != quantized(2)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_state_of_a_quantized_weight_is_part_of_the_name(scale: float) -> None:
    module = nn.Linear(2, 2, bias=False)
    module.weight.data.fill_(1)
    without = model_fingerprint(module)
    module.weight.quant_state = types.SimpleNamespace(absmax=torch.full((2,), scale), blocksize=2)
    named = model_fingerprint(module)
    assert named != without
    module.weight.quant_state.absmax = torch.full((2,), 3.0)
    assert model_fingerprint(module) != named


def test_compiled_it_has_the_same_name() -> None:
    model = llama()
    before = model_fingerprint(model)
    assert model_fingerprint(torch.compile(model, backend="eager")) == before
    CHANGES["a layer compiled"].change(model)
    assert model_fingerprint(model) == before
    forget(model)
    assert model_fingerprint(model) == before


# ---------------------------------------------------------------------- W11: fewer bits for plain layers only


class LoRALinear(nn.Linear):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.down, self.up = (nn.Parameter(torch.randn(*shape) * 0.3) for shape in ((4, 64), (self.out_features, 4)))

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) + states @ self.down.t() @ self.up.t()


class Reordered(nn.Linear):
    """Says what its base says, as Falcon's layers do."""

    def forward(self, states: Tensor) -> Tensor:
        return states @ self.weight.T


def test_w11_layers_that_do_more_stay_as_they_are() -> None:
    model = llama()
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.q_proj = LoRALinear(attention.q_proj)
    mlp.down_proj.register_forward_hook(lambda _, given, out: out + 1)
    mlp.up_proj.forward = types.MethodType(lambda self, states: -type(self).forward(self, states), mlp.up_proj)
    parametrize.register_parametrization(attention.o_proj, "weight", nn.Tanh())
    same = Reordered(64, 32, bias=False)
    same.weight = attention.k_proj.weight
    attention.k_proj = same
    new = quantize_linear(model, "int8")
    kept = [name for name, part in new.model.layers[1].named_modules() if isinstance(part, nn.Linear)]
    assert sorted(kept) == ["mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"]
    assert isinstance(new.model.layers[1].self_attn.k_proj, PackedLinear)
    with torch.no_grad():
        ours, theirs = (one(WHOLE).logits.flatten() for one in (new, model))
        plain = quantize_linear(llama(), "int8")(WHOLE).logits.flatten()
    # Rounding to 8 bits moves these logits by about a tenth of their size; what was dropped, by all of it.
    assert float((ours - theirs).norm() / theirs.norm()) < 0.25 < float((plain - theirs).norm() / theirs.norm())


def test_w11_nothing_plain_is_refused() -> None:
    model = nn.Sequential(LoRALinear(nn.Linear(64, 64)), LoRALinear(nn.Linear(64, 64)))
    with pytest.raises(InputError, match="none of the 2 linear layers"):
        quantize_linear(model, "int8")


def test_w11_adapters_stay_as_they_are() -> None:
    model = CHANGES["another adapter"].make()
    new = quantize_linear(model, "int8")
    kept = {name.rpartition(".")[2] for name, part in new.named_modules() if isinstance(part, nn.Linear)}
    assert {"base_layer", "one", "two"} <= kept
    assert any(isinstance(part, PackedLinear) for part in new.modules())
    with torch.no_grad():
        ours, theirs = (one(input_ids=WHOLE).logits.flatten() for one in (new, model))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.25


def test_w11_what_cannot_be_copied_is_refused() -> None:
    model = llama()
    CHANGES["an object bound"].change(model)
    with pytest.raises(InputError, match="cannot be copied to compute in int8"):
        quantize_linear(model, "int8")
    assert quantize_linear(model, "fp32") is model


def test_a_copy_in_fewer_bits_is_of_the_moment() -> None:
    model = build("llama")
    new = quantize_linear(model, "int8")
    with torch.no_grad():
        before = new(WHOLE).logits
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
        assert torch.equal(new(WHOLE).logits, before)
    manager = KVCacheManager(new)
    assert torch.equal(manager.generate(WHOLE, **GREEDY)[:, WHOLE.shape[1] :], said(new))


# ---------------------------------------------------------------------- adapters by row


def test_adapters_by_row_have_no_prefix_in_common() -> None:
    model = CHANGES["another adapter"].make()
    manager = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore()))
    manager.add_prefix("p", PREFIX)
    with pytest.raises(InputError, match="prefix or adapter_names"):
        manager.generate(input_ids=REST.expand(2, -1), prefix="p", adapter_names=["one", "two"], **GREEDY)
    with model.disable_adapter():
        found = manager.generate(input_ids=REST, prefix="p", **GREEDY)
        assert torch.equal(found[:, WHOLE.shape[1] :], said(model))
