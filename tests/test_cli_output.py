"""Where a command's words go: encodings, full devices, closed pipes, interrupts, narrow terminals."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.folders import weightless_llama

pytest.importorskip("typer")
pytest.importorskip("rich")

from support.inside.commands import PLAN, print_json, shown_bytes
from support.inside.tools import PLANNED_PROCESS_BYTES
from support.snapshots import cold, voice

from kvcache import cli
from kvcache.cache import pack
from kvcache.cli import main
from kvcache.io import Redactor, printable
from kvcache.prefixes.stores import DiskStore
from kvcache.tools import Finding

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(weightless_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KVCACHE_STORE", raising=False)
    monkeypatch.setattr(PLANNED_PROCESS_BYTES, lambda precision: 400 * 2**20)


def told(monkeypatch, arguments, encoding):
    """The exit code, and what standard output and standard error get in an encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", streams[0])
        patched.setattr(sys, "stderr", streams[1])
        code = main(arguments)
    for stream in streams:
        assert stream.errors == "strict"  # as it was
        stream.flush()
    return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "shift_jis", "utf-16"])
def test_c8_an_encoding_that_has_not_every_character(encoding, folder, monkeypatch):
    code, out, err = told(monkeypatch, ["plan", folder, "--length", "20"], encoding)
    assert (code, err) == (0, "") and "KV cache" in out and "at most" in out
    code, out, err = told(monkeypatch, ["plan", "modèle-█-\udcff"], encoding)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("kvcache: ")
    if encoding in ("ascii", "latin-1"):
        assert told(monkeypatch, ["plan", folder], encoding)[1].count("#") > 50  # bars are bars, and no question marks


@full
@pytest.mark.parametrize("arguments", [["prefixes", "list"], ["plan", "FOLDER", "--json"], ["--help"]], ids=str)
def test_c8_a_full_device(arguments, folder, monkeypatch, capsys):
    with open("/dev/full", "w") as device:
        monkeypatch.setattr(sys, "stdout", device)
        assert main([folder if one == "FOLDER" else one for one in arguments]) == 1
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), device.fileno())
    [line] = capsys.readouterr().err.splitlines()
    assert line == "kvcache: standard output cannot be written: No space left on device; make room, or write elsewhere"


def test_c8_a_pipe_that_was_closed(folder, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", pipe)
            assert main(["plan", folder, "--length", "20"]) == 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
    assert capsys.readouterr().err == ""


@full
def test_c8_nothing_can_be_said_at_all(monkeypatch):
    with open("/dev/full", "w") as device, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", device)
        assert main(["nope"]) == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), device.fileno())


