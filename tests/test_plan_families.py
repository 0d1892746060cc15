"""Planned = told = held, to the byte, for caches of every kind."""

from typing import Any

import pytest
import torch
from plan_families import NAMES, class_of, config_of, made
from torch import Tensor, nn

from kvcache import KVCacheManager
from kvcache.footprint import language_footprint
from kvcache.setting import Setting

FRAMES = 60  # of sound, twice Whisper's positions
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def bytes_held(cache: Any) -> int:
    """Bytes of the storages of all that a cache refers to, but for counters."""
    storages: dict[int, int] = {}
    visited: set[int] = set()

    def visit(thing: Any) -> None:
        if id(thing) in visited or isinstance(thing, type | nn.Module):
            return
        visited.add(id(thing))
        if isinstance(thing, Tensor):
            if thing.dim() > 1:  # no counters, and no pads
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                visit(value)
        elif isinstance(thing, list | tuple | set):
            for value in thing:
                visit(value)
        elif hasattr(thing, "__dict__"):
            visit(vars(thing))

    visit(cache)
    return sum(storages.values())


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


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_c2_keeping_all_is_planned_to_the_byte(name: str, rows: int) -> None:
    check(name, rows, 21, 7)
    check(name, rows, 3, 2)  # within every window
