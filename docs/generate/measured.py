"""What the pages say is read from `benchmarks/results/`: the files, their rows, and how their figures are written."""

import ast
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One file of results.

    Attributes:
        name: of the file, without its suffix.
        data: what it holds, see the page on benchmarks for the fields.
    """

    name: str
    data: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        return list(self.data["rows"])

    @property
    def ratios(self) -> dict[str, float]:
        return dict(self.data["ratios"])

    def of(self, **values: Any) -> list[Row]:
        """The rows that have these values; a column whose name is no Python name is left to the caller."""
        return [row for row in self.rows if all(row.get(column) == value for column, value in values.items())]

    def row(self, **values: Any) -> Row:
        """The one row that has these values."""
        found = self.of(**values)
        if len(found) != 1:
            raise LookupError(f"{self.name}.json has {len(found)} rows with {values}; the page expects one")
        return found[0]

    @property
    def script(self) -> str:
        return f"benchmarks/{self.data['benchmark']}.py"

    @property
    def about(self) -> str:
        """The docstring of the script that wrote it; empty if there is none."""
        file = ROOT / self.script
        return (ast.get_docstring(ast.parse(file.read_text())) or "") if file.is_file() else ""

    @property
    def hardware(self) -> str:
        """The machine and the versions, in a line."""
        machine, versions = self.data["machine"], self.data["versions"]
        cpu = machine["cpu"].replace("(R)", "").replace("(TM)", "").strip()
        parts = [
            f"{cpu}, {counted(machine['cores'], 'core')}, {counted(machine['threads'], 'thread')}, "
            f"{machine['memory_gib']:g} GiB",
            machine["gpu"] or "no GPU",
            ", ".join(f"{'Python' if k == 'python' else k} {v}" for k, v in versions.items() if v and k != "kvcache"),
        ]
        if (commit := self.data.get("commit")) is not None:
            changed = " with files changed" if commit.endswith("-changed") else ""
            parts.append(f"commit {commit[:9]}{changed}")
        return "; ".join(parts)

    def made(self, command: str = "") -> str:
        """Below each figure: by what it was made and on what. `command` serves where the file does not say."""
        command = self.data.get("command") or command or f"python {self.script}"
        gpu = "" if self.data["machine"]["gpu"] else " GPU: not yet measured."
        return f"> `{command}`, kept in `benchmarks/results/{self.name}.json`.\n> On {self.hardware}.{gpu}"


def results(folder: Path = RESULTS) -> dict[str, Result]:
    """All results, by their files' names."""
    return {file.stem: Result(file.stem, json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))}


# ---------------------------------------------------------------------- figures in words


def digits(value: float | None, significant: int = 3) -> str:
    """So many significant digits, but never fewer than all before the point: 0.984, 9.84, 98.4, 984, 9843."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = significant - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, max(0, places))  # 9.996 has three digits as 10.0
    return f"{rounded:.{max(0, significant - 1 - math.floor(math.log10(abs(rounded))))}f}"


def ms(value: float) -> str:
    """Milliseconds: tenths below 100, whole ones from there on."""
    return f"{value:.1f}" if round(value, 1) < 100 else f"{value:.0f}"


def quartiles(row: Row, median: str, low: str = "q1", high: str = "q3", form: Any = ms) -> str:
    return f"{form(row[median])} ({form(row[low])}–{form(row[high])})"


def times(value: float | None) -> str:
    """A ratio: 1.83×."""
    return "–" if value is None else f"{value:.2f}×"


def percent(ratio: float, places: int = 1) -> str:
    """A ratio as what it is above 1: 1.0341 is +3.4 %."""
    return signed(100 * (ratio - 1), places)


def signed(value: float | None, places: int = 1) -> str:
    """Per cent with their sign: +3.4 %."""
    if value is None:
        return "–"
    text = f"{value:+.{places}f}"
    text = text.lstrip("+-") if float(text) == 0 else text
    return text.replace("-", "−") + " %"


def counted(count: int, thing: str) -> str:
    """2 cores, 1 thread."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = list(words)
    return f"{', '.join(most)} and {last}" if most else last


def cell(value: Any) -> str:
    """Any value, in a table that nobody wrote by hand."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return digits(value, 4)
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(part)}" for key, part in value.items())
    return str(value).replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """In Markdown. The first columns are words, the others are figures and stand to the right."""
    lines = [header, [*["---"] * words, *["---:"] * (len(header) - words)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
