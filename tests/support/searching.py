"""How long tests search: a part of a test's examples in the fast set, all of them, or more, by the variable SEARCH.

`SEARCH=1 pytest` tries as many examples as a test says, `SEARCH=20` twenty times as many, new on every run. Without it, as the
fast set runs, it is FAST of them, the same on every run.
"""

import os
from typing import Any

import hypothesis
from hypothesis import Phase

FAST = 0.2
SHARE = float(os.environ.get("SEARCH", FAST))


def register() -> None:
    """Make this the profile of all tests, so that `search` in a test says only what is its own."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)  # explaining a failure takes longer than finding it
    hypothesis.settings.register_profile(
        "kvcache", derandomize=SHARE <= 1, database=None, deadline=None, phases=phases, max_examples=examples(100)
    )
    hypothesis.settings.load_profile("kvcache")


def examples(count: int) -> int:
    """So many of this number of examples are tried now."""
    return max(2, round(count * SHARE))


def search(count: int, whole: bool = False, **options: Any) -> hypothesis.settings:
    """Settings of a search that tries `count` examples when all are tried; or always, where it has to find something."""
    return hypothesis.settings(max_examples=count if whole else examples(count), **options)


def steps(count: int) -> int:
    """So many steps of a text are compared now: half of them, or all with the whole search."""
    return count if SHARE >= 1 else count // 2
