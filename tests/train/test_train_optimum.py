"""The optimum of a grid: quadratics by hand, with noise, at the end of a grid, and where too little is left."""

import math

import numpy as np
import pytest

from pensar.base.errors import ConfigError
from pensar.train.optimum import Point, check_axis, optima, optimum
from pensar.train.powerlaw import NoFit

RATES = (0.005, 0.01, 0.02, 0.04, 0.08)
BATCHES = (64, 128, 256, 512)


def bowl(rate: float, batch: float, best: tuple[float, float] = (0.017, 190.0)) -> float:
    """A loss whose optimum is known; its axes lean, since larger batches bear larger rates."""
    x, y = math.log(rate / best[0]), math.log(batch / best[1])
    return 2.5 + 0.05 * x * x + 0.03 * y * y - 0.02 * x * y


def grid(loss: object = bowl, rates: tuple[float, ...] = RATES, **more: object) -> list[Point]:
    return [Point(rate, batch, loss(rate, batch, **more)) for rate in rates for batch in BATCHES]  # type: ignore[operator]


def test_the_bottom_of_a_bowl_is_found_exactly() -> None:
    best = optimum(grid())
    assert (best.rate.value, best.batch.value) == pytest.approx((0.017, 190.0))
    assert best.loss == pytest.approx(2.5)
    assert (best.rate_edge, best.batch_edge) == ("", "")
    assert best.scatter == pytest.approx(0, abs=1e-9)
    assert best.loss_at(0.05, 100.0) == pytest.approx(bowl(0.05, 100.0))


def test_three_rates_and_one_batch_by_hand() -> None:
    """(x - 1)^2 through x = 0, 1, 3 in steps of ln 2 has its vertex where the second rate stands."""
    points = [Point(0.01 * 2**x, 64, (x - 1) ** 2 + 1) for x in (0, 1, 3)]
    best = optimum(points)
    assert best.rate.value == pytest.approx(0.02)
    assert best.rate.low is None
    assert best.scatter is None
    assert (best.loss, best.batch.value, best.batch_edge) == (pytest.approx(1.0), pytest.approx(64.0), "")


def test_only_runs_near_the_best_count() -> None:
    far = [Point(0.08 * 2**n, batch, 9.0) for n in (1, 2, 3) for batch in BATCHES]
    best = optimum([*grid(), *far])
    assert best.window[1] <= 0.08
    assert best.rate.value == pytest.approx(0.017)


def test_cells_share_a_curvature_that_none_of_them_could_tell_alone() -> None:
    """Three runs of each of eight cells, at vertices of their own: 24 losses, 8 heights, 16 slopes less would do."""
    rng = np.random.default_rng(2)
    places = [(0.01 * 1.2**n, 90.0 * 1.15**n) for n in range(8)]
    cells = []
    for n, place in enumerate(places):
        chosen = [
            (RATES[i], BATCHES[j]) for i, j in zip(rng.permutation(5)[:4], rng.permutation(4), strict=True)
        ]
        cells.append([Point(x, y, 0.1 * n + bowl(x, y, place)) for x, y in chosen])
    for cell in cells:
        with pytest.raises(NoFit, match="do not tell 6 coefficients"):
            optimum(cell)
    for number, (place, found) in enumerate(zip(places, optima(cells), strict=True)):
        assert not isinstance(found, str)
        assert found.coefficients[2::2] == pytest.approx((0.05, 0.03))
        assert found.loss == pytest.approx(2.5 + 0.1 * number)
        assert (found.rate.value, found.batch.value) == pytest.approx(place)


def test_a_cell_without_runs_leaves_the_others_theirs() -> None:
    first, none, last = optima([grid(), [Point(0.01, 64, None)], grid(best=(0.02, 150.0))])
    assert none == "all of 1 runs diverged; lower the learning rates"
    assert not isinstance(first, str)
    assert not isinstance(last, str)
    assert (first.rate.value, last.rate.value) == pytest.approx((0.017, 0.02))


@pytest.mark.parametrize(
    ("at", "edges", "value"),
    [
        ((0.5, 190.0), ("high", ""), 0.08),
        ((0.001, 190.0), ("low", ""), 0.005),
        ((0.017, 3000.0), ("", "high"), 512.0),
        ((0.017, 8.0), ("", "low"), 64.0),
    ],
)
def test_an_optimum_beyond_the_grid_stands_at_its_end_and_says_so(
    at: tuple[float, float], edges: tuple[str, str], value: float
) -> None:
    best = optimum(grid(best=at))
    assert (best.rate_edge, best.batch_edge) == edges
    assert (best.rate if edges[0] else best.batch).value == pytest.approx(value)


def test_the_interval_holds_the_optimum_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits, repeats = 0, 60
    for _ in range(repeats):
        noisy = [Point(p.rate, p.batch, (p.loss or 0) + 0.005 * rng.standard_normal()) for p in grid()]
        found = optimum(noisy).rate
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.017 <= found.high
    assert hits / repeats >= 0.85


def test_runs_that_diverged_leave_the_rest_to_tell() -> None:
    points = [Point(p.rate, p.batch, None if p.rate == 0.08 else p.loss) for p in grid()]
    assert optimum(points).rate.value == pytest.approx(0.017)
    with pytest.raises(NoFit, match="8 runs near the best do not tell 6 coefficients"):
        optimum([Point(p.rate, p.batch, p.loss if p.rate < 0.02 else None) for p in points])
    with pytest.raises(NoFit, match="all of 20 runs diverged"):
        optimum([Point(p.rate, p.batch, None) for p in points])


def test_a_grid_with_holes_is_refused() -> None:
    points = [Point(rate, batch, 2.0) for rate, batch in zip((0.01, 0.02, 0.04), (64, 128, 256), strict=True)]
    with pytest.raises(NoFit, match="3 of 3 runs end near the best loss, and they do not differ"):
        optimum(points)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0.02, 0.01, 0.04), "each once, the least first"),
        ((0.0, 0.01, 0.04), "positive values"),
        ((0.01, 0.02), "has 2 values; the fit takes 1 or 3 or more"),
        ((), "positive values"),
    ],
)
def test_an_axis_is_rising_and_long_enough(values: tuple[float, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_axis("learning_rates", values, (1, 3))
