"""500 greedy tokens of a full-size T3: every back end says what the usual loop says."""

import importlib.util
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # from inside upstream's conditioning
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),  # torch's own, at the compiler's import
]
# Imported whole, it would want its audio stack; and once its parts are loaded alone, it has no spec.
CHATTERBOX = "chatterbox" in sys.modules or importlib.util.find_spec("chatterbox") is not None
TOKENS = 500


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("variant", ["english", "nano"])
def test_chatterbox(variant):
    if not CHATTERBOX:
        pytest.skip("chatterbox-tts is not installed")
    from kvcache_chatterbox import ChatterboxEngine, byte_tokens, load_t3, random_conditionals

    t3 = load_t3(variant, seed=0)
    with torch.no_grad():  # it would end at once, or never: let it speak
        t3.speech_head.weight[t3.hp.stop_speech_token].zero_()
    request = {
        "t3_cond": random_conditionals(t3),
        "text_tokens": byte_tokens(t3, "The birch canoe slid on the planks."),
    }
    spoken = {}
    for backend in ("off", "eager", "graph", "compile"):
        engine = ChatterboxEngine(t3, backend=backend)
        chunks = engine.inference_stream(max_new_tokens=TOKENS, temperature=0.0, **request)
        spoken[backend] = torch.cat(list(chunks), 1)
        assert engine.report().fallback is None
        assert torch.equal(spoken[backend], spoken["off"]), backend
    assert spoken["off"].shape[1] == TOKENS
