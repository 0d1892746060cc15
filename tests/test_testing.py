"""What `kvcache.testing` catches: planted leaks, and planted mistakes in policies and layers; and what it lets pass."""

import re
import sys
import threading
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count

import pytest
import torch
from support.families import build, tiny, token_ids
from support.inside import testing as inside
from support.searching import examples

from kvcache import (
    H2O,
    TOVA,
    AdaKV,
    ExpectedAttention,
    InputError,
    KeepAll,
    KeyDiff,
    KeyNorm,
    KVCacheManager,
    KVLayer,
    KVQuantization,
    MaxBytes,
    MaxTokens,
    PerHead,
    Pinned,
    PolicyError,
    RankingPolicy,
    SizePolicy,
    SlidingWindow,
    SnapKV,
)
from kvcache.cache import GroupedLayer, RankedLayer
from kvcache.testing import check_layer, check_policy, no_leaks

pytestmark = pytest.mark.one_release

GREEDY = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}

# ---------------------------------------------------------------------- leaks


def left(found):
    """The lines of what was found."""
    first, *lines = str(found.value).splitlines()
    assert first == "left behind:"
    return [line.strip() for line in lines]


@pytest.fixture
def keeper():
    """What a block leaves behind is left with it: made anew, since what is as old as the tests is not looked through."""
    keeper = type("Keeper", (), {"held": None})
    yield keeper
    keeper.held = None


def test_a_hook_is_found(keeper):
    model = build("llama")
    with pytest.raises(AssertionError) as found, no_leaks(model):
        keeper.held = model.model.layers[1].register_forward_pre_hook(hooked)
    keeper.held.remove()
    assert left(found) == ["a hook on LlamaForCausalLM: model.layers.1, forward_pre_hooks: hooked"]


def hooked(module, args):
    """A hook that somebody forgot."""


def keep_a_cache(keeper, manager):
    keeper.held = manager.new_cache()
    manager.generate(token_ids(1, 9), past_key_values=keeper.held, **GREEDY)


def test_a_cache_that_is_kept_alive_is_found(keeper):
    manager = KVCacheManager(tiny("llama"), SlidingWindow(6))
    manager.generate(token_ids(1, 9), **GREEDY)
    with pytest.raises(AssertionError) as found, no_leaks(manager.model):
        keep_a_cache(keeper, manager)
    report = manager.report()
    begin = f"a KVLayer: SlidingWindow(window=6, sinks=0), 6 tokens, {report.layers[0].nbytes} bytes, held by "
    lines = left(found)
    assert len(lines) == len(report.layers), "its layers, and not each of their tensors again"
    assert all(re.fullmatch(re.escape(begin) + r"a \w+(\.\w+|\[…\])+", line) for line in lines), lines


def test_a_tensor_that_is_kept_alive_is_found(keeper):
    with pytest.raises(AssertionError) as found, no_leaks():
        keeper.held = {"mask": [torch.zeros(3, 5, dtype=torch.float16)]}
    assert left(found) == ["a Tensor [3, 5] of torch.float16 on cpu, held by Keeper.held.mask[…]"]


def test_a_file_that_is_left_open_is_found(keeper, tmp_path):
    with pytest.raises(AssertionError) as found, no_leaks():
        keeper.held = (tmp_path / "log.txt").open("w")
    keeper.held.close()
    assert left(found) == [f"an open file: {tmp_path / 'log.txt'}"]


def test_a_thread_that_goes_on_is_found(monkeypatch):
    monkeypatch.setattr(inside.GRACE, 0.05)
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="forgotten")
    with pytest.raises(AssertionError) as found, no_leaks():
        thread.start()
    over.set()
    thread.join()
    assert left(found) == ["a thread: forgotten"]


def test_a_module_that_was_exchanged_is_found():
    model = build("llama")
    with pytest.raises(AssertionError) as found, no_leaks(model):
        model.model.norm = torch.nn.Identity()
    assert "a part of LlamaForCausalLM that is another: model.norm" in left(found)


def test_what_is_expected_is_allowed(keeper):
    with no_leaks(allow=lambda held: isinstance(held, torch.Tensor) and held.shape == (7,)):
        keeper.held = torch.zeros(7)


def test_what_is_let_go_of_is_no_leak(tmp_path):
    model = build("llama")
    with no_leaks(model):
        model.register_forward_hook(lambda *args: None).remove()
        loop = [torch.zeros(3)]
        loop.append(loop)  # a circle, which only the collector finds
        del loop
        (tmp_path / "text").write_text("closed again")
        threading.Thread(target=lambda: None).start()


def test_an_error_of_the_block_comes_through(keeper):
    with pytest.raises(TypeError), no_leaks():
        keeper.held = torch.zeros(3) + "no number"


