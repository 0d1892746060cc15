"""The vocoder in `kvcache profile` and `kvcache tune`: parts told apart, settings chosen by their time, kept and loaded again."""

import json
from dataclasses import replace

import pytest
import torch
from support.clocks import Ticking
from support.inside.speech import options_of, speaker_of
from support.inside.tools import AUDIO, LanguageTarget, tuned_vocoder
from support.t3_models import UPSTREAMS_WARNINGS, tiny_t3
from support.whole import reference, short_s3gen

pytest.importorskip("typer")

from kvcache import CorruptError, InputError, TuningProfile
from kvcache.cli import main
from kvcache.decoding import Setting, VocoderSetting
from kvcache.tools import Space, profile, tune
from kvcache_chatterbox import ChatterboxEngine, VocoderOptions, stand_in
from kvcache_chatterbox.tools import LoadedTarget

pytestmark = [*UPSTREAMS_WARNINGS, pytest.mark.one_release, pytest.mark.filterwarnings("ignore")]
COSTS = {None: 10.0, "bf16": 6.0, "fp16": 9.9, "int8": 7.0}  # ms a token


class Speaks:
    """A subject whose vocoder takes made-up times, on a clock of its own."""

    name = "made up"

    def __init__(self, costs=None, compiled=0.5, fails=()):
        self.costs, self.compiled, self.fails = costs or COSTS, compiled, fails
        self.now, self.ran = 0.0, []

    def prepared(self, setting, device):
        return _Prepared(self, setting.vocoder)


class _Prepared:
    def __init__(self, subject, setting):
        self.subject, self.setting = subject, setting

    def vocode(self, tokens):
        subject, one = self.subject, self.setting
        if one.precision in subject.fails or (one.compiled and "compiled" in subject.fails):
            raise RuntimeError("its kernel is missing\nand more")
        subject.ran.append(one)
        subject.now += tokens * subject.costs[one.precision] * (subject.compiled if one.compiled else 1) / 1e3
        return {}

    def release(self):
        pass


def tuned(subject, given=None, **options):
    return tuned_vocoder(subject, Setting(), given or VocoderSetting(), clock=lambda: subject.now, **options)


def test_what_changes_the_sound_is_tried_only_where_it_is_asked_for():
    best, trials, said = tuned(Speaks())
    assert best == VocoderSetting(compiled=True)
    assert {one.setting.precision for one in trials} == {None}
    assert any("--change-sound" in line for line in said)
    best, trials, _ = tuned(Speaks(), change_sound=True)
    assert best == VocoderSetting(precision="bf16", compiled=True)
    assert [one.milliseconds for one in trials] == pytest.approx([10, 6, 9.9, 7, 3])
    given = VocoderSetting("meanflow", "int8", reference_seconds=3)
    best, trials, said = tuned(Speaks(), given)
    assert best == replace(given, compiled=True)
    assert len(trials) == 2 and "meanflow, int8, compiled, 3 s of the voice" in said[0]


def test_what_is_hardly_faster_is_not_taken():
    best, _, _ = tuned(Speaks({None: 10.0, "bf16": 9.9, "fp16": 11, "int8": 12}, compiled=0.99), change_sound=True)
    assert best == VocoderSetting()


def test_what_fails_is_refused_with_its_reason():
    best, trials, said = tuned(Speaks(fails=("bf16", "compiled")), change_sound=True)
    assert best == VocoderSetting(precision="int8")
    assert [one.refused for one in trials].count("its kernel is missing") == 2
    assert "refused, its kernel is missing" in said[0]
    with pytest.raises(InputError, match="the vocoder of made up cannot run: its kernel is missing"):
        tuned(Speaks(fails=(None,)))


def test_nothing_is_begun_after_its_time():
    subject = Speaks()
    best, trials, _ = tuned(subject, until=1.0, change_sound=True)
    assert best == VocoderSetting() and set(subject.ran) == {best}
    assert {one.refused for one in trials} == {None, "no time was left"}


# ---------------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A profile of a stand-in, tuned with its vocoder."""
    model, out = stand_in(tiny_t3("gpt")), tmp_path_factory.mktemp("tuned") / "profile.json"
    space = Space(("eager",))
    found = tune(LoadedTarget(model), context=60, time_limit=0.01, space=space, vocoder=VocoderSetting())
    found.profile.save(out)
    return model, out, found.profile


def test_a_profile_says_how_the_vocoder_runs_and_an_engine_takes_it(saved):
    model, out, made = saved
    assert made.vocoder == VocoderSetting()
    assert any(line.startswith("vocoder: own, as loaded") for line in made.explanation)
    loaded = TuningProfile.load(out, model.t3)
    assert loaded == made
    assert options_of(speaker_of(ChatterboxEngine.from_profile(model, out))) == VocoderOptions()
    assert speaker_of(ChatterboxEngine.from_profile(model.t3, out)) is None  # a bare T3 has none


