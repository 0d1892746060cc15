"""Which benchmarks `make bench` runs: each that does not say of itself why it is left out."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parents[1]
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
