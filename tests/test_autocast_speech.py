"""An engine computes in its own precision, whatever autocast its caller is in, begins or ends in between."""

import pytest
import torch
from support.t3_models import tiny_t3

from kvcache import MemoryStore, SpeakerCache
from kvcache.events import subscribe
from kvcache.models import has_half
from kvcache_chatterbox import ChatterboxEngine, byte_tokens, random_conditionals, stand_in

pytestmark = pytest.mark.one_release

MODELS = {kind: tiny_t3(kind) for kind in ("english", "multilingual", "gpt")}
HALF = {"device_type": "cpu", "dtype": torch.bfloat16}


def engine(kind, **options):
    return ChatterboxEngine(stand_in(MODELS[kind]), prefix_cache=SpeakerCache(MemoryStore("32MiB")), **options)


def request(ours, how):
    voice = random_conditionals(ours.t3)
    if how == "voice" and "v" not in ours.voices:
        ours.add_voice("v", conditionals=voice)
    who = {"voice": "v"} if how == "voice" else {"t3_cond": voice}
    return {"text_tokens": byte_tokens(ours.t3, "hello"), "max_new_tokens": 5, "chunk_size": 2, "seed": 0, **who}


@pytest.mark.grid(5)
@pytest.mark.parametrize("precision", [None, "bf16", "fp16", "int8"])
@pytest.mark.parametrize("backend", ["eager", "off"])
@pytest.mark.parametrize("how", ["voice", "t3_cond"])
@pytest.mark.parametrize("kind", MODELS)
def test_autocast_changes_nothing(kind, how, backend, precision):
    if precision in ("bf16", "fp16") and not has_half(precision):
        pytest.skip(f"this CPU has no fast {precision} arithmetic")
    expected = torch.cat(list(engine(kind, backend=backend, precision=precision).inference_stream(
        **request(engine(kind), "t3_cond"))), 1)  # fmt: skip
    ours = engine(kind, backend=backend, precision=precision)
    with torch.autocast(**HALF):
        asked = request(ours, how)
        said = list(ours.inference_stream(**asked))
    assert torch.equal(torch.cat(said, 1), expected)
    for autocast in (
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (True, False, True),
    ):  # when it is added, asked for, and in the middle of a request
        with torch.autocast(**HALF, enabled=autocast[0]):
            ours = engine(kind, backend=backend, precision=precision)
            asked = request(ours, how)
        with torch.autocast(**HALF, enabled=autocast[1]):
            stream = ours.inference_stream(**asked)
            said = [next(stream)]
            assert torch.is_autocast_enabled("cpu") == autocast[1]
        with torch.autocast(**HALF, enabled=autocast[2]):
            said += list(stream)
        assert torch.equal(torch.cat(said, 1), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_autocast_around_segments_changes_nothing_and_is_told(kind):
    ours = engine(kind)
    given = {"language_id": "en", "max_new_tokens": 6, "segment_characters": 20, "seed": 1}
    expected = ours.generate("Hello there. It is a fine day.", **given)
    told = []
    with torch.autocast(**HALF), subscribe(told.append, ["fell_back"]):
        said = torch.cat(list(ours.generate_stream("Hello there. It is a fine day.", **given)), 1)
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=0)  # one vocoder pass, or several that are faded
    assert "precision='bf16'" in told[0].reason


class Marks:
    def apply_watermark(self, wav, sample_rate):
        return wav


def test_autocast_reaches_neither_clips_nor_the_vocoder_nor_the_watermark(tmp_path, monkeypatch):
    model, inside = stand_in(MODELS["english"]), []

    def spied(part):
        def spy(*args, **given):
            inside.append(torch.is_autocast_enabled("cpu"))
            return part(*args, **given)

        return spy

    monkeypatch.setattr(model.s3gen, "inference", spied(model.s3gen.inference))
    monkeypatch.setattr(type(model), "prepare_conditionals", spied(type(model).prepare_conditionals))
    model.watermarker = Marks()
    model.watermarker.apply_watermark = spied(model.watermarker.apply_watermark)
    (tmp_path / "clip.wav").write_bytes(bytes(range(100)))  # the stand-in makes a voice of any bytes
    ours = ChatterboxEngine(model, prefix_cache=SpeakerCache(MemoryStore("32MiB")))
    with torch.autocast(**HALF):
        ours.generate("Hello there.", max_new_tokens=6, audio_prompt_path=tmp_path / "clip.wav")
        for _ in ours.generate_stream("Hello there.", max_new_tokens=6):
            assert torch.is_autocast_enabled("cpu")
    assert len(inside) > 2 and not any(inside)
