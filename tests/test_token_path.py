"""How many files of ours a token passes on its way, from one that is drawn to the next: what a reader has to follow."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build, token_ids
from support.speech import tts
from transformers import LogitsProcessor

from kvcache import KVCacheManager
from kvcache.decoding import Sampler
from kvcache_chatterbox import ChatterboxEngine

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent
OURS = (f"{ROOT}/kvcache/", f"{ROOT}/adapters/")


class Drawn(LogitsProcessor):
    """Is called by `generate` once a token."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


def passed(run: Callable[[], Any], draws: type, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Files that are run between two calls of `draws`, in the middle of a run and of a chunk."""
    seen: set[str] = set()
    tokens: list[set[str]] = []
    drawn = draws.__call__

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens.append(set(seen))
        seen.clear()
        return drawn(self, *args, **kwargs)

    def watch(frame: Any, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            seen.add(frame.f_code.co_filename.removeprefix(f"{ROOT}/"))

    monkeypatch.setattr(draws, "__call__", note)
    run()  # what is asked of a model once
    tokens.clear()
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    return sorted(tokens[5:-5], key=len)[0]


def test_a_token_of_generate_passes_8_files(monkeypatch):
    manager, ids = KVCacheManager(build("llama")), token_ids(1, 10)
    found = passed(
        lambda: manager.generate(ids, max_new_tokens=40, do_sample=False, logits_processor=[Drawn()]),
        Drawn,
        monkeypatch,
    )
    assert {"kvcache/models/_managed_layer.py", "kvcache/cache/_slotted.py"} <= found and len(found) <= 8, sorted(found)


def test_a_token_of_a_stream_passes_10_files(monkeypatch):
    manager, ids = KVCacheManager(build("llama")), token_ids(1, 10)
    found = passed(
        lambda: list(manager.stream(ids, max_new_tokens=40, do_sample=False, backend="eager")), Sampler, monkeypatch
    )
    assert {"kvcache/decoding/_engine.py", "kvcache/decoding/_wiring.py"} <= found and len(found) <= 10, sorted(found)


@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_a_token_of_speech_passes_12_files(kind, monkeypatch):
    engine = ChatterboxEngine(tts(kind))
    text = "Hello there, this is one. And here is another one, which follows."
    found = passed(
        lambda: list(engine.generate_stream(text, max_new_tokens=60, seed=1, segment_characters=30, chunking="fixed")),
        Sampler,
        monkeypatch,
    )
    assert "adapters/kvcache_chatterbox/speech/_step_engine.py" in found and len(found) <= 12, sorted(found)
