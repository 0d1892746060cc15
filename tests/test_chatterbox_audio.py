"""From tokens to audio: the joints, the lengths, the segments, and a whole Chatterbox model with a stand-in's vocoder."""

import ast
import functools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.clocks import Clock
from support.inside.speech import S3GEN_SIL, AudioStream, Cost, ToneVocoder, model_of, punc_norm
from support.searching import search
from support.speech import tts
from support.vocoders import NOBODY, Told

from kvcache import InputError
from kvcache.models import looks_on
from kvcache_chatterbox import ChatterboxEngine, Chunking, byte_tokens
from kvcache_chatterbox.audio import CONTEXT, Joints, SegmentedAudio, Speaker, heard
from kvcache_chatterbox.units import SAMPLES_PER_TOKEN
from kvcache_chatterbox.upstream import upstream_t3
from kvcache_chatterbox.vocoder import LEAD, SeededNoise

pytestmark = pytest.mark.one_release


NOISE = SeededNoise(0)
ONE = Chunking((1,))


def tone(tokens, behind=0):
    """Each token sets a level that the sound glides to, so audio depends on the three tokens before it, and on those behind."""
    levels = torch.nn.functional.pad((tokens.float() % 17) / 17, (3, behind)).unfold(0, 4 + behind, 1).mean(1)
    return levels.repeat_interleave(SAMPLES_PER_TOKEN)


def streaming(vocoder, **options):
    return AudioStream(vocoder, NOBODY, NOISE, **options)


@search(100)
@given(
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    context=st.integers(6, 30),
    fade=st.integers(0, LEAD),
    lookahead=st.integers(0, 4),
)
def test_chunks_of_audio_are_together_the_whole(chunks, context, fade, lookahead):
    tokens = torch.randint(0, 6561, (sum(chunks),), generator=torch.Generator().manual_seed(sum(chunks)))
    vocoder = Told(functools.partial(tone, behind=lookahead), lookahead)
    stream = streaming(vocoder, context=context, fade=fade)
    parts, heard, said = [], 0, 0
    for chunk in tokens.split(chunks):
        parts.append(stream.push(chunk))
        heard += chunk.numel()
        said = max(said, heard - lookahead)
        assert sum(part.numel() for part in parts) >= said * SAMPLES_PER_TOKEN - fade
    parts.append(stream.flush())
    # With a context longer than the vocoder's memory (3 tokens) and the fade (half a token), every joint fades between equal
    # signals: fp32 rounding. And where it looks ahead, it has what it looks for.
    torch.testing.assert_close(torch.cat(parts), tone(tokens, lookahead), atol=1e-6, rtol=0)
    places = [run.place for run in vocoder.runs]
    assert places == sorted(places)
    for run in vocoder.runs:
        assert torch.equal(run.tokens, tokens[run.place : run.place + run.tokens.numel()])
        assert run.known == min(context, run.place + run.known)
    assert sum(run.ended for run in vocoder.runs) == (lookahead > 0)


def test_what_comes_behind_a_flush_is_made_with_what_came_before_it():
    vocoder = Told(tone, 3)
    stream, tokens = streaming(vocoder), tokens_of(40)[0]
    parts = [stream.push(tokens[:10]), stream.flush(), stream.push(tokens[10:]), stream.flush()]
    torch.testing.assert_close(torch.cat(parts), tone(tokens), atol=1e-6, rtol=0)
    assert [(run.known, run.ended) for run in vocoder.runs] == [(0, False), (7, True), (10, False), (25, True)]


def test_nothing_is_made_of_no_tokens():
    vocoder = Told(tone, 3)
    stream = streaming(vocoder)
    assert stream.push(torch.zeros(0, dtype=torch.long)).numel() == stream.flush().numel() == 0
    assert stream.push(torch.zeros(3, dtype=torch.long)).numel() == 0  # they are only looked ahead at
    assert vocoder.runs == []
    assert stream.flush().numel() == 3 * SAMPLES_PER_TOKEN


