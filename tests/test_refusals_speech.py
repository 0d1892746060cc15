"""What `ChatterboxEngine` cannot do is refused where it is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from t3_models import tiny_t3

from kvcache import InputError, MemoryStore, PolicyError, SlidingWindow, SnapKV, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"policy": [SlidingWindow(3)] * 4}, PolicyError, r"all layers; give one SizePolicy, such as SlidingWindow\(500\)"),
    ({"policy": SnapKV(128)}, PolicyError, r"SnapKV.*chooses tokens by head, which the engine does not.*SlidingWindow"),
    ({"policy": "window"}, PolicyError, "policy='window'"),
    ({"speakers": "redis://localhost"}, InputError, "must be a SpeakerCache"),
    ({"kv_dtype": "bf16"}, InputError, "kv_dtype='bf16'"),
]


@pytest.fixture(scope="module")
def t3() -> Any:
    return tiny_t3("english")


@pytest.mark.parametrize(("given", "error", "said"), REFUSED, ids=lambda value: str(value)[:24])
def test_d11_the_engine_refuses_at_construction(
    t3: Any, given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ChatterboxEngine(t3, **{"speakers": SpeakerCache(MemoryStore("1MiB")), **given})


def test_d11_a_budget_is_a_size_in_words_too(t3: Any) -> None:
    engine = ChatterboxEngine(t3, speakers=SpeakerCache(MemoryStore("1MiB")))
    assert engine.room(64, 64, "2MiB") == engine.room(64, 64, 2 * 2**20)
    assert engine.room(64, 64, "2MiB")[1] < 64
    with pytest.raises(PolicyError, match="cannot read 'much' as a size"):
        engine.room(64, 64, "much")
    assert "SlidingWindow" in repr(ChatterboxEngine(t3, SlidingWindow(9), speakers=SpeakerCache(MemoryStore("1MiB"))))


class Anything:
    """What a restricted unpickler does not read."""


def test_d11_a_bad_file_of_conditionals_hands_on_no_advice_to_run_it(t3: Any, tmp_path: Path) -> None:
    engine = ChatterboxEngine(t3, speakers=SpeakerCache(MemoryStore("1MiB")))
    torch.save({"t3": Anything()}, tmp_path / "more.pt")
    torch.save({"gen": {}}, tmp_path / "less.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 no more")
    for name, said in (("more.pt", "more than tensors"), ("torn.pt", "damaged"), ("less.pt", "'t3' is missing")):
        with pytest.raises(InputError, match=said) as raised:
            engine.add_voice("a", conditionals=tmp_path / name)
        assert "weights_only" not in str(raised.value)
        assert name != "more.pt" or raised.value.__suppress_context__
