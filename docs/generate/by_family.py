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
SHORT = (
    (r"ALiBi biases", "ALiBi counts slots"),
    (r"T5-style relative bias", "a relative bias counts slots"),
    (r"positions count slots|which counts slots", "its positions count slots"),
    (r"cannot tell how this model encodes positions", "unknown positions"),
    (r"positions are learned", "learned positions"),
    (r"positions are none", "no positions"),
    (r"positions are unknown", "unknown positions"),
    (r"positions are (\w+)", "other positions"),
    (r"stores beside its keys carries positions", "latents carry positions"),
    (r"in another way than by a rotation", "no plain rotation"),
    (r"is another at other positions", "depends on absolute positions"),
    (r"changes its frequencies with the length|positions that depend on the length", "RoPE by length"),
    (r"turns the first keys by how many", "RoPE by length"),
    (r"no layer to work on|has no layer that kvcache manages", "all layers are the model's own"),
    (r"is an encoder-decoder", "encoder-decoder"),
    (r"keeps no keys and values to reuse", "layers with a state"),
    (r"keeps a part of its cache in its own way", "some layers are the model's own"),
    (r"manages layers its own way", "some layers are the model's own"),
    (r"has a generate of its own|generates in its own way|generate\(\) of its own", "its own generate"),
    (r"brings its own attention|'eager' attention", "its own attention"),
    (r"has attention of a kind of its own|attends in a way of its own", "attention of its own kind"),
    (r"a short trial of|something else", "another answer, or none, in a trial"),
    (r"scales its attention by layer", "scales attention by layer"),
    (r"caches latents", "latents (MLA)"),
    (r"counts its positions in a way of its own", "positions of its own"),
    (r"of its own making", "a cache of its own"),
    (r"takes no cache of keys and values|makes? its cache itself", "no cache of keys and values"),
    (r"holds a state of all of them", "layers with a state"),
    (r"sliding layers have passed their window", "its own windows are full"),
    (r"depend on those that follow", "its prompt attends both ways"),
    (r"positions are others than in a whole prompt", "positions depend on the whole prompt"),
    (r"not what it computes of a whole prompt", "depends on the whole prompt"),
    (r"depends on how many of its tokens came at once", "depends on how the tokens came"),
    (r"a short prefix failed", "cannot go on behind a beginning of text"),
    (r"cannot be run on tokens alone|a short run failed", "cannot be run on text alone"),
    (r"were given and \d+ cached", "caches more than its tokens"),
    (r"attends to more than its mask", "ignores masks"),
    (r"puts more into its mask", "a mask of its own making"),
    (r"takes no other mask|is given a mask", "takes no other mask"),
    (r"attends for more than one layer", "attention shared by layers"),
    (r"computes with other keys", "changes keys behind the cache"),
    (r"nothing attends to the keys", "layers without attention"),
    (r"cannot be streamed", "no stream of tokens"),
    (r"tells a streamer nothing", "tells no tokens"),
)


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
