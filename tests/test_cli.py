"""The command line as a whole: whatever is wrong with a request is said in one line with a next step, exit code 2; and the
page about it shows commands that there are."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from snapshots import cold, ids, voice
from support.folders import weightless_llama

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer

import kvcache
from kvcache.cache import pack
from kvcache.cli import application, main, overview
from kvcache.prefixes.stores import DiskStore

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent
NEXT_STEP = re.compile(r"\b(run|give|use|install|lower|raise|leave out|make|check|name|see|write|take)\b")

NOT_YET: list[str] = []  # commands that are still placeholders: take a name out once it is built


def commands(group, before=()):
    """Each command's full name and what typer made of it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield " ".join((*before, name)), command


COMMANDS = {name: command for name, command in commands(typer.main.get_command(application())) if name not in NOT_YET}

# Of each command: what it cannot do without, then what can be wrong and a part of the line that says so.
# {words} in braces are made by the fixture `places`.
NEEDED = {
    "doctor": [],
    "plan": ["{model}"],
    "profile": ["{model}"],
    "tune": ["{model}", "--out", "{tmp}/profile.json"],
    "warm": ["{model}"],
    "prefixes list": [],
    "prefixes show": ["{file}"],
    "prefixes verify": [],
    "prefixes export": ["{address}", "{tmp}/new.safetensors"],
    "prefixes import": ["{file}"],
    "prefixes prune": ["--max-bytes", "1GiB"],
    "prefixes remove": ["{address}"],
    "prefixes pin": ["{address}"],
    "prefixes unpin": ["{address}"],
}
STORE = [  # of every command that opens one
    (["--store", "{tmp}/nothing"], "there is no folder"),
    (["--store", "{file}"], "is a file"),
    (["--store", "gopher://host/voices"], "gopher"),
    (["--store", "redis://host:port"], "Redis"),
    (["--store", "redis://host", "--namespace", "a b"], "namespace='a b'"),
    (["--namespace", "a"], "a namespace is Redis'"),
    (["--secret-file", "{tmp}/nothing"], "cannot be read"),
    (["--secret-file", "{empty}"], "is empty"),
]
ADDRESS = [  # of every command that takes one
    (["sarah"], "is no address"),
    (["../../etc/passwd"], "is no address"),
    (["ABC"], "is no address"),
    ([""], "is no address"),
    (["{nobody}"], "no prefix there"),
    (["{shared}"], "give more digits"),
]
MODEL = [  # of every command that takes one
    (["chatterbox-nope"], "chatterbox-nope"),
    (["{tmp}/nothing"], "no folder with a config.json"),
    (["{tmp}"], "has no config.json"),
    (["{file}"], "no .gguf file"),
]


def store_of(*needed):
    return [([*needed, *wrong], says) for wrong, says in STORE]


