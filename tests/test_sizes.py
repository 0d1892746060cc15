"""Files, functions and argument lists that fit in a head, and an explicit list of those that do not yet."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).parents[1]
FILE, FUNCTION, ARGUMENTS = 460, 60, 8

# What is above a limit, and how far: it may shrink, and leaves the list once it is below.
FILES: dict[str, int] = {}
FUNCTIONS = {
    "kvcache/decoding/_kernel.py _attend": 71,  # a Triton kernel
}
OF_MANY_ARGUMENTS = {
    # Commands: each argument is an option of the user's.
    "kvcache/cli/_plan.py command": 19,
    "kvcache/cli/_profile.py command": 13,
    "kvcache/cli/_tune.py command": 16,
    "kvcache/cli/_prefixes.py prune": 9,
    "kvcache/cli/_warm.py command": 11,
    # A Triton kernel: pointers, sizes and strides.
    "kvcache/decoding/_kernel.py _attend": 28,
}


def functions(source: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Each function of a module, with its name within the module."""

    def inside(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for part in ast.iter_child_nodes(node):
            named = isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            own = f"{name}.{part.name}".lstrip(".") if named else name
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                yield own, part
            yield from inside(part, own)

    return inside(ast.parse(source), "")


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of a function from its ``def`` on, without its docstring."""
    first = function.body[0]
    told = ast.get_docstring(function, clean=False) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if told else 0)


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of a function, without ``self``; what ``**options: Unpack[...]`` stands for are fields of a value, and count not."""
    given = function.args
    own = [*given.posonlyargs, *given.args]
    return len(own) + len(given.kwonlyargs) - (bool(own) and own[0].arg in ("self", "cls"))


def sources() -> dict[str, str]:
    return {
        str(file.relative_to(ROOT)): file.read_text()
        for folder in ("kvcache", "adapters")
        for file in (ROOT / folder).rglob("*.py")
    }


def wrong(found: dict[str, int], limit: int, listed: dict[str, int]) -> list[str]:
    """What is above a limit and not listed, or further above than listed, and what is listed in vain."""
    above = {name: size for name, size in found.items() if size > limit}
    said = [
        f"{name}: {size}, at most {listed.get(name, limit)}"
        for name, size in above.items()
        if size > listed.get(name, limit)
    ]
    return said + [f"{name}: {found.get(name, 'gone')}; take it off the list" for name in listed if name not in above]


def test_files_fit_in_a_head():
    assert wrong({name: len(source.splitlines()) for name, source in sources().items()}, FILE, FILES) == []


@pytest.mark.parametrize(
    ("size", "limit", "listed"),
    [(lines, FUNCTION, FUNCTIONS), (arguments, ARGUMENTS, OF_MANY_ARGUMENTS)],
    ids=["lines", "arguments"],
)
def test_functions_fit_in_a_head(size, limit, listed):
    found: dict[str, int] = {}
    for file, source in sources().items():
        for name, function in functions(source):
            found[f"{file} {name}"] = max(size(function), found.get(f"{file} {name}", 0))  # overloads have one name
    assert wrong(found, limit, listed) == []


def test_sizes_are_counted_and_lists_are_held_to():
    source = '''
class A:
    def f(self, a, *, b, **options: Unpack[Options]):
        """Told
        in two lines."""
        def g(c, d, e):
            return c
        return g
'''
    found = dict(functions(source))
    assert {name: (lines(one), arguments(one)) for name, one in found.items()} == {"A.f": (4, 2), "A.f.g": (2, 3)}
    sizes = {"a": 5, "b": 7, "c": 9}
    assert wrong(sizes, 6, {"b": 7, "c": 9}) == []
    assert wrong(sizes, 6, {"b": 7}) == ["c: 9, at most 6"]
    assert wrong(sizes, 6, {"b": 7, "c": 8}) == ["c: 9, at most 8"]
    assert wrong(sizes, 6, {"a": 7, "b": 7, "c": 9, "d": 8}) == [
        "a: 5; take it off the list",
        "d: gone; take it off the list",
    ]
