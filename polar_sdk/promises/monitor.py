"""The monitor of a promise: does the share of lost answers still stay within what was promised?

It reads audits in order and bets against the promise. For each audit, a bet on a larger share multiplies its stake by a
factor whose mean is at most 1 while the promise holds, so that the total stake is a supermartingale: the probability
that it ever reaches 1 / δ is at most δ, whenever anybody looks (Ville). Stakes are divided among a few larger shares
and among all audits at which bets may begin, since a bet that runs through a long good phase has lost its stake when
the promise breaks. What is kept back for later bets stays in the total. The share of requests that are audited may
depend on everything seen before, as long as the choice of a request does not depend on its own answer.

In addition there is a doubt, which decides nothing: the likelihood ratio of twice the promised share to that share
itself, over the audits since its last minimum (CUSUM). While it is high, a closer look is worth its cost.

All stakes are integers that are rounded down, so that every machine computes the same state from the same audits, and
rounding never counts against the promise. Knows no prompts, requests or times. Standard library only.
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
_DOUBTFUL: Final = 1.9
"""A doubt from which more requests should be audited: one loss where at most a third may be lost, else two in a row."""
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
    _stakes: tuple[int, ...] = (0,) * len(_ODDS)
    _kept_back: int = _ONE
    _doubt: int = _ONE

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if not 1 / _MOST_EXACT <= value <= 1 - 1 / _MOST_EXACT:
                raise ValueError(f"{name} is {value:g}; use a share above 0 and below 1.")

    @classmethod
    def of(cls, alpha: float, delta: float, audits: Iterable[bool]) -> Self:
        """Rebuild a monitor from its audits in order: whether each answer was lost."""
        monitor = cls(alpha, delta)
        for lost in audits:
            monitor = monitor.observe(lost)
        return monitor

    @classmethod
    def restored(cls, alpha: float, delta: float, text: str) -> Self:
        """The monitor of a promise that `text` was made of.

        Raises:
            ValueError: It is of no monitor.
        """
        audits, losses, at_risk, kept_back, doubt, *stakes = map(int, text.split())
        if len(stakes) != len(_ODDS) or min(audits - losses, losses, kept_back, doubt, *stakes) < 0:
            raise ValueError(f"{text!r} is not a monitor's text.")
        state = State.AT_RISK if at_risk else State.IN_FORCE
        return cls(alpha, delta, audits, losses, state, tuple(stakes), kept_back, doubt)

    @property
    def text(self) -> str:
        """All that `restored` needs beside the promise."""
        at_risk = int(self.state is State.AT_RISK)
        return " ".join(map(str, (self.audits, self.losses, at_risk, self._kept_back, self._doubt, *self._stakes)))

    def observe(self, lost: bool) -> Self:
        """The monitor after one more audit, whose answer was lost or not by the promise's own measure."""
        begun = _beginning(self.audits + 1)
        *factors, (gain, of) = _factors(self.alpha, lost)
        stakes = tuple(
            min(_LARGEST, (stake + begun) * gain // of) for stake, (gain, of) in zip(self._stakes, factors, strict=True)
        )
        after = replace(
            self,
            audits=self.audits + 1,
            losses=self.losses + lost,
            _stakes=stakes,
            _kept_back=self._kept_back - begun * len(_ODDS),
            _doubt=max(_ONE, min(_LARGEST, self._doubt * gain // of)),
        )
        return replace(after, state=State.AT_RISK) if after._total * _exact(self.delta) >= _ONE else after

    @property
    def doubtful(self) -> bool:
        """Whether the audits of late speak so much against a promise in force that more are worth their cost."""
        return self.state is State.IN_FORCE and self._doubt > _DOUBTFUL * _ONE

    @property
    def evidence(self) -> float:
        """Natural logarithm of the stakes: at ln(1 / δ) the promise is at risk. Four digits after the point."""
        return float(round(_log(Decimal(self._total)) - _log(Decimal(_ONE)), 4))

    @property
    def interval(self) -> tuple[float, float]:
        """The share of lost answers among the audited requests, with confidence 1 − δ at all times at once.

        It is about the mean of what their chances to be lost were, which may have changed on the way.
        """
        return _share_interval(self.audits, self.losses, self.delta) if self.audits else (0.0, 1.0)

    @property
    def _total(self) -> int:
        return sum(self._stakes) + self._kept_back


@lru_cache(maxsize=64)
def _exact(share: float) -> Fraction:
    return Fraction(share).limit_denominator(_MOST_EXACT)


@lru_cache(maxsize=1024)
def _factors(alpha: float, lost: bool) -> tuple[tuple[int, int], ...]:
    """The factors of an audit on each stake, and last on the doubt; the mean of each is 1 where exactly α is lost."""
    share = _exact(alpha)
    doubled = min(2 * share, (1 + share) / 2)
    made = [(Fraction(odds, 2) if lost else 1) / (1 + (Fraction(odds, 2) - 1) * share) for odds in _ODDS]
    made.append(doubled / share if lost else (1 - doubled) / (1 - share))
    return tuple((factor.numerator, factor.denominator) for factor in made)


def _beginning(audit: int) -> int:
    """The stake that each bet begins with at an audit, counted from 1.

    A half is for the first, a sixth for the next two, a twelfth for the next four, … so that audit N has a share of
    about 1 / (N log² N); all together are 1.
    """
    doubled = audit.bit_length()
    return _ONE // (len(_ODDS) * doubled * (doubled + 1) << (doubled - 1))


@lru_cache(maxsize=256)
def _share_interval(audits: int, lost: int, delta: float) -> tuple[float, float]:
    """Shares that a mixture of bets on more and on less does not rule out.

    With r = exp(tilt) and mean share m, r ** lost / (1 + m (r − 1)) ** audits is at most a supermartingale even where
    the chances differ from audit to audit, as the logarithm of 1 + m (r − 1) is concave in m.
    """
    most = _log(1 / Decimal(delta)) + _log(Decimal(len(_TILTS)))

    def ruled_out(step: int) -> bool:
        mean = Decimal(step) / _STEPS
        logs = [tilt * lost - audits * _log(1 + mean * (tilt.exp(_DIGITS) - 1)) for tilt in _TILTS]
        highest = max(logs)
        return highest + _log(sum(((each - highest).exp(_DIGITS) for each in logs), Decimal(0))) >= most

    # What was seen is not ruled out, and beyond a share that is ruled out all are.
    seen = lost * _STEPS // audits
    low = max(0, bisect_left(range(seen), True, key=lambda step: not ruled_out(step)) - 1)
    above = range(min(seen + 1, _STEPS), _STEPS)
    return low / _STEPS, (above.start + bisect_left(above, True, key=ruled_out)) / _STEPS


def _log(value: Decimal) -> Decimal:
    return value.ln(_DIGITS)
