"""What the command lines of the examples refuse: one clear line, exit code 2, before anything is loaded."""

import importlib.util
import sys
from pathlib import Path

import pytest

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
REFUSED = {
    "long_text": [
        *MODEL,
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
