"""Tuning against tables of made-up costs, profiles against files that are not what they say, and settings put to use."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import VOCABULARY, build
from support.inside import decoding as inside
from support.inside.tools import AXES, LanguageTarget
from support.searching import search

from kvcache import (
    CorruptError,
    InputError,
    KVCacheManager,
    KVQuantization,
    PolicyError,
    TuningProfile,
    quantize_linear,
)
from kvcache.decoding import RECORDERS, Setting, Trial, machine, versions
from kvcache.models import model_fingerprint, model_outline
from kvcache.tools import Refusal, Space, SubjectBench, Tuner, space_of, tune

pytestmark = pytest.mark.one_release

FP32, BF16 = torch.float32, torch.bfloat16
SPACE = Space(
    backend=("eager", "off", "compile"),
    requests=(1, 2, 4, 8),
    precision=("fp32", "bf16", "int8"),
    kv_dtype=(FP32, BF16),
    quantization=(None, 8),
    alone=frozenset({"off"}),
    refused=(Refusal("bucket", "all", "nothing is captured"),),
)


class Table:
    """A bench of made-up costs, in which time passes only as it is measured."""

    def __init__(self, cost, noise=0.0, seed=0, divergence=None, nbytes=None, fails=()):
        self.cost, self.noise, self.fails = cost, noise, fails
        self.random = torch.Generator().manual_seed(seed)
        self.now, self.calls, self.held = 0.0, [], set()
        self._divergence, self._nbytes = divergence or {}, nbytes

    def clock(self):
        return self.now

    def seconds(self, setting, tokens):
        if setting in self.fails:
            raise InputError("its kernel is missing")
        self.now += (40 if "compile" in setting.backend and setting not in self.held else 1) + tokens / 100
        self.calls.append(setting)
        self.held.add(setting)
        wobble = 2 * torch.rand(max(1, tokens // 8), generator=self.random) - 1
        return [self.cost(setting) * (1 + self.noise * float(x)) for x in wobble]

    def divergence(self, setting):
        return self._divergence.get(setting.precision, 0.0)

    def nbytes(self, setting):
        return self._nbytes(setting)

    def drop(self, setting):
        self.held.discard(setting)


def tuner(bench, space=SPACE, **options):
    return Tuner(space, bench, clock=bench.clock, **options)


def best_of(cost, space=SPACE):
    return min(map(cost, space.settings()))


# A doubling of requests gains as much as the one before, or loses: there the search stops. And what changes one axis alone
# makes nothing much faster that is already twice as slow: there it gives up.
factors = st.fixed_dictionaries(
    {("requests", "doubled"): st.floats(0.55, 1.3)}
    | {
        (axis, value): st.floats(0.75, 1.3) if axis == "quantization" else st.floats(0.3, 3)
        for axis in ("backend", "precision", "kv_dtype", "quantization")
        for value in SPACE.values(axis)
    }
)


def of(table, setting, axis):
    value = getattr(setting, axis)
    if axis == "requests":
        return table[axis, "doubled"] ** math.log2(value)
    return table.get((axis, value), 1.0)


@search(200)
@given(table=factors, seed=st.integers(0, 2**16), additive=st.booleans())
def test_the_best_is_found_where_axes_are_independent(table, seed, additive):
    """Whatever each value costs: factors or summands, measured with 1 % of noise."""

    def cost(setting):
        parts = [of(table, setting, axis) for axis in AXES]
        return sum(parts) if additive else math.prod(parts)

    bench = Table(cost, noise=0.01, seed=seed)
    found = tuner(bench)
    best = found.search()
    # The median of the noise can mislead by 2 % where two lie close, on each of the axes that can.
    assert cost(best) <= 1.05 * best_of(cost)
    assert len(found.trials) <= len(SPACE.settings()) * 0.75
    assert not bench.held  # nothing is left set up


def decode(setting):
    """Milliseconds of a token as hardware has it: weights are read once a step, caches and products once a request."""
    weights = {"fp32": 12.0, "bf16": 6.0, "int8": 3.0}[setting.precision]
    cache = (2.0 if setting.kv_dtype in (None, FP32) else 1.0) * (0.5 if setting.quantization else 1.0)
    host = {"eager": 6.0, "off": 8.0, "compile": 0.5}[setting.backend]
    rounding = {"fp32": 0.0, "bf16": 0.5, "int8": 3.0}[setting.precision] if setting.backend != "compile" else 0.0
    return (weights + host + rounding) / setting.requests + cache + 1.0


@pytest.mark.parametrize("requests", [(1,), (1, 2, 4, 8)])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_a_model_of_decoding_is_found_in_a_fifth_of_the_time(requests, seed):
    """A model in which axes are not independent: what rounding costs without a compiler it does not cost with one."""
    space = replace(SPACE, requests=requests, quantization=(None,))
    few, all_of_it = Table(decode, 0.02, seed), Table(decode, 0.02, seed + 100)
    best = tuner(few, space).search()
    tuner(all_of_it, space).sweep()
    assert decode(best) <= 1.05 * best_of(decode, space)
    compiled = {one for one in few.calls if one.backend == "compile"}
    assert len(compiled) <= 4
    if len(requests) > 1:
        assert few.now <= all_of_it.now / 5


def test_a_sweep_measures_everything_once_and_the_finalists_again():
    space = replace(SPACE, requests=(1, 2))
    bench = Table(decode)
    found = tuner(bench, space)
    assert decode(found.sweep()) == best_of(decode, space)
    assert set(bench.calls) == set(found.trials) == set(space.settings())


@pytest.mark.parametrize("seed", range(8))
def test_the_chosen_is_the_fastest_of_its_own_table(seed):
    """However the first looks mislead: what looks faster than the best is measured again beside it."""
    space = replace(SPACE, requests=(1,), backend=("eager", "off"))
    bench = Table(lambda setting: 1.0 + 0.001 * space.settings().index(setting), noise=0.2, seed=seed)
    found = tuner(bench, space)
    best = found.search()
    cost = {setting: trial.milliseconds for setting, trial in found.trials.items()}
    alike = {best, *found.tied}
    assert all(cost[one] >= min(cost[each] for each in alike) for one in cost)
    assert not found.uncompared
    compared = [one for one, trial in found.trials.items() if trial.chunks > 3]
    assert alike <= set(compared)
    order = [one for one in bench.calls if one in compared][-2 * len(compared) :]
    assert order[: len(compared)] == order[len(compared) :]  # in turn


def test_of_what_cannot_be_told_apart_the_simplest_is_taken():
    said = []
    space = replace(SPACE, requests=(1,), backend=("eager",))
    bench = Table(lambda setting: 0.999 if setting.precision == "int8" else 1.0, noise=0.1)
    found = tuner(bench, space, say=said.append)
    assert found.search() == Setting("eager", "fp32", FP32)
    assert found.tied
    assert "the simplest is taken" in said[-2]
    exact = tuner(Table(lambda setting: 0.999 if setting.precision == "int8" else 1.0), space)
    assert exact.search().precision == "int8"  # without any spread it is faster


def test_what_there_was_no_time_to_compare_is_said():
    space = replace(SPACE, requests=(1,), backend=("eager",), kv_dtype=(FP32,))
    found = tuner(Table(lambda setting: 1.0, noise=0.1, seed=1), space, time_limit=5)
    best = found.search()
    assert all(trial.chunks <= 3 for trial in found.trials.values())
    assert all(found.trials[best].milliseconds <= trial.milliseconds for trial in found.trials.values())


def test_settings_are_listed_once_without_what_does_not_matter():
    listed = SPACE.settings()
    assert (
        len(set(listed)) == len(listed) == 3 * 2 + 2 * 3 * 2 * 4
    )  # off: precision x bits; else precision x dtype x requests
    assert all(one.requests == 1 and one.kv_dtype is None for one in listed if one.backend == "off")
    assert all(one.quantization is None for one in listed if one.backend != "off")
    graphs = Space(("eager", "graph"), bucket=(256, 128))
    assert [(one.backend, one.bucket) for one in graphs.settings()] == [
        ("eager", None),
        ("graph", 256),
        ("graph", 128),
    ]


@pytest.mark.parametrize("limit", [0.5, 3, 20, 50, 100, 150])
def test_nothing_begins_after_the_time_is_over(limit):
    bench = Table(decode)
    begun = []
    seconds = bench.seconds
    bench.seconds = lambda setting, tokens: begun.append(bench.now) or seconds(setting, tokens)
    found = tuner(bench, time_limit=limit)
    best = found.search()
    assert max(begun) < limit
    # A compilation takes 40 s here; one that could not have ended in time was not begun, the first for 60 s.
    assert bench.now <= limit + 2
    assert found.untried or limit == 150
    assert ("compile" in {one.backend for one in found.trials}) == (limit >= 100)
    assert best in found.trials
    if limit < 100:
        assert any("no time was left" in line for line in found.explanation(best))


def test_fidelity_is_kept():
    bench = Table(decode, divergence={"int8": 0.02, "bf16": 0.0002})
    found = tuner(bench, bound=0.01)
    best = found.search()
    assert best.precision == "bf16"
    assert not any(one.precision == "int8" for one in bench.calls)  # not even timed
    assert any("int8 was refused: it moves what the model says by 0.02" in line for line in found.explanation(best))
    assert tuner(Table(decode, divergence={"int8": 0.02}), bound=0.03).search().precision == "int8"
    assert found.trials[best].divergence == 0.0002


def test_memory_is_kept():
    def nbytes(setting):
        return 2**20 * setting.requests * (1 if setting.kv_dtype == BF16 else 2)

    found = tuner(Table(decode, nbytes=nbytes), memory=5 * 2**20)
    best = found.search()
    assert (best.requests, best.kv_dtype) == (4, BF16)
    assert any("8 was refused: its cache takes" in line for line in found.explanation(best))


def test_what_cannot_be_run_is_refused_with_its_reason():
    broken = {one for one in SPACE.settings() if one.backend == "compile"}
    found = tuner(Table(decode, fails=broken))
    best = found.search()
    assert best.backend == "eager"
    assert any("compile was refused: its kernel is missing" in line for line in found.explanation(best))
    with pytest.raises(InputError, match="no setting can be run: its kernel is missing"):
        tuner(Table(decode, fails=set(SPACE.settings()))).search()
    first = SPACE.first("eager")  # the search does not hang on where it begins
    assert decode(tuner(Table(decode, fails={first})).search()) == best_of(decode)


def test_the_explanation_names_each_axis_and_what_it_brought():
    found = tuner(Table(decode))
    best = found.search()
    lines = found.explanation(best)
    assert len(lines) == len(AXES)
    assert best == Setting("compile", "int8", BF16, 8)
    back_end, requests, precision, dtype, bits, bucket = lines
    assert back_end.startswith("back end: compile; eager takes 1.") and "off (the token loop)" in back_end
    assert requests.startswith("requests together: 8; 1 takes") and "x as long (with back end eager" in requests
    assert precision.startswith("precision: int8; fp32 takes") and "bf16 takes" in precision
    rival = replace(best, kv_dtype=FP32)
    assert f"fp32 takes {decode(rival) / decode(best):.2f}x as long" in dtype
    assert bits.startswith("bits of the growing cache: full precision; 8")
    assert bucket == "bucket of graphs: none; all is left out: nothing is captured"


# ---------------------------------------------------------------------- profiles


def profile(model="0" * 64, setting=None, **changes):
    setting = setting or Setting("eager", "bf16", BF16, 2)
    trials = (
        Trial(setting, 12.5, 8, 0.0001),
        Trial(Setting("off", None, quantization=8), refused="too far"),
        Trial(Setting("graph", "fp32", bucket=128, max_length=64), 13.0, 3),
    )
    where = machine(torch.device("cpu"))
    return TuningProfile(
        "a model", model, "throughput", 256, 0.03, where, versions(), setting, trials, ("back end: eager",), **changes
    )


def test_profiles_come_back_as_they_were(tmp_path):
    path = tmp_path / "profile.json"
    profile().save(path)
    assert TuningProfile.load(path) == profile()
    assert [one.name for one in tmp_path.iterdir()] == ["profile.json"]


TWISTS = {
    ("format",): ["kvcache-heads", None, 3],
    ("version",): [2, 0, "1", True, None],
    ("name",): [None, 3, ["a"]],
    ("model",): ["", "0" * 63, "g" * 64, None, 1],
    ("goal",): ["speed", None, 1, ["latency"]],
    ("context",): [0, -1, 1.5, "256", True, None, 2**40],
    ("bound",): [-0.1, "0.1", None, float("nan"), float("inf"), True, 10**400],
    ("machine",): [None, [], {}, {"device": "cpu"}],
    ("machine", "device"): [None, 1],
    ("machine", "cpu"): [None, {}],
    ("machine", "cores"): [0, "2", None],
    ("machine", "threads"): [-1, 1.0],
    ("versions",): [None, {}, {"torch": "2"}],
    ("versions", "torch"): [None, 2.13],
    ("setting",): [None, [], "eager", {}],
    ("setting", "backend"): ["auto", "fast", None, 1, {}],
    ("setting", "precision"): ["fp8", 16, "", []],
    ("setting", "kv_dtype"): ["int8", "torch.bfloat16", 16, {}],
    ("setting", "requests"): [0, -1, "2", None, True, 3],
    ("setting", "quantization"): [3, "8", True, 4.0],
    ("setting", "bucket"): [0, "256", True, -1],
    ("setting", "max_length"): [0, "64", True, 1.5],
    ("trials",): [None, {}, "x", [], [None]],
    ("trials", 0): [None, {}, []],
    ("trials", 0, "setting"): [None, {}],
    ("trials", 0, "milliseconds"): [None, -1, 0, "12", float("nan")],
    ("trials", 0, "chunks"): [-1, 1.5, None],
    ("trials", 0, "divergence"): [-1, "0"],
    ("trials", 0, "refused"): ["because", 1],
    ("explanation",): [None, "text", [1]],
    ("outline",): [None, "g" * 64, "0", 1],
    ("random",): [None, 0, "yes"],
}


@pytest.mark.parametrize("place", TWISTS, ids=lambda place: ".".join(map(str, place)))
def test_each_field_is_checked(tmp_path, place):
    path = tmp_path / "profile.json"
    *above, last = place
    for value in TWISTS[place]:
        content = profile().to_dict()
        held = content
        for name in above:
            held = held[name]
        held[last] = value
        path.write_text(json.dumps(content))
        with pytest.raises(CorruptError, match=r"is no tuning profile: .*tune again with kvcache tune"):
            TuningProfile.load(path)
    content = profile().to_dict()
    held = content
    for name in above:
        held = held[name]
    if isinstance(held, dict) and last not in ("outline", "random"):  # which the first profiles had not
        del held[last]
        path.write_text(json.dumps(content))
        with pytest.raises(CorruptError, match="is no tuning profile"):
            TuningProfile.load(path)
        held["policy"] = "a field that is not known"
        path.write_text(json.dumps(content))
        with pytest.raises(CorruptError, match="is no tuning profile"):
            TuningProfile.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "kvcache-tuning"}', b"[" * 100_000, b"1" * 10_000],
    ids=lambda content: repr(content[:20]),
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="tuning profile"):
        TuningProfile.load(path)


def test_a_file_that_is_not_there_or_far_too_long_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        TuningProfile.load(tmp_path / "gone.json")
    path = tmp_path / "long.json"
    with path.open("wb") as file:
        file.truncate(2**25)
    with pytest.raises(CorruptError, match="33554432 bytes"):
        TuningProfile.load(path)


def test_another_models_profile_is_refused(tmp_path, monkeypatch):
    model, other, path = build("llama"), build("llama", num_hidden_layers=1), tmp_path / "profile.json"
    profile(model_fingerprint(model)).save(path)
    assert TuningProfile.load(path, model).name == "a model"
    with pytest.raises(InputError, match=r"was measured on another model \(a model\); tune this one"):
        KVCacheManager.from_profile(other, path)
    replace(profile(model_fingerprint(model)), versions={**versions(), "transformers": "5.1.0"}).save(path)
    with pytest.raises(InputError, match=r"or this one under transformers 5\.1\.0, not"):
        TuningProfile.load(path, other)


@pytest.mark.parametrize("random", [True, False])
def test_a_profile_is_bound_to_shapes(tmp_path, caplog, random):
    """Made of random weights, loaded by a model that is the same but for its weights: with a word about fidelity."""
    model, path = build("llama"), tmp_path / "profile.json"
    other = build("llama")
    other.lm_head.weight.mul_(2)
    mine = profile(model_fingerprint(model), outline=model_outline(model), random=random)
    mine.save(path)
    assert TuningProfile.load(path) == mine
    TuningProfile.load(path, model)
    assert caplog.text == ""
    assert TuningProfile.load(path, other) == mine
    assert f"was measured on {'random' if random else 'other'} weights" in caplog.text
    with pytest.raises(InputError, match="another model"):
        TuningProfile.load(path, build("llama", num_hidden_layers=1))


def test_the_first_profiles_are_still_read(tmp_path):
    path, content = tmp_path / "profile.json", profile().to_dict()
    del content["outline"], content["random"]
    path.write_text(json.dumps(content))
    assert TuningProfile.load(path) == profile()


def test_another_machines_profile_is_taken_with_a_warning(tmp_path, caplog):
    model, path = build("llama"), tmp_path / "profile.json"
    mine = profile(model_fingerprint(model))
    replace(mine, machine={**mine.machine, "cpu": "a faster one"}).save(path)
    TuningProfile.load(path, model)
    assert "cpu a faster one, not" in caplog.text
    caplog.clear()
    mine.save(path)
    TuningProfile.load(path, model)
    assert caplog.text == ""


# ---------------------------------------------------------------------- put to use


def said(manager, **options):
    prompt = torch.arange(3, 13)[None] % VOCABULARY
    chunks = manager.stream(prompt, max_new_tokens=12, do_sample=False, **options)
    return torch.cat(list(chunks), 1)


def saved_for(model, path, setting):
    replace(profile(model_fingerprint(model)), setting=setting, trials=(Trial(setting, 1.0, 1),)).save(path)


@pytest.mark.parametrize(
    "setting",
    [
        Setting("eager", "fp32", BF16),
        Setting("graph", "bf16", FP32, bucket=64),
        Setting("off", "fp32", quantization=8),
        Setting("off"),
    ],
    ids=lambda one: f"{one.backend}-{one.precision}",
)
def test_a_manager_from_a_profile_is_one_built_by_hand(tmp_path, setting):
    model, path = build("llama"), tmp_path / "profile.json"
    saved_for(model, path, setting)
    manager = KVCacheManager.from_profile(model, path)
    by_hand = KVCacheManager(
        model if setting.precision is None else quantize_linear(model, setting.precision),
        kv_dtype=setting.kv_dtype,
        storage=None if setting.quantization is None else KVQuantization(setting.quantization),
    )
    assert torch.equal(said(manager), said(by_hand, backend=setting.backend))
    assert manager.report().backend == (None if setting.backend == "off" else setting.backend)
    assert manager.report().fallback is None
    assert manager.spec == by_hand.spec
    if setting.kv_dtype == BF16:
        assert manager.report().nbytes * 2 == said_bytes(KVCacheManager(model, backend="eager"))
    over = KVCacheManager.from_profile(model, path, backend="off", max_cache_length=50)
    assert (over.backend, over.max_cache_length) == ("off", 50)


def said_bytes(manager):
    said(manager)
    return manager.report().nbytes


def test_an_engine_from_a_profile_is_one_built_by_hand(tmp_path):
    from support.t3_models import tiny_t3

    from kvcache_chatterbox import ChatterboxEngine, random_conditionals

    t3, path = tiny_t3("gpt"), tmp_path / "profile.json"
    saved_for(t3, path, Setting("eager", "bf16", FP32, 4))
    request = {"text_tokens": torch.arange(1, 9), "t3_cond": random_conditionals(t3), "max_new_tokens": 10, "seed": 0}
    by_hand = ChatterboxEngine(t3, backend="eager", precision="bf16", kv_dtype=FP32, reuse="none")
    engine = ChatterboxEngine.from_profile(t3, path, reuse="none")
    tokens, expected = (torch.cat(list(one.inference_stream(**request)), 1) for one in (engine, by_hand))
    assert torch.equal(tokens, expected)
    assert engine.report() == by_hand.report()
    assert ChatterboxEngine.from_profile(t3, path, backend="off", reuse="none").batches is False
    with pytest.raises(InputError, match="another model"):
        ChatterboxEngine.from_profile(tiny_t3("gpt", seed=1), path)
    saved_for(t3, path, Setting("off", quantization=8))
    with pytest.raises(InputError, match="quantized cache, which Chatterbox's engine has not"):
        ChatterboxEngine.from_profile(t3, path)


def test_a_manager_has_a_back_end_of_its_own():
    model = build("llama")
    manager = KVCacheManager(model, backend="eager")
    said(manager)
    assert manager.report().backend == "eager"
    said(manager, backend="off")
    assert manager.report().backend is None
    with pytest.raises(InputError, match="backend='fast'"):
        KVCacheManager(model, backend="fast")
    with pytest.raises(InputError, match="bucket=0"):
        KVCacheManager(model, bucket=0)


@pytest.mark.parametrize("bucket", [8, 32, 256])
def test_graphs_read_multiples_of_their_bucket(bucket):
    """What is recorded is one graph for each multiple that is reached, and what it says does not change."""
    model, slots = build("llama"), 100
    manager = KVCacheManager(model, max_cache_length=slots, bucket=bucket)
    expected = said(manager, backend="eager")
    assert torch.equal(said(manager, backend="graph"), expected)
    (decoding,) = (one for one in inside.idle(inside.pool_of(manager)).values() if one.backend == "graph")
    reads = sorted(columns for columns, _ in inside.recorded(inside.backend_of(decoding)))
    lengths = range(11, 22)  # ten tokens of prompt, twelve new ones, the last of which is never run
    assert reads == sorted({min(-(-length // bucket) * bucket, slots) for length in lengths})
    with pytest.raises(InputError, match="bucket=0 must be a whole number"):
        KVCacheManager(model, bucket=0)
    assert inside.Graph(RECORDERS["cpu"], bucket=bucket).name == "graph"


# ---------------------------------------------------------------------- a real bench


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(folder)
    return LanguageTarget(str(folder))


def test_the_space_of_a_model_on_a_cpu(tiny):
    space = space_of(tiny, "throughput", max_requests=6)
    assert space.backend == ("eager", "off", "compile")
    assert space.requests == (1, 2, 4)
    assert space.quantization == (None, 8, 4)
    assert space.precision[0] == "fp32"
    out = {(one.axis, one.value) for one in space.refused}
    assert {("backend", "graph"), ("backend", "graph+compile"), ("bucket", "all")} <= out
    kept = set(space.precision) | {value for axis, value in out if axis == "precision"}
    assert kept == {"fp32", "bf16", "fp16", "int8"}
    assert space_of(tiny).requests == (1,)


def test_divergence_is_that_of_the_cache_and_precision(tiny):
    bench = SubjectBench(tiny, 20)
    assert bench.note is not None and "no tokenizer" in bench.note
    assert bench.divergence(Setting("eager", "fp32", FP32)) < 1e-9  # the order of sums alone
    cache = bench.divergence(Setting("eager", "fp32", BF16))
    four, eight = (bench.divergence(Setting("off", "fp32", quantization=bits)) for bits in (4, 8))
    # By hand: each pair of full passes, as the reference has it.
    model, ids = tiny.load(), tiny.sample(48)[0]
    with torch.inference_mode():
        ours, theirs = (
            one(ids[None]).logits[0].double().log_softmax(-1) for one in (quantize_linear(model, "bf16"), model)
        )
    expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    # The bench reads half of it step by step, through a cache: the same but for the order of sums, of bf16 products.
    assert bench.divergence(Setting("eager", "bf16", FP32, 4)) == pytest.approx(expected, rel=0.3)
    assert 1e-9 < cache < expected
    assert eight <= four  # within 64 tokens the cache may still hold all in full


def test_few_bits_are_judged_where_they_are_at_work(tiny):
    """Over texts of whole groups: there four bits cost more than eight, and both more than rounding alone."""
    bench = SubjectBench(tiny, 20)
    four, eight = (bench.divergence(Setting("off", "fp32", quantization=bits)) for bits in (4, 8))
    assert four > 4 * eight > 1e-9


def test_bits_that_would_do_nothing_are_left_out(tmp_path):
    build("mistral-own-window").save_pretrained(tmp_path)
    found = space_of(LanguageTarget(str(tmp_path)))
    assert found.quantization == (None,)
    (refused,) = (one for one in found.refused if one.axis == "quantization")
    assert "no layer of this model's cache is held in few bits" in refused.reason
    with pytest.raises(PolicyError, match="no layer"):
        KVCacheManager(build("mistral-own-window"), storage=KVQuantization(8))


def test_bits_are_left_out_behind_few_tokens(tiny):
    assert space_of(tiny, context=256).quantization == (None, 8, 4)
    found = space_of(tiny, context=100)
    assert found.quantization == (None,)
    assert any("behind 100 tokens hardly any are held in few bits" in one.reason for one in found.refused)


def test_bytes_of_a_setting_are_those_of_its_cache(tiny):
    bench = SubjectBench(tiny, 20)
    token = 2 * 2 * 16 * 2 * 4  # layers, KV heads, head dim, keys and values, fp32
    assert bench.nbytes(Setting("eager", requests=3, kv_dtype=FP32)) == 21 * 3 * token
    assert bench.nbytes(Setting("eager", kv_dtype=BF16)) == 21 * token // 2


def test_a_real_run_says_what_is_fastest_and_saves_it(tiny, tmp_path):
    space = Space(
        ("eager", "off"), (1, 2), ("fp32",), (FP32, BF16), (None,), refused=(Refusal("backend", "graph", "no GPU"),)
    )
    lines = []
    tuned = tune(tiny, "throughput", context=20, space=space, say=lines.append, time_limit=None)
    trials = {trial.setting: trial for trial in tuned.profile.trials}
    assert tuned.profile.setting in trials
    assert set(trials) <= set(space.settings())
    assert min(trial.milliseconds for trial in trials.values()) > 0
    assert tuned.best == trials[tuned.profile.setting].milliseconds / 1e3
    assert lines[-1].startswith("best: ")
    path = tmp_path / "profile.json"
    tuned.profile.save(path)
    manager = KVCacheManager.from_profile(tiny.load(), path)
    said(manager)
    assert manager.backend == tuned.profile.setting.backend


def test_wrong_requests_are_refused_before_anything_is_loaded(tmp_path):
    class Unloaded:
        name, shortest = "a model", 30

    for options, why in (
        ({"context": 20}, "context=20 must be at least 30"),
        ({"max_requests": 0}, "max_requests=0"),
        ({"bound": -1.0}, "fidelity -1"),
        ({"bound": math.nan}, "fidelity nan"),
        ({"time_limit": 0.0}, "time limit 0.0"),
    ):
        with pytest.raises(InputError, match=why):
            tune(Unloaded(), **options)
