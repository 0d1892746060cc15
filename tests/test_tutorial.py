"""The tutorial, followed to the letter by a newcomer: a clone, a fresh environment, each block in turn, timed."""

import os
import re
import subprocess
import time

import pytest
from support.pages import NOT_RUN, ROOT, blocks

pytestmark = pytest.mark.one_release

SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text):
    """The shell blocks that are to be run."""
    return [match[1] for match in SHELL.finditer(text) if NOT_RUN.search(text[: match.start()]) is None]


def session(text):
    """All Python blocks as one script that says on stderr how long each took, and what they print."""
    lines, printed = ["import sys, time"], []
    for number, (source, run, output) in enumerate(blocks(text), 1):
        if run:
            line = source.count("\n", 0, len(source) - len(source.lstrip("\n"))) + 1
            took = f"print(f'block {number}, line {line}: {{time.perf_counter() - _began:.1f}} s', file=sys.stderr)"
            lines += ["_began = time.perf_counter()", source.strip("\n"), took]
            printed.append(output)
    return "\n".join(lines), printed


@pytest.mark.slow  # it installs torch
@pytest.mark.timeout(3000)
def test_a_newcomer_follows_it_to_the_letter(tmp_path, capsys):
    text = (ROOT / "docs" / "tutorial.md").read_text()
    clone = tmp_path / "kvcache"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "KVCACHE"))
    }
    clean |= {"PYTHONNOUSERSITE": "1", "HOME": str(tmp_path)}
    shell = commands(text)
    assert len(shell) == 1 and "pip install" in shell[0]

    began = time.perf_counter()
    subprocess.run(["bash", "-euc", shell[0]], cwd=clone, env=clean, check=True, stdout=subprocess.DEVNULL)
    installed = time.perf_counter()
    script, printed = session(text)
    run = subprocess.run(
        [str(clone / "tutorial" / "bin" / "python"), "-c", script], cwd=clone, env=clean, capture_output=True, text=True
    )
    ended = time.perf_counter()
    assert run.returncode == 0, run.stderr[-4000:]
    for output in filter(None, printed):
        assert output in run.stdout
    assert (clone / "tutorial.wav").stat().st_size > 50_000  # about 40 tokens of 960 samples in each of 3 segments
    times = re.findall(r"^block .*", run.stderr, re.MULTILINE)
    with capsys.disabled():
        print(f"\ninstalled in {installed - began:.0f} s, the rest in {ended - installed:.0f} s", *times, sep="\n  ")
