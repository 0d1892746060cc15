"""Where things are: folders are floors, and what is private stays in its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "kvcache"


def floors() -> dict[str, int]:
    """The row of each folder and module, from the ground up, as CONTRIBUTING has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| ([^|]*`[^|]*) \|$", text[text.index("## Where things are") :], re.MULTILINE)
    return {name: i for i, row in enumerate(rows) for name in re.findall(r"`(\w+)/?`", row)}


def imports(source: str) -> Iterator[tuple[str, list[str]]]:
    """What a module imports of the library: a dotted path below it, and names of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvcache"):
            package, _, path = (node.module or "").partition(".")
            assert package == "kvcache", "it imports an adapter"
            yield path, [alias.name for alias in node.names]


def faults(own: str, source: str, place: dict[str, int]) -> Iterator[str]:
    """What is wrong with the imports of a module of the folder, or module, `own`."""
    for path, names in imports(source):
        for name, *inner in [path.split(".")] if path else [[one] for one in names]:
            if name == own:
                continue
            if place.get(name, len(place)) >= place[own]:
                yield f"{own} imports {name}, which stands no lower"
            if any(part.startswith("_") for part in [*inner, *names]):
                yield f"{own} imports what is private to {name}: {path} {names}"


def test_the_map_names_every_folder_and_module():
    here = {file.stem for file in HOUSE.glob("*.py")} - {"__init__"}
    assert set(floors()) == here | {folder.parent.name for folder in HOUSE.glob("*/__init__.py")}
    assert len(set(floors().values())) <= 9
    assert len(here) <= 8


def test_nothing_is_imported_from_the_same_floor_or_further_up_and_nothing_private():
    place = floors()
    found = [
        f"{file.relative_to(ROOT)}: {fault}"
        for file in HOUSE.rglob("*.py")
        if (own := file.relative_to(HOUSE).parts[0].removesuffix(".py")) != "__init__"
        for fault in faults(own, file.read_text(), place)
    ]
    assert found == []


def test_what_is_no_folders_face_begins_with_an_underscore():
    others = [file for folder in HOUSE.glob("*/__init__.py") for file in folder.parent.rglob("*.py")]
    assert [file for file in others if not file.stem.startswith("_")] == []


def test_a_folder_hands_on_what_it_imports():
    for face in HOUSE.rglob("__init__.py"):
        if face.parent == HOUSE or face.parent.name in ("cli", "testing"):
            continue
        names = [name for _, names in imports(face.read_text()) for name in names]
        [handed] = [
            ast.literal_eval(node.value)
            for node in ast.parse(face.read_text()).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert sorted(names) == sorted(handed)


def test_faults_are_found():
    place = {"errors": 0, "cache": 1, "models": 2, "beside": 2}
    assert (
        list(faults("models", "from kvcache.cache import KVLayer\nfrom kvcache.models._probe import Probe", place))
        == []
    )
    for own, source in (
        ("cache", "from kvcache.models import facts_of"),
        ("models", "from kvcache.beside import it"),
        ("models", "from kvcache.cache._rope import KeyRotation"),
        ("models", "from kvcache.cache import _hidden"),
        ("errors", "from kvcache import cache"),
        ("errors", "def late():\n    from kvcache.cache import KVLayer"),
    ):
        assert len(list(faults(own, source, place))) == 1
