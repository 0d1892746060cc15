"""How the tests are built: what they share lies in `support`, and none takes from another."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_release

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("*.py"))
# Not yet: what these two take is about the layers, whose contract is being made anew.
STILL_TAKE = {"test_heads.py": ["test_ranking"], "test_prefix_laws.py": ["test_laws"]}


def imported(source: str) -> Iterator[str]:
    """The full name of each module that is imported, wherever in the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def taken(source: str) -> list[str]:
    """What is imported of test modules, or of `conftest`."""
    return [
        name for name in imported(source) if name.split(".")[0] in {"tests", "conftest"} or name.startswith("test_")
    ]


def test_no_module_takes_from_a_test_module():
    assert {file.name: taken(file.read_text()) for file in MODULES if taken(file.read_text())} == STILL_TAKE


def test_beside_the_tests_there_is_only_what_they_share():
    assert [file.name for file in TESTS.glob("*.py") if not file.name.startswith("test_")] == ["conftest.py"]


def test_what_is_taken_is_found():
    assert taken("import test_laws") == ["test_laws"]
    assert taken("def late():\n    from test_laws import KINDS") == ["test_laws"]
    assert taken("from conftest import stores") == ["conftest"]
    assert taken("from support.families import build\nimport testing") == []