def test_a_joint_without_enough_context_is_faded_and_not_a_click():
    tokens = torch.tensor([3, 16, 3, 16, 0, 16, 5, 9])
    jumps = {}
    for fade in (0, LEAD):
        stream = streaming(Told(tone), context=1, fade=fade)
        audio = torch.cat([*(stream.push(part) for part in tokens.split(2)), stream.flush()])
        assert audio.numel() == tokens.numel() * SAMPLES_PER_TOKEN
        joints = torch.arange(2, 8, 2) * SAMPLES_PER_TOKEN
        jumps[fade] = max(float((audio[j - 500 : j + 500].diff()).abs().max()) for j in joints.tolist())
    assert jumps[LEAD] < jumps[0]


@pytest.mark.parametrize("kind", ["english", "gpt", "multilingual"])
def test_streamed_audio_is_the_whole_audio(kind):
    model = tts(kind)
    engine = ChatterboxEngine(model)
    drawn = {"max_new_tokens": 40, "seed": 1, "top_p": 0.9, "repetition_penalty": 1.2}  # `inference` has other defaults
    request = drawn | {"language_id": "fr" if kind == "multilingual" else None}
    whole = engine.generate("Hello there", watermark=False, **request)
    chunks = list(engine.generate_stream("Hello there", watermark=False, chunking=[7], **request))
    assert len(chunks) > 3
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-6, rtol=0)  # joints fade between equal signals
    text = model.tokenizer.text_to_tokens("Hello there.", request["language_id"])
    text = byte_tokens(model.t3, "Hello there.") if kind == "gpt" else torch.nn.functional.pad(text, (1, 1))
    if kind != "gpt":
        text[0, 0] = 255
    tokens = torch.cat(list(engine.inference_stream(t3_cond=model.conds.t3, text_tokens=text, **drawn)), 1)
    silent = 3 if kind == "gpt" else 0
    assert whole.shape == (1, (int((tokens < 6561).sum()) + silent) * SAMPLES_PER_TOKEN)


def test_the_watermark_is_applied_unless_switched_off():
    engine = ChatterboxEngine(tts("gpt"))
    request = {"max_new_tokens": 10, "seed": 1}
    plain = engine.generate("Hello", watermark=False, **request)
    torch.testing.assert_close(engine.generate("Hello", **request), plain + 1)
    torch.testing.assert_close(
        torch.cat(list(engine.generate_stream("Hello", **request)), 1), plain + 1, atol=1e-6, rtol=0
    )


def test_voices_and_emotions_are_of_the_request_alone(tmp_path):
    model = tts("english")
    engine = ChatterboxEngine(model)
    voice, emotion = model.conds, model.conds.t3.emotion_adv
    emotions, heard = [], []
    watch = looks_on(lambda module, inputs: emotions.append(float(inputs[0])))
    model.t3.cond_enc.emotion_adv_fc.register_forward_pre_hook(watch)
    vocode = model.s3gen.inference
    model.s3gen.inference = lambda **given: [heard.append(given["ref_dict"]["embedding"]), vocode(**given)][1]
    clip = tmp_path / "other.wav"
    clip.write_bytes(b"another voice")
    request = {"max_new_tokens": 10, "seed": 1, "watermark": False}
    mine = engine.generate("Hello", **request)
    other = engine.generate("Hello", audio_prompt_path=clip, **request)
    engine.generate("Hello", exaggeration=0.9, **request)
    assert emotions == pytest.approx([0.5, 0.5, 0.9])
    assert torch.equal(engine.generate("Hello", **request), mine)
    assert not torch.equal(other, mine)
    with pytest.raises(FileNotFoundError):
        engine.generate("Hello", audio_prompt_path="missing.wav", **request)
    assert model.conds is voice
    assert model.conds.t3.emotion_adv is emotion
    model.prepare_conditionals(clip)
    assert [torch.equal(one, voice.gen["embedding"]) for one in heard] == [True, False, True, True]
    assert torch.equal(heard[1], model.conds.gen["embedding"])


def test_bad_texts_and_voices_are_refused():
    model = tts("multilingual")
    engine = ChatterboxEngine(model)
    with pytest.raises(InputError, match="text is empty"):
        engine.generate_stream("  ", language_id="fr")
    with pytest.raises(InputError, match="'xx' is not one of ar, da, de,"):
        engine.generate_stream("Bonjour", language_id="xx")
    with pytest.raises(InputError, match="None is not one of ar, da, de,"):
        engine.generate("Bonjour")
    model.conds = None
    with pytest.raises(InputError, match="there is no voice"):
        engine.generate("Bonjour", language_id="fr")