def test_c8_an_interrupt_in_a_command(folder, monkeypatch, capsys):
    def interrupted(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(PLAN, interrupted)
    assert main(["plan", folder]) == 130
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(cli, "application", interrupted)
    assert main(["plan", folder]) == 130


# Where a process ends as a shell sees it: while it imports, and what is left to write when it exits.
PROCESS = (
    "import os, signal, sys\nfrom kvcache import cli\nfrom kvcache.cli.__main__ import run\nsys.argv[0] = 'kvcache'\n"
)


@pytest.mark.parametrize(
    ("set_up", "output", "code", "says"),
    [
        (
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
            "def stop(names):\n    signal.raise_signal(signal.SIGINT)\n    return 1 / 0\ncli.application = stop\n",
            None,
            130,
            "",
        ),
        pytest.param("", "/dev/full", 1, "cannot be written", marks=full),
        ("os.close(1)\nsys.stdout = None\n", None, 0, ""),
    ],
    ids=["interrupted while it imports", "full", "closed"],
)
def test_c8_as_a_process(set_up, output, code, says):
    """As a shell has it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "adapters")))}
    with open(output or os.devnull, "w") as to:
        command = [sys.executable, "-c", f"{PROCESS}{set_up}run()", "prefixes", "list"]
        ended = subprocess.run(command, env=environment, stdout=to, stderr=subprocess.PIPE, text=True, timeout=100)
    assert ended.returncode == code and says in ended.stderr
    assert len(ended.stderr.splitlines()) == bool(says)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no such signals here")
def test_c8_the_handler_of_interrupts_is_as_it_was(capsys):
    before = signal.getsignal(signal.SIGINT)
    main(["nope"])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("columns", ["20", "40", "79"])
def test_c8_figures_are_whole_in_a_narrow_terminal(columns, folder, monkeypatch, capsys):
    given = ["plan", folder, "--length", "20"]
    assert main([*given, "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    for name, value in {"COLUMNS": columns, "FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    for size in parts.values():
        if size:
            assert f" {shown_bytes(size)} " in out
    assert main(["prefixes", "list"]) == 0
    assert "…" not in capsys.readouterr().out


def test_only_what_a_command_needs_is_imported():
    """The library itself is lazy: what only says what is wrong, or is interrupted, waits for no torch."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "adapters")))}
    program = "import sys; from kvcache.cli import main; code = main(['nope']); print(code, 'torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.stdout == "2 False\n", ended.stderr


# ---------------------------------------------------------------------- what strangers wrote

STEERING = "\x1b]0;owned\x07\x1b[2J\x9b1A\r\n\x7f\u202e\u2066\ud800"


def stranger(folder, address="ab" * 32, **fields):
    """A file of a prefix whose header somebody else wrote, in a store with an intact one."""
    store = DiskStore(folder)
    store.put(cold(voice(1)))
    snapshot = cold(voice(2))
    file = folder / f"{address}.safetensors"
    file.write_bytes(pack(snapshot.tensors(), {**snapshot.header(), **fields}))
    return file


def steers(text):
    return {character for character in text if printable(character) != character} - {"\n"}


def test_text_that_steers_a_terminal_is_shown_as_text(tmp_path, capsys):
    shown = STEERING.encode("utf-8", "ignore").decode()  # a lone surrogate is no name, which the listing says
    file = stranger(tmp_path / f"a{STEERING[:6]}", model=shown, name=STEERING)
    stranger(file.parent, "cd" * 32, model=STEERING)
    store = ["--store", str(file.parent)]
    said = []
    for arguments, code in (
        (["list", *store], 0),
        (["show", str(file)], 0),
        (["show", "ab", *store], 0),
        (["verify", *store], None),  # what is found wrong with it is not the point
        (["show", f"no file{STEERING}"], 2),
        ([f"--{STEERING}"], 2),
        ([STEERING], 2),
    ):
        assert main(["prefixes", *arguments]) in ({0, 1, 2} if code is None else {code})
        said += capsys.readouterr()
    assert not steers("".join(said))
    assert said[4].count("�") >= 5 and "model" in said[4]  # shown, and in one line
    assert len(said[4].splitlines()) == 14
    assert printable("a\tb\r\nc é 声 👩‍🚀") == "a b  c é 声 👩‍🚀"
    assert not steers(Redactor().error(ValueError(STEERING)))


@pytest.mark.parametrize("name", ["[/x]", "[prod]", ":cat:", "[link=x]"])
def test_names_are_no_markup(name, tmp_path, capsys, folder, monkeypatch):
    file = stranger(tmp_path / name, model=name)
    assert main(["prefixes", "list", "--store", str(file.parent)]) == 0
    out = capsys.readouterr().out
    assert f"{file.parent}: 2 prefixes" in out.replace("\n", "")
    assert f"│ {name[:8]} " in out
    assert main(["prefixes", "show", "abab", "--store", str(file.parent)]) == 0
    assert f" {name}\n" in capsys.readouterr().out
    model = tmp_path / "models" / name
    model.parent.mkdir(parents=True)
    model.symlink_to(folder)
    assert main(["plan", str(model), "--length", "20"]) == 0
    assert name in capsys.readouterr().out
    monkeypatch.setattr("kvcache.tools.diagnose", lambda *given, **named: [Finding(name, name, "ok", name, name)])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.count(name) == 4


def test_numbers_that_json_does_not_have_are_null(capsys):
    print_json({"a": [float("inf"), {"b": float("nan")}, (1.5, -float("inf"))], "c": True, "d": None})
    assert json.loads(capsys.readouterr().out) == {"a": [None, {"b": None}, [1.5, None]], "c": True, "d": None}
