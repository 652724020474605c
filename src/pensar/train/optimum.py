"""The optimum of a grid: learning rate and batch at the bottom of a quadratic, or the end of the grid that it is at.

Near its minimum the loss is close to a quadratic in the logarithms of learning rate and batch (it is convex in both:
arXiv 2503.04715, section 3), and small steps of a large batch do as well as half the steps of half of it, so that the
bottom is a long valley. Three things make what noisy runs tell of it steady: runs far from the best do not count, all
sizes and numbers of tokens share one curvature, and each has a place and a height of its own.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pensar.base.errors import ConfigError
from pensar.base.files import seed_of
from pensar.train.powerlaw import LEVEL, Interval, NoFit

Floats = npt.NDArray[np.float64]
Edge = Literal["", "low", "high"]
Box = tuple[tuple[float, float], tuple[float, float]]
STRAIGHT, CURVED = (0, 1, 3), (2, 4, 5)
"""Places among the features of what each cell has of its own, and of what all share."""
NEAR = 0.05
"""How far above a cell's best loss, as a share of it, runs count: further up the loss is no quadratic."""
BLOCK = 3
"""So many learning rates and batches around the best run count wherever their losses are."""
NUM_DRAWS = 400
"""Repetitions of a fit for its interval."""


class Point(msgspec.Struct, frozen=True):
    """A run: its loss is None where it diverged."""

    rate: float
    batch: float
    loss: float | None


class Optimum(msgspec.Struct, frozen=True, kw_only=True):
    """Where the quadratic of a cell is lowest within its grid."""

    rate: Interval
    batch: Interval
    loss: float
    """Of the quadratic there."""
    rate_edge: Edge = ""
    """The end of the grid that the rate stands at, where the losses still fall towards it: a bound, no optimum."""
    batch_edge: Edge = ""
    coefficients: tuple[float, ...]
    """Of 1, x, x^2, and with several batches y, y^2, xy, where x and y are the logarithms of rate and batch."""
    scatter: float | None
    """Deviation of all cells' losses from their quadratics; None where these go through all of them."""
    num_points: int
    """Runs of the cell that count."""
    window: tuple[float, float]
    """Least and largest rate of the runs that count."""

    def loss_at(self, rate: float, batch: float) -> float:
        """The quadratic's value."""
        features = _features(
            np.array([math.log(rate)]), np.array([math.log(batch)]), len(self.coefficients) > 3
        )
        return float(features[0] @ np.array(self.coefficients))


def optimum(points: Sequence[Point]) -> Optimum:
    """The best learning rate and batch of one cell alone; NoFit where its runs do not say."""
    (found,) = optima([points])
    if isinstance(found, str):
        raise NoFit(found)
    return found


def optima(cells: Sequence[Sequence[Point]]) -> list[Optimum | str]:
    """The best learning rate and batch of each cell, one size with one number of tokens; or why it has none.

    One linear fit of all runs that count: 1, x and y for each cell, x^2, y^2 and xy for all of them.
    """
    both = len({point.batch for points in cells for point in points}) > 1
    near = [_near(points) for points in cells]
    found: list[Optimum | str] = [
        _lack(points, chosen, both) for points, chosen in zip(cells, near, strict=True)
    ]
    told = [place for place, why in enumerate(found) if not why]
    num_shared, own = (3, 3) if both else (1, 2)
    blocks, losses = [], []
    for number, place in enumerate(told):
        x, y = _logarithms(near[place])
        features = _features(x, y, both)
        block = np.zeros((len(x), num_shared + own * len(told)))
        block[:, :num_shared] = features[:, CURVED[:num_shared]]
        block[:, num_shared + own * number : num_shared + own * (number + 1)] = features[:, STRAIGHT[:own]]
        blocks.append(block)
        losses.append(np.array([point.loss for point in near[place]], float))
    if not told:
        return found
    X, target = np.concatenate(blocks), np.concatenate(losses)
    if np.linalg.matrix_rank(X) < X.shape[1]:
        why = f"{len(X)} runs near the best do not tell {X.shape[1]} coefficients of their quadratic; fill the grid"
        return [why if place in told else other for place, other in enumerate(found)]
    inverse = np.asarray(np.linalg.inv(X.T @ X), np.float64)
    best = inverse @ X.T @ target
    freedom = X.shape[0] - X.shape[1]
    scatter = math.sqrt(float(((target - X @ best) ** 2).sum()) / freedom) if freedom else None
    for number, place in enumerate(told):
        straight = [num_shared + own * number + n for n in range(own)]
        columns = [straight[0], straight[1], 0, *([straight[2], 1, 2] if both else [])]
        fit = _Fit(best[columns], inverse[np.ix_(columns, columns)], scatter, freedom)
        found[place] = _lowest_of(fit, cells[place], near[place], both)
    return found


def check_axis(name: str, values: Sequence[float], least: tuple[int, ...]) -> None:
    """ConfigError for values that make no axis of a grid; `least` are the smallest counts that do."""
    if sorted(set(values)) != list(values) or min(values, default=0) <= 0:
        raise ConfigError(f"{name} is {list(values)}: give positive values, each once, the least first")
    if len(values) < max(least) and len(values) not in least:
        known = " or ".join(str(count) for count in least)
        raise ConfigError(f"{name} has {len(values)} values; the fit takes {known} or more")


class _Fit(NamedTuple):
    """The quadratic of one cell: coefficients in the order of `_features`, their (X'X)^-1, and the scatter of all."""

    coefficients: Floats
    inverse: Floats
    scatter: float | None
    freedom: int


