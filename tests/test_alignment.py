"""The multilingual model's alignment check as tensors, beside upstream's analyzer: its rules, its looks, its tokens."""

import asyncio
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.alignments import PATHS, Upstream
from support.inside import decoding as inside
from support.inside.speech import ALIGNMENT, AlignmentNote, AlignmentRule, HeadReader, aligned_heads, pool_of, tokens_of
from support.searching import search, steps
from support.speech import audio, tts
from support.t3_models import UPSTREAMS_WARNINGS, tiny_t3
from support.upstream import model, upstream, voice

from kvcache import InputError, SlidingWindow
from kvcache.models import structural_copy
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, byte_tokens
from kvcache_chatterbox.upstream import upstream_t3

pytestmark = [pytest.mark.one_release, *UPSTREAMS_WARNINGS]

STOP, START, VOCABULARY = 6, 5, 9
TEXT = "The birch canoe slid on the smooth planks."
CPU = torch.device("cpu")


def rule(requests, text=40, steps=200):
    return AlignmentRule(requests, text, steps, STOP, START, CPU)


def begun(path, tokens, openings):
    """What the check begins with where a path is followed; the tokens before the last are at the path's beginning, too."""
    return AlignmentNote((2, 2 + tokens), torch.stack([path(tokens, 0)] * openings))


def seen(paths, step):
    """What one head sees of texts that begin at slot 2, ``[requests, columns]``."""
    found = torch.zeros(len(paths), 60)
    for row, (path, tokens, _) in zip(found, paths, strict=True):
        row[2 : 2 + tokens] = path(tokens, step)
    return found


def follow(paths, tokens_drawn, logits):
    """The scores of all requests at each step by our rule, and by an analyzer each."""
    ours = rule(len(paths))
    theirs = [Upstream(tokens, STOP) for _, tokens, _ in paths]
    for i, (path, tokens, openings) in enumerate(paths):
        ours.begin(i, begun(path, tokens, openings))
    for step, drawn in enumerate(tokens_drawn):
        if step:
            ours.look([seen(paths, step)] * 3)
        scores = ours.scores(logits[step].clone())
        expected = []
        for i, (path, tokens, openings) in enumerate(paths):
            looks = [path(tokens, step)] * (1 if step else openings)
            last = START if step == 0 else int(tokens_drawn[step - 1][i])
            expected.append(theirs[i].step(looks, logits[step][i : i + 1].clone(), last))
        if any(one.close for one in theirs):
            return
        yield scores, torch.cat(expected)
        ours.drew(drawn)


@pytest.mark.parametrize("openings", [1, 2])
@pytest.mark.parametrize("name", PATHS)
def test_each_path_ends_and_goes_on_as_upstream_has_it(name, openings):
    generator = torch.Generator().manual_seed(len(name))
    logits = torch.randn(60, 1, VOCABULARY, generator=generator)
    drawn = torch.arange(60)[:, None] % 4  # no token twice in a row
    paths = [(PATHS[name], 14, openings)]
    changed = 0
    found = list(follow(paths, drawn, logits))
    assert len(found) == 60, "no sum is close to a limit"
    for given_, (scores, expected) in zip(logits, found, strict=True):
        assert torch.equal(scores, expected)
        changed += not torch.equal(scores, given_)
    assert changed or name in ("at the last three", "before the diagonal", "jumping to the end")


def test_every_rule_is_tripped_by_some_path():
    ends, holds, silent = set(), set(), set()
    logits, drawn = torch.zeros(60, 1, VOCABULARY), torch.arange(60)[:, None] % 4
    for name, path in PATHS.items():
        found = [scores for scores, _ in follow([(path, 14, 2)], drawn, logits)]
        ends |= {name} if any(bool((one[0, STOP] > 0).all()) for one in found) else set()
        holds |= {name} if any(bool((one[0, STOP] < 0).all()) for one in found) else set()
        silent |= {name} if all(bool((one <= 0).all()) for one in found[:14]) else set()
    assert {"running on", "at the last three", "from the start again", "to the middle again"} <= ends
    assert {"straight", "slow", "never at the end", "looping", "nothing"} <= holds
    assert ends.isdisjoint({"never at the end", "looping", "slower than it may", "nothing"})
    assert "straight" in silent, "speech that goes through its text is left alone until its end"


