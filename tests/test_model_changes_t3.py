"""A T3 that changes under its engine: speech is that of the model as it is, with what was known of voices computed anew."""

import types
from typing import Any

import pytest
import torch
from support.t3_models import UPSTREAMS_WARNINGS, tiny_t3

from kvcache import MemoryStore, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine, byte_tokens, random_conditionals

pytestmark = UPSTREAMS_WARNINGS
TEXT = "hello there my friend"


def spoken(engine: Any, t3: Any, **who: Any) -> torch.Tensor:
    given = {"text_tokens": byte_tokens(t3, TEXT), "max_new_tokens": 16, "seed": 0, **who}
    return torch.cat(list(engine.inference_stream(**given)), 1)


@torch.no_grad()
def weights(t3: Any) -> None:
    t3.load_state_dict({name: tensor * -60 if "v_proj" in name else tensor.clone() for name, tensor in t3.state_dict().items()}, assign=True)  # fmt: skip


def hook(t3: Any) -> None:
    t3.tfmr.layers[1].mlp.register_forward_hook(lambda module, given, out: out * -60)


def head(t3: Any) -> None:
    t3.speech_head = torch.nn.Linear(t3.dim, t3.speech_head.out_features, bias=False)
    torch.nn.init.normal_(t3.speech_head.weight, generator=torch.Generator().manual_seed(4))


def bound(t3: Any) -> None:
    t3.tfmr.forward = types.MethodType(type(t3.tfmr).forward, t3.tfmr)
    weights(t3)


class Negating:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) * -60


def unknown(t3: Any) -> None:
    mlp = t3.tfmr.layers[0].mlp
    mlp.forward = Negating(mlp.forward)


FALLS_BACK = {"unknown": "is a Negating"}


@pytest.mark.grid(4)
@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("change", [weights, hook, head, bound, unknown], ids=lambda one: one.__name__)
def test_an_engine_follows_its_model(change: Any, backend: Any) -> None:
    t3, bare = tiny_t3("english"), tiny_t3("english")
    voice = random_conditionals(t3)
    change(bare)
    plain = ChatterboxEngine(bare, backend="off", reuse="none", onednn=False)
    expected = spoken(plain, bare, t3_cond=voice)
    engine = ChatterboxEngine(t3, backend=backend, prefix_cache=SpeakerCache(MemoryStore()), onednn=False)
    engine.add_voice("v", conditionals=voice)
    before = spoken(engine, t3, voice="v"), spoken(engine, t3, t3_cond=voice)
    assert torch.equal(*before)
    assert not torch.equal(before[0], expected)
    change(t3)
    assert torch.equal(spoken(engine, t3, t3_cond=voice), expected)
    assert torch.equal(spoken(engine, t3, voice="v"), expected)
    engine.add_voice("w", conditionals=voice)
    assert torch.equal(spoken(engine, t3, voice="w"), expected)
    assert FALLS_BACK.get(change.__name__, "") in str(engine.report().fallback)
    if change is hook and backend == "graph":
        assert "hooks on tfmr.layers.1.mlp run in Python" in str(engine.report().fallback)
