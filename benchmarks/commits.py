"""A commit beside the one before, both measured by turns on one machine, with the same benchmarks.

    python benchmarks/commits.py HEAD~1 --json result.json

Each tree runs its own scripts from a worktree of its own; what is compared are rows that both print. A row is slower only if it
is so in every run: what the old tree takes against itself, printed beside it, is what the machine alone does to a figure.
"""
# Not by `make bench`: it runs other benchmarks, twice each in two trees.

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

from common import ROOT, arguments, finish

BENCHMARKS: Mapping[str, Sequence[str]] = {
    "t3_step": ("--steps", "16"),
    "compressed_step": (
        *("--parts", "policies", "quantized", "--lengths", "2000"),
        *("--cycles", "1", "--blocks", "1"),
    ),
    "voice_ttft": ("--rounds", "5", "--cases", "nano", "smollm2"),
    "t3_decode": (
        *("--variant", "nano", "--contexts", "500", "--steps", "6"),
        *("--sides", "upstream-cache,eager-fp32,compile-int8"),
    ),
}
TIMES = ("ms/step, median", "ms/step", "ms, median", "ms/token")
"""Columns that hold what a row takes."""
NAMES = ("part", "variant", "model", "case", "side", "policy", "how", "prefix", "precision", "context", "tokens")
"""Columns that say which row it is."""
SLOWER = 0.93
"""Old over new, below which a row is slower."""

Times = Mapping[tuple[str, ...], float]


def times(result: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """What each row of a result takes, by what the row is."""
    found = {}
    for row in result["rows"]:
        taken = [row[column] for column in TIMES if isinstance(row.get(column), (int, float))]
        if taken:
            key = (result["benchmark"], *(str(row[name]) for name in NAMES if row.get(name) is not None))
            found[key] = taken[0]
    return found


def compared(olds: Sequence[Times], news: Sequence[Times]) -> list[dict[str, Any]]:
    """A row for each that all runs of both trees have: old over new in each run, and the old one over its first run."""
    rows = []
    for key in olds[0]:
        if all(key in run for run in (*olds, *news)):
            ratios = [old[key] / new[key] for old, new in zip(olds, news, strict=True)]
            again = [olds[0][key] / old[key] for old in olds[1:]]
            rows.append(
                {
                    "row": " | ".join(key),
                    **{f"old / new, run {i}": ratio for i, ratio in enumerate(ratios, 1)},
                    **{f"old / old, run {i}": ratio for i, ratio in enumerate(again, 2)},
                    "slower": "in every run" if max(ratios) < SLOWER else "",
                }
            )
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios; 1 of none."""
    return prod(values) ** (1 / len(values)) if values else 1.0


def measured(tree: Path, benchmark: str, folder: Path, quick: bool) -> Times:
    """One run of a tree's own benchmark.

    Raises:
        SystemExit: with what it wrote last, if it failed.
    """
    path = folder / "result.json"
    path.unlink(missing_ok=True)
    given = ("--quick",) if quick else BENCHMARKS[benchmark]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "adapters")])}
    done = subprocess.run(
        [sys.executable, str(tree / f"benchmarks/{benchmark}.py"), *given, "--json", str(path)],
        cwd=tree, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not path.exists():
        raise SystemExit(f"{benchmark} failed in {tree} with code {done.returncode}:\n{done.stderr[-2000:]}")
    return times(json.loads(path.read_text()))


def checked_out(commit: str, stack: ExitStack) -> Path:
    """A worktree of a commit, removed again with the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tree"
    added = subprocess.run(
        ["git", "worktree", "add", "--detach", str(folder), commit], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    if added.returncode:
        raise SystemExit(f"{commit!r} cannot be checked out: {added.stderr.strip()}")
    stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=False)
    return folder


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("old", help="the commit to compare this tree with")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--runs", type=int, default=2, help="of each benchmark in each tree (default: 2)")
    options: argparse.Namespace = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        old, folder = checked_out(options.old, stack), Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for benchmark in options.only:
            olds, news = [], []
            for run in range(options.runs):
                turns = ((old, olds), (ROOT, news))
                for tree, found in turns if run % 2 == 0 else turns[::-1]:  # neither is always the one that comes first
                    print(f"{benchmark}, run {run + 1}: {'old' if tree is old else 'new'}", file=sys.stderr)
                    found.append(measured(tree, benchmark, folder, options.quick))
            rows += compared(olds, news)
    ratios = {
        f"{what}_geometric_mean": geometric_mean(
            [value for row in rows for name, value in row.items() if name.startswith(what.replace("_over_", " / "))]
        )
        for what in ("old_over_new", "old_over_old")
    }
    finish("commits", rows, ratios, options, old=options.old)


if __name__ == "__main__":
    main()
