"""Power laws fitted with intervals, on NumPy alone: straight lines in logarithms, and a loss that levels off."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pensar.base.errors import ConfigError, RunError
from pensar.base.files import seed_of

Floats = npt.NDArray[np.float64]
LEVEL = 0.95
"""Of every interval."""
NUM_DRAWS = 300
"""Repetitions of a fit whose interval has no formula."""
EXPONENTS = (0.02, 2.0)
"""Exponents of the loss are looked for between these."""
ZOOMS = 8


class NoFit(RunError):
    """Points that do not tell what was asked of them; the message says what would."""


class Interval(msgspec.Struct, frozen=True):
    """An estimate and its 95% interval; without limits where too few points are left to tell."""

    value: float
    low: float | None = None
    high: float | None = None


class PowerLaw(msgspec.Struct, frozen=True, kw_only=True):
    """y = exp(c_0) prod_i x_i^c_i, by least squares of ln y (the form of DeepSeek LLM, arXiv 2401.02954, section 3.1).

    Intervals are those of normal linear regression: c +- t s sqrt(diagonal of (X'X)^-1), and for a new y at x
    s sqrt(1 + x'(X'X)^-1 x), with t of n - k degrees of freedom. The scatter s is that of the points around the law,
    so both their noise and what the law misses are in it.
    """

    variables: tuple[str, ...]
    coefficients: tuple[float, ...]
    """ln of the factor, then the exponents."""
    inverse: tuple[tuple[float, ...], ...]
    """(X'X)^-1."""
    scatter: float
    """s: deviation of ln y from the law, on n - k degrees of freedom."""
    freedom: int
    r_squared: float
    num_points: int
    ranges: dict[str, tuple[float, float]]
    """Variable -> least and largest value of the points."""

    @property
    def factor(self) -> Interval:
        """y where all x are 1."""
        return _exponential(self._coefficient(0))

    def exponent(self, variable: str) -> Interval:
        """How y goes with one variable."""
        return self._coefficient(1 + self.variables.index(variable))

    def predict(self, values: Mapping[str, float], *, scattered: bool = True) -> Interval:
        """y at new values, with the interval of one more point, or of the law alone if not `scattered`."""
        row = np.array([1.0, *(math.log(values[name]) for name in self.variables)])
        middle = float(row @ np.array(self.coefficients))
        spread = float(row @ np.array(self.inverse) @ row) + float(scattered)
        half = student(self.freedom) * self.scatter * math.sqrt(spread)
        return _exponential(Interval(middle, middle - half, middle + half))

    def beyond(self, values: Mapping[str, float]) -> float:
        """The largest factor by which a value lies outside the range of the points; 1 inside all of them."""
        outside = [1.0]
        for name in self.variables:
            low, high = self.ranges[name]
            outside += [low / values[name], values[name] / high]
        return max(outside)

    def _coefficient(self, place: int) -> Interval:
        value = self.coefficients[place]
        half = student(self.freedom) * self.scatter * math.sqrt(self.inverse[place][place])
        return Interval(value, value - half, value + half)


def fit_power_law(columns: Mapping[str, Sequence[float]], y: Sequence[float]) -> PowerLaw:
    """The law through points; raises NoFit where they are too few, or do not tell the variables apart."""
    names = tuple(columns)
    observed = np.array(y, float)
    table = np.array([columns[name] for name in names], float).reshape(len(names), -1)
    if not np.isfinite(observed).all() or not (observed > 0).all() or not (table > 0).all():
        raise ConfigError(
            "a power law is of positive numbers; leave out points that are zero, negative or not finite"
        )
    count, needed = len(observed), len(names) + 2
    if count < needed:
        raise NoFit(
            f"{count} points for {len(names) + 1} coefficients: at least {needed} leave something to judge the fit by"
        )
    for name, column in zip(names, table, strict=True):
        if len(set(column.tolist())) < 2:
            raise NoFit(f"all points have {name} {column[0]:g}: take a second value to learn an exponent")
    X = np.column_stack([np.ones(count), np.log(table).T])
    if np.linalg.matrix_rank(X) < X.shape[1]:
        raise NoFit(
            f"{' and '.join(names)} go together in all points, so that their exponents cannot be told apart"
        )
    inverse = np.linalg.inv(X.T @ X)
    target = np.log(observed)
    coefficients = inverse @ X.T @ target
    rest = float(((target - X @ coefficients) ** 2).sum())
    total = float(((target - target.mean()) ** 2).sum())
    freedom = count - X.shape[1]
    return PowerLaw(
        variables=names,
        coefficients=tuple(coefficients.tolist()),
        inverse=tuple(tuple(row) for row in inverse.tolist()),
        scatter=math.sqrt(rest / freedom),
        freedom=freedom,
        r_squared=1 - rest / total if total > 0 else 1.0,
        num_points=count,
        ranges={
            name: (float(column.min()), float(column.max()))
            for name, column in zip(names, table, strict=True)
        },
    )


class LossLaw(msgspec.Struct, frozen=True, kw_only=True):
    """L(N, D) = E + A N^-a + B D^-b (Hoffmann et al., arXiv 2203.15556, section 3.3), by least squares of L.

    E, A and B are not negative; for given a and b they follow from a linear fit, so that only a and b are searched for.
    Intervals are percentiles of fits to L + s' e, with e normal and s'^2 = s^2 v / chi^2(v), v = n - 5: what makes
    Student's intervals of a linear fit.
    """

    coefficients: tuple[float, float, float, float, float]
    """E, A, a, B, b."""
    draws: list[tuple[float, float, float, float, float, float]]
    """The same of repeated fits, and each one's draw of a new point's deviation."""
    scatter: float
    freedom: int
    r_squared: float
    num_points: int
    ranges: dict[str, tuple[float, float]]

    @property
    def floor(self) -> Interval:
        """E: what no size and no amount of tokens gets below."""
        return self._of(lambda row: row[0])

    @property
    def size_exponent(self) -> Interval:
        """a."""
        return self._of(lambda row: row[2])

    @property
    def tokens_exponent(self) -> Interval:
        """b."""
        return self._of(lambda row: row[4])

    @property
    def allocation(self) -> Interval:
        """N ~ C^(b / (a + b)) makes the least loss of the compute C ~ N D."""
        return self._of(lambda row: row[4] / (row[2] + row[4]))

    def predict(self, parameters: float, tokens: float) -> Interval:
        """The loss of a new run at its best learning rate and batch."""

        def at(row: Sequence[float]) -> float:
            return float(row[0] + row[1] * parameters ** -row[2] + row[3] * tokens ** -row[4])

        ends = np.quantile([at(row) + row[5] for row in self.draws], _tails())
        return Interval(at(self.coefficients), float(ends[0]), float(ends[1]))

    def _of(self, value: Any) -> Interval:
        ends = np.quantile([value(row) for row in self.draws], _tails())
        return Interval(value(self.coefficients), float(ends[0]), float(ends[1]))


def fit_loss_law(parameters: Sequence[float], tokens: Sequence[float], loss: Sequence[float]) -> LossLaw:
    """The law through losses of runs at their best; raises NoFit where the points do not tell it."""
    n, d, observed = (np.array(values, float) for values in (parameters, tokens, loss))
    for name, values in (("sizes", n), ("numbers of tokens", d)):
        if len(set(values.tolist())) < 3:
            raise NoFit(
                f"{len(set(values.tolist()))} {name}: a term of the loss that levels off takes 3 or more"
            )
    if len(observed) < 6:
        raise NoFit(
            f"{len(observed)} points for 5 coefficients: at least 6 leave something to judge the fit by"
        )
    # Around 1, so that factors and exponents do not depend on each other more than they must.
    reference = math.exp(np.log(n).mean()), math.exp(np.log(d).mean())
    here = n / reference[0], d / reference[1]
    best = _nearest(here, observed[None])[0]
    fitted = _loss(best[None], here)[0]
    freedom = len(observed) - 5
    scatter = math.sqrt(float(((observed - fitted) ** 2).sum()) / freedom)
    for name, column, factor, exponent in (("size", here[0], *best[1:3]), ("tokens", here[1], *best[3:])):
        fall = factor * (column.min() ** -exponent - column.max() ** -exponent)
        inside = EXPONENTS[0] * 1.01 < exponent < EXPONENTS[1] * 0.99
        if not inside or fall <= 2 * scatter or fall <= 1e-9 * observed.mean():
            raise NoFit(
                f"the losses do not tell how they fall with {name}: by {fall:.3g} over its whole range with exponent "
                f"{exponent:.2f}, and they scatter by {scatter:.3g}; widen the range of {name}"
            )
    rng = np.random.default_rng(seed_of("loss law"))
    deviations = scatter * np.sqrt(freedom / rng.chisquare(freedom, NUM_DRAWS))
    noise = deviations[:, None] * rng.standard_normal((NUM_DRAWS, len(observed) + 1))
    repeated = np.column_stack([_nearest(here, fitted + noise[:, :-1]), noise[:, -1]])
    return LossLaw(
        coefficients=_moved(best, reference),
        draws=[(*_moved(row[:5], reference), float(row[5])) for row in repeated],
        scatter=scatter,
        freedom=freedom,
        r_squared=1 - scatter**2 * freedom / float(((observed - observed.mean()) ** 2).sum()),
        num_points=len(observed),
        ranges={"parameters": (float(n.min()), float(n.max())), "tokens": (float(d.min()), float(d.max()))},
    )


def student(freedom: int, level: float = LEVEL) -> float:
    """t with P(|T| <= t) = level, by bisection on the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle))."""
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * power / (power + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _nearest(here: tuple[Floats, Floats], observed: Floats) -> Floats:
    """For each row of losses [R, P] the best E, A, a, B, b [R, 5], by ever finer grids of a and b."""
    rows = len(observed)
    low, high = (math.log(limit) for limit in EXPONENTS)
    centre = np.full((rows, 2), (low + high) / 2)
    reach, num = (high - low) / 2, 17
    best = np.zeros((rows, 5))
    for _ in range(ZOOMS):
        steps = np.linspace(-reach, reach, num)
        grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(1, -1, 2)
        exponents = np.exp(np.clip(centre[:, None] + grid, low, high))
        rest, factors = _linear(here, observed, exponents)
        chosen = rest.argmin(1)
        every = np.arange(rows)
        picked = exponents[every, chosen]
        e, a, b = factors[every, chosen].T
        best = np.column_stack([e, a, picked[:, 0], b, picked[:, 1]])
        centre = np.log(picked)
        # Two steps of the last grid to either side, on half as many points.
        reach, num = 2 * (2 * reach / (num - 1)), 9
    return best


def _linear(here: tuple[Floats, Floats], observed: Floats, exponents: Floats) -> tuple[Floats, Floats]:
    """Squares [R, M] and factors E, A, B [R, M, 3], none negative, for each row and each pair of exponents [R, M, 2].

    The best of the fits with E free and with E = 0 whose factors are not negative is the constrained best.
    """
    n, d = here
    u, v = n ** -exponents[..., :1], d ** -exponents[..., 1:]
    y = observed[:, None]
    found: list[tuple[Floats, Floats]] = []
    for with_floor in (True, False):
        # Least squares with a constant are those of the deviations from the means.
        p, q, r = (w - w.mean(-1, keepdims=True) if with_floor else w for w in (u, v, y))
        pp, qq, pq, pr, qr = (
            (one * other).sum(-1) for one, other in ((p, p), (q, q), (p, q), (p, r), (q, r))
        )
        determinant = pp * qq - pq * pq
        safe = np.where(determinant > 0, determinant, 1.0)
        a, b = (qq * pr - pq * qr) / safe, (pp * qr - pq * pr) / safe
        e = y.mean(-1) - a * u.mean(-1) - b * v.mean(-1) if with_floor else np.zeros_like(a)
        rest = ((r - a[..., None] * p - b[..., None] * q) ** 2).sum(-1)
        allowed = (determinant > 0) & (a >= 0) & (b >= 0) & (e >= 0)
        found.append((np.where(allowed, rest, np.inf), np.stack([e, a, b], -1)))
    (one, first), (two, second) = found
    return np.minimum(one, two), np.where((one <= two)[..., None], first, second)


def _loss(rows: Floats, here: tuple[Floats, Floats]) -> Floats:
    e, a, alpha, b, beta = (rows[:, place, None] for place in range(5))
    return np.asarray(e + a * here[0] ** -alpha + b * here[1] ** -beta)


def _moved(row: Floats, reference: tuple[float, float]) -> tuple[float, float, float, float, float]:
    """Factors for N and D themselves of those for N and D over their references."""
    e, a, alpha, b, beta = row.tolist()
    return e, a * reference[0] ** alpha, alpha, b * reference[1] ** beta, beta


def _exponential(of: Interval) -> Interval:
    assert of.low is not None
    assert of.high is not None
    return Interval(_exp(of.value), _exp(of.low), _exp(of.high))


def _exp(value: float) -> float:
    """Finite for JSON where an interval has no bound to speak of."""
    return math.exp(min(max(value, -700.0), 700.0))


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2
