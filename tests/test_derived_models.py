"""A class of one's own that derives from one of upstream's is served as that one is, from whatever module it comes."""

import sys
from types import ModuleType

import pytest
import torch
from support.inside.speech import StandIn, aligned_heads, is_checked
from support.t3_models import tiny_t3

from kvcache import InputError, MemoryStore, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine, random_conditionals, stand_in
from kvcache_chatterbox.upstream import beside, needed_beside

pytestmark = pytest.mark.one_release

KINDS = ["english", "multilingual", "gpt"]


class MyTTS(StandIn):
    """Nothing of its own."""


def derived(t3):
    """The same model, of a class in this module."""
    same = tiny_t3("multilingual" if t3.hp.is_multilingual else "gpt" if t3.is_gpt else "english")
    same.load_state_dict(t3.state_dict())
    same.__class__ = type("MyT3", (type(t3),), {"__module__": __name__})
    return same


def said(tts, **given):
    """Samples of a short text, in the language that some variants ask for."""
    engine = ChatterboxEngine(tts, prefix_cache=SpeakerCache(MemoryStore("32MiB")))
    torch.manual_seed(0)
    return engine.generate("hello there. My  friend", language_id="en", max_new_tokens=12, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_upstreams_says(kind):
    t3 = tiny_t3(kind)
    assert torch.equal(said(MyTTS(derived(t3), 0)), said(stand_in(t3)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_checked_where_upstreams_is(kind):
    t3 = tiny_t3(kind)
    assert is_checked(derived(t3)) == is_checked(t3) == (kind == "multilingual")
    if kind == "multilingual":
        assert aligned_heads(derived(t3)) == aligned_heads(t3)


@pytest.mark.parametrize("kind", KINDS)
def test_its_voices_are_kept_and_read(kind, tmp_path):
    t3 = tiny_t3(kind)
    first, second = (ChatterboxEngine(stand_in(one)) for one in (t3, derived(t3)))
    assert type(random_conditionals(second.t3)) is type(random_conditionals(t3))
    first.add_voice("ann", conditionals=random_conditionals(t3))
    first.voices.export("ann", tmp_path / "ann.safetensors")
    assert second.voices.load(tmp_path / "ann.safetensors") == "ann"


def test_what_upstreams_methods_read_is_their_own_modules(monkeypatch):
    module = ModuleType("somebodys")
    module.punc_norm = lambda text: "mine"
    monkeypatch.setitem(sys.modules, "somebodys", module)
    mine = type("Mine", (StandIn,), {"__module__": "somebodys"})(tiny_t3("english"), 0)
    assert beside(mine, "punc_norm") is beside(stand_in(tiny_t3("english")), "punc_norm")
    assert beside(mine, "SOMETHING", 3) == 3
    with pytest.raises(InputError, match="int is no model of chatterbox: there is no T3Cond"):
        needed_beside(1, "T3Cond")