WRONG = {
    "doctor": [(wrong, says) for wrong, says in STORE if "{tmp}/nothing" not in wrong or wrong[0] != "--store"],
    "plan": [
        *MODEL,
        (["{model}", "--length", "0"], "at least 2"),
        (["{model}", "--length", "-5"], "at least 2"),
        (["{model}", "--length", "301"], "up to 300"),
        (["{model}", "--length", "1.5"], "--length"),
        (["{model}", "--context", "-1"], "context=-1"),
        (["{model}", "--requests", "-1"], "at least 1"),
        (["{model}", "--window", "-1"], "at least 1"),
        (["{model}", "--window", "9", "--sinks", "-1"], "-1"),
        (["{model}", "--kv-budget", "-1MiB"], "--kv-budget -1MiB"),
        (["{model}", "--memory", "24 bananas"], "--memory 24 bananas"),
        (["{model}", "--bits", "3"], "8 or 4"),
        (["{model}", "--precision", "int2"], "--precision int2"),
        (["{model}", "--kv-dtype", "int8"], "--kv-dtype int8"),
        (["{model}", "--backend", "magic"], "--backend magic"),
        (["{model}", "--device", "tpu"], "--device tpu"),
    ],
    "profile": [
        *MODEL,
        (["{model}", "--context", "0"], "--context 0"),
        (["{model}", "--context", "many"], "--context"),
        (["{model}", "--tokens", "-1"], "--tokens -1"),
        (["{model}", "--requests", "0"], "--requests 0"),
        (["{model}", "--backend", "magic"], "--backend magic"),
        (["{model}", "--precision", "int2"], "--precision int2"),
        (["{model}", "--device", "tpu"], "--device tpu"),
        (["{model}", "--threads", "-2"], "--threads -2"),
        (["{model}", "--plot", "{tmp}/plot.txt"], "plot.txt"),
        (["{model}", "--plot", "{tmp}/nothing/plot.png"], "folder that exists"),
        pytest.param(
            ["{model}", "--device", "cuda"],
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="is no wrong request with a GPU"),
        ),
    ],
    "tune": [
        *(([*wrong, "--out", "{tmp}/profile.json"], says) for wrong, says in MODEL),
        (["chatterbox-nano"], "--out"),
        (["{model}", "--out", "{tmp}"], "a folder itself"),
        (["{model}", "--out", "{tmp}/nothing/profile.json"], "no folder"),
        (["chatterbox-nano", "--out", "{tmp}/profile.json", "--time-limit", "-1"], "--time-limit -1"),
        (["{model}", "--out", "{tmp}/profile.json", "--time-limit", "soon"], "--time-limit"),
        (["{model}", "--out", "{tmp}/profile.json", "--for", "beauty"], "beauty"),
        (["{model}", "--out", "{tmp}/profile.json", "--fidelity", "-0.1"], "--fidelity -0.1"),
        (["{model}", "--out", "{tmp}/profile.json", "--context", "0"], "--context 0"),
        (["{model}", "--out", "{tmp}/profile.json", "--max-requests", "0"], "--max-requests 0"),
        (["{model}", "--out", "{tmp}/profile.json", "--threads", "0"], "--threads 0"),
        (["{model}", "--out", "{tmp}/profile.json", "--memory", "lots"], "--memory lots"),
        (["{model}", "--out", "{tmp}/profile.json", "--device", "abacus"], "--device abacus"),
    ],
    "warm": [
        *MODEL,
        (["{model}", "--context", "0"], "--context 0"),
        (["{model}", "--tokens", "7"], "--tokens 7"),
        (["{model}", "--max-length", "0"], "--max-length 0"),
        (["{model}", "--precision", "int2"], "--precision int2"),
        (["{model}", "--threads", "-2"], "--threads -2"),
    ],
    "prefixes list": store_of(),
    "prefixes show": [
        *store_of("{address}"),
        *(case for case in ADDRESS if case[1] != "is no address"),
        (["sarah"], "cannot be read"),
        (["{tmp}"], "cannot be read"),
        (["{foreign}"], "not a file of kvcache's"),
        (["{empty}"], "not a file of kvcache's"),
    ],
    "prefixes verify": [*ADDRESS, *store_of()],
    "prefixes export": [
        *(([*wrong, "{tmp}/new.safetensors"], says) for wrong, says in ADDRESS),
        *store_of("{address}", "{tmp}/new.safetensors"),
        (["{address}"], "FILE"),
        (["{address}", "{file}"], "--force"),
        (["{address}", "{tmp}/nothing/file"], "there is no folder"),
    ],
    "prefixes import": [
        *((wrong, says) for wrong, says in store_of("{file}") if says != "there is no folder"),  # it makes one
        (["{tmp}/nothing"], "cannot be read"),
        (["{foreign}"], "not a file of kvcache's"),
        (["{voice}"], "kvcache-voice"),
    ],
    "prefixes prune": [
        *store_of("--max-bytes", "1GiB"),
        ([], "--max-bytes"),
        (["--max-bytes", "lots"], "--max-bytes lots"),
        (["--max-bytes", "-1GiB"], "--max-bytes -1GiB"),
        (["--max-bytes", "0"], "--max-bytes 0"),
        (["--older-than", "a while"], "--older-than 'a while'"),
        (["--older-than", "-3d"], "--older-than '-3d'"),
        (["--model", ""], "model=''"),
    ],
    "prefixes remove": [*ADDRESS, *store_of("{address}")],
    "prefixes pin": [*ADDRESS, *store_of("{address}")],
    "prefixes unpin": [*ADDRESS, *store_of("{address}")],
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A store, a model without weights, files of all sorts. No wrong request changes any of it."""
    folder = tmp_path_factory.mktemp("places")
    empty = folder / "elsewhere"
    empty.mkdir()
    model = weightless_llama(folder / "model")
    store = DiskStore(folder / "store")
    keys = [voice(seed, dtype=torch.long) for seed in range(17)]  # more than there are hex digits: two begin alike
    for key in keys:
        store.put(cold(key))
    taken = [key.address[0] for key in keys]
    files = {"foreign": b"{}" * 100, "empty": b"", "file": cold(ids(1, 2)).to_bytes()}
    files["voice"] = pack({"x": torch.zeros(1)}, {"format": "kvcache-voice", "version": 1})
    for name, data in files.items():
        (folder / name).write_bytes(data)
    nobody = next(digits for i in range(256) if not any(k.address.startswith(digits := f"{i:02x}") for k in keys))
    return {
        "tmp": str(empty),
        "model": str(model),
        "store": str(folder / "store"),
        "address": keys[0].address,
        "nobody": nobody,
        "shared": next(digit for digit in taken if taken.count(digit) > 1),
        **{name: str(folder / name) for name in files},
    }


@pytest.fixture
def refused(places, monkeypatch, capsys):
    """Asks for something wrong and gives the one line that says what."""
    monkeypatch.setenv("KVCACHE_HOME", places["store"])  # so that the default store has something in it
    monkeypatch.delenv("KVCACHE_STORE", raising=False)

    def ask(name, arguments):
        held = sorted((path, path.stat().st_mtime_ns) for path in Path(places["store"]).parent.rglob("*"))
        assert main([*name.split(), *(one.format(**places) for one in arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        [line] = err.splitlines()
        assert line.startswith("kvcache") and NEXT_STEP.search(line), line
        assert sorted((path, path.stat().st_mtime_ns) for path in Path(places["store"]).parent.rglob("*")) == held
        return line

    return ask


def test_every_command_has_its_cases():
    assert set(COMMANDS) | set(NOT_YET) == set(NEEDED) == set(WRONG)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_grammar_of_every_command(name, refused):
    """What typer itself refuses, of every option that there is; a new option is in this by itself."""
    options = [one for one in COMMANDS[name].params if one.param_type_name == "option" and one.opts != ["--help"]]
    assert ["--json"] in [option.opts for option in options]
    for option in options:
        flag = option.opts[0]
        if option.is_flag:
            assert flag in refused(name, [*NEEDED[name], f"{flag}=perhaps"])
        else:
            assert flag in refused(name, [*NEEDED[name], flag])
    if name == "bench":  # whose further arguments are the benchmark's own
        return
    assert "--no-such-option" in refused(name, [*NEEDED[name], "--no-such-option"])
    surplus = [*NEEDED[name], *(["0"] * sum(one.param_type_name == "argument" for one in COMMANDS[name].params)), "0"]
    assert "unexpected extra argument" in refused(name, surplus)
    if any(one.required for one in COMMANDS[name].params):
        assert "Missing" in refused(name, [])


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        pytest.param(name, *case.values, marks=case.marks) if hasattr(case, "marks") else (name, *case)
        for name in COMMANDS
        for case in WRONG[name]
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, arguments, says, refused, places):
    assert says.format(**places) in refused(name, arguments)
    refused(name, [*arguments, "--json"])  # JSON or not: nothing but that line


@pytest.mark.parametrize("arguments", [["magic"], ["prefixes", "magic"], ["--magic"], ["prefixes", "--magic"]])
def test_commands_that_there_are_not(arguments, refused):
    assert "magic" in refused(arguments[0], arguments[1:])


@pytest.mark.parametrize("arguments", [[], ["prefixes"]])
def test_without_a_command_the_help_says_which_there_are(arguments, capsys):
    assert main(arguments) in (0, 2)  # by release of click
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    for name in COMMANDS:
        if name.split()[: len(arguments)] == arguments:
            assert name.split()[len(arguments)] in said


@pytest.mark.grid(1, any_of=("arguments",))
@pytest.mark.parametrize(
    "arguments",
    [
        ["prefixes", "export", "sarah", "{tmp}/new.safetensors", "--store", "{store}"],
        ["plan", "{tmp}", "--length", "10"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_as_a_process_of_its_own(arguments, places):
    """The exit code and the streams as a shell has them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "adapters")))}
    command = [sys.executable, "-m", "kvcache.cli", *(one.format(**places) for one in arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith("kvcache: ") and NEXT_STEP.search(line)


# ---------------------------------------------------------------------- the page about it

PAGE = (ROOT / "docs" / "cli.md").read_text()
CONSOLE = re.compile(r"(<!-- run -->\n)?^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown(text):
    """Each command that a page shows, whether it is to be run, and what it prints, if the page says that."""
    for marked, block in CONSOLE.findall(text):
        for one in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, printed = one.partition("\n")
            words = shlex.split(line)
            assert words[0] == "kvcache", line
            yield pytest.param(words[1:], bool(marked), printed, id=line)


def parsed(words):
    """What typer makes of a command without running it; raises if it refuses."""
    command, rest = typer.main.get_command(application()), list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    return command.make_context(" ".join(words), rest)


@pytest.mark.parametrize(("words", "run", "printed"), list(shown(PAGE)))
def test_the_page_shows_commands_that_there_are(words, run, printed, tmp_path, monkeypatch, capsys):
    if words[0] not in NOT_YET:
        parsed(words)
    if not run and not printed:
        return
    monkeypatch.setenv("KVCACHE_STORE", str(tmp_path))
    store = DiskStore(tmp_path)
    for seed in (1, 2):
        store.put(cold(voice(seed)))
    assert main(words) == (2 if printed.startswith("kvcache: ") else 0)
    out, err = capsys.readouterr()
    assert err == (printed if printed.startswith("kvcache: ") else "")
    assert "--json" not in words or json.loads(out)
    assert len(store.entries()) == 2


def test_the_page_tells_of_every_command_and_no_other():
    told = [" ".join(one.values[0]) for one in shown(PAGE)]
    for name in (*COMMANDS, *NOT_YET):
        assert any(f"{line} ".startswith(f"{name} ") for line in told), name
    with pytest.raises(Exception, match="No such option"):
        parsed(["plan", "m", "--no-such-option"])
    [one, two] = shown("```console\n$ kvcache a 'b c'\nout\n$ kvcache d\n```\n```sh\n$ kvcache e\n```\n")
    assert (one.values, two.values) == ((["a", "b c"], False, "out\n"), (["d"], False, ""))


# ---------------------------------------------------------------------- the list of all, and the version


@pytest.mark.parametrize("arguments", [["--version"], ["--version", "plan"]], ids=str)
def test_the_version_is_that_of_the_package(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"kvcache {kvcache.__version__}\n"


def test_the_version_is_said_without_typer():
    """By a wheel that was installed without what it needs."""
    missing = "import sys; sys.modules |= dict.fromkeys(['typer', 'rich', 'torch', 'transformers', 'filelock'])"
    script = f"{missing}; from kvcache.cli import main; sys.exit(main(['--version']))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, f"kvcache {kvcache.__version__}\n"), ran.stderr


def test_the_list_of_commands_says_of_each_what_its_own_help_says():
    whole, short = (typer.main.get_command(app) for app in (application(), overview()))
    assert {name: command.get_short_help_str(1000) for name, command in short.commands.items()} == {
        name: command.get_short_help_str(1000) for name, command in whole.commands.items()
    }


def test_the_help_comes_at_once():
    """Half a second of the processor's time, as others may be busy: typer and rich take most of it. The best of five."""
    resource = pytest.importorskip("resource")

    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    took = []
    for _ in range(5):
        before = spent()
        subprocess.run([sys.executable, "-m", "kvcache.cli", "--help"], check=True, capture_output=True, timeout=300)
        took.append(spent() - before)
    assert min(took) < 0.5


def test_the_package_is_imported_without_anything_heavy():
    """The compiler of torch, which takes seconds to import, comes with transformers' first class, not with ours."""
    heavy = ["torch", "torch._dynamo", "transformers", "safetensors"]
    script = f"import sys, kvcache; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "[]\n", ran.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["nothing"]])
def test_the_list_of_commands_imports_nothing_heavy(arguments):
    script = f"import sys; from kvcache.cli import main; main({arguments}); sys.exit('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    shown = ("kvcache",) if arguments == ["--version"] else ("doctor", "profile", "prefixes")
    assert "nothing" in ran.stderr or all(name in ran.stdout for name in shown)


def test_a_command_behind_two_dashes_is_run(capsys):
    assert main(["--", "prefixes", "nothing of that name"]) == 2
    assert "nothing of that name" in capsys.readouterr().err
