"""What all benchmarks share: interleaved timing, the machine they ran on, one form of table and file."""

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small and few, its figures mean nothing")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--rehearsal", action="store_true", help="mark the result as one that measures nothing")
    return parser


def synchronize() -> None:
    """Wait for the GPU, if this process uses one: to be called before a look at the clock."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    before: Mapping[str, Callable[[], None]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each side in each round, all sides in turn, so that a machine that slows down slows them all.

    Args:
        before: what to do before a side's turn, outside its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in tqdm(range(warmup + rounds), desc="rounds", leave=False):
        for name, run in sides.items():
            if before is not None and name in before:
                before[name]()
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Gate:
    """Called by a side before each of its turns: reports how long the last one took, and waits for the next.

    Attributes:
        told: what the side does when it is told something between two turns, outside their time.
        notes: what the side has to say at its end.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._start = time.perf_counter()
        self.told: Callable[[Any], None] = lambda word: None
        self.notes: dict[str, Any] = {}

    def __call__(self) -> None:
        synchronize()
        self._connection.send(time.perf_counter() - self._start)
        while (order := self._connection.recv())[0] == "tell":
            self.told(order[1])
            self._connection.send(None)
        if order[0] == "end":
            self._connection.send(self.notes | memory())
            raise SystemExit
        self._start = time.perf_counter()


def memory() -> dict[str, float]:
    """MiB of this process now and at most, and at most on the GPU, if it used one."""
    status = dict(line.split(":", 1) for line in _lines("/proc/self/status"))
    found = {
        name: int(status[field].split()[0]) / 2**10
        for name, field in (("MiB", "VmRSS"), ("MiB, peak", "VmHWM"))
        if field in status
    }
    if torch.cuda.is_initialized():
        found["GPU MiB, peak"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _serve(connection: Connection, threads: int, side: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    side(Gate(connection), *arguments)


class Processes:
    """Sides that live in a process each, as they would in use, and take turns.

    What one side allocates and frees then does not decide where another's memory comes from. A side is a function and
    its arguments; it is called with a `Gate` before them, and calls it before each turn.

    Args:
        together: prepare all sides at once instead of one at a time, where there are cores and memory for that.
    """

    def __init__(self, sides: Mapping[str, tuple[Any, ...]], threads: int, together: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: dict[str, Connection] = {}
        self._processes = []
        for name, (side, *rest) in tqdm(sides.items(), desc="preparing", leave=False):
            self._ends[name], end = context.Pipe()
            process = context.Process(target=_serve, args=(end, threads, side, tuple(rest)), daemon=True)
            process.start()
            end.close()
            self._processes.append(process)
            if not together:
                self._ends[name].recv()
        for received in self._ends.values() if together else ():
            received.recv()  # prepared: nobody is, while another is timed

    def tell(self, word: Any) -> None:
        """Let every side do what it does at this word."""
        for end in self._ends.values():
            end.send(("tell", word))
            end.recv()

    def rounds(self, rounds: int, warmup: int = 3) -> dict[str, list[float]]:
        """Seconds of each side in each round."""
        seconds: dict[str, list[float]] = {name: [] for name in self._ends}
        for i in tqdm(range(warmup + rounds), desc="rounds", leave=False):
            for name, end in self._ends.items():
                end.send(("turn",))
                took = end.recv()
                if i >= warmup:
                    seconds[name].append(took)
        return seconds

    def end(self) -> dict[str, dict[str, Any]]:
        """Let every side end; their notes."""
        for end in self._ends.values():
            end.send(("end",))
        notes = {name: end.recv() for name, end in self._ends.items()}
        for process in self._processes:
            process.join()
        return notes


def interleaved_processes(
    sides: Mapping[str, tuple[Any, ...]], rounds: int, threads: int, warmup: int = 3
) -> dict[str, list[float]]:
    """As `interleaved`, but with each side in a process of its own, see `Processes`."""
    processes = Processes(sides, threads)
    seconds = processes.rounds(rounds, warmup)
    processes.end()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "q1": low, "q3": high, "n": len(values)}


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the rounds of how many times longer `slow` took; above 1, `fast` is faster."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def machine() -> dict[str, Any]:
    """The hardware, as far as the operating system tells."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**20, 1),
        "gpu": gpu,
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Python and the packages whose speed is in the figures."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "kvcache", "chatterbox-tts"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """The checkout's commit, with a mark if files have been changed since.

    A copy without its repository says what `KVCACHE_COMMIT` says, or "unknown".
    """
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("KVCACHE_COMMIT", "unknown")
    return head + ("-changed" if changed.stdout.strip() else "")


def command(argv: Sequence[str]) -> str:
    """How to run this again, without where the result went and where this machine keeps its files."""
    words = ["python", f"benchmarks/{Path(argv[0]).name}"]
    rest = iter(argv[1:])
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif not word.startswith("--json="):
            option, equals, value = word.rpartition("=")
            words.append(f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else word)
    return shlex.join(words)


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> Console:
    """Print a table."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)
    return console


def finish(
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    options: argparse.Namespace,
    **more: Any,
) -> None:
    """Print the table and the ratios, and write the file, if asked to: see `keep`."""
    console = show(f"{benchmark}, {machine()['cpu']}, {torch.get_num_threads()} threads", rows)
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio:.4g}x")
    if options.quick:
        console.print("a quick run: these figures mean nothing")
    keep(benchmark, rows, ratios, options, **more)


def keep(
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    options: argparse.Namespace,
    **more: Any,
) -> None:
    """Write the file with what has been measured so far, and what more there is, if asked to."""
    if options.json is None:
        return
    result = {
        "benchmark": benchmark,
        "command": command(sys.argv),
        "quick": options.quick,
        **({"rehearsal": True} if options.rehearsal else {}),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rows": list(rows),
        "ratios": dict(ratios),
        **more,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1e4 else f"{value:.4g}"
    return "–" if value is None else str(value)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
