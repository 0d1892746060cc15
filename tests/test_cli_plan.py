"""`kvcache plan` as it is typed: exit codes, JSON, one line for what is wrong."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("typer")
pytest.importorskip("rich")

from support.inside.tools import PLANNED_PROCESS_BYTES

from kvcache.cli import main
from kvcache.decoding import Setting
from kvcache.tools import subject

pytestmark = pytest.mark.one_release


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=300, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """As much as a new process holds: this one may hold what other tests left, and more at the second call."""
    monkeypatch.setattr(PLANNED_PROCESS_BYTES, lambda precision: 400 * 2**20)


def test_json_says_what_the_cache_will_hold(folder, capsys):
    assert main(["plan", folder, "--length", "200", "--context", "150", "--requests", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    served = subject(folder).prepared(Setting(requests=2))
    list(served.stream(150, 50))
    assert said["kv"] == served.report().nbytes
    assert said["total"] == sum(said["parts"].values())
    assert said["weights"]["mlp"] == 2 * 3 * 64 * 128 * 4
    assert "room" not in said


def test_table_and_bar(folder, capsys):
    assert main(["plan", folder, "--length", "200", "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert "MLP weights" in out
    assert "KV cache" in out
    assert "█" in out
    assert "1.00 GiB has room for 1024 requests or more" in out
    assert "300 tokens, all that the model goes up to" in " ".join(out.split())


def test_what_does_not_fit_is_exit_code_1_and_says_what_would(folder, capsys):
    arguments = ["plan", folder, "--length", "200", "--requests", "9"]
    assert main([*arguments, "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["total"]
    assert main([*arguments, "--memory", str(needed - 2**18), "--json"]) == 1
    out, err = capsys.readouterr()
    room = json.loads(out)["room"]
    assert not room["fits"]
    assert 1 <= room["requests"] < 9
    assert room["length"] < 200
    [line] = err.strip().splitlines()
    assert f"--requests {room['requests']}" in line
    assert f"--length {room['length']}" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing-here"], "no folder with a config.json"),
        (["FOLDER", "--length", "0"], "at least 2"),
        (["FOLDER", "--length", "301"], "up to 300"),
        (["FOLDER", "--context", "500"], "context=500"),
        (["FOLDER", "--requests", "0"], "at least 1"),
        (["FOLDER", "--memory", "lots"], "--memory lots"),
        (["FOLDER", "--precision", "int2"], "--precision int2: give one of fp32"),
        (["FOLDER", "--device", "tpu"], "cpu, cuda"),
        (["FOLDER", "--backend", "magic"], "off, eager"),
        (["FOLDER", "--kv-dtype", "int8"], "fp32, bf16, fp16"),
        (["FOLDER", "--bits", "3"], "8 or 4"),
        (["FOLDER", "--sinks", "4"], "--window"),
        (["FOLDER", "--window", "10", "--kv-budget", "1MiB"], "one of them"),
        (["FOLDER", "--window", "0"], "at least 1"),
        (["FOLDER", "--precision", "int8", "--device", "cuda"], "runs on CPUs"),
        (["FOLDER", "--length", "many"], "run kvcache plan --help"),
        ([], "run kvcache plan --help"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(folder, capsys, arguments, says):
    assert main(["plan", *(folder if one == "FOLDER" else one for one in arguments)]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("kvcache")]) == 1
    assert out == ""


def test_windows_bits_and_devices(folder, capsys):
    said = {}
    for name, options in {
        "all": [],
        "window": ["--window", "60", "--sinks", "4"],
        "bits": ["--bits", "4"],
        "bf16": ["--kv-dtype", "bf16"],
        "cuda": ["--device", "cuda", "--precision", "bf16"],
    }.items():
        assert main(["plan", folder, "--length", "250", "--json", *options]) == 0
        said[name] = json.loads(capsys.readouterr().out)
    whole, token = said["all"]["kv"], 2 * 2 * 2 * 16 * 4
    assert whole == 288 * token  # the step of the ladder that holds 249
    assert said["window"]["kv"] == 64 * token
    assert said["bf16"]["kv"] == said["cuda"]["kv"] == whole // 2
    assert said["bits"]["kv"] < whole // 3
    assert "read on the host" in said["bits"]["fallback"]
    assert any("not yet measured" in note for note in said["cuda"]["notes"])
    assert said["cuda"]["process"] is None
