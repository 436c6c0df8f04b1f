"""The monitor of a promise: does the share of lost answers still stay within what was promised?

It reads audits in order and bets against the promise. For each audit, a bet on a larger share multiplies its stake by a
factor whose mean is at most 1 while the promise holds, so that the total stake is a supermartingale: it ever reaches
1 / δ with a probability of at most δ, at whatever times it is looked at (Ville). Stakes are divided among a few larger
shares and among all audits at which bets may begin, since a bet that runs through a long good phase has lost its stake
when the promise breaks. What is kept back for later beginnings stays in the total.

All stakes are integers that are rounded down, so that every machine computes the same state from the same audits, and
rounding never speaks against the promise. Knows no prompts, requests or times. Standard library only.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from decimal import Context, Decimal
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Monitor", "State"]

_ONE: Final = 1 << 96
"""A stake of 1."""
_LARGEST: Final = _ONE << 96
"""No stake grows beyond this: it is decided long before."""
_ODDS: Final = (3, 4, 6, 12, 32)
"""Bets, as the odds of a lost answer over those that are promised, in halves."""
_WEIGHT: Final = 1 << 16
"""A weight of 1."""
_MOST_EXACT: Final = 10**9
_TILTS: Final = tuple(Decimal(sign) * Decimal(2) ** power for power in range(2, -7, -1) for sign in (1, -1))
"""Exponents of the bets that the interval rests on."""
_STEPS: Final = 10_000
"""The interval's ends are multiples of one over this, rounded outward."""
_DIGITS: Final = Context(prec=24)


class State(StrEnum):
    """Whether a promise is served."""

    IN_FORCE = "in force"
    AT_RISK = "at risk"


@dataclass(frozen=True, slots=True)
class Monitor:
    """The audits of one promise so far, and what follows from them; a value that `observe` makes a new one of.

    Attributes:
        alpha: Largest share of lost answers that is promised.
        delta: Largest probability of ever being at risk while the promise holds.
        audits: Number of audits.
        losses: Number of those whose answer was lost.
        state: At risk once the stakes have reached 1 / δ, and ever after: only a new promise ends that.
    """

    alpha: float
    delta: float
    audits: int = 0
    losses: int = 0
    state: State = State.IN_FORCE
    _weights: tuple[int, int] = (0, 0)
    """Sums of the weights: of all audits, and of those that were lost."""
    _stakes: tuple[int, ...] = (0,) * len(_ODDS)
    _kept_back: int = _ONE

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if not 1 / _MOST_EXACT <= value <= 1 - 1 / _MOST_EXACT:
                raise ValueError(f"{name} is {value:g}; use a share above 0 and below 1.")

    @classmethod
    def of(cls, alpha: float, delta: float, audits: Iterable[tuple[bool, float]]) -> Self:
        """Rebuild a monitor from its audits in order, each as (lost, weight)."""
        monitor = cls(alpha, delta)
        for lost, weight in audits:
            monitor = monitor.observe(lost, weight)
        return monitor

    def observe(self, lost: bool, weight: float = 1.0) -> Self:
        """The monitor after one more audit.

        Args:
            lost: Whether the audited answer was lost, by the promise's own measure.
            weight: The chance of the least audited requests of that time to be audited, over this one's: 1 while all of
                a time have the same chance, however large; less for those of a group that is audited more than others.

        Raises:
            ValueError: The weight is not above 0 and at most 1.
        """
        if not 0 < weight <= 1:
            raise ValueError(f"weight is {weight:g}; use a number above 0 and at most 1.")
        units = max(1, round(weight * _WEIGHT))
        begun = _beginning(self.audits + 1)
        stakes = tuple(
            min(_LARGEST, (stake + begun) * gain // of)
            for stake, (gain, of) in zip(self._stakes, _factors(self.alpha, lost, units), strict=True)
        )
        after = replace(
            self,
            audits=self.audits + 1,
            losses=self.losses + lost,
            _weights=(self._weights[0] + units, self._weights[1] + units * lost),
            _stakes=stakes,
            _kept_back=self._kept_back - begun * len(_ODDS),
        )
        return replace(after, state=State.AT_RISK) if after._total * _exact(self.delta) >= _ONE else after

    @property
    def evidence(self) -> float:
        """Natural logarithm of the stakes: at ln(1 / δ) the promise is at risk. Four digits after the point."""
        return float(round(_log(Decimal(self._total)) - _log(Decimal(_ONE)), 4))

    @property
    def interval(self) -> tuple[float, float]:
        """The share of lost answers among the audited requests, by weight, with confidence 1 − δ at all times at once.

        It is about the mean of what their chances to be lost were, which may have changed on the way.
        """
        if not self.audits:
            return 0.0, 1.0
        return _share_interval(self.audits, *self._weights, self.delta)

    @property
    def _total(self) -> int:
        return sum(self._stakes) + self._kept_back


@lru_cache(maxsize=64)
def _exact(share: float) -> Fraction:
    return Fraction(share).limit_denominator(_MOST_EXACT)


@lru_cache(maxsize=1024)
def _factors(alpha: float, lost: bool, units: int) -> tuple[tuple[int, int], ...]:
    """The factors of an audit on each stake, as fractions; their mean is 1 where exactly α is lost."""
    share, made = _exact(alpha), []
    for odds in _ODDS:
        whole = (Fraction(odds, 2) if lost else 1) / (1 + (Fraction(odds, 2) - 1) * share)
        factor = 1 + Fraction(units, _WEIGHT) * (whole - 1)
        made.append((factor.numerator, factor.denominator))
    return tuple(made)


def _beginning(audit: int) -> int:
    """The stake that each bet begins with at an audit, counted from 1.

    A half is for the first, a sixth for the next two, a twelfth for the next four, … so that audit N has a share of
    about 1 / (N log² N); all together are 1.
    """
    doubled = audit.bit_length()
    return _ONE // (len(_ODDS) * doubled * (doubled + 1) << (doubled - 1))


@lru_cache(maxsize=256)
def _share_interval(audits: int, weight: int, lost: int, delta: float) -> tuple[float, float]:
    """Shares that a mixture of bets on more and on less does not rule out.

    With r = exp(tilt) and mean share m, r ** lost / (1 + m (r − 1)) ** audits is at most a supermartingale even where
    the chances differ from audit to audit, as the logarithm of 1 + m (r − 1) is concave in m.
    """
    all_weights, lost_weights = Decimal(weight) / _WEIGHT, Decimal(lost) / _WEIGHT
    most = _log(1 / Decimal(delta)) + _log(Decimal(len(_TILTS)))

    def ruled_out(step: int) -> bool:
        mean = all_weights * step / _STEPS / audits
        logs = [tilt * lost_weights - audits * _log(1 + mean * (tilt.exp(_DIGITS) - 1)) for tilt in _TILTS]
        highest = max(logs)
        return highest + _log(sum(((each - highest).exp(_DIGITS) for each in logs), Decimal(0))) >= most

    # What was seen is not ruled out, and beyond a share that is ruled out all are.
    seen = lost * _STEPS // weight
    low = max(0, bisect_left(range(seen), True, key=lambda step: not ruled_out(step)) - 1)
    above = range(min(seen + 1, _STEPS), _STEPS)
    return low / _STEPS, (above.start + bisect_left(above, True, key=ruled_out)) / _STEPS


def _log(value: Decimal) -> Decimal:
    return value.ln(_DIGITS)
