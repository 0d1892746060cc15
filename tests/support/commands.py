"""Every command, what it cannot do without, and what can be wrong with a request."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer

from kvcache.cache import pack
from kvcache.cli import application, main
from kvcache.prefixes.stores import DiskStore
from support.folders import weightless_llama
from support.snapshots import cold, ids, voice

NEXT_STEP = re.compile(r"\b(run|give|use|install|lower|raise|leave out|make|check|name|see|write|take)\b")


def commands(group: Any, before: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Each command's full name and what typer made of it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield " ".join((*before, name)), command


COMMANDS = dict(commands(typer.main.get_command(application())))


# Of each command: what it cannot do without, then what can be wrong and a part of the line that says so.
# {words} in braces are made by the fixture `places`.
NEEDED: dict[str, list[str]] = {
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


def store_of(*needed: str) -> list[tuple[list[str], str]]:
    return [([*needed, *wrong], says) for wrong, says in STORE]


WRONG: dict[str, list[Any]] = {  # pairs, some of them with marks
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
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
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
def refused(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Sequence[str]], str]:
    """Asks for something wrong and gives the one line that says what."""
    monkeypatch.setenv("KVCACHE_HOME", places["store"])  # so that the default store has something in it
    monkeypatch.delenv("KVCACHE_STORE", raising=False)

    def ask(name: str, arguments: Sequence[str]) -> str:
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