@pytest.mark.parametrize("kept", ["twice", "alternating", "at the start"])
def test_a_token_that_comes_twice_ends_the_speech(kept):
    drawn = {"twice": [1, 2, 2, 3, 3, 1], "alternating": [1, 2, 1, 2, 1, 2], "at the start": [START, START, 1, 2, 1, 2]}
    tokens = torch.tensor(drawn[kept])[:, None]
    found = list(follow([(PATHS["straight"], 30, 2)], tokens, torch.zeros(6, 1, VOCABULARY)))
    assert all(torch.equal(scores, expected) for scores, expected in found)
    forced = [bool(scores[0, STOP] > 0) for scores, _ in found]
    assert (
        forced
        == {
            "twice": [False, False, False, True, False, True],
            "alternating": [False] * 6,
            "at the start": [False, False, True, False, False, False],
        }[kept]
    )


looks = st.sampled_from(sorted(PATHS)) | st.integers(0, 10_000)


@st.composite
def paths_of(draw):
    """A known path, or noise."""
    chosen, tokens = draw(looks), draw(st.integers(6, 30))
    if isinstance(chosen, str):
        return PATHS[chosen], tokens, draw(st.integers(1, 2))
    noise = torch.rand(60, tokens, generator=torch.Generator().manual_seed(chosen)) ** 6
    noise = noise / noise.sum(1, keepdim=True)
    return (lambda tokens, step: noise[step]), tokens, draw(st.integers(1, 2))


@search(60)
@given(st.lists(paths_of(), min_size=1, max_size=8), st.integers(0, 1000))
def test_many_at_once_are_each_what_upstream_has_it(paths, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, len(paths), VOCABULARY, generator=generator)
    drawn = torch.randint(0, 5, (50, len(paths)), generator=generator)
    for scores, expected in follow(paths, drawn, logits):
        assert torch.equal(scores, expected)


def test_a_text_of_three_tokens_is_no_error():
    """Upstream's own raises an IndexError: there is nothing before the last five tokens to look for the greatest of."""
    ours = rule(1)
    ours.begin(0, begun(PATHS["straight"], 3, 2))
    for step in range(1, 30):
        scores = ours.scores(torch.zeros(1, VOCABULARY))
        ours.drew(torch.tensor([step % 4]))
        ours.look([seen([(PATHS["running on"], 3, 2)], step)])
    assert int(scores.argmax()) == STOP
    with pytest.raises(IndexError):
        Upstream(3, STOP).step([PATHS["straight"](3, 0)], torch.zeros(1, VOCABULARY), START)


def test_who_has_no_check_is_left_alone_and_who_moves_takes_it_along():
    ours, path = rule(3), PATHS["running on"]
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    ours.begin(0, begun(path, 8, 2))
    ours.begin(1, None)
    ours.begin(2, begun(PATHS["straight"], 30, 1))
    told = [(path, 8, 2), (path, 8, 2), (PATHS["straight"], 30, 1)]
    for step in range(1, 20):
        scores = ours.scores(logits)
        ours.drew(torch.full((3,), step % 4))
        ours.look([seen(told, step)])
    assert torch.equal(scores[1], logits[1])
    assert int(scores[0].argmax()) == STOP and scores[2, STOP] < -1000
    assert ours.alignment(1).shape == (0, 0) and ours.alignment(0).shape == (19, 8)
    for step, row in enumerate(ours.alignment(0)[1:], 1):
        torch.testing.assert_close(row.float(), path(8, step), atol=1e-3, rtol=0)
    ours.move(0, 1)
    ours.begin(0, None)
    front = ours.first_rows(2)
    assert int(front.scores(logits[:2])[1].argmax()) == STOP
    assert torch.equal(front.scores(logits[:2])[0], logits[0])
    assert ours.alignment(1).shape == (21, 8), "the first rows are the same memory"


