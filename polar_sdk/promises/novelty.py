"""Whether prompts are still like those that a promise was calibrated on, by what the router reads, without audits.

Calibration counts how many of its prompts are nearest to each of the router's centres, how many are in each range of
lengths, and how many are far from all centres. Each count gives an upper limit for the true share of such prompts. A
detector then bets, for each of these regions, that more prompts fall into it, as `monitor` bets on losses: the mean of
all stakes is a supermartingale while prompts are like those of the calibration. Regions that become rare are not bet
on, because others then become frequent. A prompt for which the tier runs all layers cannot break a promise, however
unlike the others it is. It counts as one that falls into no region, which only lowers the stakes.

Knows no prompts and no requests, only the regions in which they fall. Standard library only.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Likeness", "Novelty", "Usual", "Usualness"]

_ODDS: Final = (2.0, 6.0, 30.0)
"""Bets, as the odds of a region over those that calibration allows."""
_FAR: Final = (0.8, 0.95)
"""Quantiles of the distances of calibration's prompts, from which a prompt is far."""
_LENGTHS: Final = 8
"""Ranges of lengths, with the same number of calibration's prompts in each."""
_BEYOND: Final = 20
"""No stake grows beyond what is enough, times this, so that it is soon lost where prompts are as usual again."""


class Likeness(NamedTuple):
    """A prompt as a router reads it."""

    tokens: int
    """Length of the prompt."""
    distance: float
    """Distance to the nearest centre of the prompts that the router was trained on, squared, per feature."""
    centre: int
    """Index of that centre."""
    harmless: bool = False
    """Whether the tier that was asked for runs all layers for it, so that its answer cannot be lost."""


class Usualness(StrEnum):
    """The finding of a detector on the prompts that it saw last."""

    USUAL = "usual"
    SUSPECT = "suspect"
    """Evidence enough to look closer, with more audits."""
    UNUSUAL = "unusual"
    """Evidence enough to doubt the promise."""


@dataclass(frozen=True)
class Usual:
    """Where the prompts of one kind fell in calibration.

    Attributes:
        n: Number of prompts.
        centres: Number of them that are nearest to each centre.
        lengths: Ascending lengths that separate ranges; beyond the first and the last one there was no prompt.
        within: Number of prompts in each range between them.
        far: Ascending distances.
        beyond: Number of prompts beyond each of them.
    """

    n: int
    centres: tuple[int, ...]
    lengths: tuple[int, ...]
    within: tuple[int, ...]
    far: tuple[float, ...]
    beyond: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[Likeness], centres: int) -> Self:
        """Count the prompts of a calibration.

        Args:
            prompts: At least one.
            centres: Number of the router's centres.
        """
        counted = Counter(prompt.centre for prompt in prompts)
        lengths = sorted(prompt.tokens for prompt in prompts)
        edges = sorted({*(lengths[len(lengths) * place // _LENGTHS] for place in range(_LENGTHS)), lengths[-1] + 1})
        distances = sorted(prompt.distance for prompt in prompts)
        far = tuple(float(f"{distances[int(share * (len(distances) - 1))]:.4g}") for share in _FAR)
        return cls(
            n=len(prompts),
            centres=tuple(counted[centre] for centre in range(centres)),
            lengths=tuple(edges),
            within=tuple(bisect_left(lengths, high) - bisect_left(lengths, low) for low, high in pairwise(edges)),
            far=far,
            beyond=tuple(sum(distance > edge for distance in distances) for edge in far),
        )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of prompts in each region: centres, lengths with those shorter and longer than all, far ones."""
        return (*self.centres, 0, *self.within, 0, *self.beyond)

    def regions(self, prompt: Likeness) -> tuple[int, ...]:
        """Indices of the regions that a prompt falls into."""
        lengths = len(self.centres) + bisect_right(self.lengths, prompt.tokens)
        first_far = len(self.centres) + len(self.within) + 2
        far = bisect_left(self.far, prompt.distance)
        return (prompt.centre, lengths, *range(first_far, first_far + far))


class Novelty:
    """A detector of unusual prompts. It is fed by one thread at a time.

    What it says is about now: where prompts are as usual again, the stakes that speak against that are soon lost.

    Args:
        usual: What calibration counted of prompts of that kind.
        delta: Maximum probability that prompts like those of the calibration are ever found unusual; half of it is for
            the chance that calibration itself was unusual.
        suspicion: Maximum probability that they are ever found suspect or unusual.
    """

    def __init__(self, usual: Usual, delta: float = 0.05, suspicion: float = 0.25) -> None:
        if not 0 < delta <= suspicion < 1:
            raise ValueError(f"delta is {delta:g} and suspicion {suspicion:g}; use 0 < delta ≤ suspicion < 1.")
        self.usual = usual
        self.prompts = 0
        """Number of prompts seen."""
        self._limits = (1 / (suspicion - delta / 2), 2 / delta)
        counts = usual.counts
        shares = [largest_share(count, usual.n, delta / 2 / len(counts)) for count in counts]
        self._missed = [1 / (1 + (odds - 1) * share) for share in shares for odds in _ODDS]
        """Factor of each stake where a prompt is not of its region; times the odds where it is."""
        self._stakes = [0.0] * len(self._missed)
        """By region, then by odds."""
        self._kept_back = 1.0

    def observe(self, prompt: Likeness) -> Usualness:
        """Count one more prompt; returns what follows."""
        self.prompts += 1
        begun = beginning(self.prompts)
        each = begun / len(self._stakes)
        self._kept_back -= begun
        self._stakes = [(stake + each) * missed for stake, missed in zip(self._stakes, self._missed, strict=True)]
        for region in () if prompt.harmless else self.usual.regions(prompt):
            for place, odds in enumerate(_ODDS, region * len(_ODDS)):
                self._stakes[place] = min(self._stakes[place] * odds, self._limits[1] * _BEYOND)
        return self.found

    @property
    def evidence(self) -> float:
        """Natural logarithm of all stakes."""
        return math.log(self._total)

    @property
    def found(self) -> Usualness:
        """The finding on the prompts seen so far."""
        suspect, unusual = self._limits
        if self._total < suspect:
            return Usualness.USUAL
        return Usualness.SUSPECT if self._total < unusual else Usualness.UNUSUAL

    @property
    def _total(self) -> float:
        return sum(self._stakes) + self._kept_back


def beginning(place: int) -> float:
    """The share of all stakes that begins at the N-th prompt, from 1: about 1 / (N log² N); all together are 1."""
    doubled = place.bit_length()
    return 1 / (doubled * (doubled + 1) << (doubled - 1))


def largest_share(count: int, n: int, level: float) -> float:
    """The share at which `count` or fewer of n have the probability `level`, rounded up (Clopper and Pearson)."""
    if count >= n:
        return 1.0
    ways = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)

    def likely(share: float) -> bool:
        """Whether that many or fewer have a larger probability; what fewer add soon falls to nothing."""
        exact = math.exp(ways + count * math.log(share) + (n - count) * math.log1p(-share))
        total = 0.0
        for fewer in range(count, -1, -1):
            if (total := total + exact) > level:
                return True
            if exact < total * 1e-9:
                break
            exact *= fewer * (1 - share) / ((n - fewer + 1) * share)
        return False

    low, high = count / n, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if likely(middle) else (low, middle)
    return high
