"""Pace: how much time the rows of busy tenants may add to each token of the others.

Rows that decode together share a pass, which takes longer the more there are, and prompts have separate passes. So that
a tenant with many rows does not slow one with few to a fraction of its speed, each tenant has a balance. In every round
it earns a part of the time that the tenant with least to decode would need for a token alone, and pays for the time
that its rows add; while its balance is negative, it sits out rounds. A tenant that decodes alone earns twice the
elapsed time: its debt is forgiven, but not at once, so that a tenant that asks again and again is not slowed each time.
What a row adds is measured, since it differs between machines. Pure: tenants and seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_FADING: Final = 0.98
"""Weight of a pass when one more was measured."""
_FIRST_SHARE: Final = 0.75
"""Share of a one-row pass that it takes without rows: assumed until passes of several sizes were measured."""
_SPREAD: Final = 0.25
"""Variance of the sizes of passes from which they tell what a row adds; less is enough where rows are few."""
_SHARE_OF_SPREAD: Final = 0.02
"""The same, over the square of their mean."""
_BURST_TOKENS: Final = 2.0
"""Maximum lead of a tenant, in tokens that the other one decodes alone."""


class PassTimes:
    """How long a pass that decodes takes: a part of its own, and a part for each row. Unit: seconds."""

    def __init__(self) -> None:
        self._weight = self._rows = self._squares = self._seconds = self._products = 0.0
        self._learned: float | None = None
        """Time that one more row added, from passes of several sizes; None = not known yet."""

    def measured(self, rows: float, seconds: float) -> None:
        """Note a pass."""
        for name, value in (
            ("_weight", 1.0),
            ("_rows", rows),
            ("_squares", rows * rows),
            ("_seconds", seconds),
            ("_products", rows * seconds),
        ):
            setattr(self, name, _FADING * getattr(self, name) + value)
        mean_rows, mean_seconds = self._means()
        spread = self._squares / self._weight - mean_rows * mean_rows
        if spread >= min(_SPREAD, _SHARE_OF_SPREAD * mean_rows * mean_rows):  # passes of one size tell nothing
            self._learned = (self._products / self._weight - mean_rows * mean_seconds) / spread

    @property
    def per_row(self) -> float:
        """Time that one more row adds, by least squares; between nothing and its even part of an average pass."""
        if not self._weight:
            return 0.0
        rows, seconds = self._means()
        if self._learned is None:
            return seconds * (1 - _FIRST_SHARE) / (_FIRST_SHARE + (1 - _FIRST_SHARE) * rows)
        return min(max(self._learned, 0.0), seconds / max(rows, 1e-9))

    def _means(self) -> tuple[float, float]:
        return self._rows / self._weight, self._seconds / self._weight

    def of(self, rows: float) -> float:
        """Time of a pass of N rows."""
        if not self._weight:
            return 0.0
        return max(self._seconds / self._weight + self.per_row * (rows - self._rows / self._weight), 0.0)


class Pace:
    """Balances of the tenants whose rows run. Unit: seconds, divided by the tenant's weight."""

    def __init__(self) -> None:
        self.times = PassTimes()
        self._burst = 0.0
        self._passed = 0.0
        """Times of the passes of the last round."""
        self._balances: dict[str, float] = {}

    def begin(self, tenants: Mapping[str, float], pace: float) -> None:
        """A round begins.

        Args:
            tenants: Those with rows that can go on, and how many of them decode, divided by the tenant's weight; a row
                counts by its share of full depth. 0 if they only have prompts.
            pace: How many times as long as alone a token of the one with least may take because of the others.
        """
        decoding = [rows for rows in tenants.values() if rows]
        alone = self.times.of(min(decoding, default=0.0)) if decoding else 0.0
        self._burst = _BURST_TOKENS * alone
        balances: dict[str, float] = {}
        for tenant in tenants:
            others = [rows for other, rows in tenants.items() if other != tenant and rows]
            if others:
                own = self.times.per_row * min(others)  # as much as the one with least, whoever else is there
                earned = max(own, (pace - 1) * alone / (len(tenants) - 1))
                most = max(self._burst, earned)  # less would take from a tenant what it earned while it waited
            else:
                earned, most = 2 * self._passed, self._burst
            balances[tenant] = min(self._balances.get(tenant, self._burst) + earned, most)
        self._balances, self._passed = balances, 0.0

    def may_run(self, tenant: str) -> bool:
        """Whether a tenant owes nothing."""
        return self._balances.get(tenant, 0.0) >= 0

    def decoded(self, rows: Mapping[str, float], seconds: float, weights: Mapping[str, float]) -> None:
        """Count a pass that decoded: each tenant pays what its rows added.

        Args:
            rows: By tenant; a row counts by its share of full depth.
            seconds: What the pass took.
            weights: Of tenants that do not count 1.
        """
        self.times.measured(sum(rows.values()), seconds)
        self._passed += seconds
        for tenant, count in rows.items():
            self._pay(tenant, self.times.per_row * count, weights)

    def read(self, tokens: Mapping[str, int], seconds: float, weights: Mapping[str, float]) -> None:
        """Count a pass over prompts, which the tenants pay for in full, by tokens."""
        self._passed += seconds
        for tenant, count in tokens.items():
            self._pay(tenant, seconds * count / sum(tokens.values()), weights)

    def _pay(self, tenant: str, seconds: float, weights: Mapping[str, float]) -> None:
        if tenant in self._balances:
            self._balances[tenant] -= seconds / weights.get(tenant, 1.0)
