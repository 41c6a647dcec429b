"""Figures of k samples, against enumerations and simulations."""

from itertools import combinations
from math import comb, isclose

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.evaluation.statistics import interval, majority, pass_at_k


@given(st.integers(1, 8), st.data())
def test_pass_at_k_counts_the_sets_with_a_right_answer(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    sets = sum(any(one < right for one in some) for some in combinations(range(n), k))
    assert isclose(pass_at_k(n, right, k), sets / comb(n, k), abs_tol=1e-12)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 1)])
def test_pass_at_k_refuses(n, right, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, right, k)


def test_majority():
    def same(one, other):
        return one.strip() == other.strip()

    assert majority(["1", "2", " 2"], same) == 1
    assert majority(["1", "2"], same) == 0
    assert majority([None, None, "3"], same) == 2
    assert majority([None], same) is majority([], same) is None


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.nightly
def test_intervals_cover_as_often_as_they_say(rate):
    """95 % of 300 intervals, of 60 problems each; 4 standard errors are 5 points."""
    rng = np.random.default_rng(0)
    for samples, method in ((1, "Wilson"), (4, "bootstrap over problems")):
        covered = 0
        for trial in range(300):
            values = rng.binomial(samples, rate, 60) / samples
            low, high, said = interval(values.tolist(), trial)
            assert said == method and 0 <= low <= high <= 1
            covered += low <= rate <= high
        assert 0.9 <= covered / 300 <= 0.995


def test_intervals_of_one_problem_and_of_no_doubt():
    low, high, _ = interval([1.0], 0)
    assert isclose(low, 1 / (1 + 1.959963984540054**2), rel_tol=1e-9) and high == 1
    assert interval([0.5, 0.5], 0)[:2] == (0.5, 0.5)
    assert interval([0.25, 0.5, 1.0], 3) == interval([0.25, 0.5, 1.0], 3)
