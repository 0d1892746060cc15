"""What `generate` rules about single tokens, and where it stops, on the decode engine: processors and stopping criteria."""

import functools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import CPU, streamed
from support.families import RELEASE, VOCABULARY, build, tiny, token_ids
from support.inside.decoding import ALWAYS, read_processors
from support.searching import search
from tokenizers import Tokenizer, models
from transformers import (
    EosTokenCriteria,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkingConfig,
)

from kvcache import InputError, KVCacheManager, SlidingWindow
from kvcache.decoding import Sampler, TokenLimits, TokenRules

# ---------------------------------------------------------------------- the rules against transformers' processors


@st.composite
def processors(draw):
    """Of one generation with a prompt: in the order of `generate`, mostly, or with one twice or out of place."""
    few = st.lists(st.integers(0, 29), min_size=1, max_size=4, unique=True)
    tokens = lambda: torch.tensor(draw(few))  # noqa: E731
    prompt, total = draw(st.integers(1, 6)), draw(st.integers(4, 20))
    made = {
        "penalty": lambda: RepetitionPenaltyLogitsProcessor(draw(st.sampled_from([0.7, 1.3]))),
        "ngram": lambda: NoRepeatNGramLogitsProcessor(draw(st.integers(1, 5))),
        "words": lambda: NoBadWordsLogitsProcessor(
            [[t] for t in draw(few)] + draw(st.sampled_from([[], [], [[3, 4]]])), tokens()
        ),
        "least": lambda: MinLengthLogitsProcessor(draw(st.integers(1, 15)), tokens()),
        "least new": lambda: MinNewTokensLengthLogitsProcessor(prompt, draw(st.integers(1, 9)), tokens()),
        "first": lambda: ForcedBOSTokenLogitsProcessor(draw(st.integers(0, 29))),
        "last": lambda: ForcedEOSTokenLogitsProcessor(prompt + total, tokens()),
        "never": lambda: SuppressTokensLogitsProcessor(draw(few)),
        "not first": lambda: SuppressTokensAtBeginLogitsProcessor(draw(few), prompt + draw(st.sampled_from([0, 0, 0, -1, 2]))),
        "temperature": lambda: TemperatureLogitsWarper(draw(st.sampled_from([0.5, 1.7]))),
        "top_k": lambda: TopKLogitsWarper(draw(st.sampled_from([1, 6, 100]))),
        "top_p": lambda: TopPLogitsWarper(draw(st.sampled_from([0.5, 0.95])), draw(st.sampled_from([-torch.inf, -torch.inf, -9.0]))),
        "min_p": lambda: MinPLogitsWarper(0.05),
        "typical": lambda: TypicalLogitsWarper(0.7),
    }  # fmt: skip
    chosen = sorted(draw(st.sets(st.sampled_from(range(len(made))), max_size=6)))
    if chosen and draw(st.integers(0, 7)) == 0:
        chosen.append(draw(st.sampled_from(chosen)))
    return prompt, total, LogitsProcessorList([list(made.values())[i]() for i in chosen])


@search(150)
@given(case=processors(), rows=st.integers(1, 3), draws=st.booleans(), seed=st.integers(0, 2**32))
def test_scores_are_those_of_the_processors_one_after_the_other(case, rows, draws, seed):
    prompt, total, wanted = case
    read = read_processors(wanted, prompt, draws)
    room = read.rules.room(prompt + total)
    sampler = Sampler(rows, 30, room.order, CPU, rules=room.rules(rows, 30, CPU))
    generator = torch.Generator().manual_seed(seed)
    highest = 34 if RELEASE >= (5, 23) else 30  # some that the model never says, which older processors fail on
    ids = torch.randint(0, highest, (rows, prompt), generator=generator)
    for row in range(rows):
        sampler.set(row, read.sampling)
        sampler.begin(row, ids[row], read.rules.notes(ids[row]))
    noise = torch.ones(rows, 30)
    for _ in range(total):
        logits = torch.randn(rows, 30, generator=generator).mul(3).round()
        expected = wanted(ids, logits)
        assert torch.equal(sampler.process(logits, sampler.drawing), expected)
        for row in range(rows):  # each by itself, too: what a process notes is noted when a token is drawn
            which = slice(row, row + 1)
            alone = sampler.process(logits[which], sampler.drawing_of(which), which)
            assert torch.equal(alone, expected[which])
        if bool(expected.isneginf().all(-1).any()):
            return
        ids = torch.cat([ids, sampler(logits, noise, sampler.drawing)[:, None]], 1)