# ------------------------------------------------------------------ segments


@functools.cache
def speaker(kind):
    return Speaker(tts(kind))


def tokens_of(count, seed=0):
    return torch.randint(0, 6561, (1, count), generator=torch.Generator().manual_seed(100 * seed + count))


def edged(audio, first, last):
    """A segment's audio, its edges faded over 5 ms where it meets another."""
    fade = torch.arange(1, 121) / 121
    audio = audio.clone()
    if not first:
        audio[:120] *= fade
    if not last:
        audio[-120:] *= fade.flip(0)
    return audio


def laid_out(speaker, voice, segments, pause, joined):
    """The audio of whole segments, and that of the vocoder alone, made without any of the code under test."""
    said = [tokens[0] for tokens in segments if tokens.numel()]
    if not said:
        return torch.zeros(0), torch.zeros(1)
    ending = torch.full((3,), S3GEN_SIL)[: 3 if model_of(speaker).t3.is_gpt else 0]
    vocode = functools.partial(model_of(speaker).s3gen.inference, ref_dict=voice.gen)
    if joined:
        together = vocode(torch.cat([*said, ending]))[0][0]
        lengths = [960 * tokens.numel() for tokens in said]
        lengths[-1] += 960 * ending.numel()
        made = list(together.split(lengths))
        if pause == 0:
            return together, together
    else:
        made = [vocode(torch.cat([tokens, ending]))[0][0] for tokens in said]
    parts = []
    for i, audio in enumerate(made):
        parts += [torch.zeros(round(pause * 24000))] * (i > 0) + [edged(audio, i == 0, i == len(made) - 1)]
    return torch.cat(parts), torch.cat(made)


