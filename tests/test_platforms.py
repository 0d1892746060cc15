"""Windows and macOS, as far as they can be played on Linux: what a process holds, and commands without Unix's own modules."""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.inside import tools as inside
from support.inside.ground import STATM

from kvcache import memory

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent


def test_w16_what_a_process_holds_is_told_in_one_place():
    assert all(one is memory.resident_bytes for one in inside.RESIDENT_BYTES)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read from /proc")
def test_w16_on_linux_it_is_the_resident_set():
    status = Path("/proc/self/status").read_text()
    told = int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024
    assert memory.resident_bytes() == pytest.approx(told, rel=0.05)  # it moves between the two looks


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024), ("freebsd14", 1024)])
def test_w16_without_proc_it_is_the_most_in_the_platforms_own_unit(platform, unit, monkeypatch, tmp_path):
    monkeypatch.setattr(STATM, tmp_path / "none")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=123_456))
    assert memory.resident_bytes() == 123_456 * unit


class Kernel32:
    """As ctypes has it: two functions that take attributes, of which one fills a structure."""

    def __init__(self, told):
        def get(process, counters, size):
            found = counters._obj
            assert (found.size, size) == (ctypes.sizeof(found), ctypes.sizeof(found))
            found.peak, found.resident = 2**40, 2**33 + 5  # more than 32 bits
            return told

        self.GetCurrentProcess = type("F", (), {"__call__": lambda self: -1})()
        self.K32GetProcessMemoryInfo = type("F", (), {"__call__": lambda self, *given: get(*given)})()


@pytest.mark.parametrize(("told", "held"), [(1, 2**33 + 5), (0, None)])
def test_w16_on_windows_its_own_call_is_asked(told, held, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=Kernel32(told)), raising=False)
    assert memory.resident_bytes() == held


def test_w16_where_nothing_is_told_it_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(STATM, tmp_path / "none")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.resident_bytes() is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory.resident_bytes() is None  # a Windows without the call
    assert inside.process_bytes() is None


# What Windows lacks is taken away once torch and transformers are there, which would look for their own parts of it.
PLAYED = """
import io, os, sys, torch, transformers, filelock, rich.console, typer.main
from transformers import LlamaConfig, LlamaForCausalLM
folder, platform = sys.argv[1:]
LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=300, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
gone = ("fcntl", "resource", "pwd", "grp", "termios") if platform == "win32" else ()
for name in gone:
    sys.modules[name] = None
for name in ("fork", "sched_getaffinity", "getuid") if platform == "win32" else ("sched_getaffinity",):
    if hasattr(os, name):
        delattr(os, name)
sys.platform = platform
import kvcache.memory
from pathlib import Path
kvcache.memory._STATM = Path("/none")
from kvcache.cli import main
codes = []
for given in (["plan", folder, "--length", "20"], ["plan", folder, "--memory", "1"], ["plan", folder, "--length", "0"],
              ["prefixes", "list"], ["prefixes", "remove", "ab"], ["bench", "nope"], ["doctor", "--json"], ["tune", folder]):
    out, sys.stdout = sys.stdout, io.TextIOWrapper(io.BytesIO(), encoding="cp1252" if platform == "win32" else "utf-8")
    codes.append(main(given))
    sys.stdout = out
print(codes)
"""


@pytest.mark.parametrize("platform", ["win32", pytest.param("darwin", marks=pytest.mark.slow)])
def test_commands_on_another_platform(platform, tmp_path):
    places = os.pathsep.join((str(ROOT), str(ROOT / "adapters")))
    environment = os.environ | {"PYTHONPATH": places, "KVCACHE_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-W", "ignore", "-c", PLAYED, str(tmp_path / "model"), platform]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stdout == "[0, 1, 2, 0, 2, 2, 0, 2]\n", ended.stderr
    assert len(ended.stderr.splitlines()) == 5  # one line for each that is not 0


def test_the_memory_of_a_plan_that_is_not_told_is_said(monkeypatch, tmp_path, capsys):
    pytest.importorskip("typer")
    from transformers import LlamaConfig

    from kvcache.cli import main

    LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    monkeypatch.setattr(inside.PLANNED_RESIDENT_BYTES, lambda: None)
    assert main(["plan", str(tmp_path), "--length", "20"]) == 0
    assert "does not tell what a process holds" in capsys.readouterr().out
