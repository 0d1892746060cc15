"""How the tests are built: what they share lies in `support`, none takes from another, and none reaches into the library."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_release

TESTS = Path(__file__).parent
ROOT = TESTS.parent
MODULES = sorted(TESTS.rglob("*.py"))
HOUSES = {"kvcache": ROOT / "kvcache", "kvcache_chatterbox": ROOT / "adapters" / "kvcache_chatterbox"}

# Not yet: these are about the layers, whose contract is being made anew.
STILL_TAKE = {"test_heads.py": ["test_ranking"], "test_prefix_laws.py": ["test_laws"]}
STILL_REACH = {"test_heads.py", "test_laws.py", "test_quantized.py", "test_ranking.py"}


# ---------------------------------------------------------------------- none takes from another


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


# ---------------------------------------------------------------------- none reaches inside

# Names that are torch's, transformers' or Jupyter's too.
NOT_OURS = {"_attn_implementation_internal", "_check", "_modules", "_repr_html_", "_sample", "_version"}
BY_NAME = {"setattr", "getattr", "delattr", "hasattr", "object"}  # the last of `mock.patch`


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def bound(tree: ast.AST) -> Iterator[str]:
    """Names that a source gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@cache
def private_names() -> set[str]:
    """All that the library keeps to itself."""
    files = [file for house in HOUSES.values() for file in house.rglob("*.py")]
    names = {name for file in files for name in bound(ast.parse(file.read_text()))}
    return {name for name in names | {file.stem for file in files} if private(name)} - NOT_OURS


def of_ours(path: str) -> bool:
    """Whether a dotted path leads to what a folder of the library keeps to itself."""
    first, *inner = path.split(".")
    return first in HOUSES and any(map(private, inner))


def reaches(source: str, ours: set[str]) -> Iterator[str]:
    """What a test takes of the library's insides: by an import, as an attribute, or by name. A class may use what it inherits."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{before}{one.name}" for one in node.names if of_ours(f"{before}{one.name}"))
        elif isinstance(node, ast.Attribute) and node.attr in ours:
            if ast.unparse(node.value) not in {"self", "cls", "super()"}:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            strings = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            yield from (one for one in strings if one in ours)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [node.value] if re.fullmatch(r"[\w.]+", node.value) and of_ours(node.value) else []


def outside(files: Iterable[Path]) -> Iterator[Path]:
    return (file for file in files if file.parent != TESTS / "support" / "inside")


def test_only_one_folder_reaches_inside():
    ours = private_names()
    found = {file.name: list(reaches(file.read_text(), ours)) for file in outside(MODULES)}
    assert {name: taken for name, taken in found.items() if taken and name not in STILL_REACH} == {}


def test_what_reaches_inside_is_found():
    ours = private_names()
    for source in (
        "from kvcache.decoding._pool import Pool",
        "from kvcache.decoding import _pool",
        "import kvcache.decoding._pool as pools",
        "def late():\n    from kvcache_chatterbox.text import _pace",
        "batch._decoding",
        "engine._speaker.vocoder",
        "make(self)._decoding",
        'monkeypatch.setattr(kv, "_policies", [])',
        'patch.setattr("kvcache.decoding._scheduler.time", clock)',
    ):
        assert len(list(reaches(source, ours))) == 1, source
    for source in (
        "from kvcache.decoding import Pool",
        "from kvcache import __version__",
        "from support.inside.decoding import idle",
        "module._forward_hooks",
        "class Mine(KVLayer):\n    def trim(self):\n        super()._overwrite(self._keys)",
        'name.startswith("_forward")',
        '"of kvcache._pool, a sentence"',
    ):
        assert list(reaches(source, ours)) == [], source
