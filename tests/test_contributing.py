"""The exercise of CONTRIBUTING, "Add a policy", followed to the letter in a copy of the project."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.one_release


def exercise() -> list[str]:
    """The blocks of code, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Add a policy") : text.index("## How a cache is put together")]
    return [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)    ```", section, re.DOTALL)]


def put(file: Path, before: str, text: str) -> None:
    """Text before the first place where this stands."""
    source = file.read_text()
    assert before in source, f"{file.name} has no {before!r}"
    file.write_text(source.replace(before, text + before, 1))


def test_the_exercise_leads_to_a_policy_that_every_law_holds(tmp_path):
    for name in ("kvcache", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    policy, line, formula = exercise()
    name = re.search(r"class (\w+)", policy)[1]
    with (tmp_path / "kvcache/cache/_ranking.py").open("a") as file:
        file.write("\n\n" + policy)
    for face in ("cache/__init__.py", "_public.py"):
        file = tmp_path / "kvcache" / face
        put(file, "    ExpectedAttention,\n", f"    {name},\n")
        put(file, '    "ExpectedAttention",\n', f'    "{name}",\n')
    laws = tmp_path / "tests/test_ranking.py"
    put(laws, "    ExpectedAttention,\n", f"    {name},\n")
    source = laws.read_text()
    first = re.search(r"RANKINGS: .* = {\n", source)[0]
    laws.write_text(source.replace(first, first + textwrap.indent(line, "    "), 1))
    put(laws, "        held, how = self.rows[b][h], self.how\n", textwrap.indent(formula, "        "))
    called = re.search(r'"(\w+)"', line)[1]
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(laws),
        "-k",
        f"test_law and {called}",
        "-m",
        "not slow",
        "-p",
        "no:randomly",
    ]
    found = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=540, env=environment(tmp_path))
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert re.search(r"^\.{5,} ", found.stdout, re.MULTILINE), "hardly a law was tried"
    checked = f"from kvcache import {name}; from kvcache.testing import check_policy; check_policy({name}(9, sinks=1, window_size=2))"
    subprocess.run([sys.executable, "-c", checked], cwd=tmp_path, check=True, timeout=300, env=environment(tmp_path))


def environment(root: Path) -> dict[str, str]:
    """In which the copy is the kvcache that is imported."""
    import os

    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
