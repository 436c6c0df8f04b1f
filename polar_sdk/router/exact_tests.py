"""The exact statistics that calibration and evaluation rest on. Knows counts, no prompts.

Binomial tails are sums of exact terms (logarithms of the gamma function), and those of paired differences come from
their characteristic function, so that no approximation stands between a count and a promise.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, expm1, log, log1p, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_Z95 = NormalDist().inv_cdf(0.975)
_SHARE_OF_DELTA = 0.1
"""The share of δ that `paired_loss_p` spends on bounding how many pairs differ at all."""
_NUISANCE_POINTS = 8


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X ≤ k) for n draws that each succeed with probability p."""
    if k >= n or p <= 0:
        return 1.0
    if k < 0 or p >= 1:
        return 0.0
    successes = torch.arange(k + 1, dtype=torch.float64)
    terms = _log_ways(n)[: k + 1] + successes * log(p) + (n - successes) * log1p(-p)
    return min(1.0, float(terms.exp().sum()))


@lru_cache(maxsize=64)
def _log_ways(n: int) -> Tensor:
    """Logarithm of the number of ways to choose k of n, for k from 0 to n."""
    factorials = torch.lgamma(torch.arange(1, n + 2, dtype=torch.float64))
    return factorials[-1] - factorials - factorials.flip(0)


def least_prompts(alpha: float, delta: float) -> int:
    """Minimum number of calibration prompts that can certify α at δ, where none of them may be lost."""
    return ceil(log(delta) / log1p(-alpha) - 1e-9)


def least_paired_prompts(alpha: float, delta: float) -> int:
    """Minimum number of calibration prompts with which `paired_loss_p` can reach δ, where no pair may differ."""
    return ceil(log(_SHARE_OF_DELTA * delta) / log1p(-alpha) - 1e-9)


@lru_cache(maxsize=4096)
def paired_loss_p(lost: int, gained: int, n: int, alpha: float, delta: float) -> float:
    """P-value of "the mean loss is α or more" for n pairs, of which some are lost (+1) and some gained (−1).

    How many pairs differ at all is not known beforehand. It is bounded first, at a tenth of δ (Clopper and Pearson);
    the p-value is the largest exact probability of a sum as small as this one within that bound, plus that tenth
    (Berger and Boos, 1994). So at level δ it is valid for any n, without a normal approximation.

    Args:
        lost: Number of pairs that the second system loses.
        gained: Number of pairs that it wins.
        n: Number of all pairs.
        alpha: The mean loss that is to be ruled out.
        delta: The level that the p-value is compared with; it includes the share spent on the bound.
    """
    spent = _SHARE_OF_DELTA * delta
    most = upper_share(lost + gained, n, spent)
    if most < alpha:  # so few pairs differ that the mean cannot reach α
        return spent
    # The probability is smooth in the share that differs; its upper end is where it is largest in practice.
    differ = torch.linspace(alpha, most, _NUISANCE_POINTS, dtype=torch.float64)
    return min(1.0, spent + float(_sum_cdf(lost - gained, n, (differ + alpha) / 2, (differ - alpha) / 2).max()))


def upper_share(k: int, n: int, level: float) -> float:
    """The upper limit of Clopper and Pearson: the share at which k or fewer of n have probability `level`."""
    low, high = k / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(k, n, middle) > level else (low, middle)
    return high


def upper_loss(lost: int, gained: int, n: int, level: float) -> float:
    """The mean loss of n pairs that is not exceeded with probability 1 − `level`; see `paired_loss_p`.

    Where none is gained, it is the upper limit of Clopper and Pearson.
    """
    if not gained:
        return upper_share(lost, n, level)
    low, high = max(0.0, (lost - gained) / n), upper_share(lost, n, level)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if paired_loss_p(lost, gained, n, middle, level) > level else (low, middle)
    return high


def _power(base: Tensor, exponent: int) -> Tensor:
    """Complex numbers to a natural power by repeated squaring, which takes a tenth of the time of torch's."""
    total = torch.ones_like(base)
    while exponent:
        total = total * base if exponent & 1 else total
        base, exponent = base * base, exponent >> 1
    return total


def _sum_cdf(total: int, n: int, up: Tensor, down: Tensor) -> Tensor:
    """P(sum ≤ total) for n draws of +1, −1 or 0, with probabilities (K,) of +1 and −1; returns (K,).

    Exact up to rounding: the characteristic function is inverted at 2^m points, more than there are possible sums.
    """
    size = 1 << (2 * n + 1).bit_length()
    angle = 2 * torch.pi * torch.arange(size // 2 + 1, dtype=torch.float64) / size  # the others are their conjugates
    turn = torch.complex(torch.cos(angle), -torch.sin(angle))
    up, down = up[:, None], down[:, None]
    chances = torch.fft.irfft(_power(up * turn + down * turn.conj() + (1 - up - down), n), size)
    # Index s holds the probability of the sum s; negative sums count from the end.
    tail = torch.cat((chances[:, -n:], chances[:, : n + 1]), 1)[:, : total + n + 1]
    return tail.sum(1).clamp(0, 1)


def smallest_alpha(n: int, delta: float) -> float:
    """The smallest α that n prompts can certify at δ; it takes that none is lost."""
    return -expm1(log(delta) / n)


def wilson(k: int, n: int) -> Interval:
    """The share k of n, with Wilson's 95 % interval.

    Raises:
        ValueError: n is 0.
    """
    if n < 1:
        raise ValueError("n is 0; an interval needs n of at least 1.")
    share, z2 = k / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Mean of first − second over the same prompts; see `mean_difference`."""
    return mean_difference(list(map(float, first)), list(map(float, second)))


def mean_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of first − second, from 0 to 1 each, with its 95 % interval (normal, from the paired differences).

    Where all pairs are equal the interval does not collapse to a point: its half-width is what n prompts leave open,
    3 / n.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return Interval(mean, -1.0, 1.0)
    variance = sum((value - mean) ** 2 for value in differences) / (n - 1)
    half = _Z95 * sqrt(variance / n) if variance else min(1.0, 3 / n)
    return Interval(mean, mean - half, mean + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p-value of "both systems are right equally often", over the same prompts."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    split = only_first + only_second
    return min(1.0, 2 * binomial_cdf(min(only_first, only_second), split, 0.5)) if split else 1.0
