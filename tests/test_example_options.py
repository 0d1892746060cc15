"""What the command lines of the examples refuse: one clear line, exit code 2, before anything is loaded."""

import importlib.util
import sys
from pathlib import Path

import pytest

from kvcache import MissingDependencyError
from kvcache_chatterbox import VocoderOptions

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
pytestmark = pytest.mark.one_release


def example(name):
    """The script as a module; a folder has its own voices.py on the path perhaps, so it is loaded by its file."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODEL = [
    (["--checkpoint", "/no/such/folder"], "is no folder"),
    (["--checkpoint", "."], "has no t3_nano_v1.safetensors"),
    (["--device", "gpu"], "--device gpu"),
    (["--variant", "french"], "invalid choice"),
    (["--json", "/no/such/folder/a.json"], "is in no folder"),
]
SOUND = [
    (["--chunking", "slow"], "invalid choice"),
    (["--first-chunk", "0"], "from 1 to 1000"),
    (["--max-chunk", "1e3"], "no whole number"),
    (["--first-chunk", "30", "--max-chunk", "20"], "first_chunk=30 is more than max_chunk=20"),
    (["--chunking", "fixed", "--max-chunk", "20"], "leave them out"),
    (["--vocoder", "/no/such/folder"], "weights='/no/such/folder' must be 'own', 'meanflow', a file or folder"),
    (["--steps", "0"], "from 1 to 1000"),
    (["--reference-seconds", "0.5"], "is no number of at least 1"),
    (["--reference-seconds", "nan"], "is no number of at least 1"),
    (["--vocoder-precision", "fp8"], "invalid choice"),
]
REFUSED = {
    "long_text": [
        *MODEL,
        *SOUND,
        (["--file", "/nonexistent"], "there is no file '/nonexistent'"),
        (["--file", "{binary}"], "is no text in UTF-8"),
        (["--file", "{empty}"], "the text is empty"),
        (["--budget", "nan"], "'nan' is no number above 0"),
        (["--budget", "0"], "is no number above 0"),
        (["--budget", "1e400"], "is no number above 0"),
        (["--voice", "/nonexistent.wav"], "there is no file"),
        (["--max-new-tokens", "0"], "from 1 to"),
        (["--rows", "0"], "from 1 to"),
        (["--segment", "5"], "from 20 to"),
        (["--seed", "-1"], "from 0 to"),
        (["--language", "english"], "--language english"),
        (["--wav", "."], "is a folder"),
    ],
    "chatterbox_stream": [
        *MODEL,
        *SOUND,
        (["--weights", "random", "--steps", "2"], "no audio is made; add --audio"),
        (["--max-new-tokens", "0"], "from 1 to"),
        (["--chunk-size", "x"], "no whole number"),
        (["--window", "0"], "from 1 to"),
        (["--text", " "], "the text is empty"),
        (["--seed", str(2**63)], "from 0 to"),
        (["--wav", "/no/such/folder/a.wav"], "is in no folder"),
    ],
    "voices": [
        *MODEL,
        (["--voices", "0"], "from 1 to"),
        (["--rounds", "0"], "from 1 to"),
        (["--conds", "/nonexistent.pt"], "there is no file"),
        (["--redis", "localhost"], "redis://"),
        (["--export", __file__], "is a file"),
        (["--text", ""], "the text is empty"),
    ],
    "llm_stream": [
        (["--tokens", "0"], "from 1 to"),
        (["--window", "-5"], "from 1 to"),
        (["--sinks", "-1"], "from 0 to"),
        (["--temperature", "nan"], "is no number of at least 0"),
        (["--chunk-size", "0"], "from 1 to"),
        (["--prompt", ""], "the text is empty"),
        (["--json", "/no/such/folder/a.json"], "is in no folder"),
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_is_one_line_before_anything_is_loaded(name, tmp_path, monkeypatch, capsys):
    files = {"binary": tmp_path / "binary", "empty": tmp_path / "empty"}
    files["binary"].write_bytes(b"\xff\xfe\x00")
    files["empty"].write_text(" \n")
    script = example(name)
    for options, words in REFUSED[name]:
        given = [option.format(**files) if option.startswith("{") else option for option in options]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        with pytest.raises(SystemExit) as ended:
            script.parse()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith(f"{name}.py: error: ") and said.count("\n") == 1, said
        assert words in said, given


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_right_is_taken(name, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("Hello.", "utf-8")
    device = [] if name == "llm_stream" else ["--device", "cpu"]
    more = ["--file", str(tmp_path / "text"), "--budget", "0.5"] if name == "long_text" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--json", str(tmp_path / "new.json"), *device, *more])
    options = example(name).parse()
    assert options.json == tmp_path / "new.json"
    assert name != "long_text" or (options.file, options.budget) == ("Hello.", 0.5)


def test_audio_where_it_cannot_be_made_says_how_to_add_it(monkeypatch, capsys):
    script = example("chatterbox_stream")

    def missing():
        raise MissingDependencyError("upstream's vocoder does not load: install what docs/chatterbox.md says")

    monkeypatch.setattr(script, "s3gen_module", missing)
    monkeypatch.setattr(sys, "argv", ["chatterbox_stream.py", "--device", "cpu", "--audio"])
    with pytest.raises(SystemExit) as ended:
        script.parse()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("chatterbox_stream.py: error: --audio: upstream's vocoder does not load: install what docs/")


def test_what_is_said_of_audio_is_what_engine_and_request_are_given(monkeypatch):
    script = example("chatterbox_stream")
    script.s3gen_module = lambda: None
    given = ["--audio", "--chunking", "fixed", "--first-chunk", "50", "--steps", "4", "--reference-seconds", "3"]
    monkeypatch.setattr(sys, "argv", ["chatterbox_stream.py", "--device", "cpu", *given])
    options = script.parse()
    assert options.chunks == {"chunking": "fixed", "first_chunk": 50, "max_chunk": None}
    assert options.vocoder == VocoderOptions(steps=4, reference_seconds=3)
    monkeypatch.setattr(sys, "argv", ["chatterbox_stream.py", "--device", "cpu"])
    assert script.parse().vocoder is None
