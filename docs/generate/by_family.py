"""The page on models: which class of transformers works with which feature, and the reasons in short words."""

import re
from collections import Counter

from measured import Result, Row, table

# What a column is called, and where its feature is explained.
COLUMNS = {
    "generate": "generate",
    "stream": "stream",
    "engine": "engine",
    "window": "window",
    "re-rotation": "re-rotation",
    "prefix": "prefix",
    "ranking": "ranking",
    "bits": "fewer bits",
    "save": "save",
    "plan": "plan",
    "truncate": "truncate",
    "beams": "beams",
}
# The first pattern that a reason holds says it in short.
SHORT: tuple[tuple[str, str], ...] = ()


def counts(result: Result) -> str:
    """How many classes are in each state, a row for each feature."""
    lines = []
    for line in result.data["counts"]:
        refused = line["refused"] + line["falls back"]
        faults = line["wrong"] + line["crash"]
        lines.append([COLUMNS[line["feature"]], *map(str, (line["works"], refused, line["not tried"], faults))])
    return table(["feature", "works", "refused or by generate", "nothing to compare with", "wrong or crashes"], lines)


def classes(result: Result) -> str:
    """All classes, a column for each feature."""
    lines = []
    for row in _built(result):
        cells = [_short(row["cells"][feature]) for feature in COLUMNS]
        lines.append([f"`{row['class']}`", *cells])
    return table(["class", *COLUMNS.values()], lines, words=1 + len(COLUMNS))


def left_out(result: Result) -> str:
    """The classes that could not be tried, and why."""
    found = [row for row in result.rows if row["built"] is not None]
    return table(["class", "why it was not tried"], [[f"`{r['class']}`", _plain(r["built"])] for r in found], words=2)


def tried(result: Result) -> int:
    return len(_built(result))


def unknown(result: Result) -> Counter[str]:
    """The reasons that have no short words yet."""
    found = Counter[str]()
    for row in _built(result):
        for cell in row["cells"].values():
            if cell["state"] in ("refused", "falls back") and _known(cell["why"]) is None:
                found[cell["why"]] += 1
    return found


def _built(result: Result) -> list[Row]:
    return [row for row in result.rows if row["built"] is None]


def _known(why: str) -> str | None:
    return next((short for pattern, short in SHORT if re.search(pattern, why)), None)


def _short(cell: Row) -> str:
    if cell["state"] == "works":
        return "works"
    if cell["state"] == "not tried":
        return "–"
    words = _known(cell["why"]) or _plain(re.sub(r"^\w+Error: ", "", cell["why"]).split(";")[0][:80])
    return {"falls back": f"by generate: {words}"}.get(cell["state"], words)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
