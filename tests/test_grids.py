"""Samples of grids: every value is tried, the same cases each time, and the rest is slow, not gone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.grids import sample

pytestmark = pytest.mark.one_release


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 60))
def test_a_sample_has_every_value_and_no_more_than_it_needs(sizes, size):
    cases = [dict(zip("abcd", values, strict=False)) for values in itertools.product(*map(range, sizes))]
    chosen = sample(cases, size)
    assert chosen == sample(cases, size)
    assert len(set(chosen)) == len(chosen)
    assert {value for i in chosen for value in cases[i].items()} == {v for case in cases for v in case.items()}
    assert min(size, len(cases)) <= len(chosen) <= max(size, sum(sizes))


def test_cases_outside_the_sample_are_slow(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    pytester.makeconftest(
        """
        import os
        import pytest
        from support.grids import mark_grids

        def pytest_configure(config):
            config.addinivalue_line("markers", "slow: x")
            config.addinivalue_line("markers", "grid: x")

        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(items):
            mark_grids(items, 1 if "every" not in os.environ else 0.4, every="every" not in os.environ)
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.grid(6)
        @pytest.mark.parametrize("a", range(5))
        @pytest.mark.parametrize("b", range(5))
        def test_some(a, b):
            pass

        @pytest.mark.grid(2, any_of=("seed",))
        @pytest.mark.parametrize("seed", range(5))
        def test_few(seed):
            pass

        @pytest.mark.parametrize("a", range(5))
        def test_all(a):
            pass
        """
    )
    pytester.runpytest_inprocess("-q", "-m", "not slow").assert_outcomes(passed=13, deselected=22)
    pytester.runpytest_inprocess("-q", "-m", "slow").assert_outcomes(passed=22, deselected=13)
    monkeypatch.setenv("every", "no")
    pytester.runpytest_inprocess("-q", "-m", "not slow").assert_outcomes(passed=5, deselected=30)
    pytester.runpytest_inprocess("-q", "-m", "slow and grid").assert_outcomes(passed=30, deselected=5)
