"""Intervals and pass@k against brute force and hand values."""

import math
from itertools import combinations

import numpy as np
import pytest

from pensar.evaluate.statistics import Estimate, mean, pass_at, share

Z = 1.959964


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (3, 7), (8, 10), (0, 50), (299, 300), (150, 300)]
)
def test_wilson_s_interval_holds_every_share_that_the_count_does_not_contradict(
    successes: int, n: int
) -> None:
    """By brute force: the shares p whose own normal interval covers what was observed."""
    grid = np.linspace(0, 1, 200_001)
    observed = successes / n
    possible = grid[np.abs(observed - grid) <= Z * np.sqrt(grid * (1 - grid) / n) + 1e-12]
    found = share(successes, n)
    assert found.score == observed
    assert found.n == n
    assert found.low == pytest.approx(possible.min(), abs=2e-5)
    assert found.high == pytest.approx(possible.max(), abs=2e-5)


def test_wilson_s_interval_ends_where_the_share_does_in_spite_of_rounding() -> None:
    for n in range(1, 500):
        assert share(0, n).low == 0.0
        assert share(n, n).high == 1.0


def test_wilson_s_interval_by_hand() -> None:
    found = share(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    none = share(0, 10)
    assert none.low == 0
    assert none.high == pytest.approx(Z**2 / (10 + Z**2))
    assert share(0, 0) == Estimate(0.0, 0.0, 1.0, 0)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int) -> None:
    for correct in range(n + 1):
        replies = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = list(combinations(replies, k))
            assert pass_at(k, n, correct) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_one_is_the_mean_and_pass_at_n_asks_for_any() -> None:
    assert pass_at(1, 64, 16) == pytest.approx(0.25)
    assert pass_at(64, 64, 1) == 1.0
    assert pass_at(64, 64, 0) == 0.0


def test_the_mean_s_interval_is_the_normal_one_cut_to_what_is_possible() -> None:
    values = [0.0, 0.25, 1.0, 0.5]
    half = Z * np.std(values, ddof=1) / math.sqrt(4)
    found = mean(values)
    assert found.score == pytest.approx(0.4375)
    assert found.low == pytest.approx(max(0.0, 0.4375 - half))
    assert found.high == pytest.approx(min(1.0, 0.4375 + half))
    free = mean([3.0, 5.0], bounded=False)
    assert (free.score, free.low, free.high) == (4.0, pytest.approx(4 - Z), pytest.approx(4 + Z))
    assert mean([]) == Estimate(0.0, 0.0, 1.0, 0)
    assert mean([1.0]) == Estimate(1.0, 1.0, 1.0, 1)
