"""The statistics that calibration and evaluation rest on: exact, in plain Python. Knows counts, no prompts.

Binomial tails are sums of exact terms (logarithms of the gamma function), so that no approximation stands between a
count and a promise.
"""

from __future__ import annotations

from math import ceil, exp, expm1, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Interval", "binomial_cdf", "least_prompts", "mcnemar", "paired_difference", "smallest_alpha", "wilson"]

_Z95 = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X ≤ k) of n draws that each succeed with probability p."""
    if k >= n or p <= 0:
        return 1.0
    if k < 0 or p >= 1:
        return 0.0
    yes, no = log(p), log1p(-p)
    terms = (lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) + i * yes + (n - i) * no for i in range(k + 1))
    return min(1.0, sum(map(exp, terms)))


def least_prompts(alpha: float, delta: float) -> int:
    """Fewest calibration prompts that can certify α at δ at all: those of which not one may be lost."""
    return ceil(log(delta) / log1p(-alpha) - 1e-9)


def smallest_alpha(n: int, delta: float) -> float:
    """The smallest α that n prompts can certify at δ, reached where none is lost."""
    return -expm1(log(delta) / n)


def wilson(k: int, n: int) -> Interval:
    """A share k of n, with Wilson's 95 % interval.

    Raises:
        ValueError: n is 0.
    """
    if n < 1:
        raise ValueError("a share of nothing has no interval; n must be at least 1.")
    share, z2 = k / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Mean of first − second over the same prompts, with its 95 % interval (normal, from the paired differences).

    Where all pairs are equal the interval does not collapse to a point: its half is what n prompts leave open, 3 / n.
    """
    differences = [int(a) - int(b) for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return Interval(mean, -1.0, 1.0)
    variance = sum((value - mean) ** 2 for value in differences) / (n - 1)
    half = _Z95 * sqrt(variance / n) if variance else min(1.0, 3 / n)
    return Interval(mean, mean - half, mean + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p-value that one of two systems is right more often, over the same prompts."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    split = only_first + only_second
    return min(1.0, 2 * binomial_cdf(min(only_first, only_second), split, 0.5)) if split else 1.0
