"""Which benchmarks `make bench` runs: each that does not say of itself why it is left out."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("rich")
sys.path.insert(0, str(ROOT / "benchmarks"))
from commits import compared, geometric_mean, times  # noqa: E402

FILES = sorted((ROOT / "benchmarks").glob("*.py"))
LEFT_OUT = re.compile(r"^# Not by `make bench`: \S.*\.$", re.MULTILINE)
IS_RUN = re.compile(r'^if __name__ == "__main__":$', re.MULTILINE)
TAKES_QUICK = re.compile(r"\b(?:common\.)?arguments\(")  # of common.py, which knows --quick


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_runs_each_that_does_not_say_why_it_is_left_out():
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", "--dry-run", "bench"]
    said = subprocess.run(command, cwd=ROOT, env=alone, check=True, capture_output=True, text=True).stdout
    [scripts] = re.findall(r"for script in (.*?);", said)
    named = {file.name for file in FILES if not LEFT_OUT.search(file.read_text())}
    assert {Path(script).name for script in scripts.split()} == named


def test_what_is_run_is_a_script_that_can_be_quick():
    for file in FILES:
        source = file.read_text()
        if not LEFT_OUT.search(source):
            assert IS_RUN.search(source) and TAKES_QUICK.search(source), f"{file.name} says not why it is left out"


def test_a_commit_is_slower_only_where_each_run_says_so():
    def run(*rows):
        return times({"benchmark": "steps", "rows": [{"side": side, "context": 9, "ms/step": ms} for side, ms in rows]})

    olds = [
        run(("kept", 10.0), ("once", 10.0), ("slow", 10.0), ("gone", 1.0)),
        run(("kept", 8.0), ("once", 10.0), ("slow", 9.0)),
    ]
    news = [
        run(("kept", 10.0), ("once", 20.0), ("slow", 20.0), ("new", 1.0)),
        run(("kept", 8.0), ("once", 10.0), ("slow", 12.0)),
    ]
    found = {row["row"]: row for row in compared(olds, news)}
    assert list(found) == [
        "steps | kept | 9",
        "steps | once | 9",
        "steps | slow | 9",
    ]  # what only one tree prints has no pair
    assert [row["slower"] for row in found.values()] == ["", "", "in every run"]
    kept, once, slow = found.values()
    assert (kept["old / new, run 1"], kept["old / new, run 2"], kept["old / old, run 2"]) == (1, 1, 1.25)
    assert (once["old / new, run 1"], slow["old / new, run 2"]) == (0.5, 0.75)
    assert times({"benchmark": "x", "rows": [{"side": "failed", "ms/step": None}]}) == {}
    assert geometric_mean([0.5, 2.0]) == 1 and geometric_mean([]) == 1
