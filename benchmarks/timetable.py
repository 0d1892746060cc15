"""Steps that run one after another, each in a process with a limit of its own; what became of them is kept as they end.

Only Python's own library is imported here: a machine may have nothing else that works.
"""
# Not by `make bench`: a part of gpu.py.

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TAIL = 2000  # characters of a step's output that are kept beside what became of it


@dataclass(frozen=True)
class Step:
    """A command, and what it may take.

    Attributes:
        limit: seconds, after which it is stopped with everything that it started.
        needs: packages without which it is skipped.
        always: run it although it has passed before: what it leaves behind is not in the results.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    always: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        status: ``"passed"``, ``"failed"``, ``"timed out"`` or ``"skipped"``.
        exit: the exit status; negative for a signal; None if there is none.
        reason: why it has not passed.
        tail: the end of its output.
    """

    status: str
    seconds: float = 0.0
    exit: int | None = None
    reason: str = ""
    tail: str = ""


class Results:
    """What became of the steps, in a file that is whole at any time.

    Args:
        file: ``gpu.json`` of this or an earlier run.
        about: what the results are of. Those of an earlier run are gone on with if their `key` is the same.
        key: names in `about`.
        again: start anew, whatever is there.

    Raises:
        SystemExit: if the file has results of something else.
    """

    def __init__(self, file: Path, about: Mapping[str, Any], key: Sequence[str], again: bool = False) -> None:
        self._file = file
        self._data: dict[str, Any] = {**about, "steps": {}}
        if again or not file.exists():
            return
        before = json.loads(file.read_text())
        if differs := [name for name in key if before.get(name) != about.get(name)]:
            was = ", ".join(f"{name} {before.get(name)!r}, now {about.get(name)!r}" for name in differs)
            raise SystemExit(
                f"{file} has results of something else ({was}): give another folder with --results, or replace them with --again"
            )
        self._data["steps"] = before["steps"]

    def of(self, name: str) -> Outcome | None:
        """What became of a step, if it has run."""
        kept = self._data["steps"].get(name)
        return None if kept is None else Outcome(**{field: kept[field] for field in Outcome.__dataclass_fields__})

    def put(self, step: Step, outcome: Outcome) -> None:
        """Keep what became of a step."""
        self._data["steps"][step.name] = {"limit": step.limit, **asdict(outcome)}
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._data, indent=1) + "\n")
        partial.replace(self._file)


def run_step(step: Step, seconds: float, environment: Mapping[str, str], log: Path) -> Outcome:
    """Run a step for so many seconds at most, then stop it and all that it started; its output goes behind `log`'s."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n==> {step.name}: {' '.join(step.command)}\n".encode())
        output.flush()
        start = output.tell()
        try:
            process = subprocess.Popen(
                step.command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome("failed", reason=str(error))
        status: int | None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _stop(process)
    took, tail = time.monotonic() - began, _tail(log, start)
    if status is None:
        return Outcome("timed out", took, reason=f"stopped after {seconds:.4g} s", tail=tail)
    if status:
        return Outcome("failed", took, status, _said(status, tail), tail)
    return Outcome("passed", took, 0, tail=tail)


def run_all(
    steps: Sequence[Step],
    results: Results,
    *,
    environment: Callable[[Step], Mapping[str, str]],
    log: Path,
    missing: Callable[[], Mapping[str, str]],
    deadline: float,
    say: Callable[[str], None] = print,
) -> bool:
    """Run the steps that have not passed yet, in order.

    Args:
        environment: of a step's process.
        missing: packages that cannot be used, asked before each step.
        deadline: of `time.monotonic`: no step runs beyond it.
        say: prints a line.

    Returns:
        Whether all have passed.
    """
    for step in steps:
        before = results.of(step.name)
        if before is not None and before.status == "passed" and not step.always:
            say(line(step, before) + "  (of an earlier run)")
            continue
        lacking = [name for name in step.needs if name in missing()]
        left = deadline - time.monotonic()
        if lacking:
            outcome = Outcome("skipped", reason=f"needs {', '.join(lacking)}")
        elif left <= 0:
            outcome = Outcome("skipped", reason="no time left")
        else:
            outcome = run_step(step, min(step.limit, left), environment(step), log)
        results.put(step, outcome)
        say(line(step, outcome))
    outcomes = [results.of(step.name) for step in steps]
    return all(outcome is not None and outcome.status == "passed" for outcome in outcomes)


def line(step: Step, outcome: Outcome) -> str:
    """A step's line on the console."""
    return (
        f"{step.name:<14} {outcome.status:<10} {outcome.seconds:6.1f} s of {step.limit:4.0f}  {outcome.reason}".rstrip()
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and of its group."""
    with contextlib.suppress(ProcessLookupError):  # nothing is
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, start: int) -> str:
    """The end of the output, of each line what a terminal would show of it: progress bars overwrite themselves."""
    with log.open("rb") as output:
        output.seek(max(start, output.seek(0, os.SEEK_END) - 20 * TAIL))
        text = output.read().decode(errors="replace")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).strip()[-TAIL:]


def _said(status: int, tail: str) -> str:
    """Why a step failed, in a line."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return tail.splitlines()[-1][-160:] if tail else f"exit status {status}, without a word"