def test_a_request_leaves_nothing_of_its_rules_to_the_next_and_takes_them_along():
    limits = read_processors([SuppressTokensLogitsProcessor([4]), NoRepeatNGramLogitsProcessor(1)], 2, False)
    room = limits.rules.room(20)
    sampler = Sampler(3, 9, room.order, CPU, rules=room.rules(3, 9, CPU))
    logits = torch.zeros(3, 9)
    sampler.begin(1, torch.tensor([2, 3]), limits.rules.notes(torch.tensor([2, 3])))
    assert sampler.drawing_of(slice(0, 1)) is None
    assert sampler.drawing.rules == ("ngrams", "limits") and not sampler.drawing.draws
    banned = sampler.process(logits, sampler.drawing).isneginf()
    assert banned.nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]
    sampler.move(1, 0)
    sampler.free(1)
    sampler.begin(1, torch.tensor([2, 3]), None)
    assert sampler.process(logits, sampler.drawing).isneginf().nonzero().tolist() == [[0, 2], [0, 3], [0, 4]]
    assert sampler.first_rows(1).drawing.rules == ("ngrams", "limits")
    sampler.free(0)
    assert sampler.drawing is None


def test_what_is_always_out_of_the_question_stays_so():
    rule = TokenLimits(1, 5, CPU)
    rule.begin(0, read_processors([SuppressTokensLogitsProcessor([1])], 1, False).rules.limits)
    assert rule.state()[1].max() == ALWAYS
    assert TokenRules().room(10).rules(1, 5, CPU) == {}


# ---------------------------------------------------------------------- generate


def same(manager, ids, backend, on=None, **given):
    """The tokens are those of `generate`, and the engine says them on the back end `on`."""
    expected, drawn = streamed(manager, ids, "off", **given)
    tokens, ours = streamed(manager, ids, backend, **given)
    assert manager.report().backend == (backend if on is None else on), manager.report().fallback
    assert torch.equal(tokens, expected)
    assert torch.equal(ours, drawn)
    return tokens


