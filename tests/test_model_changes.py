"""A model that changes under a manager: every feature says what the model, as it is now, says without kvcache, or refuses.

The table of changes says which of both. Each change is made before anything was made from the model, and after.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.changes import CHANGES, GREEDY, PREFIX, REST, WHOLE, hooked, llama, said
from support.inside.models import unwrapped
from torch import Tensor

from kvcache import TOVA, KVCacheError, KVCacheManager, MemoryStore, SpeakerCache


def generate(manager: KVCacheManager) -> Tensor:
    return manager.generate(input_ids=WHOLE, **GREEDY)[:, WHOLE.shape[1] :]


def prefix(manager: KVCacheManager) -> Tensor:
    if not manager.prefixes:
        manager.add_prefix("p", PREFIX)
    return manager.generate(input_ids=REST, prefix="p", **GREEDY)[:, WHOLE.shape[1] :]


def engine(manager: KVCacheManager) -> Tensor:
    return torch.cat(list(manager.stream(WHOLE, backend="eager", **GREEDY)), 1)


@torch.no_grad()
def saved(manager: KVCacheManager) -> Tensor:
    cache = manager.new_cache()
    manager.observed_model(input_ids=PREFIX, past_key_values=cache, use_cache=True)
    loaded = manager.load(manager.save(cache))
    return manager.generate(input_ids=WHOLE, past_key_values=loaded, **GREEDY)[:, WHOLE.shape[1] :]


FEATURES: dict[str, Callable[[KVCacheManager], Tensor]] = {
    "generate": generate,
    "prefix": prefix,
    "engine": engine,
    "ranking": generate,
    "saved": saved,
}


def manager_of(model: Any, feature: str) -> KVCacheManager:
    policy = TOVA(200) if feature == "ranking" else None  # nothing leaves: all else is as without it
    return KVCacheManager(model, policy, prefix_cache=SpeakerCache(MemoryStore()))


def outcome(ask: Callable[[], Tensor], expected: Tensor) -> str:
    try:
        found = ask()
    except KVCacheError:
        return "r"
    assert torch.equal(found, expected), f"{found} where {expected} is right"
    return "="


SLOW = ("the model's forward compiled",)  # ten seconds each


@pytest.mark.grid(36)
@pytest.mark.filterwarnings("ignore")  # of the wrappers that are tried
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CHANGES])
def test_every_feature_follows_the_model(name: str, when: str, feature: str) -> None:
    change, use = CHANGES[name], FEATURES[feature]
    bare = change.make()
    unchanged = said(bare)
    changed = change.change(bare)
    expected = said(bare if changed is None else changed)
    assert torch.equal(unchanged, expected) != change.matters  # else stale copies would not show
    model = change.make()
    if when == "before":
        other = change.change(model)
        made = model if other is None else other
        found = outcome(lambda: use(manager_of(made, feature)), expected)
    else:
        manager = manager_of(model, feature)
        begins = change.make is not hooked or feature in ("generate", "engine", "ranking")
        assert outcome(lambda: use(manager), unchanged) == ("=" if begins else "r")
        other = change.change(model)
        if other is not None:  # the manager has the wrapper or what was wrapped, whose parts are the same
            manager = manager_of(other, feature)
        found = outcome(lambda: use(manager), expected)
    assert found == change.expected[list(FEATURES).index(feature)]


def test_the_table_is_large_and_mostly_right_answers() -> None:
    cells = "".join(change.expected for change in CHANGES.values())
    assert len(CHANGES) >= 24
    assert cells.count("=") > len(cells) / 2
    assert all(
        change.expected[0] == change.expected[2] == "=" for change in CHANGES.values()
    )  # these can always be right


def test_unwrapping_is_of_what_was_wrapped() -> None:
    model = llama()
    assert unwrapped(torch.compile(model, backend="eager")) is model
