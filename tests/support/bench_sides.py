"""Tiny sides for the tests of `benchmarks/processes.py`: they import nothing, so that their processes start at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 2**20


def steady(gate: Any, trace: Path, name: str, mebibytes: int = 0) -> None:
    """Writes down what it does, and holds so much memory."""
    held = b"x" * (mebibytes * MIB)
    gate.told = lambda word: note(trace, f"{name} {word}")
    note(trace, f"{name} ready")
    while True:
        gate.notes["held"] = len(held)
        gate()
        note(trace, name)


def growing(gate: Any, trace: Path, name: str, mebibytes: int, turns: int) -> None:
    """Takes its memory only after some turns."""
    held = []
    for i in range(10**6):
        gate()
        note(trace, name)
        if i == turns:
            held.append(b"x" * (mebibytes * MIB))


def ends(gate: Any, trace: Path, name: str, turns: int, way: str) -> None:
    """Ends by itself, after so many turns; before it is ready if there are none."""
    for _ in range(turns):
        gate()
        note(trace, name)
    sys.stderr.write("on my way\n")
    if way == "killed":
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "raises":
        raise ValueError("no such model")
    if way == "exits":
        sys.exit(7)


def parent(gate: Any, trace: Path, name: str, turns: int, way: str) -> None:
    """Starts a process that would outlive it, and that holds its end of the pipe open."""
    os.set_inheritable(gate._connection.fileno(), True)
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], close_fds=False)
    note(trace, f"{name} started {child.pid}")
    ends(gate, trace, name, turns, way)


def stuck(gate: Any, trace: Path, name: str) -> None:
    """Is never ready."""
    note(trace, f"{name} {os.getpid()}")
    signal.pause()


def note(trace: Path, line: str) -> None:
    with Path(trace).open("a") as file:
        file.write(line + "\n")
