"""`kvcache tune` from the command line: a real run of a tiny model, and wrong requests, each said in one line."""

import json

import pytest
from support.families import build
from support.inside.tools import LanguageTarget

from kvcache import KVCacheManager, TuningProfile
from kvcache.cli import main

pytestmark = pytest.mark.one_release


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """A profile of a real run, and what it printed as JSON; a limit too short for anything to be compiled in."""
    out = tmp_path_factory.mktemp("out") / "profile.json"
    return out, [str(folder), "--context", "20", "--time-limit", "40", "--out", str(out)]


def test_a_run_prints_json_and_saves_what_it_says(ran, folder, capsys):
    out, arguments = ran
    assert main(["tune", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)  # nothing else is on standard output
    assert "best: " in captured.err
    profile = TuningProfile.load(out, LanguageTarget(str(folder)).load())
    assert answer["profile"] == json.loads(out.read_text()) == profile.to_dict()
    assert answer["setting"] == profile.to_dict()["setting"]
    assert answer["tokens_per_second"] == pytest.approx(1e3 / answer["milliseconds"])
    assert answer["untried"] > 0
    assert "no tokenizer" in answer["note"]
    chosen = [trial for trial in profile.trials if trial.setting == profile.setting]
    assert [trial.milliseconds for trial in chosen] == [answer["milliseconds"]]
    assert profile.setting.requests == 1
    assert all(trial.divergence is None or trial.refused or trial.divergence <= 0.03 for trial in profile.trials)
    assert KVCacheManager.from_profile(LanguageTarget(str(folder)).load(), out).backend == profile.setting.backend


def test_a_run_explains_itself(ran, capsys):
    out, arguments = ran
    assert main(["tune", *arguments, "--fidelity", "0", "--for", "throughput", "--max-requests", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for line in TuningProfile.load(out).explanation:
        assert " ".join(line.split()) in shown
    assert "over 0" in shown  # what fewer bits move is refused
    assert f"Saved as {out}" in shown


WRONG = {
    "no such model": (["nothing-here", "--out", "p.json"], "is no folder with a config.json"),
    "no out": (["FOLDER"], "Missing option '--out'"),
    "no model": (["--out", "p.json"], "Missing argument 'MODEL'"),
    "no folder to write to": (["FOLDER", "--out", "gone/p.json"], "there is no folder gone"),
    "a folder as out": (["FOLDER", "--out", "."], "is a folder itself"),
    "no goal": (["FOLDER", "--out", "p.json", "--for", "speed"], "'latency', 'throughput'"),
    "no time": (
        ["FOLDER", "--out", "p.json", "--time-limit", "0"],
        "--time-limit 0: give a number of seconds above 0",
    ),
    "endless time": (["FOLDER", "--out", "p.json", "--time-limit", "inf"], "--time-limit inf"),
    "no number": (["FOLDER", "--out", "p.json", "--time-limit", "soon"], "Invalid value for '--time-limit'"),
    "negative fidelity": (["FOLDER", "--out", "p.json", "--fidelity", "-1"], "--fidelity -1: give"),
    "no fidelity": (["FOLDER", "--out", "p.json", "--fidelity", "nan"], "--fidelity nan"),
    "no requests": (["FOLDER", "--out", "p.json", "--max-requests", "0"], "--max-requests 0: give at least 1"),
    "no context": (["FOLDER", "--out", "p.json", "--context", "0"], "--context 0: give at least 1"),
    "no threads": (["FOLDER", "--out", "p.json", "--threads", "0"], "--threads 0: give at least 1"),
    "no memory": (["FOLDER", "--out", "p.json", "--memory", "much"], "--memory much"),
    "no device": (["FOLDER", "--out", "p.json", "--device", "abacus"], "--device abacus is not here"),
    "unknown option": (["FOLDER", "--out", "p.json", "--fast"], "No such option"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_said_in_one_line(name, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, why = WRONG[name]
    assert main(["tune", *(str(folder) if one == "FOLDER" else one for one in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert why in captured.err
    assert list(tmp_path.iterdir()) == []  # nothing was written


def test_a_cache_that_may_take_nothing_leaves_nothing_to_choose(folder, tmp_path, capsys):
    out = tmp_path / "p.json"
    assert main(["tune", str(folder), "--context", "20", "--memory", "1KiB", "--out", str(out)]) == 2
    assert "no setting can be run: its cache takes" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