@pytest.mark.search
def test_500_requests_leave_nothing():
    managers = [KVCacheManager(tiny("llama"), policy) for policy in (KeepAll(), SlidingWindow(6), SnapKV(8, 1, 2))]
    prompts = [token_ids(1, n, seed=n) for n in (3, 5, 9)]

    def request(i):
        manager, prompt = managers[i % 3], prompts[i // 3 % 3]
        if i % 2:
            return torch.cat(list(manager.stream(prompt, chunk_size=2, **GREEDY)), 1)
        return manager.generate(prompt, **GREEDY)

    for i in range(18):  # what is made once and kept
        request(i)
    made, total = Counter(), examples(500)
    with no_leaks(*(manager.model for manager in managers)):
        for i in range(total):
            made[request(i).shape[0]] += 1
    assert made == {1: total}


# ---------------------------------------------------------------------- policies: the house's own pass


HOUSE = [
    KeepAll(),
    SlidingWindow(5),
    SlidingWindow(4, sinks=2),
    MaxTokens(9, low_water=3),
    MaxTokens(1000),
    MaxBytes(2000),
    Pinned(3, MaxTokens(6)),
    Pinned(2, Pinned(1, SlidingWindow(4, sinks=1))),
    SnapKV(12, sinks=2, window_size=3),
    H2O(12, sinks=2, window_size=3, low_water=6),
    TOVA(9, sinks=1, window_size=1),
    KeyNorm(10, sinks=0, window_size=2),
    KeyDiff(10, sinks=2, window_size=2),
    ExpectedAttention(12, sinks=2, window_size=3, n_future_positions=5),
    Pinned(3, SnapKV(12, sinks=2, window_size=3)),
    PerHead((KeepAll(), SlidingWindow(4, sinks=1))),
    PerHead((SnapKV(12, sinks=2, window_size=3), MaxTokens(6))),
    AdaKV(SnapKV(12, sinks=2, window_size=3)),
]


@pytest.mark.search
@pytest.mark.grid(9)
@pytest.mark.parametrize("policy", HOUSE, ids=repr)
def test_the_houses_policies_keep_the_laws(policy):
    check_policy(policy, examples=examples(6))


@dataclass(frozen=True)
class Own(SizePolicy):
    """Right in itself; its mistakes are in subclasses."""

    limit: int = 8
    pinned: int = 2

    def keep(self, count):
        return min(count, self.limit)


class ExceedsFarFromItsLimit(Own):
    """Only where a check of a few counts about the limit does not look."""

    def keep(self, count):
        return self.limit + 1 if count == self.limit + 3 else min(count, self.limit)


class DropsPinned(Own):
    def keep(self, count):
        return self.pinned if count == 2 * self.limit else min(count, self.limit)


class EvictsWithinItsLimit(Own):
    def keep(self, count):
        return 4 if count == 5 else min(count, self.limit)


class ChangesItsMind(Own):
    calls = count()

    def keep(self, count):
        return self.limit - next(self.calls) % 3 if count > 2 * self.limit + 1 else min(count, self.limit)


class NoValue(SizePolicy):
    limit = 8

    def keep(self, count):
        return min(count, self.limit)

    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__


class Unhashable(NoValue):
    __hash__ = None


@dataclass(frozen=True)
class ScoresByNothing(RankingPolicy):
    """Right: any score will do."""

    def score(self, seen):
        return torch.zeros(seen.positions.shape)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (ExceedsFarFromItsLimit(), r"keep\(11\) is 9: more than its limit, 8"),
        (DropsPinned(), r"keep\(16\) is 2: 2 are pinned, and the current token stays"),
        (EvictsWithinItsLimit(), r"keep\(5\) is 4: within the limit \(8\) nothing may leave"),
        (ChangesItsMind(), r"keep\(\d+\) has two answers"),
        (NoValue(), "is another policy; make it a frozen dataclass"),
        (Unhashable(), "is no value: unhashable type: 'Unhashable'; make it a frozen dataclass"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_mistakes_of_policies_are_caught(policy, says):
    with pytest.raises(AssertionError, match=says):
        check_policy(policy)


def test_a_policy_that_no_cache_would_take_is_refused_as_a_cache_refuses_it():
    with pytest.raises(PolicyError, match=r"keep\(9\) is 9; it must be from 3 to 8"):
        check_policy(type("Grows", (Own,), {"keep": lambda self, count: count})())


def test_a_policy_of_ones_own_passes():
    for policy in (Own(), ScoresByNothing(10, sinks=1, window_size=2)):
        check_policy(policy, examples=4)


class ForgetsTheRecent(RankedLayer):
    def _scores(self, seen):
        return torch.zeros(seen.positions.shape).masked_fill(seen.positions < self.policy.pinned, torch.inf)


class BringsBack(RankedLayer):
    """Says that it holds the tokens that came first, whatever it holds."""

    def positions(self):
        at = super().positions()
        return torch.arange(at.shape[2]).expand(at.shape)


class ForgetsItsPositionsBytes(RankedLayer):
    @property
    def nbytes(self):
        return 0 if self._buffer is None else self._buffer.nbytes


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (ForgetsTheRecent, "has lost the pinned or recent tokens"),
        (BringsBack, "has lost the pinned or recent|again, which had left|holds other keys"),
        (ForgetsItsPositionsBytes, "bytes are reported"),
    ],
)
def test_mistakes_of_layers_that_rank_are_caught(layer, says, monkeypatch):
    monkeypatch.setattr(inside.MADE_BY, lambda spec: layer)
    with pytest.raises(AssertionError, match=says):
        check_policy(KeyNorm(10, sinks=1, window_size=2), examples=20)


