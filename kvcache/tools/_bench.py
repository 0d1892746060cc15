"""The project's benchmarks, which live in a checkout and not in the package: found, listed, run."""

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvcache.errors import InputError

_SHARED = "common.py"  # what all of them import
_SENTENCE = re.compile(r".*?[.!?](?=\s|$)")


def benchmarks_folder(folder: Path | None = None) -> Path:
    """Where the benchmarks are.

    Args:
        folder: a checkout, or its benchmarks; None is the checkout that this package is part of.

    Raises:
        InputError: if there are none.
    """
    if folder is not None:
        found = next((place for place in (folder, folder / "benchmarks") if (place / _SHARED).is_file()), None)
        if found is None:
            raise InputError(f"there are no benchmarks in {folder}; give the folder of a checkout")
        return found
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file() or not (root / "benchmarks" / _SHARED).is_file():
        raise InputError(
            "the benchmarks are not part of the installed package; clone the repository and run pip install -e '.[bench]' in "
            "it, or give the checkout with --folder"
        )
    return root / "benchmarks"


def benchmarks(folder: Path) -> dict[str, str]:
    """The names of the benchmarks in a folder, and what each measures: the first sentence of its docstring."""
    found = {}
    for script in sorted(folder.glob("*.py")):
        source = script.read_text()
        if "from common import" in source:
            said = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
            sentence = _SENTENCE.match(said)
            found[script.stem] = sentence[0] if sentence else said
    return found


def run_benchmark(folder: Path, name: str, arguments: Sequence[str] = ()) -> int:
    """Run one with these arguments, as a process of its own whose output is this one's; its exit code.

    Raises:
        InputError: if there is none of this name.
    """
    known = benchmarks(folder)
    if name not in known:
        raise InputError(f"there is no benchmark {name!r} in {folder}; give one of {', '.join(known)}")
    code = subprocess.run([sys.executable, str(folder / f"{name}.py"), *arguments]).returncode
    return code if code >= 0 else 128 - code  # as a shell has it for one that a signal ended
