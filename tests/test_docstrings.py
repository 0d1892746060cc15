"""What public functions say of the tensors that they take and give: their shapes, where a reader looks for them."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_release

ROOT = Path(__file__).resolve().parent.parent
HOUSES = {"kvcache": ROOT / "kvcache", "kvcache_chatterbox": ROOT / "adapters" / "kvcache_chatterbox"}
SHAPE = re.compile(r"\[[^\[\]\n]*\]|of any shape")  # ``[batch, tokens]``, ``[n]``; ``[]`` for a single number
TENSOR = re.compile(r"\bTensor\b")


@dataclass(frozen=True)
class Public:
    """A public function or method, by the name that is imported; what stands in for its docstring where it has none."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    around: str = ""

    @property
    def takes_tensors(self) -> bool:
        """Whether an annotation of an argument or of what is returned names tensors."""
        given = self.node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        notes = [one.annotation for one in arguments if one is not None] + [self.node.returns]
        return any(note is not None and TENSOR.search(ast.unparse(note)) for note in notes)

    @property
    def says_shapes(self) -> bool:
        """Whether its docstring, or that of its class, has a shape."""
        return SHAPE.search(f"{ast.get_docstring(self.node) or ''}\n{self.around}") is not None


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def handed_on(module: ast.Module) -> set[str]:
    """The names in `__all__`."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def definitions() -> Iterator[tuple[str, ast.AST]]:
    """Each function and class that a public module or folder hands on, under the name that it is imported by."""
    for package, house in HOUSES.items():
        for face in sorted(house.rglob("*.py")):
            path = face.relative_to(house).with_suffix("").parts
            if (face.stem.startswith("_") and face.stem != "__init__") or "cli" in path:
                continue
            public = ".".join((package, *(part for part in path if part != "__init__")))
            module = parsed(face)
            names = handed_on(module) or {node.name for node in module.body if hasattr(node, "name")}
            own = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            yield from ((f"{public}.{name}", own[name]) for name in sorted(names & own.keys()) if name[0] != "_")
            for node in module.body:
                if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(f"{public}._"):
                    continue
                source = house.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
                there = {n.name: n for n in parsed(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
                kept = {alias.name for alias in node.names} & names & there.keys()
                yield from ((f"{public}.{name}", there[name]) for name in sorted(kept))


def functions(found: dict[str, ast.AST]) -> Iterator[Public]:
    """The public functions among these definitions, and the public methods of the classes."""
    classes = {node.name: node for node in found.values() if isinstance(node, ast.ClassDef)}
    for name, node in found.items():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Public(name, node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if method.name.startswith("_") and method.name not in ("__init__", "__call__"):
                    continue
                yield Public(f"{name}.{method.name}", method, "\n".join(about(node, method.name, classes)))


def about(kind: ast.ClassDef, method: str, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """The docstring of a class, and those of the methods of this name that it replaces."""
    yield ast.get_docstring(kind) or ""
    for base in kind.bases:
        above = classes.get(re.split(r"[\[.]", ast.unparse(base))[0])
        if above is not None:
            for node in above.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == method:
                    yield ast.get_docstring(node) or ""
            yield from about(above, method, classes)


def silent(found: dict[str, ast.AST]) -> set[str]:
    """The names of those that take or give tensors and say no shape."""
    return {one.name for one in functions(found) if one.takes_tensors and not one.says_shapes}


def test_whoever_takes_or_gives_tensors_says_their_shapes():
    found = dict(definitions())
    assert len(found) > 300  # or the search is wrong
    assert silent(found) == set()


def test_what_says_no_shape_is_found():
    source = '''
def bare(x: Tensor) -> int:
    "Nothing."
def gives() -> tuple[Tensor, int]:
    "Nothing."
def told(x: Tensor) -> None:
    "Of ids ``[n]``."
def neither(x: int) -> None:
    "Nothing."
class Base:
    def add(self, x: Tensor) -> None:
        "Of ids ``[n]``."
    def take(self) -> Tensor: ...
class Heir(Base):
    def add(self, x: Tensor) -> None: ...
    def take(self) -> Tensor:
        "Nothing."
class Shaped:
    """Of keys ``[heads, tokens]``."""
    def __call__(self) -> Tensor: ...
    def _inner(self) -> Tensor: ...
'''
    found = {node.name: node for node in ast.parse(source).body}
    assert silent(found) == {"bare", "gives", "Base.take", "Heir.take"}
