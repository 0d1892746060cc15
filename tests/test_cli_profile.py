"""The command `kvcache profile`: what it prints, and what it says to wrong requests."""

import json

import pytest
from support.families import build

from kvcache.cli import main
from kvcache.tools import MEMORY, PARTS

pytestmark = pytest.mark.one_release


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return str(path)


def run(capsys, *arguments):
    code = main(["profile", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


SHORT = ("--context", "30", "--tokens", "12")


def test_tables_bars_and_plain_words(capsys, folder, tmp_path):
    code, out, _ = run(capsys, folder, *SHORT, "--plot", str(tmp_path / "bars.png"))
    assert code == 0
    for said in ("cache update", "MLP", "sampling", "KV cache", "Outside attention", "perfect cache", "█"):
        assert said in out
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_json_alone_and_whole(capsys, folder):
    code, out, _ = run(capsys, folder, *SHORT, "--backend", "off", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["step"]["parts"]) == set(PARTS) and set(found["memory"]["parts"]) == set(MEMORY)
    assert sum(found["step"]["shares"].values()) == pytest.approx(1)
    assert sum(found["memory"]["parts"].values()) == found["memory"]["total"]
    assert found["setting"] == {"backend": "off", "requests": 1}
    assert found["best_speedup"] == pytest.approx(1 / (1 - found["cache_time"]))
    assert all(isinstance(sentence, str) for sentence in found["sentences"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "warp"], "--backend warp: give one of off, eager"),
        (["--precision", "fp4"], "--precision fp4: give one of fp32"),
        (["--requests", "0"], "--requests 0: give at least 1"),
        (["--threads", "0"], "--threads 0: give at least 1"),
        (["--device", "tpu"], "--device tpu: give cpu or cuda"),
        (["--tokens", "3"], "--tokens 3: give at least 8"),
        (["--context", "0"], "--context 0"),
        (["--plot", "bars.doc"], "bars.doc: name a .png, .pdf or .svg"),
        (["--tokens", "many"], "run kvcache profile --help"),
        (["--nonsense"], "run kvcache profile --help"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(capsys, folder, arguments, said):
    code, out, err = run(capsys, folder, *arguments)
    assert code == 2
    assert out == ""
    assert said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "said"), [("/nowhere/at/all", "no folder"), ("chatterbox-klingon", "no variant 'klingon'")]
)
def test_a_model_that_is_not_there(capsys, model, said):
    code, out, err = run(capsys, model)
    assert code == 2 and out == ""
    assert said in err and len(err.strip().splitlines()) == 1


def test_a_model_whose_text_is_too_short_for_a_voice(capsys):
    pytest.importorskip("chatterbox")
    code, _, err = run(capsys, "chatterbox-nano", "--context", "100")
    assert code == 2
    assert "context=100" in err and "378 tokens or more" in err


def test_without_matplotlib_it_says_how_to_get_it(capsys, folder, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, folder, "--plot", str(tmp_path / "bars.png"))
    assert code == 2
    assert 'pip install "kvcache[plot]"' in err
