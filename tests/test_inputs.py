"""All that `generate` takes, by whichever name, and all ways it goes: the reference is the model without us."""

import copy

import pytest
import torch
from support.families import RELEASE, build, tiny, token_ids
from support.input_models import CODEBOOKS, ids_of, inputs_of, model_of, noise, picture_behind
from transformers import CompileConfig, GenerationConfig, Mamba2ForCausalLM, WhisperForCausalLM
from transformers.generation.streamers import BaseStreamer

from kvcache import GeometryError, InputError, KVCacheManager, KVQuantization, MaxTokens, PolicyError, SlidingWindow
from kvcache.models import looks_on

GREEDY = {"max_new_tokens": 8, "do_sample": False}
MODELS = ("whisper", "csm", "dia", "musicgen", "blip", "blip2", "llava", "mamba2", "xlnet")
SPEAKING = {"csm": CODEBOOKS, "dia": CODEBOOKS, "musicgen": CODEBOOKS + 1}


def given(name):
    return picture_behind(9) if name == "llava" else inputs_of(name)


def seeded(run, *args, seed=5, **kwargs):
    torch.manual_seed(seed)
    return run(*args, **kwargs)


def streamed(manager, *args, seed=5, **kwargs):
    torch.manual_seed(seed)
    return torch.cat(list(manager.stream(*args, **kwargs)), 1)


