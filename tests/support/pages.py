"""The Python blocks of a page of the documentation."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"\s*^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # right behind a block: what it prints
NOT_RUN = re.compile(r"<!-- not run: \S.*? -->\s*\Z")


def blocks(text: str) -> Iterator[tuple[str, bool, str | None]]:
    """Each Python block, padded to its line, whether it is to be run, and what it prints, if the page says that."""
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(1))
        printed = PRINTED.match(text, match.end())
        yield (
            "\n" * line + match[1],
            NOT_RUN.search(text[: match.start()]) is None,
            None if printed is None else printed[1],
        )