def test_only_the_last_steps_are_remembered():
    ours, path = rule(1, steps=5), PATHS["slow"]
    ours.begin(0, begun(path, 12, 1))
    for step in range(1, 12):
        ours.scores(torch.zeros(1, VOCABULARY))
        ours.look([seen([(path, 12, 1)], step)])
    kept = ours.alignment(0)
    assert kept.shape == (5, 12)
    torch.testing.assert_close(kept.float(), torch.stack([path(12, step) for step in range(6, 11)]), atol=1e-3, rtol=0)


# ------------------------------------------------------------------ in the model


def engine(backend="eager", **options):
    made = ChatterboxEngine(model("multilingual"), backend=backend, **options)
    made.add_voice("who", conditionals=voice(made.t3))
    return made


def said(made, text, most, **options):
    chunks = made.inference_stream(voice="who", text_tokens=text, max_new_tokens=most, **options)
    return torch.cat([torch.zeros(1, 0, dtype=torch.long), *chunks], 1)


@pytest.mark.grid(2, any_of=("seed",))
@pytest.mark.parametrize("backend", ["off", "eager", "graph"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.search
def test_tokens_are_upstreams(seed, backend):
    text = byte_tokens(model("multilingual"), TEXT)
    expected = upstream(tiny_t3("multilingual"), text, steps(300), seed)
    made = engine(backend)
    assert torch.equal(said(made, text, steps(300), seed=seed, chunk_size=25), expected)
    assert made.report().fallback is None


@pytest.mark.parametrize("backend", ["off", "eager"])
@pytest.mark.parametrize("reuse", ["all", "conditioning", "none"])
def test_what_is_looked_at_is_upstreams(backend, reuse, monkeypatch):
    analyzer = upstream_t3().AlignmentStreamAnalyzer
    step, theirs, ours = analyzer.step, [], []

    def record(self, logits, next_token=None):
        result = step(self, logits, next_token)
        theirs[:] = [self.alignment.clone()]
        return result

    scores = AlignmentRule.scores

    def recorded(self, logits, which=slice(None)):
        ours.append(inside_looks(self)[which][:1].clone())
        return scores(self, logits, which)

    text = byte_tokens(model("multilingual"), TEXT)
    monkeypatch.setattr(analyzer, "step", record)
    expected = upstream(tiny_t3("multilingual"), text, 40, 1)
    monkeypatch.setattr(AlignmentRule, "scores", recorded)
    made = engine(backend, reuse=reuse)
    for _ in range(2):  # also of a voice that is known
        ours.clear()
        assert torch.equal(said(made, text, 40, seed=1, chunk_size=7), expected)
        mine = torch.cat(ours)[: expected.shape[1], : text.shape[1]]
        for i, (a, b) in enumerate(zip(theirs[0][1:], mine, strict=True)):
            # One head alone instead of sixteen in one product: fp32 rounding, on weights of at most 1. What lies further on
            # than there were steps, upstream has set to 0.
            torch.testing.assert_close(b[: i + 1], a[: i + 1], atol=1e-6, rtol=0)


def inside_looks(one):
    return one.state()[8]


def scripted(monkeypatch):
    """Texts whose heads see what a path of `PATHS` has, which one by their length: in our rule and in upstream's analyzer."""
    names = sorted(PATHS)

    def path(tokens):
        return PATHS[names[tokens % len(names)]]

    look, begin = AlignmentRule.look, AlignmentRule.begin

    def looked(self, weights):
        found = torch.zeros_like(weights[0])
        columns, lengths, made = (self.state()[i] for i in (0, 1, 2))
        for row, at, tokens, step in zip(found, columns.tolist(), lengths.tolist(), made.tolist(), strict=True):
            if tokens:
                row[at : at + tokens] = path(tokens)(tokens, step)
        look(self, [found])

    def began(self, request, note):
        if note is not None:
            tokens = note.text[1] - note.text[0]
            note = AlignmentNote(note.text, path(tokens)(tokens, 0).expand(len(note.looks), -1))
        begin(self, request, note)

    analyzer = upstream_t3().AlignmentStreamAnalyzer
    step = analyzer.step

    def stepped(self, logits, next_token=None):
        begins, ends = self.text_tokens_slice
        tokens, at = ends - begins, self.curr_frame_pos
        seen = torch.zeros_like(self.last_aligned_attns[0])
        seen[-2 if at == 0 else -1 :, begins:ends] = path(tokens)(tokens, at)
        self.last_aligned_attns = [seen] * 3
        return step(self, logits, next_token)

    monkeypatch.setattr(AlignmentRule, "look", looked)
    monkeypatch.setattr(AlignmentRule, "begin", began)
    monkeypatch.setattr(analyzer, "step", stepped)


def texts():
    """One for each path."""
    return [byte_tokens(model("multilingual"), "a" * (12 + i)) for i in range(len(PATHS))]


@pytest.fixture
def upstreams_ends(monkeypatch):
    """What upstream says where the heads see a path of each, and the same in ours."""
    scripted(monkeypatch)
    expected = [upstream(tiny_t3("multilingual"), text, 60, i)[0].tolist() for i, text in enumerate(texts())]
    stop = model("multilingual").hp.stop_speech_token
    ended = [len(one) for one in expected if one[-1] == stop]
    assert len(ended) >= 4 and len(set(ended)) >= 3, "some paths end the speech, at different places"
    assert any(len(one) == 60 for one in expected)
    return expected


@pytest.mark.parametrize("places", [0, 1, 3, 8])
def test_speech_ends_where_upstreams_does_alone_and_in_batches(places, upstreams_ends):
    made = engine()
    utterances = [made.utterance(made.voices["who"], text, max_new_tokens=60, seed=i) for i, text in enumerate(texts())]
    if places == 0:
        found = [torch.cat(list(tokens_of(made, one, 7)), 1)[0].tolist() for one in utterances]
    else:
        waiting, found, places_of = list(enumerate(utterances)), [[] for _ in utterances], {}
        with made.batch(places, max(map(made.slots, utterances))) as batch:
            while waiting or batch.busy:
                pieces = []
                while waiting and batch.busy < places:
                    index, utterance = waiting.pop(0)
                    job = made.job(utterance)
                    places_of[job] = index
                    pieces.append(batch.add(job))
                for piece in pieces + batch.step():
                    found[places_of[piece.job]] += piece.tokens.tolist()
    assert found == upstreams_ends


@pytest.mark.parametrize("backend", ["off", "graph", "compile"])
def test_every_back_end_ends_speech_where_upstreams_does(backend, monkeypatch):
    # Scripts of what is seen run on the host, so here it is the tokens that end speech: one that comes twice.
    monkeypatch.setattr(inside.COMPILED, partial(inside.Compiled, compiler="aot_eager"))
    t3 = tiny_t3("multilingual")
    with torch.no_grad():
        t3.speech_head = torch.nn.Linear(t3.dim, t3.speech_head.out_features)
        t3.speech_head.bias[20:28] = 7.0  # few tokens, again and again
    text = byte_tokens(t3, TEXT)
    expected = [upstream(t3, text, 60, seed, repetition_penalty=1.0) for seed in range(4)]
    assert any(one.shape[1] < 60 for one in expected)
    made = ChatterboxEngine(t3, backend=backend)
    for seed, one in enumerate(expected):
        chunks = made.inference_stream(
            t3_cond=voice(t3), text_tokens=text, max_new_tokens=60, seed=seed, repetition_penalty=1.0, chunk_size=9
        )
        assert torch.equal(torch.cat(list(chunks), 1), one)


@pytest.mark.parametrize("policy", [None, SlidingWindow(12)])
def test_the_scheduler_says_what_each_says_alone(policy):
    request = {"language_id": "fr", "segment_characters": 45, "max_new_tokens": 24, "chunking": [10]}
    long = "The birch canoe slid. Glue the sheet to it. It is easy to tell. These days it is rare."
    ours = ChatterboxEngine(tts("multilingual"), policy)
    alone = [audio(ours.generate_stream(long, seed=seed, max_rows=1, **request)) for seed in range(3)]

    async def main():
        async with SpeechScheduler(ours, max_rows=3, slots=200) as scheduler:
            streams = [scheduler.submit(long, seed=seed, **request) for seed in range(3)]

            async def whole(stream):
                return audio([chunk async for chunk in stream])

            return await asyncio.gather(*map(whole, streams))

    for ours_, expected in zip(asyncio.run(main()), alone, strict=True):
        torch.testing.assert_close(ours_, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_every_linear_layer_of_the_checked_model_is_converted(precision):
    made = engine(precision=precision)
    kept = [name for name, part in made.t3.tfmr.named_modules() if isinstance(part, torch.nn.Linear)]
    assert kept == []
    text = byte_tokens(made.t3, TEXT)
    off = ChatterboxEngine(made.t3, backend="off")
    off.add_voice("who", conditionals=voice(made.t3))
    assert torch.equal(said(made, text, 30, seed=0), said(off, text, 30, seed=0))


def test_what_each_step_saw_can_be_read_from_the_engine():
    made, text = engine(), byte_tokens(model("multilingual"), TEXT)
    made.release()
    tokens = said(made, text, 25, seed=3)
    [decoding] = inside.idle(pool_of(made)).values()
    found = decoding.sampler.rules[ALIGNMENT].alignment(0)
    assert found.shape == (tokens.shape[1], text.shape[1])
    assert bool((found >= 0).all()) and 0 < float(found.float().sum(1).max()) <= 1


def test_a_model_of_a_release_without_the_check_is_not_checked(monkeypatch):
    module = upstream_t3()
    monkeypatch.delattr(module, "AlignmentStreamAnalyzer")
    made = engine()
    said(made, byte_tokens(made.t3, TEXT), 12, seed=0)
    [decoding] = inside.idle(pool_of(made)).values()
    assert decoding.sampler.rules == {}


def test_a_sampler_wants_each_rule_in_its_order():
    with pytest.raises(InputError, match="must hold each of"):
        inside.Sampler(1, 9, inside.TRANSFORMERS, CPU, rules={ALIGNMENT: rule(1)})


@pytest.mark.slow  # torch's compiler, once
def test_texts_of_any_length_share_a_compiled_step(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))
    text = byte_tokens(model("multilingual"), TEXT)
    eager, made = engine(), engine("compile", bucket=64)
    for most in (30, 300):
        expected = said(eager, text, 30 if most == 300 else most, seed=1)
        assert torch.equal(said(made, text, most, seed=1)[:, :30], expected)
        assert (made.report().backend, made.report().fallback) == ("compile", None)
    assert len(list((tmp_path / "programs").iterdir())) == 1, "one program, compiled ahead of time, serves both"


def test_what_a_rule_does_is_part_of_what_a_program_is_kept_under(monkeypatch):
    made = engine()
    said(made, byte_tokens(made.t3, TEXT), 2, seed=0)
    [decoding] = inside.idle(pool_of(made)).values()
    before = decoding.program()[1]
    monkeypatch.setattr(AlignmentRule, "scores", lambda self, scores, which=slice(None): scores)
    assert decoding.program()[1] != before


def test_what_is_copied_while_somebody_is_prefilled_has_none_of_its_hooks():
    t3 = model("multilingual")
    with HeadReader(t3.tfmr, aligned_heads(t3)).reading():
        assert t3.tfmr.layers[9].self_attn.q_proj._forward_hooks
        made = structural_copy(t3.tfmr, lambda name, module: None)
    assert not any(part._forward_hooks for part in made.modules())
