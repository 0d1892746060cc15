"""A model that has changed is another model: its fingerprint, and never a wrong prefix."""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import build, token_ids
from support.inside.models import TENSOR_DIGEST, TRANSFORMERS_VERSION, fingerprinted, tensor_digest
from support.prefixes import (
    CLOSE,
    GREEDY,
    PREFIX,
    TEXT,
    after,
    assert_holds,
    cold,
    forwarded,
    held_states,
    in_memory,
    in_place,
    manager,
    weight,
)
from support.searching import search
from torch import Tensor, nn

from kvcache import (
    DiskStore,
    KVCacheManager,
    MemoryStore,
    PrefixKey,
    PrefixSnapshot,
    SpeakerCache,
    TieredStore,
    model_fingerprint,
)
from kvcache.models import forget

# ---------------------------------------------------------------------- fingerprints


def fresh_print(model: nn.Module) -> str:
    """The fingerprint of a model that is read now, whatever was known."""
    forget(model)
    return model_fingerprint(model)


@torch.no_grad()
def through_a_view(model: Any) -> None:
    weight(model).detach().view(-1)[7].neg_()


def loaded(model: Any, assign: bool = False) -> None:
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states["model.norm.weight"][0] += 1
    model.load_state_dict(states, assign=assign)


def another_parameter(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight = nn.Parameter(weight(model) * 2)


def another_tensor_behind_it(model: Any) -> None:
    weight(model).data = weight(model) * 3


def turned_where_it_lies(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.t())


def an_optimizers_step(model: Any) -> None:
    weight(model).requires_grad_().grad = torch.ones_like(weight(model))
    torch.optim.AdamW([weight(model)], lr=0.1).step()


@torch.no_grad()
def a_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq[1] *= 2


def rope_settings(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 20000.0}


def two_layers_swapped(model: Any) -> None:
    layers = model.model.layers
    layers[0].self_attn, layers[1].self_attn = layers[1].self_attn, layers[0].self_attn


def switch(name: str, value: Any, model: Any) -> None:
    setattr(model.model.layers[1].self_attn.q_proj, name, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": in_place,
    "through a view": through_a_view,
    "loaded": loaded,
    "loaded by assignment": partial(loaded, assign=True),
    "another parameter": another_parameter,
    "turned where it lies": turned_where_it_lies,
    "another tensor behind it": another_tensor_behind_it,
    "an optimizer's step": an_optimizers_step,
    "a buffer": a_buffer,
    "half and back": lambda model: model.half().float(),
    "bfloat16": lambda model: model.bfloat16(),
    "one dtype of many": lambda model: model.lm_head.double(),
    "tied": lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "rope settings": rope_settings,
    "another setting": lambda model: setattr(model.config, "rms_norm_eps", 1e-2),
    "layers swapped": two_layers_swapped,
    "an activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Tanh()),
    "another activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Sigmoid()),
    "adapter chosen": partial(switch, "_active_adapter", ["voice"]),
    "another adapter": partial(switch, "_active_adapter", ["other"]),
    "adapters off": partial(switch, "_disable_adapters", True),
    "adapter merged": partial(switch, "merged_adapters", ["voice"]),
    "adapter scaled": partial(switch, "scaling", {"voice": 0.5}),
    "adapter scaled more": partial(switch, "scaling", {"voice": 2.0}),
    "adapters off elsewhere": lambda model: setattr(model.model.layers[0].self_attn.q_proj, "_disable_adapters", True),
    "adapter for another": lambda model: setattr(model.model.layers[1].self_attn.k_proj, "_active_adapter", ["voice"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    model = build("llama")
    before = model_fingerprint(model)
    CHANGES[change](model)
    noticed = model_fingerprint(model)
    assert noticed != before
    assert fresh_print(model) == noticed  # what is remembered is what is read
    elsewhere = build("llama")
    CHANGES[change](elsewhere)
    assert model_fingerprint(elsewhere) == noticed
    assert model_fingerprint(build("llama")) == before


def test_no_two_changes_look_the_same() -> None:
    found = {"none": model_fingerprint(build("llama"))}
    for name, change in CHANGES.items():
        if name == "loaded by assignment":  # what "loaded" makes, by another way
            continue
        model = build("llama")
        change(model)
        found[name] = model_fingerprint(model)
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "bloom"])
def test_any_one_weight_matters(name: str) -> None:
    model = build(name)
    before = model_fingerprint(model)
    found = [before]
    with torch.no_grad():
        for number, parameter in enumerate((*model.parameters(), *model.buffers())):
            flat = parameter.view(-1)
            at = (7919 * number) % flat.numel()
            old = flat[at].clone()
            flat[at] = old + 1 if not parameter.is_floating_point() else torch.nextafter(old, old + 1)  # the last bit
            found.append(model_fingerprint(model))
            flat[at] = old
    assert len(set(found)) == len(found)
    assert model_fingerprint(model) == before  # it is what it was, though it was touched


def test_the_same_weights_elsewhere_are_the_same_model() -> None:
    model = build("llama")
    same = model_fingerprint(model)
    assert model_fingerprint(build("llama")) == model_fingerprint(copy.deepcopy(model)) == same
    for there_and_back in (lambda m: m.double().float(), lambda m: m.train().eval(), lambda m: m.requires_grad_()):
        there_and_back(model)
        assert model_fingerprint(model) == same
    for name, value in {"_name_or_path": "elsewhere", "use_cache": False, "return_dict": False}.items():
        setattr(model.config, name, value)  # how it was loaded and what it returns is not what it computes
    assert model_fingerprint(model) == same
    with torch.inference_mode():
        assert model_fingerprint(build("llama")) == same
    other = build("llama", "eager")
    assert model_fingerprint(other) != same
    other.set_attn_implementation("sdpa")
    assert model_fingerprint(other) == same


def test_another_release_of_transformers_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = model_fingerprint(model)
    monkeypatch.setattr(TRANSFORMERS_VERSION, "9.0.0")
    assert fresh_print(model) != before


def test_bytes_alone_do_not_make_a_tensor() -> None:
    def module(tensor: Tensor, name: str = "held") -> nn.Module:
        made = nn.Module()
        made.register_buffer(name, tensor)
        return made

    zeros = torch.zeros(2, 3)
    different = [zeros, zeros.int(), zeros.reshape(3, 2), zeros.reshape(6), torch.zeros(2, 4), torch.tensor(0.0)]
    different += [torch.zeros(0), torch.zeros(0, 3), zeros.bool(), zeros.bfloat16(), zeros.half()]
    found = [model_fingerprint(module(tensor)) for tensor in different]
    found += [model_fingerprint(module(zeros, "other")), model_fingerprint(nn.Module())]
    assert len(set(found)) == len(found)
    strided = torch.arange(6.0).reshape(3, 2).t()
    assert model_fingerprint(module(strided)) == model_fingerprint(module(strided.contiguous()))
    assert model_fingerprint(module(strided)) != model_fingerprint(module(strided.t().contiguous().reshape(2, 3)))


def test_an_unchanged_model_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = build("llama"), []

    def counting(tensor: Tensor) -> str:
        read.append(1)
        return tensor_digest(tensor)

    monkeypatch.setattr(TENSOR_DIGEST, counting)
    tensors = len([*model.parameters(), *model.buffers()])

    def reads(ask: Callable[[], Any]) -> int:
        read.clear()
        ask()
        return len(read)

    asked = partial(model_fingerprint, model)
    assert reads(asked) == tensors
    assert reads(asked) == 0
    kv = KVCacheManager(model, prefix_cache=in_memory())
    assert reads(lambda: kv.add_prefix("p", PREFIX)) == 0
    assert reads(lambda: kv.generate(TEXT, prefix="p", **GREEDY)) == 0
    in_place(model)
    assert reads(asked) == tensors
    assert reads(asked) == 0
    forget(model)
    assert reads(asked) == tensors
    forget(nn.Linear(2, 2))  # one that was never asked about


def test_what_torch_does_not_notice_is_noticed_after_forget() -> None:
    model = build("llama")
    before = model_fingerprint(model)
    weight(model).data[0, 0] += 1
    assert model_fingerprint(model) == before  # as documented
    forget(model)
    assert model_fingerprint(model) != before


def test_memory_that_was_freed_and_taken_again_is_another() -> None:
    """A weight that is replaced in a loop often lands where the last one was, as new as it was."""
    model, found, kept = nn.Linear(64, 64, bias=False), set(), []
    for i in range(60):
        tensor = torch.full((64, 64), float(i))
        if i < 20:
            model.weight.data = tensor
        elif i < 40:
            model.weight = nn.Parameter(tensor)
        else:  # the last one lives on
            model.weight.data = tensor
            kept.append(tensor)
        found.add(model_fingerprint(model))
    assert len(found) == 60


def test_a_model_that_is_gone_is_not_kept() -> None:
    model = build("llama")
    model_fingerprint(model)
    assert model in fingerprinted
    held = len(fingerprinted)
    del model
    import gc

    gc.collect()
    assert len(fingerprinted) < held


# ---------------------------------------------------------------------- never a wrong prefix


LENGTH = 18
TEXTS = [token_ids(1, LENGTH, seed=40)[0]]
TEXTS += [
    torch.cat((TEXTS[0][:9], token_ids(1, LENGTH - 9, seed=41)[0])),
    torch.cat((TEXTS[0][:1], token_ids(1, LENGTH - 1, seed=42)[0])),
    token_ids(1, LENGTH, seed=43)[0],
]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@cache
def zoo() -> list[Any]:
    """Models that look the same: two that are, and one each of another weight, attention implementation and dtype."""
    models = [build("llama", attention, **SMALL) for attention in ("sdpa", "sdpa", "sdpa", "eager", "sdpa", "sdpa")]
    with torch.no_grad():
        for i in (2, 5):
            models[i].model.layers[0].self_attn.k_proj.weight[2, 3] += 0.5
    for i in (4, 5):
        models[i].bfloat16()
    return models


def identity(model: Any) -> tuple[Any, ...]:
    """All that tells these models apart, read anew."""
    states = tuple(
        (name, str(t.dtype), t.view(torch.uint8).numpy().tobytes()) for name, t in model.state_dict().items()
    )
    return model.config._attn_implementation, states


class Watched(SpeakerCache):
    """Keeps what was asked for and what was served."""

    served: list[tuple[PrefixKey, PrefixSnapshot]]

    def get_or_extend(
        self, key: PrefixKey, extend: Callable[[PrefixSnapshot | None], PrefixSnapshot]
    ) -> PrefixSnapshot:
        found = super().get_or_extend(key, extend)
        self.served.append((key, found))
        return found


REQUESTS = st.tuples(
    st.sampled_from([*["add"] * 6, *["generate"] * 4, "change", "change", "change back", "evict", "pin"]),
    st.integers(0, 5),  # model
    st.integers(0, len(TEXTS) - 1),
    st.sampled_from([5, 9, LENGTH]),
)


@pytest.mark.search
def test_what_is_served_is_what_this_model_computes_for_this_prefix() -> None:
    """Models and prompts as alike as can be share stores that are too small for them; some change between requests."""
    total: Counter[str] = Counter()
    names: dict[tuple[Any, ...], str] = {}

    def serve(requests: list[tuple[str, int, int, int]], write_behind: bool) -> None:
        models = zoo()
        originals = [weight(model).clone() for model in models]
        # A whole text takes 5 KB in fp32, and a file one more: memory holds one of them, the disk a few.
        with tempfile.TemporaryDirectory() as folder:
            store = TieredStore(MemoryStore("8KB"), DiskStore(folder, "40KB"), write_behind=write_behind)
            prefix_cache = Watched(store)
            prefix_cache.served = []
            managers = [KVCacheManager(model, prefix_cache=prefix_cache) for model in models]
            try:
                for what, i, text, length in requests:
                    answer(managers[i], what, text, length, originals[i])
                total.update({f"hit {tier}": n for tier, n in prefix_cache.stats().hits.items()})
                stats = prefix_cache.stats()
                asked = {key for key, _ in prefix_cache.served}
                total.update(extended=stats.extended, built=stats.built, refused=stats.refused)
                total.update(again=max(0, stats.built + stats.extended - len(asked)))
                assert stats.nbytes["memory"] <= 8_000
                assert stats.nbytes["disk"] <= 40_000
            finally:
                prefix_cache.close()
                with torch.no_grad():
                    for model, original in zip(models, originals, strict=True):
                        weight(model).copy_(original)

    def answer(kv: KVCacheManager, what: str, text: int, length: int, original: Tensor) -> None:
        model, ids, name = kv.model, TEXTS[text][:length], f"{text}:{length}"
        prefix_cache = kv.prefix_cache
        assert isinstance(prefix_cache, Watched)
        if what.startswith("change"):
            with torch.no_grad():
                weight(model).copy_(original)
                if what == "change":
                    weight(model)[text, length] += 0.5
            return
        if name not in kv.prefixes:  # else it is the model as it is now that must answer for what was added before
            kv.add_prefix(name, ids, pin=what == "pin")
        key = PrefixKey(model_fingerprint(model), ids)
        assert names.setdefault(identity(model), key.model) == key.model
        assert len(set(names.values())) == len(names)
        if what == "evict":
            prefix_cache.evict(key)
        held = kv.new_cache(1, prefix=name)
        assert prefix_cache.served[-1][0] == prefix_cache.served[-1][1].key == key
        # 1e-4 in fp32, for keys and values of size 1 to 10: what began with another prefix was computed in two parts,
        # and products of other shapes add up in another order. In bfloat16 that order shows in the last of 8 bits.
        close = CLOSE if model.dtype == torch.float32 else 0.1
        for ours, expected in zip(held_states(held), cold(model, ids), strict=True):
            assert ours.dtype == expected.dtype == model.dtype
            assert (ours - expected).abs().max() < close
        if what == "generate" and model.dtype == torch.float32:  # in bfloat16 the order of sums may decide a draw
            asked = {"max_new_tokens": 3, "do_sample": False}
            assert torch.equal(kv.generate(TEXT, prefix=name, **asked), model.generate(after(ids), **asked))

    given(st.lists(REQUESTS, min_size=20, max_size=30), st.booleans())(search(30)(serve))()
    # The search went where it was meant to: to all tiers, to beginnings, and to what had been evicted.
    assert total["refused"] == 0
    for way in ("hit memory", "hit disk", "extended", "built", "again"):
        assert total[way] > 3, total


@pytest.mark.parametrize(
    "change", ["in place", "another parameter", "a buffer", "half and back", "attention", "loaded"]
)
def test_a_model_that_has_changed_is_asked_again(change: str) -> None:
    model = build("llama")
    kv = manager(model)
    kv.generate(TEXT, prefix="p", **GREEDY)
    CHANGES[change](model)
    with forwarded(model) as counts:
        assert_holds(kv, "p", PREFIX)
        assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), model.generate(after(PREFIX), **GREEDY))
    assert counts[:3] == [13, 13, 9]  # ours, the reference, and then ours without it
    assert kv.prefix_cache.stats().built == 2