WITHIN = {
    "at least so many new": {"min_new_tokens": 9, "eos_token_id": list(range(0, VOCABULARY, 2))},
    "at least so many": {"min_length": 16, "eos_token_id": list(range(0, VOCABULARY, 2))},
    "never": {"suppress_tokens": list(range(0, VOCABULARY, 3))},
    "not first": {"begin_suppress_tokens": list(range(VOCABULARY // 2))},
    "bad words": {"bad_words_ids": [[i] for i in range(0, VOCABULARY, 3)]},
    "ends with": {"forced_eos_token_id": [5, 6], "eos_token_id": 5},
    "no n-gram twice": {"no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "all of it": {
        "no_repeat_ngram_size": 3, "min_new_tokens": 4, "suppress_tokens": [1, 2], "begin_suppress_tokens": [3],
        "forced_eos_token_id": 5, "eos_token_id": [7, 9], "repetition_penalty": 1.2,
    },
}  # fmt: skip
DRAWS = ({"do_sample": False}, {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95})


@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("case", WITHIN)
def test_a_step_rules_as_generate_does(case, backend):
    manager = KVCacheManager(tiny("llama"))
    manager.add_prefix("before", token_ids(1, 11, seed=5))
    padded = token_ids(3, 9)
    padded[1, :4] = 0
    for draws in DRAWS:
        given_ = {"max_new_tokens": 25, "pad_token_id": 0, **WITHIN[case], **draws}
        same(manager, token_ids(1, 1), backend, **given_)
        same(manager, padded, backend, attention_mask=(padded != 0).long(), chunk_size=7, **given_)
        same(manager, token_ids(2, 9), backend, prefix="before", **given_)
        same(manager, token_ids(2, 9), backend, num_return_sequences=2, **{**given_, "do_sample": True})


def test_a_window_remembers_what_has_left_it():
    manager = KVCacheManager(tiny("llama"), SlidingWindow(12, sinks=3))
    tokens = same(manager, token_ids(1, 9), "eager", max_new_tokens=60, do_sample=False, no_repeat_ngram_size=1)
    assert len(set(tokens[0].tolist())) == 60


@pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`")
def test_the_rules_are_about_what_is_said_where_the_prompt_is_embeddings():
    manager, given_ = KVCacheManager(tiny("llama")), {"max_new_tokens": 20, "do_sample": False}
    embeds = tiny("llama").get_input_embeddings()(token_ids(2, 9))
    for case in ("no n-gram twice", "not first", "at least so many new"):
        same(manager, None, "eager", inputs_embeds=embeds, pad_token_id=0, **given_, **WITHIN[case])


class Odd(LogitsProcessor):
    """A user's own: no odd token where the last was odd, which it counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        odd = (torch.arange(scores.shape[1]) % 2 == 1) & (input_ids[:, -1:] % 2 == 1)
        return scores.masked_fill(odd, -torch.inf)


ONCE_A_STEP = {
    "words of two tokens": lambda: {"bad_words_ids": [[i, j] for i in range(0, 64, 3) for j in range(0, 64, 2)]},
    "biased": lambda: {"sequence_bias": {(3,): 5.0, (7, 8): -3.0}},
    "typical": lambda: {"do_sample": True, "typical_p": 0.5},
    "above epsilon": lambda: {"do_sample": True, "epsilon_cutoff": 0.01, "renormalize_logits": True},
    "above eta": lambda: {"do_sample": True, "eta_cutoff": 0.02},
    "ends soon": lambda: {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 5},
    "finite": lambda: {"remove_invalid_values": True},
    "a user's": lambda: {"logits_processor": LogitsProcessorList([Odd()])},
    "a user's, drawn": lambda: {"logits_processor": LogitsProcessorList([Odd()]), "do_sample": True, "top_k": 9},
    "a temperature without a draw": lambda: {
        "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.3)]), "do_sample": False
    },
    "a filter of a user's before the temperature": lambda: {
        "logits_processor": LogitsProcessorList([TopKLogitsWarper(5), TopPLogitsWarper(0.9)]), "do_sample": True, "temperature": 0.7
    },
    "some tokens allowed": lambda: {"prefix_allowed_tokens_fn": lambda row, ids: range(int(ids[-1]) % 7, VOCABULARY, 7)},
    "forced, and out of the question": lambda: {"forced_eos_token_id": [5, 8], "suppress_tokens": [6, 5]},
    "a watermark": lambda: {"watermarking_config": WatermarkingConfig(), "do_sample": True},
    "guided": lambda: {"guidance_scale": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("case", ONCE_A_STEP)
def test_other_processors_run_once_a_step(case):
    manager = KVCacheManager(tiny("llama"))
    make = ONCE_A_STEP[case]
    for rows in (1,) if case == "guided" else (1, 3):
        for backend in ("eager", "graph"):
            ids = token_ids(rows, 9)
            given_ = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False, **make()}
            expected, drawn = streamed(manager, ids, "off", **given_)
            tokens, ours = streamed(manager, ids, backend, **{**given_, **make()})
            report = manager.report()
            assert report.backend == "eager"
            assert (report.fallback is None) == (backend == "eager") or "once a step" in report.fallback
            assert torch.equal(tokens, expected)
            assert torch.equal(ours, drawn)


def test_a_processor_is_called_once_for_each_token_and_not_for_the_prefill():
    manager, odd = KVCacheManager(tiny("llama")), Odd()
    list(
        manager.stream(token_ids(1, 9), backend="eager", max_new_tokens=12, logits_processor=LogitsProcessorList([odd]))
    )
    assert odd.calls == 12


@pytest.mark.parametrize(
    "given_",
    [
        {"eos_token_id": -1, "min_new_tokens": 3},
        {"eos_token_id": [2, 500], "min_new_tokens": 3},
        {"suppress_tokens": [500]},
        {"suppress_tokens": [-1]},
    ],
    ids=str,
)
def test_ids_that_are_no_tokens_are_nothing(given_):
    same(KVCacheManager(tiny("llama")), token_ids(1, 9), "eager", max_new_tokens=9, do_sample=False, **given_)


def test_a_processor_is_not_asked_what_comes_behind_an_end():
    manager, ids = KVCacheManager(tiny("llama")), token_ids(1, 9)

    def allowed(row, text):  # as transformers calls it
        """Two tokens and an end, and nothing then."""
        return [5] if len(text) == 9 else [80] if len(text) == 10 else []

    given_ = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": 80, "max_new_tokens": 20, "do_sample": False}
    assert same(manager, ids, "eager", **given_).tolist() == [[5, 80]]


class Told(LogitsProcessor):
    """Notes all ids that it is given."""

    def __init__(self):
        self.ids = []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.tolist())
        return scores


def test_a_processor_sees_the_ids_that_generate_shows_it():
    manager, ids = KVCacheManager(tiny("llama")), token_ids(3, 9)
    plain, _ = streamed(manager, ids, "off", max_new_tokens=12, do_sample=False)
    seen = []
    for backend in ("off", "eager"):
        told = Told()
        given_ = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": [int(plain[1, 4])]}
        streamed(manager, ids, backend, logits_processor=LogitsProcessorList([told]), **given_)
        seen.append(told.ids)
    assert seen[0] == seen[1]


def test_what_is_forced_behind_a_rule_of_ones_own_is_done_in_that_order():
    processor = LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])
    ids = token_ids(1, 9)
    given_ = {"forced_eos_token_id": int(ids[0, 3]), "logits_processor": processor, "max_new_tokens": 6}
    same(KVCacheManager(tiny("llama")), ids, "eager", do_sample=False, **given_)


def test_rules_of_other_sizes_are_other_programs():
    texts = [[rule.program() for rule in TokenRules(ngram=3).room(n).rules(1, 9, CPU).values()] for n in (200, 300)]
    assert texts[0] != texts[1]


# ---------------------------------------------------------------------- where a text ends


def words():
    """A tokenizer of a word for each token: a, b, …, aa, ab, …"""
    names = {"".join(chr(97 + d) for d in (i // 26, i % 26)): i for i in range(1, VOCABULARY)}
    names["abcdef"] = 0  # which transformers looks for, to learn how tokens are joined
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="abcdef")))


def late(ids, scores, tokens=15):  # as transformers calls it
    return ids.shape[1] >= tokens


def each(ids, scores):  # as transformers calls it
    """A row ends where its last two tokens add up to a multiple of five."""
    return (ids[:, -2:].sum(-1) % 5) == 0


STOPS = {
    "a length": lambda ids: {"stopping_criteria": StoppingCriteriaList([late])},
    "each row by itself": lambda ids: {"stopping_criteria": StoppingCriteriaList([each])},
    "two": lambda ids: {"stopping_criteria": StoppingCriteriaList([each, functools.partial(late, tokens=12)])},
    "a length of transformers": lambda ids: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(14)])},
    "a shorter one than the prompt": lambda ids: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(3)])},
    "other ends": lambda ids: {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(int(ids[0, 6]))]), "eos_token_id": 1},
    "a string": lambda ids: {"stop_strings": [words().decode([int(ids[0, 5])])], "tokenizer": words()},
    "with an end": lambda ids: {"stopping_criteria": StoppingCriteriaList([each]), "eos_token_id": [int(ids[0, 3])]},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("case", STOPS)
def test_criteria_end_a_text_where_generate_ends_it(case, backend):
    manager = KVCacheManager(tiny("llama"))
    for rows in (1, 3):
        ids = token_ids(rows, 9)
        plain, _ = streamed(manager, ids, "off", max_new_tokens=20, do_sample=True)
        for size in (1, 5, 64):
            for draws in ({"do_sample": True}, {"do_sample": False}):
                given_ = {"max_new_tokens": 20, "pad_token_id": 0, "chunk_size": size, **draws, **STOPS[case](plain)}
                same(manager, ids, backend, **given_)


def test_time_that_has_run_out_ends_a_text_at_the_next_look():
    manager, begun = KVCacheManager(tiny("llama")), time.monotonic()
    tokens = list(manager.stream(token_ids(1, 9), backend="eager", max_new_tokens=240, max_time=1e-6, chunk_size=4))
    assert sum(chunk.shape[1] for chunk in tokens) == 1
    assert time.monotonic() - begun < 60
    assert manager.report().fallback is None


class Five(EosTokenCriteria):
    """A user's own kind of end."""


def test_rows_are_padded_behind_whatever_ends_them_as_a_token_does():
    manager, ids = KVCacheManager(tiny("llama")), token_ids(2, 9)
    plain, _ = streamed(manager, ids, "off", max_new_tokens=12, do_sample=False)
    ends = StoppingCriteriaList([Five(int(plain[0, 2]))])
    same(manager, ids, "eager", max_new_tokens=12, do_sample=False, pad_token_id=0, stopping_criteria=ends)


# ---------------------------------------------------------------------- in batches

ROWS = [{}, *WITHIN.values(), STOPS["each row by itself"](None), {"no_repeat_ngram_size": 8}]


@pytest.mark.parametrize("policy", [None, SlidingWindow(16, sinks=2)], ids=str)
def test_prompts_with_rules_of_their_own_decode_together(policy):
    manager = KVCacheManager(build("llama"), policy)
    found, jobs = {}, {}
    with manager.batch(max_rows=3, slots=None if policy else 96, prefill_chunk=7) as batch:
        waiting = list(range(len(ROWS)))
        while waiting or batch.busy:
            while waiting and batch.busy < batch.rows:
                case = waiting.pop(0)
                sampled = {"do_sample": case % 2 == 1, "max_new_tokens": 8 + 3 * case}
                jobs[batch.add(token_ids(1, 3 + 2 * case, seed=case), seed=case, **sampled, **ROWS[case])] = case
            for piece in batch.step():
                assert piece.error is None
                found.setdefault(jobs[piece.job], []).extend(piece.tokens.tolist())
    for case, more in enumerate(ROWS):
        torch.manual_seed(case)
        sampled = {"do_sample": case % 2 == 1, "max_new_tokens": 8 + 3 * case}
        chunks = manager.stream(token_ids(1, 3 + 2 * case, seed=case), backend="eager", **sampled, **more)
        assert found[case] == torch.cat(list(chunks), 1)[0].tolist(), more


def test_a_criterion_that_fails_ends_its_own_prompt_alone():
    def fail(ids, scores):  # as transformers calls it
        if ids.shape[1] > 12:
            raise RuntimeError("nothing is known of so long a text")
        return False

    manager = KVCacheManager(tiny("llama"))
    expected = torch.cat(list(manager.stream(token_ids(1, 7), max_new_tokens=30, do_sample=False)), 1)[0].tolist()
    found, errors = {}, {}
    with manager.batch(max_rows=2, slots=64) as batch:
        bad = batch.add(token_ids(1, 5), max_new_tokens=30, stopping_criteria=StoppingCriteriaList([fail]))
        good = batch.add(token_ids(1, 7), max_new_tokens=30, do_sample=False)
        while batch.busy:
            for piece in batch.step():
                found.setdefault(piece.job, []).extend(piece.tokens.tolist())
                errors[piece.job] = piece.error
    assert found[good] == expected
    assert "so long a text" in str(errors[bad])


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        (
            {"logits_processor": LogitsProcessorList([Odd()])},
            "processors run once a step, by Python, which all of its batch",
        ),
        ({"no_repeat_ngram_size": 9}, "no_repeat_ngram_size=9 is more than the 8 tokens"),
    ],
)
def test_what_holds_up_a_batch_is_refused(given_, match):
    manager = KVCacheManager(tiny("llama"))
    with manager.batch(max_rows=2, slots=64) as batch, pytest.raises(InputError, match=match):
        batch.add(token_ids(1, 5), max_new_tokens=5, **given_)


def test_what_a_window_has_let_go_of_is_remembered_only_so_far():
    manager = KVCacheManager(build("llama", max_position_embeddings=9000), SlidingWindow(16, sinks=2))
    with manager.batch(max_rows=2) as batch, pytest.raises(InputError, match="a batch remembers 2048"):
        batch.add(token_ids(1, 5), max_new_tokens=3000, no_repeat_ngram_size=3)
