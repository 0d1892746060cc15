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
from support.snapshots import cold, voice

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from support.commands import COMMANDS, NEEDED, NEXT_STEP, WRONG, places, refused  # noqa: F401

import kvcache
from kvcache.cli import application, main, overview
from kvcache.prefixes.stores import DiskStore

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent


def test_every_command_has_its_cases():
    assert set(COMMANDS) == set(NEEDED) == set(WRONG)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_grammar_of_every_command(name, refused):  # noqa: F811
    """What typer itself refuses, of every option that there is; a new option is in this by itself."""
    options = [one for one in COMMANDS[name].params if one.param_type_name == "option" and one.opts != ["--help"]]
    assert ["--json"] in [option.opts for option in options]
    for option in options:
        flag = option.opts[0]
        if option.is_flag:
            assert flag in refused(name, [*NEEDED[name], f"{flag}=perhaps"])
        else:
            assert flag in refused(name, [*NEEDED[name], flag])
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
def test_what_is_wrong_is_said_in_one_line(name, arguments, says, refused, places):  # noqa: F811
    assert says.format(**places) in refused(name, arguments)
    refused(name, [*arguments, "--json"])  # JSON or not: nothing but that line


@pytest.mark.parametrize("arguments", [["magic"], ["prefixes", "magic"], ["--magic"], ["prefixes", "--magic"]])
def test_commands_that_there_are_not(arguments, refused):  # noqa: F811
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
def test_as_a_process_of_its_own(arguments, places):  # noqa: F811
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
    for name in COMMANDS:
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
