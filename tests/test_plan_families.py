"""Planned = told = held, to the byte, for caches of every kind."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import holding
from support.inside.tools import language_footprint
from support.plan_families import KINDS, NAMES, class_of, config_of, made
from torch import Tensor

from kvcache import InputError, KVCacheManager, MaxBytes, MaxTokens, Pinned, PolicyError, SizePolicy, SlidingWindow
from kvcache import models as hf
from kvcache.cache import KVQuantization
from kvcache.decoding import Setting
from kvcache.models import cache_kwarg
from kvcache.tools import plan, subject

FEW = ("llama", "gemma3", "deepseek-v3", "whisper")  # tried with everything; the others at leisure
FRAMES = 60  # of sound, twice Whisper's positions
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def bytes_held(cache: Any) -> int:
    """Bytes of the storages of all that a cache refers to, but for counters and pads."""
    return holding.bytes_held(cache, lambda tensor: tensor.dim() > 1)


def inputs_of(name: str, rows: int, context: int) -> Tensor:
    if name == "whisper":
        return torch.randn(rows, 8, FRAMES, generator=torch.Generator().manual_seed(0))
    return torch.randint(3, 97, (rows, context), generator=torch.Generator().manual_seed(0))


def check(name: str, rows: int, context: int, new: int, **given: Any) -> int:
    """Bytes that are held after a request, which must be those planned, estimated and reported."""
    model = made(name)
    manager = KVCacheManager(model, **given)
    cache = manager.new_cache(rows)
    manager.generate(inputs_of(name, rows, context), cache=cache, max_new_tokens=new, **GREEDY)
    report = manager.report()
    encoder = {}
    if model.config.is_encoder_decoder:
        encoder = {"encoder_tokens": FRAMES // 2 if name == "whisper" else context}
    assert report.nbytes == bytes_held(cache)
    assert manager.estimate(report.seen, rows, **encoder) == report.nbytes
    with torch.device("meta"):
        skeleton = class_of(name)(config_of(name)).eval()
    # What Whisper's decoder begins with is a token.
    begins = 1 if name == "whisper" else context
    blank = KVCacheManager(skeleton, **given)
    assert language_footprint(blank, Setting("off", requests=rows), begins, new, "cpu").kv == report.nbytes
    return report.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_c2_keeping_all_is_planned_to_the_byte(name: str) -> None:
    check(name, 3, 21, 2)


def some(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(NAMES))
def test_c2_a_prompt_beyond_every_window_is_planned_to_the_byte(name: str) -> None:
    check(name, 1, 150, 1)


@pytest.mark.parametrize("name", some(("mistral", "gemma3", "t5")))
def test_c2_a_text_within_every_window_is_planned_to_the_byte(name: str) -> None:
    check(name, 1, 3, 2)


BUDGET = 120_000


@pytest.mark.parametrize("policy", [SlidingWindow(30, sinks=4), MaxBytes(BUDGET)], ids=repr)
@pytest.mark.parametrize("name", some(name for name in NAMES if KINDS[name].evicts))
def test_c2_a_policy_is_planned_to_the_byte(name: str, policy: SizePolicy) -> None:
    held = check(name, 3, 60, 3, policy=policy)
    assert policy != MaxBytes(BUDGET) or held <= BUDGET


@pytest.mark.parametrize(
    "policy",
    [MaxTokens(30), Pinned(4, MaxBytes(BUDGET)), MaxBytes(BUDGET, low_water=0.5)],
    ids=repr,
)
@pytest.mark.parametrize("name", some(("gemma3", "deepseek-v3", "bart")))
def test_c2_other_policies_are_planned_to_the_byte(name: str, policy: SizePolicy) -> None:
    check(name, 1, 21, 40, policy=policy)


@pytest.mark.parametrize("name", some(name for name in NAMES if KINDS[name].bits))
def test_c2_fewer_bits_are_planned_to_the_byte(name: str) -> None:
    check(name, 2, 70, 3, storage=KVQuantization(4, group_size=16))


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "llama"])
def test_c2b_a_budget_in_fewer_bits_holds_the_whole_cache(name: str) -> None:
    budget = 40_000
    held = check(name, 2, 70, 80, policy=MaxBytes(budget), storage=KVQuantization(8, group_size=16))
    assert held <= budget


@pytest.mark.parametrize("name", ["gemma3", "lfm2", "qwen3-next", "llama"])
def test_c2b_a_budget_that_is_too_small_is_refused_with_the_least_that_works(name: str) -> None:
    if name not in NAMES:
        pytest.skip("this release cannot serve it")
    model = made(name)
    with pytest.raises(PolicyError, match="give at least") as refused:
        KVCacheManager(model, MaxBytes(64))
    least = int(re.findall(r"give at least (\d+)", str(refused.value))[0])
    manager = KVCacheManager(model, MaxBytes(least))
    manager.generate(inputs_of(name, 1, 30), max_new_tokens=20, **GREEDY)
    assert manager.report().nbytes <= least
    with pytest.raises(PolicyError, match="give at least"):
        KVCacheManager(model, MaxBytes(least - 1))


def test_c2b_what_attends_to_an_encoder_is_paid_for_as_soon_as_it_is_known() -> None:
    """Bart's, of 150 positions: 75 KiB of 100; of a shorter text more is left for the decoder."""
    seen = []
    for encoded in (150, 20):
        manager = KVCacheManager(made("bart"), MaxBytes(100_000))
        manager.generate(inputs_of("bart", 1, encoded), max_new_tokens=60, **GREEDY)
        assert manager.report().nbytes <= 100_000
        seen.append(manager.report().stored)
    assert seen[0] < seen[1] == 60
    with pytest.raises(PolicyError, match="are what the model keeps its own way"):
        KVCacheManager(made("bart"), MaxBytes(70_000)).generate(inputs_of("bart", 1, 150), max_new_tokens=2, **GREEDY)
    with pytest.raises(InputError, match="give encoder_tokens"):
        KVCacheManager(made("bart")).estimate(10)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_prompt_is_let_go_of_where_a_window_ends(name: str) -> None:
    """What is held depends on how many tokens came, not on how; the text is the model's own."""
    manager, ids = KVCacheManager(made(name)), inputs_of(name, 2, 60)
    ours = manager.generate(ids, max_new_tokens=8, **GREEDY)
    assert torch.equal(ours, made(name).generate(ids, max_new_tokens=8, **GREEDY))
    sizes = set()
    for chunks in ((60,), (59, 1), (20,) * 3, (1,) * 60):
        cache = manager.new_cache(2)
        with torch.no_grad():
            for part in ids.split(list(chunks), 1):
                made(name)(part, **cache_kwarg(made(name), cache), use_cache=True)
        sizes.add(manager.report(cache).nbytes)
    assert sizes == {manager.estimate(60, 2)}


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3", "qwen3-moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_c1_experts_are_planned(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As the command does, from a folder. An upper bound, as which expert a token goes to is not known."""
    config_of(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).partition(".")[2]}))
    for backend in ("off", "eager"):
        found = plan(subject(str(tmp_path)), Setting(backend, requests=2), 60, context=40, process=0)  # type: ignore[arg-type]
        expected = estimate(name, dtype, 59, 2) if found.fallback or backend == "off" else None
        assert expected is None or found.kv == expected
        experts = 2 * 40 * 2 * 32 * dtype.itemsize  # rows, tokens, experts of each, and their width
        assert found.parts["workspace"] >= experts
        assert found.weights.total > 0


def estimate(name: str, dtype: torch.dtype, tokens: int, rows: int) -> int:
    with torch.device("meta"):
        model = class_of(name)(config_of(name)).to(dtype).eval()
    return KVCacheManager(model).estimate(tokens, rows)


@pytest.mark.parametrize(("name", "head"), [("t5", "T5"), ("bart", "Bart"), ("whisper", "Whisper")])
def test_c2_encoder_decoders_are_planned_by_name(name: str, head: str, tmp_path: Path) -> None:
    config_of(name).save_pretrained(tmp_path)
    found = subject(str(tmp_path))
    assert type(found.blank).__name__ == f"{head}ForConditionalGeneration"
    made_plan = plan(found, Setting("off", requests=2), 30, context=10, process=0)
    assert [moment.name for moment in made_plan.moments] == ["encode", "prefill", "step"]
    seen, encoded = (29, FRAMES // 2) if name == "whisper" else (20, 10)
    assert made_plan.kv == KVCacheManager(made(name)).estimate(seen, 2, encoder_tokens=encoded)


def test_the_shape_of_a_cache_is_asked_without_touching_the_model() -> None:
    model = made("jamba" if "jamba" in NAMES else "gemma3")
    before = {name: (t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    shape = hf.shape_of(model)
    assert {name: (t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert hf.shape_of(model) is shape
    assert {layer.managed for layer in shape.layers} == {True, False}
