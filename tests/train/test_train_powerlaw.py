"""Power laws: known exponents come back, intervals hold the truth as often as they say, and what points do not tell."""

import math

import numpy as np
import pytest

from pensar.base.errors import ConfigError
from pensar.train.powerlaw import Interval, NoFit, fit_loss_law, fit_power_law, student

SIZES = [25e3, 1e5, 2.2e5, 9e5]
TOKENS = [65e3, 131e3, 524e3]
GRID = [(n, d) for n in SIZES for d in TOKENS]
N, D = ([pair[place] for pair in GRID] for place in (0, 1))


def holds(interval: Interval, truth: float) -> bool:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= truth <= interval.high


def test_student_quantiles_are_those_of_the_tables() -> None:
    """Abramowitz and Stegun, table 26.10, two-sided 95% and 99%."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 6: 2.447, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {freedom: round(student(freedom), 3) for freedom in table} == table
    assert student(5, 0.99) == pytest.approx(4.032, abs=5e-4)


def test_exact_points_give_the_law_they_lie_on() -> None:
    y = [0.3 * n**-0.7 * d**0.3 for n, d in GRID]
    law = fit_power_law({"parameters": N, "tokens": D}, y)
    assert law.exponent("parameters").value == pytest.approx(-0.7, abs=1e-9)
    assert law.exponent("tokens").value == pytest.approx(0.3, abs=1e-9)
    assert law.factor.value == pytest.approx(0.3, rel=1e-8)
    assert law.r_squared == pytest.approx(1.0)
    target = {"parameters": 1e7, "tokens": 1e8}
    assert law.predict(target).value == pytest.approx(0.3 * 1e7**-0.7 * 1e8**0.3)
    assert law.beyond(target) == pytest.approx(1e8 / 524e3)
    assert law.beyond({"parameters": 1e5, "tokens": 1e5}) == 1
    assert law.beyond({"parameters": 5e3, "tokens": 1e5}) == pytest.approx(5)


def test_a_case_by_hand() -> None:
    """ln y = 0, 1, 1 at ln x = 0, 1, 2: slope 1/2, intercept 1/6, squares 1/6 on one degree of freedom."""
    law = fit_power_law({"x": [1, math.e, math.e**2]}, [1, math.e, math.e])
    slope, half = law.exponent("x"), 12.7062 * math.sqrt(1 / 6) * math.sqrt(1 / 2)
    assert (slope.value, slope.low, slope.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-4)
    assert math.log(law.factor.value) == pytest.approx(1 / 6)
    assert law.r_squared == pytest.approx(1 - (1 / 6) / (2 / 3))
    # At the mean of ln x the law's own variance is s^2 / 3, that of one more point s^2 (1 + 1/3).
    for scattered, share in ((False, 1 / 3), (True, 4 / 3)):
        found = law.predict({"x": math.e}, scattered=scattered)
        assert found.high is not None
        assert math.log(found.high / found.value) == pytest.approx(
            12.7062 * math.sqrt(1 / 6 * share), abs=1e-4
        )


def test_errors_of_a_line_are_those_of_numpy() -> None:
    rng = np.random.default_rng(3)
    x = np.exp(rng.uniform(0, 5, 12))
    y = 2 * x**0.4 * np.exp(0.1 * rng.standard_normal(12))
    law = fit_power_law({"x": x.tolist()}, y.tolist())
    (slope, intercept), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert law.coefficients == pytest.approx((intercept, slope))
    found = law.exponent("x")
    assert found.high is not None
    assert found.high - found.value == pytest.approx(2.2281 * math.sqrt(covariance[0, 0]), rel=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    truth = np.array([1.8 * n**-0.7 * d**0.3 for n, d in GRID])
    new = {"parameters": 4e6, "tokens": 8e6}
    at = 1.8 * 4e6**-0.7 * 8e6**0.3
    hits = np.zeros(4)
    repeats = 600
    for _ in range(repeats):
        law = fit_power_law(
            {"parameters": N, "tokens": D}, (truth * np.exp(0.2 * rng.standard_normal(len(GRID)))).tolist()
        )
        hits += [
            holds(law.exponent("parameters"), -0.7),
            holds(law.exponent("tokens"), 0.3),
            holds(law.predict(new, scattered=False), at),
            holds(law.predict(new), at * math.exp(0.2 * rng.standard_normal())),
        ]
    # Three standard errors of a share of 95% in 600 are 2.7 points.
    assert hits / repeats == pytest.approx(0.95, abs=0.027)


@pytest.mark.parametrize(
    ("columns", "y", "said"),
    [
        ({"x": [1.0, 2.0]}, [1.0, 2.0], "2 points for 2 coefficients: at least 3"),
        ({"x": [2.0, 2.0, 2.0]}, [1.0, 2.0, 3.0], "all points have x 2: take a second value"),
        (
            {"x": [1.0, 2.0, 4.0, 8.0], "z": [3.0, 6.0, 12.0, 24.0]},
            [1.0, 2.0, 3.0, 5.0],
            "x and z go together",
        ),
    ],
)
def test_points_that_tell_no_law_are_refused(
    columns: dict[str, list[float]], y: list[float], said: str
) -> None:
    with pytest.raises(NoFit, match=said):
        fit_power_law(columns, y)


@pytest.mark.parametrize("y", [[1.0, 0.0, 2.0], [1.0, -1.0, 2.0], [1.0, math.nan, 2.0]])
def test_a_law_is_of_positive_numbers(y: list[float]) -> None:
    with pytest.raises(ConfigError, match="positive numbers"):
        fit_power_law({"x": [1.0, 2.0, 3.0]}, y)


def losses(deviation: float = 0.0, seed: int = 0) -> list[float]:
    exact = np.array([1.2 + 30 * n**-0.35 + 60 * d**-0.4 for n, d in GRID])
    return (exact + deviation * np.random.default_rng(seed).standard_normal(len(GRID))).tolist()


def test_exact_losses_give_floor_and_exponents() -> None:
    law = fit_loss_law(N, D, losses())
    assert law.floor.value == pytest.approx(1.2, abs=0.005)
    assert law.size_exponent.value == pytest.approx(0.35, abs=0.002)
    assert law.tokens_exponent.value == pytest.approx(0.4, abs=0.002)
    # The compute-optimal size is N ~ C^(b/(a+b)) (arXiv 2203.15556, equation 4).
    assert law.allocation.value == pytest.approx(0.4 / 0.75, abs=0.002)
    exact = 1.2 + 30 * 4e6**-0.35 + 60 * 8e6**-0.4
    assert law.predict(4e6, 8e6).value == pytest.approx(exact, abs=0.003)
    assert law.r_squared > 0.999999


def test_a_loss_that_levels_off_at_nothing_has_no_floor_below_zero() -> None:
    law = fit_loss_law(N, D, [8 * n**-0.1 + 9 * d**-0.15 - 0.3 for n, d in GRID])
    assert law.coefficients[0] >= 0
    assert law.coefficients[1] > 0
    assert law.coefficients[3] > 0


@pytest.mark.slow
def test_intervals_of_the_loss_hold_the_truth_about_as_often_as_they_say() -> None:
    exact = 1.2 + 30 * 9e5**-0.35 + 60 * 2e6**-0.4
    hits = np.zeros(3)
    repeats = 60
    for seed in range(repeats):
        law = fit_loss_law(N, D, losses(0.004, seed))
        new = exact + 0.004 * np.random.default_rng(1000 + seed).standard_normal()
        hits += [
            holds(law.size_exponent, 0.35),
            holds(law.tokens_exponent, 0.4),
            holds(law.predict(9e5, 2e6), new),
        ]
    # A law that is no straight line has intervals by repetition, right up to the size of the sample.
    assert (hits / repeats > 0.85).all(), hits / repeats


@pytest.mark.parametrize(
    ("parameters", "tokens", "loss", "said"),
    [
        (N[:6], D[:6], losses()[:6], "2 sizes: a term"),
        ([1.0, 2.0, 3.0] * 2, [1.0, 1.0, 2.0] * 2, [1.0] * 6, "2 numbers of tokens"),
        ([1.0, 2.0, 3.0, 1.0, 2.0], [1.0, 2.0, 3.0, 2.0, 3.0], [1.0] * 5, "5 points for 5 coefficients"),
        (N, D, [2.0 + 60 * d**-0.4 for d in D], "do not tell how they fall with size"),
        (N, D, [2.0 + 30 * n**-0.3 + 1e-9 * d for n, d in GRID], "do not tell how they fall with tokens"),
    ],
)
def test_losses_that_tell_no_law_are_refused(
    parameters: list[float], tokens: list[float], loss: list[float], said: str
) -> None:
    with pytest.raises(NoFit, match=said):
        fit_loss_law(parameters, tokens, loss)
