"""What all benchmarks share: interleaved timing, the machine they ran on, one form of table and file."""
# Not by `make bench`: what benchmarks share.

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from processes import Failure, allowed
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from kvcache.decoding import RECORDERS
from kvcache.io import parse_bytes
from kvcache.testing import traced

ROOT = Path(__file__).resolve().parent.parent


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small and few, its figures mean nothing")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--rehearsal", action="store_true", help="mark the result as one that measures nothing")
    return parser


def trace_graphs(rehearsed: bool) -> None:
    """Let a run that measures nothing trace on a CPU what a GPU captures, so that the same steps are rehearsed."""
    if rehearsed:
        RECORDERS["cpu"] = traced


def memory_option(parser: argparse.ArgumentParser, most: int | None = None) -> None:
    """The option ``--memory`` of a benchmark whose sides are processes; by default no more than `most` bytes."""
    budget = allowed(most)
    told = "no limit, the system does not tell what it has" if budget is None else f"{budget / 2**30:.1f}GiB here"
    parser.add_argument(
        "--memory",
        type=parse_bytes,
        metavar="SIZE",
        default=budget,
        help=f"what all sides may take together, as in 12GB; those that do not fit are measured later (default: {told})",
    )


Side = TypeVar("Side")


def chosen(sides: Mapping[str, Side], names: str | None) -> dict[str, Side]:
    """Those that the option ``--sides`` names, with commas between them; all if it was not given.

    Raises:
        SystemExit: if there is none of a name.
    """
    keys = list(sides) if names is None else names.split(",")
    if unknown := set(keys) - set(sides):
        raise SystemExit(f"--sides: there is no {', '.join(sorted(unknown))}; there are {', '.join(sides)}")
    return {key: sides[key] for key in keys}


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


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles; None where there are no values."""
    if not values:
        return {"median": None, "q1": None, "q3": None, "n": 0}
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "q1": low, "q3": high, "n": len(values)}


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the rounds of how many times longer `slow` took; above 1, `fast` is faster."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def known(ratios: Mapping[str, float | None]) -> dict[str, float]:
    """Those of which both sides were measured."""
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


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


def only(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with these columns alone, as far as they have them."""
    return [{column: row[column] for column in columns if column in row} for row in rows]


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> Console:
    """Print a table."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table(title=title)
    columns = {column: isinstance(value, str) for row in rows for column, value in row.items() if value is not None}
    for column in dict.fromkeys(column for row in rows for column in row):
        table.add_column(column, justify="left" if columns.get(column) else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(str(column.header))) for column in table.columns))
    console.print(table)
    return console


def finish(
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    options: argparse.Namespace,
    failed: Mapping[str, Failure] | None = None,
    columns: Sequence[str] | None = None,
    **more: Any,
) -> None:
    """Print the table and the ratios, and write the file, if asked to: see `keep`.

    Args:
        columns: that are printed; all by default.

    Raises:
        SystemExit: with code 1, when all is written, if sides have failed.
    """
    title = f"{benchmark}, {machine()['cpu']}, {torch.get_num_threads()} threads"
    console = show(title, rows if columns is None else only(rows, columns))
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio:.4g}x")
    if options.quick:
        console.print("a quick run: these figures mean nothing")
    keep(benchmark, rows, ratios, options, failed, **more)
    if failed:
        raise SystemExit("\n".join([*(_told(name, failure) for name, failure in failed.items()), _way_on(options)]))


def keep(
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    options: argparse.Namespace,
    failed: Mapping[str, Failure] | None = None,
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
    if failed:
        result["failed"] = {name: {"how": failure.how, "stderr": failure.said} for name, failure in failed.items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


def _told(name: str, failure: Failure) -> str:
    return "\n  ".join([f"{name}: {failure.how}", *failure.said])


def _way_on(options: argparse.Namespace) -> str:
    """What to try where memory is too little for sides that are processes."""
    ways = [] if options.memory is None else [f"--memory {0.75 * options.memory / 1e9:.1f}GB"]
    if "sides" in options:
        ways.append("--sides with fewer of them")
    return f"The other sides are measured. If memory was short, try {' or '.join(ways) or 'a larger machine'}."


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1e4 else f"{value:.4g}"
    return "–" if value is None else str(value)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