# ---------------------------------------------------------------------- layers: the house's own pass


@pytest.mark.search
def test_the_houses_layer_keeps_the_laws():
    check_layer(KVLayer, variants=("plain", "padded", "rerotated"), examples=examples(12))


def quantized(policy, rotation=None, static=False, **given):
    return GroupedLayer(policy, KVQuantization(8, group_size=8), **given)


@pytest.mark.search
def test_the_houses_quantized_layer_keeps_the_laws():
    # Values of unit size in 8 bits are off by a half step of their spread / 255: some 0.02, and more in half precision.
    check_layer(quantized, variants=("plain",), tolerance=0.1, examples=examples(12))


# ---------------------------------------------------------------------- layers: planted mistakes


class BringsTruncatedTokensBack(KVLayer):
    """Truncating lowers the counter alone."""

    def truncate(self, length):
        self.check_truncate(length)
        self.seen = length


class MutatesBeforeItFails(KVLayer):
    """Appending counts its tokens before it looks at them."""

    def append(self, keys, values):
        self.seen += keys.shape[2]
        self._check_shapes(keys, values)
        self.seen -= keys.shape[2]
        return super().append(keys, values)


class ReportsWrongBytes(KVLayer):
    @property
    def nbytes(self):
        return super().nbytes // 2


class ExceedsItsLimit(KVLayer):
    """Evicts one token too late."""

    def append(self, keys, values):
        policy = self.policy
        if policy.limit is not None and self.initialized:
            self.policy = replace(policy, window=policy.window + 1) if isinstance(policy, SlidingWindow) else policy
        result = super().append(keys, values)
        self.policy = policy
        return result


class EvictsPinnedTokens(KVLayer):
    """The ring runs over the pinned slots too."""

    def _overwrite(self, *given):
        policy, self.policy = self.policy, SlidingWindow(self.policy.limit)
        result = super()._overwrite(*given)
        self.policy = policy
        return result


class SwapsKeys(KVLayer):
    def append(self, keys, values):
        return super().append(keys.flip(1), values)


PLANTED = [
    (BringsTruncatedTokensBack, "truncate_then_append is broken under all, plain"),
    (MutatesBeforeItFails, "failed_call_changes_nothing is broken under all, plain: a call that failed has changed .*seen"),
    (ReportsWrongBytes, "bytes_are_told is broken under all, plain: [0-9]+ bytes are reported, [0-9]+ are held"),
    (ExceedsItsLimit, "is broken under window, plain"),
    (EvictsPinnedTokens, "is broken under sinks, plain"),
    (SwapsKeys, "any_chunking is broken under all, plain"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "says"), PLANTED)
def test_mistakes_of_layers_are_caught(layer, says):
    laws = {says.split()[0]} if not says.startswith("is") else {"kept_is_named"}
    policies = {name: inside.TRIED[name] for name in ("all", "window", "sinks")}
    with pytest.raises(AssertionError, match=says) as found:
        check_layer(layer, policies, variants=["plain"], laws=laws, examples=40)
    assert ", in Scenario(padding=[0]" in str(found.value), "the smallest scenario is told"


def test_what_there_is_to_choose_from_is_said():
    for wrong, says in (({"laws": ["all"]}, "laws=.*any_chunking"), ({"variants": ["padding"]}, "variants=.*padded")):
        with pytest.raises(InputError, match=says):
            check_layer(KVLayer, **wrong)


def test_without_hypothesis_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for name in inside.NEED_HYPOTHESIS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(inside.CHECKS, raising=False)
    with pytest.raises(InputError, match="pip install hypothesis"):
        check_policy(KeepAll())
    with no_leaks():
        """It needs none."""
