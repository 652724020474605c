"""Estimates with their 95% intervals, in closed form: shares (Wilson), means (normal), pass@k (Chen et al., 2021)."""

import math

import msgspec

Z = 1.959964
"""The normal distribution holds 95% within so many standard deviations."""


class Estimate(msgspec.Struct, frozen=True):
    """A share or a mean with its 95% interval and the number of trials."""

    score: float
    low: float
    high: float
    n: int


def share(successes: float, n: int) -> Estimate:
    """Wilson's score interval (1927) at 95%: holds for few trials and for shares near zero and one.

    Without trials the share may be anything: 0 to 1.
    """
    if n == 0:
        return Estimate(0.0, 0.0, 1.0, 0)
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def pass_at(k: int, n: int, correct: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is right, from `correct` of n
    (arXiv 2107.03374, equation 1)."""
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def mean(values: list[float], *, bounded: bool = True) -> Estimate:
    """Mean of per-problem values with its normal 95% interval, cut to 0..1 where the values are shares."""
    n = len(values)
    if n == 0:
        return Estimate(0.0, 0.0, 1.0, 0)
    average = sum(values) / n
    variance = sum((value - average) ** 2 for value in values) / max(n - 1, 1)
    half = Z * math.sqrt(variance / n)
    if not bounded:
        return Estimate(average, average - half, average + half, n)
    return Estimate(average, max(0.0, average - half), min(1.0, average + half), n)