@search(100)
@given(
    kind=st.sampled_from(["english", "gpt"]),
    cuts=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5),
    skipped=st.integers(0, 2),
    pause=st.sampled_from([0, 0.01234, 0.2]),
    joined=st.booleans(),
    chunking=st.one_of(
        st.builds(Chunking, st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)),
        st.builds(Chunking, st.none(), st.integers(1, 5), st.integers(5, 20)),
    ),
)
def test_streamed_segments_are_the_whole_segments(kind, cuts, skipped, pause, joined, chunking):
    one = speaker(kind)
    voice = one.builtin()
    segments = [tokens_of(sum(cut), seed) for seed, cut in enumerate(cuts)]
    pieces = [
        (i * (1 + skipped), part)
        for i, (segment, cut) in enumerate(zip(segments, cuts, strict=True))
        for part in segment.split(cut, 1)
    ]
    options = {"pause": pause, "joined": joined}

    def streamed_with(watermark):
        return list(heard(one.segmented(voice, watermark, chunking=chunking, **options), pieces))

    chunks = streamed_with(False)
    whole = one.say(enumerate(segments), voice, False, **options)
    expected, made = laid_out(one, voice, segments, pause, joined)
    assert all(chunk.shape[0] == 1 and chunk.numel() for chunk in chunks)
    streamed = torch.cat([torch.zeros(1, 0), *chunks], 1)
    assert streamed.shape == whole.shape == (1, expected.numel())
    # The stand-in's memory, 3 tokens, is shorter than the context, so joints fade between equal signals: fp32 rounding.
    torch.testing.assert_close(whole[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(streamed[0], expected, atol=1e-6, rtol=0)
    # No click: nothing jumps further than in the vocoder's own audio, but for the slope of an edge's fade.
    if expected.numel() > 1:
        steepest = float(made.diff().abs().max()) + float(made.abs().max()) / 121 + 1e-6
        assert float(streamed.diff().abs().max()) <= steepest
    # The watermarker adds 1: each sample, pauses included, has gone through it once.
    marked = torch.cat([torch.zeros(1, 0), *streamed_with(True)], 1)
    torch.testing.assert_close(marked, streamed + 1, atol=0, rtol=1e-6)
    torch.testing.assert_close(one.say(iter(pieces), voice, True, **options), whole + 1, atol=0, rtol=1e-6)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("pause", [0, 0.1])
def test_a_vocoder_that_never_says_the_same_twice_does_not_click(pause, joined):
    calls = []

    def vocode(tokens):  # another phase in each run, as S3Gen's noise has it, and at full level at all edges
        calls.append(tokens)
        return torch.cos(2 * torch.pi * 110 / 24000 * torch.arange(960 * tokens.numel()) + 2.0 * len(calls))

    audio = SegmentedAudio(Told(vocode), NOBODY, chunking=ONE, joints=Joints(pause, joined))
    parts = [audio.push(i // 4, tokens_of(1 + i % 3)) for i in range(12)]
    heard = torch.cat([*parts, audio.finish()], 1)[0]
    assert audio.chunks == [1] * 24
    assert heard.numel() == 24 * 960 + 2 * round(pause * 24000)
    # The wave's own slope; between two waves the fade adds at most their distance, 2, over its 480 samples; at an edge, 1 over 120.
    assert float(heard.diff().abs().max()) <= 2 * torch.pi * 110 / 24000 + 1 / 121


def test_tokens_that_are_only_looked_ahead_at_cost_nothing_and_are_part_of_the_next_chunk():
    clock, cost = Clock(0.0), Cost()

    def vocode(tokens):
        clock.now += 1.0
        return tone(tokens, 3)

    audio = SegmentedAudio(Told(vocode, 3), NOBODY, chunking=Chunking((2,)), cost=cost, clock=clock.perf_counter)
    given = tokens_of(9)
    parts = [audio.push(0, given[:, :2])]
    assert parts[0].shape == (1, 0) and audio.chunks == [] and cost.of(50) == 0
    parts += [audio.push(0, given[:, 2:]), audio.finish()]
    assert audio.chunks == [4, 2, 2, 1] and cost.of(50) == pytest.approx(1.0)
    assert torch.cat(parts, 1).shape == (1, 9 * SAMPLES_PER_TOKEN)


@pytest.mark.parametrize("way", ["heard", "closed", "failed", "vocoder"])
def test_who_waits_no_more_is_reckoned_with_no_more(way):
    """A stream that had ended was a listener until its memory was collected."""
    cost = Cost()

    def vocode(tokens):
        if way == "vocoder" and tokens.numel() > 4:
            raise OSError("gone")
        return tone(tokens)

    def pieces():
        yield 0, tokens_of(4)
        if way == "failed":
            raise OSError("gone")
        yield 0, tokens_of(4)

    audio = SegmentedAudio(Told(vocode), NOBODY, chunking=Chunking((4,)), cost=cost)
    stream = heard(audio, pieces())
    assert next(stream).numel() and len(cost.listeners) == 1
    if way == "closed":
        stream.close()
    else:
        with nullcontext() if way == "heard" else pytest.raises(OSError, match="gone"):
            list(stream)
    assert len(cost.listeners) == 0


@pytest.mark.parametrize("pause", [0, 0.2, 1 / 7, 3e-5])
def test_a_pause_has_its_samples(pause):
    ones = Told(lambda tokens: torch.ones(tokens.numel() * 960))
    audio = SegmentedAudio(ones, NOBODY, chunking=ONE, joints=Joints(pause))
    heard = torch.cat([*(audio.push(i, tokens_of(2)) for i in range(3)), audio.finish()], 1)
    assert int((heard == 0).sum()) == 2 * round(pause * 24000)
    assert heard[0, 0] == heard[0, -1] == 1  # where nothing meets, nothing is faded


def test_joined_segments_are_made_with_the_end_of_the_one_before():
    vocoder = Told(tone)
    audio = SegmentedAudio(vocoder, NOBODY, chunking=Chunking((30, 4)), joints=Joints(joined=True))
    first, second = tokens_of(30), tokens_of(4)
    audio.push(0, first)
    audio.push(1, second)
    assert torch.equal(vocoder.runs[1].tokens, torch.cat([first[0, -CONTEXT:], second[0]]))
    assert (vocoder.runs[1].place, vocoder.runs[1].known) == (5, CONTEXT)


def test_each_segment_has_noise_of_its_own_and_joined_ones_that_of_the_first():
    for joined in (False, True):
        vocoder, asked = Told(tone), []

        def noise(index, tokens, asked=asked):
            asked.append((index, tokens))
            return SeededNoise(index)

        audio = SegmentedAudio(vocoder, NOBODY, noise, chunking=Chunking((4,)), joints=Joints(joined=joined))
        for index in (0, 2):
            for token in (6562, 6600):
                assert audio.push(index, torch.tensor([[token]])).numel() == 0
            audio.push(index, torch.cat([tokens_of(6), torch.tensor([[6562]])], 1))
        audio.finish()
        assert [index for index, _ in asked] == ([0] if joined else [0, 2])
        assert len({id(run.noise) for run in vocoder.runs}) == len(asked)
        assert all(count == 9 for _, count in asked)  # those that are no speech were drawn, too
        assert [run.known for run in vocoder.runs] == ([0, 4, 6, 10] if joined else [0, 4, 0, 4])


def test_segments_without_speech_are_not_heard():
    one = speaker("gpt")
    voice, said = one.builtin(), tokens_of(4)
    nothing, stop = torch.zeros(1, 0, dtype=torch.long), torch.tensor([[6562]])
    silent = [(0, nothing), (3, stop)]
    assert list(heard(one.segmented(voice, True), silent)) == []
    assert one.say(silent, voice, True).shape == (1, 0)
    alone = one.say([(0, said)], voice, False)
    assert torch.equal(one.say([(0, nothing), (1, said), (1, stop), (2, stop)], voice, False), alone)
    assert alone.shape == (1, 7 * SAMPLES_PER_TOKEN)


def test_segments_out_of_order_and_bad_pauses_are_refused():
    one = speaker("english")
    audio = one.segmented(one.builtin(), False)
    audio.push(2, tokens_of(1))
    with pytest.raises(InputError, match="segment 1 comes after segment 2"):
        audio.push(1, tokens_of(1))
    for pause in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="must be a finite number of seconds from 0 to 600"):
            one.segmented(one.builtin(), False, pause=pause)


# ------------------------------------------------------------------ the stand-in


def test_clips_give_the_stand_in_their_own_voices(tmp_path):
    model = tts("english")
    tokens, heard = tokens_of(20), {}
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        (tmp_path / name).write_bytes(content)
        model.prepare_conditionals(tmp_path / name)
        heard[name] = model.s3gen.inference(tokens, model.conds.gen)[0]
    assert torch.equal(heard["a"], heard["c"])
    assert not torch.equal(heard["a"], heard["b"])


def test_the_stand_in_is_audible_smooth_and_silent_where_turbo_is():
    vocode = functools.partial(ToneVocoder().inference, ref_dict={"embedding": torch.zeros(1, 192)})
    audio = vocode(torch.cat([tokens_of(50), torch.full((1, 4), S3GEN_SIL)], 1))[0][0]
    assert audio.shape == (54 * SAMPLES_PER_TOKEN,)
    assert 0.1 < float(audio.abs().max()) < 0.3
    assert float(audio.diff().abs().max()) < 0.05
    assert not audio[-SAMPLES_PER_TOKEN:].any()


@pytest.mark.parametrize("variant", ["tts", "mtl_tts"])
def test_the_stand_ins_punctuation_is_upstreams(variant):
    # The function alone: its module imports the audio stack.
    source = Path(upstream_t3().__file__).parents[2].joinpath(f"{variant}.py").read_text("utf-8")
    function = next(node for node in ast.parse(source).body if getattr(node, "name", None) == "punc_norm")
    upstream = {}
    exec(compile(ast.Module([function], []), variant, "exec"), upstream)
    ends = [".", "!", "?", "-", ","] + (["、", "，", "。", "？", "！"] if variant == "mtl_tts" else [])
    for text in (
        "",
        "hello  there ...",
        "a: b; c - d — “e” ‘f’ ,g…h",
        "Élan – vital ",
        *(f"done{end}" for end in ends),
    ):
        assert punc_norm(text) == upstream["punc_norm"](text)
