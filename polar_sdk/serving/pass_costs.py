"""Measured costs of passes by their number of rows, and how many drafts pay. Knows seconds; no tokens."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


MAX_ROWS: Final = 16
"""Rows of one pass, drafts included, up to which drafts fill it."""
_MIN_MEASURED: Final = 3
"""Passes of one row, and wider ones, without which nothing is known of a machine."""
_LATELY: Final = 12
"""Passes after which a narrow one is no longer a measure of a wide one."""
_WIDTHS: Final = 4
"""Number of widths whose measurements are one point."""
_PER_ROW: Final = 0.03
"""Minimum that one more row is taken to add beyond the widest passes that were measured."""
_MIN_SPEED: Final = 0.98
"""Minimum speed of any row beside drafts: those that gain nothing wait for those that do."""
_GAIN: Final = 1.04
"""Minimum that a wider pass must bring, in tokens for its time."""
_GUESS: Final = 0.1
"""Assumed time of one guess of the draft head, as a multiple of a pass of one row, before any was measured."""


class PassCosts:
    """How much longer a pass takes the more rows it has, beside one of one row, as measured lately.

    A wide pass is compared with narrow ones of the same moment, since a busy machine is slow for both. What was
    measured of widths near each other is one point, its median; from point to point it is taken to rise evenly.
    """

    def __init__(self) -> None:
        self._ones: deque[tuple[int, float]] = deque(maxlen=5)
        """Passes of one row: number of the pass, and its seconds at full depth."""
        self._ratios: dict[int, deque[tuple[int, float]]] = {}
        """Rows of a pass and what it took, by width: 2 to 4 rows, 5 to 8 and so on."""
        self._took = _at_widths([(1, 1.0), (4, 1.15), (16, 1.9)])
        """See `by_width`. Until something was measured: more than machines took on which this was tried."""
        self._is_fitted = True
        """Whether `_took` follows from all measurements: it is made when somebody drafts, as most do not."""
        self._passes = 0
        self._guess_ratios: deque[float] = deque(maxlen=31)

    @property
    def guess(self) -> float:
        """Time of one guess of the draft head, as a multiple of a pass of one row."""
        return statistics.median(self._guess_ratios) if len(self._guess_ratios) >= _MIN_MEASURED else _GUESS

    def guessed(self, guesses: int, seconds: float) -> None:
        """Note how long N guesses took, one after another."""
        lately = self._narrow_ones()
        if guesses and len(lately) >= _MIN_MEASURED:
            self._guess_ratios.append(seconds / guesses / statistics.median(lately))

    def _narrow_ones(self) -> list[float]:
        """Seconds of the passes of one row of late."""
        return [one for number, one in self._ones if self._passes - number <= _LATELY]

    def measured(self, rows: int, seconds: float) -> None:
        """Note a pass; a program's seconds are those that full depth would have taken."""
        self._passes += 1
        if rows == 1:
            self._ones.append((self._passes, seconds))
            return
        lately = self._narrow_ones()
        if rows <= MAX_ROWS and len(lately) >= _MIN_MEASURED:
            ratios = self._ratios.setdefault((rows - 1) // _WIDTHS, deque(maxlen=31))
            ratios.append((rows, seconds / statistics.median(lately)))
            self._is_fitted = False

    def _fit(self) -> None:
        self._is_fitted = True
        measured = [ratios for _, ratios in sorted(self._ratios.items()) if len(ratios) >= _MIN_MEASURED]
        points = [(1.0, 1.0)]
        for ratios in measured:
            rows, ratio = statistics.mean(rows for rows, _ in ratios), statistics.median(ratio for _, ratio in ratios)
            points.append((rows, max(ratio, points[-1][1])))
        if measured:
            self._took = _at_widths(points)

    def by_width(self) -> Sequence[float]:
        """Times of passes of one row, two and so on, up to `MAX_ROWS`, as multiples of one of one row."""
        if not self._is_fitted:
            self._fit()
        return self._took

    def gain(self, chances: Sequence[float]) -> float:
        """How much faster a row comes alone by as many drafted tokens as pay, each kept with such a chance."""
        kept = accumulate(chances, initial=1.0)
        return max(tokens / took for tokens, took in zip(kept, self.by_width(), strict=False))


def _at_widths(points: Sequence[tuple[float, float]]) -> list[float]:
    """Times of passes of each width, up to `MAX_ROWS`: even rises between points of rows and times."""
    took = [1.0]
    for rows in range(2, MAX_ROWS + 1):
        place = bisect_left(points, (rows, 0.0))
        ends = place == len(points)
        (first, low), (last, high) = points[-2:] if ends else points[place - 1 : place + 1]
        rise = (high - low) / (last - first)
        took.append(high + (rows - last) * (max(rise, _PER_ROW * high) if ends else rise))
    return took


class DraftedRow(NamedTuple):
    """A row of a pass, with what is drafted for it."""

    chances: Sequence[float] = ()
    """How likely it is that each of its drafted tokens is kept."""
    always: bool = False
    """Whether they run whatever it costs."""
    probes: bool = False
    """Whether one of them runs although that does not seem to pay."""


def planned(rows: Sequence[DraftedRow], costs: PassCosts) -> list[int]:
    """How many drafted tokens each row of a pass runs: those most likely to be kept, as long as that pays."""
    counts = [0] * len(rows)
    steps = sorted((not row.always, -chance, place) for place, row in enumerate(rows) for chance in row.chances)
    steps = steps[: max(MAX_ROWS - len(rows), 0)]
    forced = sum(not unforced for unforced, _, _ in steps)
    paying = _paying([(place, -chance) for _, chance, place in steps], len(rows), costs.by_width()) if steps else 0
    chosen = [place for _, _, place in steps[: max(paying, forced)]]
    if not chosen and len(rows) < MAX_ROWS:
        chosen = [place for place, row in enumerate(rows) if row.probes][:1]
    for place in chosen:
        counts[place] += 1
    return counts


def _paying(steps: Sequence[tuple[int, float]], rows: int, took: Sequence[float]) -> int:
    """How many of these drafts, a row and a chance each, bring most tokens for their time and slow no row down."""
    brought, total, best, best_gain = [1.0] * rows, float(rows), 0, _GAIN
    for count, (row, chance) in enumerate(steps, start=1):
        brought[row] += chance
        total += chance
        longer = took[rows + count - 1] / took[rows - 1]
        if total / rows / longer > best_gain and min(brought) / longer >= _MIN_SPEED:
            best, best_gain = count, total / rows / longer
    return best
