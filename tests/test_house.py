"""Where things are: folders are floors, and what is private stays in its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = [ROOT / "kvcache", ROOT / "adapters" / "kvcache_chatterbox"]


def floors(house: Path) -> dict[str, int]:
    """The row of each folder and module, from the ground up, as CONTRIBUTING has them."""
    tables = re.findall(r"\| about \| where \|\n\|[- |]+\n((?:\|.*\n)+)", (ROOT / "CONTRIBUTING.md").read_text())
    rows = tables[HOUSES.index(house)].splitlines()
    return {name: i for i, row in enumerate(rows) for name in re.findall(r"`(\w+)/?`", row.split("|")[2])}


def imports(source: str, package: str) -> Iterator[tuple[str, list[str]]]:
    """What a module imports of a package: a dotted path below it, and names of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            first, _, path = (node.module or "").partition(".")
            if first == package:
                yield path, [alias.name for alias in node.names]


def faults(own: str, source: str, package: str, place: dict[str, int]) -> Iterator[str]:
    """What is wrong with the imports of a module of the folder, or module, `own`."""
    for path, names in imports(source, package):
        for name, *inner in [path.split(".")] if path else [[one] for one in names]:
            if name == own:
                continue
            if place.get(name, len(place)) >= place[own]:
                yield f"{own} imports {name}, which stands no lower"
            if any(part.startswith("_") for part in [*inner, *names]):
                yield f"{own} imports what is private to {name}: {path} {names}"


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
def test_the_map_names_every_folder_and_module(house):
    here = {file.stem for file in house.glob("*.py")} - {"__init__"}
    assert set(floors(house)) == here | {folder.parent.name for folder in house.glob("*/__init__.py")}
    assert len(set(floors(house).values())) <= 9
    assert len(here) <= 8


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
def test_nothing_is_imported_from_the_same_floor_or_further_up_and_nothing_private(house):
    place = floors(house)
    found = [
        f"{file.relative_to(ROOT)}: {fault}"
        for file in house.rglob("*.py")
        if (own := file.relative_to(house).parts[0].removesuffix(".py")) != "__init__"
        for fault in faults(own, file.read_text(), house.name, place)
    ]
    assert found == []


def test_the_core_knows_no_adapter_and_adapters_only_what_the_core_hands_on():
    core, adapter = HOUSES
    sources = {file.relative_to(ROOT): file.read_text() for file in core.rglob("*.py")}
    assert [
        file for file, source in sources.items() if "kvcache_chatterbox" in re.findall(r"(?:from|import) (\w+)", source)
    ] == []
    for file in adapter.rglob("*.py"):
        paths = [(path, names) for path, names in imports(file.read_text(), "kvcache")]
        private = [
            (path, names) for path, names in paths if any(one.startswith("_") for one in [*path.split("."), *names])
        ]
        assert private == [], file.relative_to(ROOT)


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
def test_what_is_no_folders_face_begins_with_an_underscore(house):
    others = [file for folder in house.glob("*/__init__.py") for file in folder.parent.rglob("*.py")]
    assert [file for file in others if not file.stem.startswith("_")] == []


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
def test_a_folder_hands_on_what_it_imports(house):
    for face in house.rglob("__init__.py"):
        if face.parent == HOUSES[0] or face.parent.relative_to(HOUSES[0].parent).parts[:2] in (
            ("kvcache", "cli"),
            ("kvcache", "testing"),
        ):
            continue
        names = [name for _, names in imports(face.read_text(), house.name) for name in names]
        [handed] = [
            ast.literal_eval(node.value)
            for node in ast.parse(face.read_text()).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert set(names) <= set(handed)


LAYERS = {"KVLayer", "ByAge", "GroupedLayer", "RankedLayer", "SplitLayer", "AdaKVLayer"}


def layers_named(source: str) -> set[str]:
    """The classes of layers that a module names: what a layer can do is asked of it, and not of its class."""
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return LAYERS & (names | attributes)


def test_no_class_of_a_layer_is_named_outside_of_the_cache():
    found = {
        str(file.relative_to(ROOT)): named
        for house in HOUSES
        for file in house.rglob("*.py")
        if file.parent != ROOT / "kvcache" / "cache" and (named := layers_named(file.read_text()))
    }
    assert found == {}
    assert layers_named("isinstance(x, kvcache.KVLayer) or type(x) is RankedLayer") == {"KVLayer", "RankedLayer"}
    defined = [
        node.name
        for file in (ROOT / "kvcache" / "cache").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(getattr(base, "id", "") in LAYERS | {"LayerCache"} for base in node.bases)
    ]
    assert set(defined) == LAYERS


def test_faults_are_found():
    place = {"errors": 0, "cache": 1, "models": 2, "beside": 2}
    assert (
        list(
            faults(
                "models", "from kvcache.cache import KVLayer\nfrom kvcache.models._probe import Probe", "kvcache", place
            )
        )
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
        assert len(list(faults(own, source, "kvcache", place))) == 1