class Kept(BaseStreamer):
    """What `generate` tells a streamer."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


# ---------------------------------------------------------------------- the first input


@pytest.mark.parametrize("name", MODELS)
def test_the_first_input_by_its_name_and_by_its_place(name):
    model, inputs = model_of(name), given(name)
    expected = model.generate(**inputs, **GREEDY)
    before = dict(model.__dict__)
    manager = KVCacheManager(model)
    assert torch.equal(manager.generate(**inputs, **GREEDY), expected)
    first, *rest = inputs
    assert torch.equal(manager.generate(inputs[first], **{one: inputs[one] for one in rest}, **GREEDY), expected)
    assert model.__dict__ == before  # not even a note that `generate` makes for itself
    ours = any(layer.policy == "KeepAll()" for layer in manager.report().layers)
    assert ours == (name not in ("mamba2", "xlnet"))  # which hold no keys and values of that kind


def test_a_first_input_may_be_called_inputs_as_well():
    model = tiny("llama")
    assert torch.equal(
        KVCacheManager(model).generate(inputs=token_ids(), **GREEDY), model.generate(token_ids(), **GREEDY)
    )


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_picture_behind_a_text_prefix(tokens):
    model, prefix, inputs = model_of("llava"), ids_of(1, 5, seed=3), picture_behind(9)
    manager = KVCacheManager(model)
    manager.add_prefix("before", prefix)
    whole = {**inputs, "input_ids": torch.cat([prefix.expand(2, -1), inputs["input_ids"]], 1)}
    expected = model.generate(**whole, **GREEDY)
    assert torch.equal(manager.generate(prefix="before", **inputs, **GREEDY), expected)
    other = {**inputs, "pixel_values": inputs["pixel_values"] * -1}
    assert not torch.equal(manager.generate(prefix="before", **other, **GREEDY), expected), "the picture was looked at"
    with pytest.raises(InputError, match="prefix or position_ids"):
        manager.generate(prefix="before", **inputs, position_ids=torch.arange(9)[None], **GREEDY)


@pytest.mark.skipif(RELEASE < (5, 24), reason="writes both attentions of a layer into one cache, whichever it is given")
def test_d8_a_decoder_alone_that_attends_to_an_encoder():
    config = copy.deepcopy(model_of("whisper").config)
    config.is_encoder_decoder = False
    model = WhisperForCausalLM(config).eval()
    model.load_state_dict({f"model.{k}": v for k, v in model_of("whisper").model.state_dict().items()}, strict=False)
    encoded = {"encoder_outputs": (noise(2, 20, 32),)}
    expected = model.generate(ids_of(2, 3), **encoded, **GREEDY)
    manager = KVCacheManager(model)
    assert torch.equal(manager.generate(ids_of(2, 3), **encoded, **GREEDY), expected)
    assert manager.report().seen == 3 + 7


# ---------------------------------------------------------------------- a generate that calls itself

FALLBACK = {"max_new_tokens": 4, "temperature": (0.0, 0.6), "logprob_threshold": 0.0}  # never satisfied
LONG = {"return_timestamps": True, "max_new_tokens": 6, "attention_mask": torch.ones(1, 100, dtype=torch.long)}


@pytest.fixture
def timed():
    """Whisper with tokens for times."""
    model = model_of("whisper")
    model.generation_config.no_timestamps_token_id = 76
    yield model
    model.generation_config.no_timestamps_token_id = 96


@pytest.mark.parametrize("policy", [None, SlidingWindow(60, sinks=2)])
def test_w8_a_text_that_is_tried_again_gets_a_new_cache(policy):
    model, inputs = model_of("whisper"), inputs_of("whisper", rows=1)
    expected = seeded(model.generate, **inputs, **FALLBACK)
    assert torch.equal(seeded(KVCacheManager(model, policy).generate, **inputs, **FALLBACK), expected)
    with pytest.raises(InputError, match=r"temperature=.* tries again"):
        KVCacheManager(model).stream(**inputs, **FALLBACK)


def test_w8_a_long_text_gets_a_new_cache_for_each_part(timed):
    expected = timed.generate(noise(1, 4, 100), **LONG)
    assert expected.shape[1] > LONG["max_new_tokens"], "takes several runs"
    manager = KVCacheManager(timed)
    assert torch.equal(manager.generate(noise(1, 4, 100), **LONG), expected)
    with pytest.raises(InputError, match="several runs"):
        list(manager.stream(noise(1, 4, 100), **LONG))
    with pytest.raises(InputError, match="several runs"):
        manager.generate(noise(1, 4, 100), past_key_values=manager.new_cache(), **LONG)


def test_d8_beams_together_with_several_sequences_of_a_generate_that_repeats_the_batch():
    model, inputs = model_of("whisper"), inputs_of("whisper")
    beams = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2}
    for policy in (None, SlidingWindow(60, sinks=2)):
        assert torch.equal(KVCacheManager(model, policy).generate(**inputs, **beams), model.generate(**inputs, **beams))


# ---------------------------------------------------------------------- models without keys and values of ours


def test_d8_beams_of_a_model_that_takes_no_cache():
    model, ids = model_of("xlnet"), ids_of(2, 7)
    assert torch.equal(
        KVCacheManager(model).generate(ids, num_beams=3, **GREEDY), model.generate(ids, num_beams=3, **GREEDY)
    )
    with pytest.raises(PolicyError, match="XLNetLMHeadModel takes no cache of keys and values"):
        KVCacheManager(model, max_cache_length=30).generate(ids, **GREEDY)


def test_d8_nothing_is_compiled_that_is_not_compiled_without_us(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        Mamba2ForCausalLM, "get_compiled_call", lambda self, config: compiled.append(1) or self.__call__
    )
    config = CompileConfig()
    config._compile_all_devices = True  # as on a GPU
    model = model_of("mamba2")
    expected = model.generate(ids_of(1, 7), compile_config=config, **GREEDY)
    assert torch.equal(KVCacheManager(model).generate(ids_of(1, 7), compile_config=config, **GREEDY), expected)
    assert not compiled
    assert "_compiled_call" not in model.__dict__


def test_a_model_that_makes_its_cache_itself_is_told_apart():
    """Where nothing asks for a cache, what a policy says has not happened, and is not said to have."""
    model = copy.copy(model_of("xlnet"))
    model.__class__ = type("OwnLoop", (type(model),), {"generate": lambda self, ids, **given: ids})
    assert torch.equal(KVCacheManager(model).generate(ids_of(1, 4)), ids_of(1, 4))
    with pytest.raises(GeometryError, match="OwnLoop made its cache itself"):
        KVCacheManager(model, max_cache_length=30).generate(ids_of(1, 4))
    with pytest.raises(InputError, match="the generate of OwnLoop tells a streamer nothing"):
        list(KVCacheManager(model).stream(ids_of(1, 4)))


# ---------------------------------------------------------------------- what is streamed


@pytest.mark.parametrize("name", SPEAKING)
def test_w13_tokens_of_several_numbers_are_streamed_with_a_dimension_of_their_own(name):
    model, inputs, levels = model_of(name), given(name), SPEAKING[name]
    chunks = list(KVCacheManager(model).stream(**inputs, chunk_size=3, **GREEDY))
    assert [chunk.shape for chunk in chunks] == [(2, 3, levels), (2, 3, levels), (2, 2, levels)]
    said = torch.cat(chunks, 1)
    if name == "csm":
        assert torch.equal(said, model.generate(**inputs, **GREEDY))
    elif name == "dia":  # the result begins with the start token, and is the model's own mask's
        assert torch.equal(said, model.generate(**inputs, **GREEDY)[:, 1:][:, : said.shape[1]])
    else:  # the result is a sound: what its own loop draws
        codes = []
        seen = type(model)._sample

        def sample(self, *args, **given):
            codes.append(seen(self, *args, **given))
            return codes[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "_sample", sample)
            model.generate(**inputs, **GREEDY)
        assert torch.equal(said, codes[0][:, -8:].reshape(2, levels, 8).transpose(1, 2))


def early_exit():
    return build("llama", num_hidden_layers=4)


ASSISTED = {
    "an assistant": lambda: (tiny("llama"), {"assistant_model": build("llama", num_hidden_layers=1)}),
    "itself": lambda: (tiny("llama"), {"assistant_model": tiny("llama")}),
    "prompt lookup": lambda: (tiny("llama"), {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}),
    "early exit": lambda: (early_exit(), {"assistant_early_exit": 2}),
}


@pytest.mark.parametrize("case", ASSISTED)
def test_w8_guessed_tokens_are_those_of_one_row(case):
    model, how = ASSISTED[case]()
    ids = token_ids(1, 5).repeat(1, 6)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=how.get("eos_token_id"))
    manager = KVCacheManager(model)
    if case == "early exit" and RELEASE < (5, 4):
        with pytest.raises(TypeError, match="is_first_iteration"):  # this release's own mistake, whatever the cache
            model.generate(ids, max_new_tokens=20, do_sample=False, **how)
        return
    assert torch.equal(manager.generate(ids, max_new_tokens=20, do_sample=False, **how), expected)
    for backend in ("off", "eager"):
        chunks = list(manager.stream(ids, max_new_tokens=20, do_sample=False, chunk_size=6, backend=backend, **how))
        assert [chunk.shape for chunk in chunks] == [(1, 6), (1, 6), (1, 6), (1, 2)]
        assert torch.equal(torch.cat(chunks, 1), expected[:, 30:])


@pytest.mark.parametrize("kept", [{"storage": KVQuantization(8)}, {"policy": SlidingWindow(16, sinks=2)}])
def test_a_guess_that_cannot_be_taken_back_is_refused(kept):
    model = build("llama")
    model.model.register_forward_pre_hook(looks_on(lambda *given: pytest.fail("nothing runs")))
    with pytest.raises(PolicyError, match="guessed tokens that are wrong are taken back"):
        KVCacheManager(model, **kept).generate(token_ids(1), prompt_lookup_num_tokens=3, eos_token_id=2, **GREEDY)


REFUSED = {
    "beams": ({"num_beams": 2}, "beams cannot be streamed"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search cannot be streamed"),
    "a cache of another kind": ({"cache_implementation": "static"}, "asks for another cache"),
    "no number of tokens": ({"max_new_tokens": 0}, "generate refuses these settings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_stream_is_refused_before_anything_runs(case):
    settings, why = REFUSED[case]
    model = build("llama")
    for where in ("arguments", "the checkpoint's config"):
        if where == "arguments":
            with pytest.raises(InputError, match=why):
                list(KVCacheManager(model).stream(token_ids(), **{**GREEDY, **settings}))
        elif case in ("beams", "contrastive search"):
            model.generation_config.update(**settings)
            with pytest.raises(InputError, match=why):
                KVCacheManager(model).stream(token_ids(), max_new_tokens=4, do_sample=False)
    with pytest.raises(InputError, match="there is no prefix 'nobody'"):
        KVCacheManager(model).stream(token_ids(), prefix="nobody")


@pytest.mark.parametrize("backend", ["off", "eager", "graph"])
@pytest.mark.parametrize("padded", [False, True])
def test_several_sequences_for_each_prompt_are_rows_of_a_stream(backend, padded):
    model, ids = tiny("llama"), token_ids()
    if padded:
        ids[1, :4] = 0
    settings = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 9, "repetition_penalty": 1.4}
    expected = seeded(model.generate, ids, attention_mask=(ids != 0).long(), **settings)
    manager = KVCacheManager(model)
    said = streamed(manager, ids, attention_mask=(ids != 0).long(), backend=backend, chunk_size=4, **settings)
    assert torch.equal(said, expected[:, 20:])
    assert manager.report().fallback is None


@pytest.mark.parametrize("backend", ["off", "eager"])
def test_a_streamer_is_told_the_tokens_as_well(backend):
    model, theirs, ours = tiny("llama"), Kept(), Kept()
    expected = model.generate(token_ids(), streamer=theirs, **GREEDY)
    said = streamed(KVCacheManager(model), token_ids(), streamer=ours, backend=backend, **GREEDY)
    assert torch.equal(said, expected[:, 20:])
    assert ours.ended == theirs.ended == 1
    assert all(torch.equal(a, b) for a, b in zip(ours.values, theirs.values, strict=True))


# ---------------------------------------------------------------------- settings, read as generate reads them


def native(manager, *args, **kwargs):
    said = streamed(manager, *args, backend="eager", **kwargs)
    assert manager.report().fallback is None
    return said


by_default = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")

LENGTHS = [
    {},
    {"max_length": 31},
    {"max_new_tokens": 7},
    {"max_new_tokens": 7, "max_length": 25},
    {"max_new_tokens": 2.5},
]


@by_default
@pytest.mark.parametrize("tokens", [1, 19, 24])
@pytest.mark.parametrize("settings", LENGTHS, ids=str)
def test_d6_lengths_are_those_of_generate(settings, tokens):
    model, ids = tiny("llama"), token_ids(1, tokens)
    manager = KVCacheManager(model)
    assert torch.equal(
        native(manager, ids, do_sample=False, **settings), model.generate(ids, do_sample=False, **settings)[:, tokens:]
    )
    embeds = {"inputs_embeds": model.get_input_embeddings()(ids)}
    try:
        expected = model.generate(**embeds, do_sample=False, **settings)
    except ValueError:  # the first releases take the prompt from a length that is a default
        with pytest.raises(InputError, match="generate refuses these settings"):
            native(manager, **embeds, do_sample=False, **settings)
    else:
        assert torch.equal(native(manager, **embeds, do_sample=False, **settings), expected)


def test_d6_lengths_of_a_config_and_lengths_that_cannot_be():
    model, ids = build("llama"), token_ids(1, 12)
    manager = KVCacheManager(model)
    config = GenerationConfig(max_length=18, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, generation_config=config)[:, 12:]
    assert torch.equal(native(manager, ids, generation_config=config), expected)
    for short in ({"max_length": 12}, {"max_length": 5}):
        with pytest.raises(ValueError, match="max_length"):
            model.generate(ids, **short)
        with pytest.raises(InputError, match=r"generate refuses these settings: .*max_length"):
            manager.stream(ids, backend="eager", **short)
    model.generation_config.max_length = 26
    assert torch.equal(native(manager, ids, do_sample=False), model.generate(ids, do_sample=False)[:, 12:])


VALUES = [
    *({"top_p": value} for value in (0.0, 0, 0.3, 1, 1.5, -0.1)),
    *({"top_k": value} for value in (0, 1, 5, 5.0, 1000, -1, None)),
    *({"min_p": value} for value in (0, 0.0, 0.4, 1, 1.5, -0.1)),
    *({"temperature": value} for value in (1, 2, 0.5, 0, 0.0, -1.0, float("nan"), None)),
    *({"repetition_penalty": value} for value in (1, 1.0, 2, 1.7, 0.0, -2.0, None)),
    *({"max_new_tokens": value} for value in (2.0, 3, 0, -1)),
]


@pytest.mark.parametrize("draws", [True, False])
@pytest.mark.parametrize("settings", VALUES, ids=str)
def test_d7_the_same_values_are_taken_and_the_same_refused(settings, draws):
    model, ids = tiny("llama"), token_ids(2, 9)
    whole = {"max_new_tokens": 5, "do_sample": draws, **settings}
    try:
        expected = seeded(model.generate, ids, **whole)
    except (ValueError, TypeError):
        with pytest.raises(InputError, match="generate refuses these settings"):
            KVCacheManager(model).stream(ids, backend="eager", **whole)
    else:
        assert torch.equal(native(KVCacheManager(model), ids, **whole), expected[:, 9:])


@by_default
def test_w12_zero_is_a_token_and_a_temperature_of_zero_is_none():
    model, ids = tiny("llama"), token_ids(2, 9)
    expected = model.generate(ids, forced_eos_token_id=0, **GREEDY)[:, 9:]
    assert (expected[:, -1] == 0).all()
    assert torch.equal(streamed(KVCacheManager(model), ids, backend="eager", forced_eos_token_id=0, **GREEDY), expected)
    with pytest.raises(InputError, match=r"temperature.* has to be a strictly positive float"):
        KVCacheManager(model).stream(ids, backend="eager", do_sample=True, temperature=0.0)


CHECKPOINTS = [
    {"cache_implementation": "static"},
    {"cache_implementation": "offloaded"},
    {"prompt_lookup_num_tokens": 3, "eos_token_id": 2},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 0},
    {"suppress_tokens": [5, 6], "repetition_penalty": 1.3},
    {"max_length": 40},
]


@pytest.mark.parametrize("settings", CHECKPOINTS, ids=str)
def test_a_checkpoints_generation_config_is_read_as_generate_reads_it(settings):
    model, ids = build("llama"), token_ids(1, 5).repeat(1, 4)
    plain = {
        name: value
        for name, value in settings.items()
        if name not in ("cache_implementation", "prompt_lookup_num_tokens")
    }
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, **plain)
    model.generation_config.update(**settings)
    manager = KVCacheManager(model)
    assert torch.equal(manager.generate(ids, max_new_tokens=9, do_sample=False), expected)
    for backend in ("off", "eager"):
        said = streamed(manager, ids, max_new_tokens=9, do_sample=False, backend=backend)
        assert torch.equal(said, expected[:, 20:])
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())


def test_a_cache_of_another_kind_that_a_request_asks_for_is_refused():
    manager = KVCacheManager(tiny("llama"), MaxTokens(40))
    with pytest.raises(InputError, match="cache_implementation='static' asks for another cache"):
        manager.generate(token_ids(), cache_implementation="static", **GREEDY)
    config = GenerationConfig(cache_implementation="static", max_new_tokens=4)
    with pytest.raises(InputError, match="cache_implementation='static' asks for another cache"):
        manager.generate(token_ids(), generation_config=config)
    assert manager.generate(token_ids(), cache_implementation="dynamic", **GREEDY).shape == (2, 28)


# ---------------------------------------------------------------------- logits that are no numbers


def spoiled(value, after):
    """A model whose logits are `value` after so many tokens of its own, and then again numbers."""
    model, calls = build("llama"), []

    def spoil(module, args, out):
        calls.append(1)
        return out * value if len(calls) == after else out

    model.lm_head.register_forward_hook(spoil)
    return model, calls


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("after", [1, 6])
def test_d10_logits_that_are_no_numbers_end_a_stream_that_draws(value, after):
    model, calls = spoiled(value, after)
    settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 20}
    with pytest.raises(RuntimeError, match="inf"):
        model.generate(token_ids(1, 5), **settings)
    manager = KVCacheManager(model)
    list(manager.stream(token_ids(1, 5), backend="eager", max_new_tokens=1))  # tries the engine once
    calls.clear()
    stream = manager.stream(token_ids(1, 5), backend="eager", chunk_size=4, **settings)
    chunks = [next(stream) for _ in range((after - 1) // 4)]  # those before are given
    assert all(chunk.shape == (1, 4) for chunk in chunks)
    with pytest.raises(InputError, match="logits of its step were NaN, infinite"):
        next(stream)