def _near(points: Sequence[Point]) -> list[Point]:
    """The runs that count, in their order."""
    finite = [(point.loss, point) for point in points if point.loss is not None]
    if not finite:
        return []
    least, best = min(finite, key=lambda pair: (pair[0], pair[1].rate, pair[1].batch))
    rates = _around([point.rate for _, point in finite], best.rate)
    batches = _around([point.batch for _, point in finite], best.batch)
    return [
        point
        for loss, point in finite
        if loss <= least * (1 + NEAR) or (point.rate in rates and point.batch in batches)
    ]


def _around(values: Sequence[float], middle: float) -> set[float]:
    """The value and its neighbours, `BLOCK` of them if there are so many."""
    ordered = sorted(set(values))
    start = max(0, min(ordered.index(middle) - BLOCK // 2, len(ordered) - BLOCK))
    return set(ordered[start : start + BLOCK])


def _lack(points: Sequence[Point], near: Sequence[Point], both: bool) -> str:
    """What a cell's runs near its best do not tell; empty where they do."""
    if not near:
        return f"all of {len(points)} runs diverged; lower the learning rates"
    x, y = _logarithms(near)
    plane = np.column_stack([np.ones_like(x), x, *([y] if both else [])])
    if len(near) <= plane.shape[1] - 1 or np.linalg.matrix_rank(plane) < plane.shape[1]:
        axes = "learning rates and batches" if both else "learning rates"
        return (
            f"{len(near)} of {len(points)} runs end near the best loss, and they do not differ in {axes}; "
            "take finer steps around the best"
        )
    return ""


def _logarithms(points: Sequence[Point]) -> tuple[Floats, Floats]:
    return np.log([point.rate for point in points]), np.log([point.batch for point in points])


def _lowest_of(fit: _Fit, points: Sequence[Point], near: Sequence[Point], both: bool) -> Optimum:
    """The bottom within the cell's grid."""
    x, y = _logarithms([point for point in points if point.loss is not None])
    box = ((float(x.min()), float(x.max())), (float(y.min()), float(y.max())))
    place = _lowest(fit.coefficients, box)
    rate, batch = _intervals(place, fit, box)
    at = _features(np.array(place[:1]), np.array(place[1:]), both)
    rates = [point.rate for point in near]
    return Optimum(
        rate=rate,
        batch=batch,
        loss=float(at[0] @ fit.coefficients),
        rate_edge=_edge(place[0], box[0]),
        batch_edge=_edge(place[1], box[1]) if both else "",
        coefficients=tuple(fit.coefficients.tolist()),
        scatter=fit.scatter,
        num_points=len(near),
        window=(min(rates), max(rates)),
    )


def _features(x: Floats, y: Floats, both: bool) -> Floats:
    columns = [np.ones_like(x), x, x * x]
    if both:
        columns += [y, y * y, x * y]
    return np.column_stack(columns)


def _lowest(c: Floats, box: Box) -> tuple[float, float]:
    """Where a quadratic is least within a box: inside, on a side, or in a corner."""
    c = np.concatenate([c, np.zeros(6 - len(c))])
    (left, right), (bottom, top) = box
    places = list(itertools.product((left, right), (bottom, top)))
    for y in (bottom, top):
        places.append((_vertex(c[1] + c[5] * y, c[2], left, right), y))
    for x in (left, right):
        places.append((x, _vertex(c[3] + c[5] * x, c[4], bottom, top)))
    determinant = 4 * c[2] * c[4] - c[5] ** 2
    if determinant > 0:
        x = (c[5] * c[3] - 2 * c[4] * c[1]) / determinant
        y = (c[5] * c[1] - 2 * c[2] * c[3]) / determinant
        if left <= x <= right and bottom <= y <= top:
            places.append((x, y))
    return min(places, key=lambda at: float(_features(np.array(at[:1]), np.array(at[1:]), True)[0] @ c))


def _vertex(slope: float, curvature: float, low: float, high: float) -> float:
    if curvature <= 0:
        return low
    return min(max(-slope / (2 * curvature), low), high)


def _edge(place: float, ends: tuple[float, float]) -> Edge:
    margin = 1e-9 * max(1.0, ends[1] - ends[0])
    if place <= ends[0] + margin:
        return "low"
    return "high" if place >= ends[1] - margin else ""


def _intervals(place: tuple[float, float], fit: _Fit, box: Box) -> tuple[Interval, Interval]:
    """Percentiles of the places of quadratics as they may be: the coefficients' distribution of a linear fit."""
    if fit.scatter is None:
        return Interval(math.exp(place[0])), Interval(math.exp(place[1]))
    rng = np.random.default_rng(seed_of("optimum"))
    # In units of their own errors, since those of a learning rate's logarithm and its square go together.
    errors = np.sqrt(np.diag(fit.inverse))
    values, vectors = np.linalg.eigh(fit.inverse / np.outer(errors, errors))
    root = errors[:, None] * vectors * np.sqrt(np.clip(values, 0, None))
    deviations = fit.scatter * np.sqrt(fit.freedom / rng.chisquare(fit.freedom, NUM_DRAWS))
    changes = deviations[:, None] * (rng.standard_normal((NUM_DRAWS, len(errors))) @ root.T)
    places = np.array([_lowest(fit.coefficients + change, box) for change in changes])
    low, high = np.exp(np.quantile(places, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0))
    rate, batch = (math.exp(value) for value in place)
    return Interval(rate, float(low[0]), float(high[0])), Interval(batch, float(low[1]), float(high[1]))
