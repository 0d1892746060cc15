"""Models that are not as they should be, and hostile arguments, at every command: one clear line, exit code 2, no traceback."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.commands import COMMANDS, NEEDED, WRONG, places, refused  # noqa: F401
from support.inside.commands import bytes_of, shown_room
from support.inside.tools import ENTRY_POINTS, PLANNED_PROCESS_BYTES, LanguageTarget
from support.searching import search
from transformers import LlamaConfig, LlamaForCausalLM

from kvcache import InputError, MissingDependencyError
from kvcache.cli import main
from kvcache.tools import Room, room, subject

pytestmark = pytest.mark.one_release

CONFIG = {
    "not JSON": b"{",
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "binary": bytes(range(256)),
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "no type": b"{}",
    "unknown type": {"model_type": "parrot"},
    "a number for a type": {"model_type": 3},
    "no language model": {"model_type": "vit"},
    "heads that do not divide": {"num_attention_heads": 3},
    "KV heads that do not divide": {"num_key_value_heads": 3},
    "no heads": {"num_attention_heads": 0},
    "no KV heads": {"num_key_value_heads": 0},
    "negative width": {"hidden_size": -64},
    "words for a width": {"hidden_size": "sixty-four"},
    "half a width": {"hidden_size": 64.5},
    "no layers": {"num_hidden_layers": 0},
    "fewer than no layers": {"num_hidden_layers": -1},
    "null layers": {"num_hidden_layers": None},
    "no vocabulary": {"vocab_size": 0},
    "no positions": {"max_position_embeddings": 0},
    "unknown activation": {"hidden_act": "magic"},
    "unknown dtype": {"dtype": "float3"},
    "unknown rope": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    "odd head": {"head_dim": 15},
    "no head": {"head_dim": 0},
}
WEIGHTS = {
    "none": None,
    "cut off": lambda data: data[:1000],
    "cut off at the end": lambda data: data[:-8],
    "text": lambda data: b"hello",
    "zeros": lambda data: bytes(100),
    "a header without end": lambda data: (2**40).to_bytes(8, "little") + data[8:],
    "empty": lambda data: b"",
}
NAMES = ["", "   ", "a\0b", "x" * 5000, "~/nothing", "/nothing", "./nothing", "https://example.com/x", "a\nb/c", "a\udcff/b",
         "chatterbox-", "chatterbox", "chatterbox-nano:/nowhere", "nope.gguf", "a/b/c", "-", "..\\x", "{", "*", "a:b"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a tiny model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=300, pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("whole")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def one_line(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(PLANNED_PROCESS_BYTES, lambda precision: 400 * 2**20)

    def ask(arguments):
        code = main(arguments)
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), (arguments, code, out, err)
        [line] = err.splitlines()
        assert line.startswith("kvcache") and "Traceback" not in line and len(line) < 1000
        assert line.count("cannot be loaded") <= 1  # said once
        return line

    return ask


@pytest.mark.parametrize("name", CONFIG)
def test_c6_a_config_that_is_not_as_it_should_be(name, whole, one_line, tmp_path):
    wrong = CONFIG[name]
    good = json.loads((whole / "config.json").read_text())
    (tmp_path / "config.json").write_bytes(wrong if isinstance(wrong, bytes) else json.dumps(good | wrong).encode())
    one_line(["plan", str(tmp_path), "--length", "20"])


@pytest.mark.parametrize(
    "command", [["profile", "--context", "20", "--tokens", "8"], ["tune", "--out", "{}/t.json"]], ids=str
)
@pytest.mark.parametrize("name", WEIGHTS)
def test_c6_weights_that_are_not_as_they_should_be(name, command, whole, one_line, tmp_path):
    shutil.copy(whole / "config.json", tmp_path)
    if (spoil := WEIGHTS[name]) is not None:
        (tmp_path / "model.safetensors").write_bytes(spoil((whole / "model.safetensors").read_bytes()))
    line = one_line([command[0], str(tmp_path), *(one.format(tmp_path) for one in command[1:])])
    assert str(tmp_path) in line and not (tmp_path / "t.json").exists()


def test_c6_weights_of_another_size(whole, one_line, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "sizes that its config.json says" in one_line(["profile", str(tmp_path)])


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_c6_a_name_that_no_model_has(name, one_line, tmp_path):
    for command in (["plan"], ["profile"], ["tune", "--out", str(tmp_path / "t.json")]):
        one_line([command[0], "--", name] if len(command) == 1 else [*command, "--", name])


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="there is no device by name")
def test_what_cannot_be_written_is_told_before_anything_is_measured(whole, one_line, tmp_path):
    assert "/dev/null is a device, not a file" in one_line(["tune", str(whole), "--out", "/dev/null"])
    assert Path("/dev/null").is_char_device()
    pytest.importorskip("matplotlib")
    (tmp_path / "plot.png").mkdir()
    plot = ["--plot", str(tmp_path / "plot.png")]
    assert "plot.png is a folder, not a file" in one_line(["profile", str(whole), *plot])


def test_c6_numbers_are_refused_by_the_name_of_their_option(whole, one_line):
    assert "--tokens 1: give at least 8" in one_line(["profile", str(whole), "--tokens", "1"])
    for command in (["profile"], ["tune", "--out", "/tmp/t.json"]):
        threads = torch.get_num_threads()
        assert "--threads 10000: this machine has" in one_line([*command, str(whole), "--threads", "10000"])
        assert torch.get_num_threads() == threads


def test_c6_a_language_model_is_not_told_of_a_vocoder(whole, capsys):
    assert main(["profile", str(whole), "--context", "20", "--tokens", "8"]) == 0
    assert "vocoder" not in capsys.readouterr().out


HOSTILE = [
    ["--no-such-option"], ["-z"], ["--json=perhaps"], ["--jsonn"], ["--no-json"], ["--=3"], ["--store"], ["---"],
    *([extra] for extra in ("surplus", "", "-", "x" * 5000, "../..", "a\0b", "a\udcff", "\n", "$(reboot)", "ü█", "%s", "0")),
]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_meets_twenty_kinds_of_bad_input(name, refused):  # noqa: F811
    assert len(HOSTILE) >= 20
    arguments = NEEDED[name]
    for hostile in HOSTILE:
        surplus = name == "prefixes verify" and not hostile[0].startswith("--")  # which takes an address, or none
        refused(name, [*arguments, *(["ab"] if surplus else []), *hostile])
    assert len(HOSTILE) + len(WRONG[name]) >= 25


# ---------------------------------------------------------------------- sizes and room


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("2G", 2 * 10**9), ("2Gi", 2 * 2**30), ("1TiB", 2**40), ("2GB", 2 * 10**9), ("512m", 512 * 10**6), ("1.5GiB", 3 * 2**29),
        ("0.1 MB", 10**5), ("7", 7), ("7b", 7), ("1k", 1000), ("1KiB", 1024), ("3 ti", 3 * 2**40), ("1P", 10**15), ("0.3K", 300),
    ],
)  # fmt: skip
def test_c5_sizes_as_people_write_them(given, count):
    assert bytes_of("--memory", given) == count


@pytest.mark.parametrize(
    "given", ["", "G", "2 2G", "-1G", "2GG", "2iB", "0", "0.0001B", "nan", "inf", "1e3", "9" * 5000, "2XB"]
)
def test_c5_what_is_no_size(given, one_line, whole):
    assert "--memory" in one_line(["plan", str(whole), "--memory", given])


def room_of(whole, capsys, *options):
    code = main(["plan", str(whole), "--json", *options])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


@pytest.fixture
def light(monkeypatch):
    monkeypatch.setattr(PLANNED_PROCESS_BYTES, lambda precision: 400 * 2**20)


@pytest.mark.slow
def test_c5_a_shorter_request_that_fits_is_named(whole, light, capsys):
    """Neither one of this length nor sixteen of any: but one shorter one does."""
    one = room_of(whole, capsys, "--length", "40")[1]["total"]
    assert main(["plan", str(whole), "--length", "60", "--requests", "16", "--memory", str(one), "--json"]) == 1
    out, err = capsys.readouterr()
    room = json.loads(out)["room"]
    assert (room["fits"], room["requests"], room["length"]) == (False, 0, 0)
    assert 40 <= room["alone"] < 60 and f"--requests 1 --length {room['alone']}" in err
    assert room_of(whole, capsys, "--length", str(room["alone"]))[1]["total"] <= one
    made = SimpleNamespace(length=60, requests=16)
    fit = Room(2**20, False, 0, False, 0, False, 50)
    assert shown_room(made, fit) == "1.0 MiB has room for no request of 60 tokens, but for 1 request of 50"
    assert shown_room(made, replace(fit, alone=0)) == "1.0 MiB is too little for any request"


@search(100)
@given(
    st.integers(1, 20),
    st.integers(2, 50),
    st.integers(0, 4000),
    st.integers(0, 20),
    st.integers(1, 20),
    st.integers(0, 50),
)
def test_c5_room_is_what_trying_all_of_them_finds(requests, length, memory, base, a_request, a_token):
    """Of plans that grow with either number."""

    def total(requests, length):
        return base + requests * (a_request + a_token * length)

    def again(requests, length):
        parts = {"KV cache": requests * a_token * length}
        return SimpleNamespace(requests=requests, length=length, total=total(requests, length), parts=parts)

    found = room(again(requests, length), memory, again, 2, 50)
    assert found.fits == (total(requests, length) <= memory)
    assert found.requests == max((n for n in range(1, 1025) if total(n, length) <= memory), default=0)
    assert found.length == max((n for n in range(2, 51) if total(requests, n) <= memory), default=0)
    if not found.requests and not found.length:
        assert found.alone == max((n for n in range(2, 51) if total(1, n) <= memory), default=0)


def test_c5_more_requests_than_are_looked_at_are_said(whole, light, capsys, one_line):
    code, said, _ = room_of(whole, capsys, "--length", "20", "--memory", "1TiB")
    assert code == 0 and said["room"]["requests"] == 1024 and said["room"]["or_more"]
    assert "up to 1024" in one_line(["plan", str(whole), "--requests", "1025"])
    assert "up to 1024" in one_line(["plan", str(whole), "--requests", "1000000"])


def test_c5_a_window_longer_than_a_request_is_said(whole, light, capsys):
    notes = room_of(whole, capsys, "--length", "100", "--window", "5000")[1]["notes"]
    assert any("window of 5000" in note for note in notes)
    assert not any("window" in note for note in room_of(whole, capsys, "--length", "100", "--window", "50")[1]["notes"])


def test_c5_no_name_stands_twice(whole, light, capsys):
    assert main(["plan", str(whole), "--length", "100"]) == 0
    out = capsys.readouterr().out
    assert out.count("KV cache ") == 2 and "prefill's KV cache" in out  # one row each


# ---------------------------------------------------------------------- adapters


def entries(monkeypatch, **loads):
    """Entry points of these names, which load so."""

    class Entry:
        def __init__(self, name):
            self.name, self.load, self.dist, self.value = name, loads[name], None, name

    monkeypatch.setattr(ENTRY_POINTS, lambda group: [Entry(name) for name in loads])


def lacking():
    raise ModuleNotFoundError("No module named 'einops'", name="einops")


def test_an_adapter_is_loaded_only_for_its_own_models(monkeypatch, whole):
    entries(monkeypatch, parrot=lacking)
    assert isinstance(subject(str(whole)), LanguageTarget)
    with pytest.raises(InputError, match="no folder"):
        subject("nothing-here")
    with pytest.raises(
        MissingDependencyError, match=r"parrot-grey is a model of parrot.*einops.*pip install \"einops\""
    ):
        subject("parrot-grey")


def test_an_adapter_may_give_its_models_other_names(monkeypatch, whole):
    found = LanguageTarget(str(whole))
    entries(monkeypatch, parrot=lacking, zoo=lambda: lambda name: found if name == "owl" else None)
    assert subject("owl") is found


def test_a_command_says_what_an_adapter_lacks(monkeypatch, one_line):
    entries(monkeypatch, chatterbox=lacking)
    assert "einops" in one_line(["plan", "chatterbox-nano"])