@pytest.mark.audio
def test_what_was_asked_for_of_the_sound_is_given_to_the_engine(saved, tmp_path):
    model, _, made = saved
    setting = VocoderSetting("own", "int8", True, 3.0)
    trial = replace(made.vocoder_trials[0], setting=setting)
    replace(made, vocoder=setting, vocoder_trials=(trial,)).save(tmp_path / "other.json")
    whole = stand_in(model.t3)
    whole.s3gen = short_s3gen(True)
    engine = ChatterboxEngine.from_profile(whole, tmp_path / "other.json")
    assert engine.vocoder.options == VocoderOptions(precision="int8", compiled=True, reference_seconds=3.0)
    plain = ChatterboxEngine.from_profile(whole, tmp_path / "other.json", vocoder=None)
    assert plain.vocoder.options == VocoderOptions()


def test_a_profile_without_a_vocoder_is_as_it_was(saved, tmp_path):
    _, out, _ = saved
    content = json.loads(out.read_text())
    del content["vocoder"], content["vocoder_trials"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert TuningProfile.load(tmp_path / "old.json").vocoder is None
    assert "vocoder" not in TuningProfile.load(tmp_path / "old.json").arguments


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocoder": 3}, "the vocoder is no object"),
        ({"vocoder": {"weights": "own"}}, "the vocoder lacks"),
        ({"vocoder_trials": []}, "its vocoder is not among the trials"),
        ({"vocoder_trials": 3}, "vocoder_trials is no list"),
    ],
    ids=str,
)
def test_a_profile_whose_vocoder_is_none_is_refused(saved, tmp_path, change, says):
    _, out, _ = saved
    (tmp_path / "bad.json").write_text(json.dumps({**json.loads(out.read_text()), **change}))
    with pytest.raises(CorruptError, match=says):
        TuningProfile.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("precision", "int4", "precision is 'int4'"),
        ("compiled", 1, "compiled is '1'"),
        ("reference_seconds", -1, "reference_seconds is '-1'"),
        ("max_chunk", 0, "max_chunk is '0'"),
        ("weights", None, "weights is 'None'"),
    ],
)
def test_each_field_of_the_vocoder_is_checked(saved, tmp_path, name, value, says):
    _, out, _ = saved
    content = json.loads(out.read_text())
    content["vocoder"][name] = value
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(CorruptError, match=says):
        TuningProfile.load(tmp_path / "bad.json")


@pytest.mark.audio
def test_parts_of_the_audio_are_told_apart(monkeypatch):
    clock = Ticking()
    monkeypatch.setattr("time.perf_counter", clock)
    model = stand_in(tiny_t3("gpt"))
    model.s3gen = short_s3gen(True)
    model.conds.gen = reference(1)
    from kvcache_chatterbox.vocoder import Flow, Hift

    for kind, name, seconds in ((Flow, "mels", 0.5), (Hift, "wave", 0.25)):
        plain = getattr(kind, name)

        def slow(self, *args, plain=plain, seconds=seconds, **given):
            clock.go_on(seconds)
            return plain(self, *args, **given)

        monkeypatch.setattr(kind, name, slow)
    found = profile(LoadedTarget(model), Setting("eager"), 70, 20, rounds=1)
    # Three chunks of 25 tokens, and the three at the end that were only looked ahead at.
    assert found.step.parts["vocoder_mel"] == pytest.approx(4 * 0.5 / 75, rel=0.02)
    assert found.step.parts["vocoder_wave"] == pytest.approx(4 * 0.25 / 75, rel=0.02)
    assert found.step.parts["watermark"] == 0
    assert any("Audio is" in line and "tokens to a mel" in line for line in found.sentences())
    own = sum(p.untyped_storage().nbytes() for p in model.s3gen.parameters())
    assert found.memory.parts["vocoder_weights"] > own
    assert found.step.share(*AUDIO) > 0.5


# ---------------------------------------------------------------------- commands


def test_a_model_that_does_not_speak_has_no_vocoder(tmp_path, capsys):
    from support.families import build

    build("llama").save_pretrained(tmp_path)
    for command in (["plan"], ["profile"], ["tune", "--out", str(tmp_path / "t.json")]):
        assert main([*command, str(tmp_path), "--vocoder", "own"]) == 2
        assert "has no vocoder; leave the vocoder out" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="has no vocoder"):
        tune(LanguageTarget(str(tmp_path)), vocoder=VocoderSetting())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--max-chunk", "25"], "--max-chunk 25: it goes with a vocoder; give --vocoder own"),
        (["profile", "--reference-seconds", "3"], "--reference-seconds 3.0: it goes with a vocoder"),
        (["plan", "--vocoder", "own", "--max-chunk", "0"], "--max-chunk 0: give at least 1"),
        (["plan", "--vocoder", "own", "--reference-seconds", "nan"], "--reference-seconds nan"),
        (["plan", "--vocoder", "own", "--vocoder-precision", "int2"], "--vocoder-precision int2: give one of"),
        (["tune", "--out", "t.json", "--change-sound"], "--change-sound: it goes with --vocoder own"),
    ],
    ids=str,
)
def test_wrong_options_are_said_in_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    assert main([command, "chatterbox-nano", *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.audio
@pytest.mark.slow
def test_a_name_is_profiled_with_random_weights(capsys):
    short_s3gen(True)
    assert (
        main(["profile", "chatterbox-nano", "--vocoder", "own", "--reference-seconds", "1", "--tokens", "8", "--json"])
        == 0
    )
    step = json.loads(capsys.readouterr().out)["step"]
    assert all(step["parts"][part] > 0 for part in ("vocoder_mel", "vocoder_wave"))
    assert torch.is_grad_enabled()
