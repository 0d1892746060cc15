"""What the example servers' command lines refuse: one clear line, exit code 2, before anything is loaded."""

import importlib.util
import socket
import sys

import pytest

if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "httpx")):
    pytest.skip("the server's packages are not installed (pip install kvcache[server,test])", allow_module_level=True)

from support.serving import engine_of, server, server_load
from support.t3_models import tiny_t3

from kvcache_chatterbox import stand_in

pytestmark = pytest.mark.one_release


def refused(call, options, monkeypatch, capsys):
    """The line that a call with these options ends in."""
    monkeypatch.setattr(sys, "argv", ["server.py", *options])
    with pytest.raises(SystemExit) as ended:
        call()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("server.py: error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "x"], "'x' is no whole number from 0 to 65535"),
        (["--port", "65536"], "from 0 to 65535"),
        (["--port", "-1"], "from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "203.0.113.1"], "--host 203.0.113.1 --port 8000"),
        (["--host", "x" * 300], "--host"),
        (["--host", ""], "--host"),
        (["--max-rows", "0"], "from 1 to"),
        (["--first-chunk", "1001"], "from 1 to 1000"),
        (["--chunking", "fixed", "--max-chunk", "20"], "leave them out"),
        (["--vocoder", "/no/such/folder"], "weights='/no/such/folder' must be"),
        (["--reference-seconds", "0.3"], "is no number of at least 1"),
        (["--max-rows", "1.5"], "no whole number"),
        (["--max-waiting", "-3"], "from 1 to"),
        (["--max-connections", "3"], "from 8 to"),
        (["--max-connections", "99999"], "ulimit -n"),
        (["--grace", "soon"], "no whole number"),
        (["--device", "gpu"], "--device gpu"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--device", ""], "--device"),
        (["--variant", "french"], "invalid choice: 'french'"),
        (["--checkpoint", "/no/such/folder"], "is no folder"),
        (["--checkpoint", __file__], "is no folder"),
        (["--checkpoint", "."], "has no t3_nano_v1.safetensors or t3_nano.safetensors"),
        (["--backend", "fast"], "invalid choice"),
        (["--precision", "fp8"], "invalid choice"),
        (["--voice", "sarah"], "no NAME=FILE"),
        (["--voice", "=sarah.wav"], "no NAME=FILE"),
        (["--voice", "sarah="], "no NAME=FILE"),
        (["--voice", "sarah=/no/such/clip.wav"], "there is no file"),
        (["--voice", "sarah=."], "there is no file"),
        (["--voice", "a\nb=" + __file__], "printable"),
        (["--voice", "x" * 201 + "=" + __file__], "1 to 200"),
        (["--voice", "a=" + __file__, "--voice", "a=" + __file__], "'a' is given twice"),
        (["--voices", "a"], "unrecognized arguments"),
        (["nano"], "unrecognized arguments"),
    ],
)  # fmt: skip
def test_s8_misuse_is_one_line_before_anything_is_loaded(options, words, monkeypatch, capsys):
    monkeypatch.setattr(server, "load", lambda options: pytest.fail("the model was loaded"))
    monkeypatch.setattr(server, "allow_files", lambda needed: min(needed, 20_000))
    assert words in refused(server.main, options, monkeypatch, capsys)


def test_s8_a_port_that_is_taken_is_told_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(server, "load", lambda options: pytest.fail("the model was loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"--port {port}" in refused(server.main, ["--port", port], monkeypatch, capsys)


@pytest.mark.parametrize("name", ["voice.pt", "voice.safetensors"])
def test_s8_a_voice_that_is_none_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server, "load", lambda options: (stand_in(tiny_t3("gpt")), server.TONES))
    (tmp_path / name).write_bytes(b"no voice")
    assert name in refused(server.main, ["--port", "0", "--voice", f"a={tmp_path / name}"], monkeypatch, capsys)


def test_s8_weights_that_are_none_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "t3_nano_v1.safetensors").write_bytes(b"no weights")
    said = refused(server.main, ["--port", "0", "--checkpoint", str(tmp_path)], monkeypatch, capsys)
    assert "cannot load nano" in said


def test_what_is_right_is_taken(monkeypatch, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"clip")
    monkeypatch.setattr(sys, "argv", ["server.py", "--port", "0", "--voice", f"a = b={tmp_path / 'a.wav'}"])
    with pytest.raises(SystemExit):
        server.parse()
    monkeypatch.setattr(
        sys, "argv", ["server.py", "--port", "0", "--voice", f"a={tmp_path / 'a.wav'}", "--max-connections", "9"]
    )
    options, bound = server.parse()
    with bound:
        assert bound.getsockname()[1] > 0
    assert options.voice == [("a", tmp_path / "a.wav")] and options.limits.connections == 9
    engine = engine_of(server_load.tiny())
    server.add_voices(engine, engine.t3, options.voice, made_up=True)
    assert "a" in engine.voices
