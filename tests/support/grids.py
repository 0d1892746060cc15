"""Grids of test cases: a sample in the fast set, the whole grid in the slow one.

``@pytest.mark.grid(40)`` lets at most 40 of a test's cases run with ``-m "not slow"``, or a share of them, and marks the others
``slow``. The sample is the same on every run, and every value of every parameter is in it, but for those named by
``any_of=("seed",)``.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import pytest


def sample(cases: Sequence[Mapping[str, int]], size: int, seed: str = "") -> list[int]:
    """Indices of about `size` cases: first until each value of each parameter is in, then on to `size`.

    Args:
        cases: of each, what tells its parameters' values apart.
        size: how many; more are chosen where the values need more.
        seed: another one chooses others.
    """
    order = sorted(range(len(cases)), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())
    missing = {value for case in cases for value in case.items()}
    chosen: list[int] = []
    while missing:
        best = max(order, key=lambda i: len(missing & set(cases[i].items())))
        chosen.append(best)
        missing -= set(cases[best].items())
    rest = (i for i in order if i not in set(chosen))
    chosen += [i for _, i in zip(range(size - len(chosen)), rest, strict=False)]
    return sorted(chosen)


def mark_grids(items: Iterable[pytest.Item], share: float = 1, every: bool = True) -> None:
    """Mark the cases ``slow`` that are not in their test's sample, of which only a share may be wanted.

    Args:
        items: what was collected.
        share: of the sizes of samples.
        every: whether each value is in a sample. If not, all tests with parameters are grids, of which a share of the cases
            runs: for another run of the tests beside one that takes them all.
    """
    grids: dict[tuple[object, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        sampled = hasattr(item, "callspec") and not every and item.get_closest_marker("slow") is None
        if sampled or item.get_closest_marker("grid") is not None:
            grids[item.parent, item.originalname].append(item)
    for (_, name), cases in grids.items():
        marker = cases[0].get_closest_marker("grid")
        size = len(cases) if marker is None else min(len(cases), int(marker.args[0]))
        but = () if marker is None else marker.kwargs.get("any_of", ())
        values = [_values(case, but) if every else {} for case in cases]
        kept = set(sample(values, max(1, round(size * share)), f"{cases[0].path.name} {name}"))
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker(pytest.mark.slow)
                case.add_marker("grid")


def _values(case: pytest.Function, but: Sequence[str]) -> dict[str, int]:
    """Its parameters' values: the cases of a grid share them."""
    return {name: id(value) for name, value in case.callspec.params.items() if name not in but}
