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


def mark_grids(items: Iterable[pytest.Item], share: float = 1) -> None:
    """Mark the cases ``slow`` that are not in their test's sample, of which only a share may be wanted."""
    grids: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("grid") is not None:
            grids[f"{item.path.name} {item.originalname}"].append(item)
    for name, cases in grids.items():
        marker = cases[0].get_closest_marker("grid")
        assert marker is not None
        kept = set(
            sample(
                [_values(case, marker.kwargs.get("any_of", ())) for case in cases], int(marker.args[0] * share), name
            )
        )
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker(pytest.mark.slow)


def _values(case: pytest.Function, but: Sequence[str]) -> dict[str, int]:
    """Its parameters' values: the cases of a grid share them."""
    return {name: id(value) for name, value in case.callspec.params.items() if name not in but}
