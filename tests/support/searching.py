"""How hypothesis searches: the same examples on every run, or with LAW_SEARCH more of them, new on every run."""

import os

from hypothesis import Phase, settings

LONGER = int(os.environ.get("LAW_SEARCH", "1"))
"""So many times as many examples, where a test multiplies by it."""


def register() -> None:
    """Make this the profile of all tests, so that `settings` in a test says only what is its own."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)  # explaining a failure takes longer than finding it
    settings.register_profile("kvcache", derandomize=LONGER == 1, database=None, deadline=None, phases=phases)
    settings.load_profile("kvcache")
