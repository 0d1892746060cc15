"""The benchmark of text to audio: its listener, its ratios, what its page and picture make of a result, and a small run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "generate"))

import end_to_end
import figures
import pages
from end_to_end import EXACT, FAST, FIXED, Parts, apart, levers_of, longest, ratios_of, row_of, with_bases, with_gains
from measured import ROOT, Result, results
from speaking import Side, listen, tokens_of

from kvcache_chatterbox.vocoder import VocoderOptions

pytestmark = pytest.mark.one_release


# ---------------------------------------------------------------------- who listens


def test_a_listener_who_never_waits_hears_no_silence():
    heard = listen([(0.5, 1.0), (1.4, 1.0), (2.5, 0.5)])  # the third comes as the second has been played
    assert (heard.first, heard.silence, heard.longest, heard.underruns) == (0.5, 0.0, 0.0, 0)
    assert heard.audio == 2.5 and heard.waited == 0.5


def test_silences_are_counted_from_when_there_is_nothing_to_play():
    heard = listen([(1.0, 1.0), (2.25, 0.5), (5.75, 1.0), (5.8, 1.0)])
    assert heard.silence == pytest.approx(0.25 + 3.0)
    assert heard.longest == pytest.approx(3.0) and heard.underruns == 2
    assert heard.waited == pytest.approx(1.0 + 3.25)


def test_what_comes_early_is_played_later():
    # 3 s are there at once: what comes at 2 s and at 4 s is in time, as it was at 1 s.
    assert listen([(0.0, 3.0), (2.0, 1.0), (4.0, 1.0)]).underruns == 0
    assert listen([(0.0, 3.0), (2.0, 1.0), (4.5, 1.0)]).silence == pytest.approx(0.5)


def test_upstreams_one_piece_is_all_waiting():
    heard = listen([(30.0, 10.0)])
    assert heard.waited == 30.0 and heard.underruns == 0


# ---------------------------------------------------------------------- its figures


def a_run(arrivals, **spent):
    return {"arrivals": arrivals, "seconds": arrivals[-1][0], "spent": spent, "chunks": [10, 40]}


def test_a_row_is_of_the_same_requests():
    runs = [a_run([(at, 1.0), (2 * at, 3.0)], T3=at / 2, flow=at) for at in (1.0, 2.0, 4.0)]
    row = row_of(runs)
    assert (row["n"], row["speech, s"], row["s"], row["first audio, s"]) == (3, 4.0, 4.0, 2.0)
    assert row["RTF"] == 1.0 and row["underruns"] == 1 and row["longest behind the first, s"] == pytest.approx(1.0)
    assert row["silence in all, s"] == pytest.approx(2.0 + 1.0)
    assert [row[name] for name in ("T3, %", "flow, %", "HiFT, %", "host, %")] == [25.0, 50.0, 0.0, 25.0]
    assert row["runs"] == 2 and row["first chunk, tokens"] == 10


def test_a_row_without_requests_has_no_figures():
    row = row_of([])
    assert row["n"] == 0 and all(value is None for name, value in row.items() if name != "n")


def a_row(variant, side, speech, s, first=1.0, **more):
    row = row_of([a_run([(first, speech / 2), (s, speech / 2)])])
    known = {
        "variant": variant,
        "side": side,
        "how": side,
        "T3": "fp32, eager",
        "vocoder": f"as {side}",
        "cold, s": 9.0,
    }
    return known | {"chunking": "auto", "new voice, s": 2.0, "peak, MiB": 100.0, "mel distance": None} | row | more


ROWS = [
    a_row("english", FIXED, 10, 160.0, 16.0),
    a_row("english", EXACT, 10, 64.0),
    a_row("english", EXACT, 30, 150.0),
    a_row("english", FAST, 10, 12.0, 2.0, **{"mel distance": 1.5, "log-spectral distance, dB": 12.0}),
    a_row("nano", FIXED, 10, 24.0, 3.0),
    a_row("nano", FIXED, 30, 72.0, 3.0),
    a_row("nano", FAST, 10, 5.0, 0.5),
    a_row("nano", FAST, 30, 16.0, 0.75),
]


def test_ratios_are_of_the_longest_speech_that_both_have_spoken():
    ratios = ratios_of(ROWS)
    assert ratios == pytest.approx(
        {
            "english_exact_over_fixed": 160 / 64,
            "english_fast_over_fixed": 160 / 12,
            "nano_fast_over_fixed": 72 / 16,
            "english_realtime": 10 / 12,
            "nano_realtime": 30 / 16,
            "english_first_audio": 8.0,
            "nano_first_audio": 4.0,
            "nano_underruns": 1.0,
        }
    )
    assert longest(ROWS, "turbo", FIXED) is None
    often = [a_row("nano", side, 2, 5.0, first, n=3) for side, first in ((FIXED, 2.0), (FAST, 1.0))]
    assert ratios_of([*ROWS, *often]) == pytest.approx(ratios | {"nano_first_audio": 2.0})  # of most requests


def test_what_was_not_measured_has_no_ratio():
    assert ratios_of([row_of([]) | {"variant": "nano", "side": FAST}]) == {}
    assert set(ratios_of(ROWS[3:4])) == {"english_realtime"}


def test_levers_are_compared_with_what_they_differ_from():
    sides = {"a": Side("a"), "b": Side("b", over="a")}
    rows = with_gains([a_row("nano", "a", 10, 8.0), a_row("nano", "b", 10, 4.0)], sides)
    assert [row["this over / this"] for row in rows] == [None, 2.0]
    assert with_bases(sides, ["b"]) == sides and list(with_bases(sides, ["a"])) == ["a"]


@pytest.mark.parametrize("variant", ["english", "nano"])
def test_each_lever_differs_from_its_base_in_one_thing_and_has_settings_that_exist(variant, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--levers"])
    levers = levers_of(end_to_end.options_of(), variant)
    for name, side in levers.items():
        VocoderOptions(**(side.vocoder or {}))
        if side.over is None:
            assert name == FIXED
            continue
        base = levers[side.over]
        fields = ("chunking", "precision", "backend", "overlap", "onednn", "whole_hift")
        changed = [name for name in fields if getattr(side, name) != getattr(base, name)]
        mine, its = (dict(one.vocoder or {}) for one in (side, base))
        changed += [name for name in mine.keys() | its.keys() if mine.get(name) != its.get(name)]
        if name not in (FAST, "outside", "t3-int8-compile", "t3-bf16-compile"):  # of which each part has a row as well
            assert len(changed) == 1, (name, changed)


def test_distances_are_zero_for_the_same_and_known_for_louder():
    noise = torch.randn(24_000, generator=torch.Generator().manual_seed(0))

    def mel(signal):
        return signal.abs().clamp(min=1e-3).log()

    assert apart(mel, noise, noise.clone()) == (0.0, 0.0)
    near, spectral = apart(mel, noise, 10 * noise)
    assert spectral == pytest.approx(20, abs=0.1) and near == pytest.approx(torch.tensor(10.0).log().item(), abs=0.05)


def test_texts_are_as_long_as_the_reports():
    assert [len(text) for text in end_to_end.TEXTS][:2] == [11, 63] and len(end_to_end.TEXTS[2]) >= 400
    assert tokens_of(end_to_end.TEXTS[1]) == 105  # 4.2 s of 15 characters


def test_parts_are_put_together_and_what_is_measured_anew_replaces_the_old(tmp_path):
    old = {"rows": ROWS[:2], "levers": [], "arrivals": {"x": [[1, 1]]}, "command": "python a", "commit": "abc"}
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    parts = Parts([file])
    again = a_row("english", EXACT, 10, 32.0)
    parts.add("rows", [again, ROWS[2]])
    assert [(row["side"], row["s"]) for row in parts.lists["rows"]] == [(FIXED, 160.0), (EXACT, 32.0), (EXACT, 150.0)]
    assert parts.made == [{"command": "python a", "commit": "abc"}] and parts.arrivals == {"x": [[1, 1]]}


# ---------------------------------------------------------------------- page and picture


@pytest.fixture
def result():
    shape = json.loads(json.dumps(results()["t3_step"].data))
    arrivals = {
        f"{row['variant']}, {row['side']}, {row['speech, s']:g}": [
            [1.0, row["speech, s"] / 2],
            [row["s"], row["speech, s"] / 2],
        ]
        for row in ROWS
    }
    levers = with_gains(
        [a_row("nano", name, 10, s) for name, s in ((FIXED, 24.0), ("grow", 12.0))],
        {FIXED: Side(FIXED), "grow": Side("grow", over=FIXED)},
    )
    more = {
        "benchmark": "end_to_end", "rows": ROWS, "ratios": ratios_of(ROWS), "arrivals": arrivals, "parts": [],
        "reference, s": 10.0, "levers": levers, "texts": [a_row("nano", FAST, 10, 5.0, characters=63)],
        "streams": [{"variant": "nano", "streams": 4, "together / one by one": 1.625}],
        "cold": [{"variant": "nano", "process": "second", "first / later": 1.125}],
    }  # fmt: skip
    return Result("end_to_end", shape | more)


def test_the_page_says_what_was_measured(result):
    page = pages.rendered("benchmarks", results() | {"end_to_end": result})
    section = page[page.index("### What a listener waits for") : page.index("### A decode step, in every way")]
    assert (
        "| English 520M | fixed | fp32, eager | as fixed | 10.0 | 16.0 | 2.00 | 9.00 | 160 (1) | 16.0 | 155 | 139 |"
        in section
    )
    assert "| english_exact_over_fixed | 2.500 |" in section
    assert "| English 520M | as fast | 1.50 | 12.0 |" in section and "not judged by ear here" in section
    assert "| Nano 110M | grow | fp32, eager | as grow | fixed | 1.00 | 1.20 | 7.00 | 2.00× | 2.00× | 1 |" in section
    assert "| nano | 4 | 1.625 |" in section
    assert "| nano | second | 1.125 |" in section
    assert section.count("are not at hand") == 1


def test_the_page_does_without_it():
    without = {name: found for name, found in results().items() if name != "end_to_end"}
    assert "What a listener waits for" not in pages.rendered("benchmarks", without)
    assert "end_to_end" not in figures.drawable(without)


def test_the_picture_shows_the_longest_speech_of_each_side(result, tmp_path):
    shown = figures.drawn("end_to_end", {"end_to_end": result}, tmp_path)
    assert shown["nano, fast"] == {"first, s": 1.0, "last, s": 16.0, "played, s": 31.0, "audio, s": 30, "chunks": 2}
    assert shown["english, exact"]["last, s"] == 150.0 and len(shown) == 5
    assert (tmp_path / "end_to_end.svg").read_text().startswith("<?xml")


# ---------------------------------------------------------------------- a small run


def test_without_the_audio_stack_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--quick"])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(end_to_end, "Processes", None)  # nothing has begun by then
    monkeypatch.setitem(sys.modules, "perth", None)
    with pytest.raises(SystemExit, match=r"chatterbox\.tts_turbo does not load, see docs/chatterbox\.md"):
        end_to_end.main()


@pytest.mark.slow
def test_a_small_run_measures_every_side(tmp_path):
    pytest.importorskip("torchaudio")
    pytest.importorskip("perth")
    file = tmp_path / "result.json"
    given = ["--json", str(file), "--streams", "2", "--cold", "--levers", "grow", "--sides", "fixed", "exact", "fast"]
    command = [sys.executable, str(ROOT / "benchmarks" / "end_to_end.py"), "--quick", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert [row["side"] for row in found["rows"]] == [FIXED, EXACT, FAST]
    assert all(row["n"] == 1 and row["s"] > 0 and row["first chunk, tokens"] <= 25 for row in found["rows"])
    assert {row["side"] for row in found["levers"]} == {FIXED, "grow"} and found["streams"][0]["streams"] == 2
    assert [row["process"] for row in found["cold"]] == ["first of the machine", "second", "third, warmed up"]
    assert all(row["first / later"] > 0 for row in found["cold"])
    assert [row["warm-up, s"] is None for row in found["cold"]] == [True, True, False]
    assert {"nano_fast_over_fixed", "nano_realtime", "nano_first_audio", "nano_underruns"} <= set(found["ratios"])
    assert found["weights"] == "random" and found["quick"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of diffusers, librosa and torchaudio
def test_the_server_under_load_speaks_through_the_real_vocoder():
    for package in ("torchaudio", "httpx", "prometheus_client", "fastapi"):
        pytest.importorskip(package)
    import server_load

    engine = server_load.engine_with_voices(server_load.tiny(), "fast")
    vocoder = engine.vocoder
    assert vocoder.meanflow and vocoder.options.reference_seconds == 3 and len(engine.voices) > 1
    voice = engine.voice_of(next(iter(engine.voices)))
    assert vocoder.before(voice) == 75  # tokens, of the 250 that its clip has
