"""What rating over a period takes in and gives out: summed usage, and lines with exact amounts.

Knows neither prices nor a database.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from decimal import Decimal

    from polar_billing.rating import Counts
    from polar_billing.statements.windows import Stretch

__all__ = ["USAGE_KINDS", "Agreement", "ExactLine", "Facts", "Kind", "Use"]

Kind = Literal["usage", "pool", "discount", "minimum", "fee", "service credit"]
"""`pool`: usage of all tiers counted together; there and in everything below, a tier of None is no tier."""

USAGE_KINDS: Final = ("usage", "pool")


@dataclass(frozen=True)
class Use:
    """Summed usage of one tier and outcome over a stretch of constant rates."""

    stretch: Stretch
    tier: str | None
    """None for programs named by hand."""
    outcome: str
    counts: Counts


@dataclass(frozen=True)
class Agreement:
    """How many answers of a tier were compared with full depth, and how many agreed; measured elsewhere."""

    agreed: int
    compared: int


@dataclass(frozen=True)
class Facts:
    """Everything about a tenant and period that charges depend on."""

    uses: tuple[Use, ...] = ()
    latency_ns_p95: Mapping[tuple[datetime, str], int] = field(default_factory=dict)
    """By beginning of the window and tier, where there were completed requests. Unit: nanoseconds."""
    agreement: Mapping[str, Agreement] = field(default_factory=dict)
    """By tier."""


@dataclass(frozen=True)
class ExactLine:
    """One line before rounding; where it has a quantity, `quantity × unit_price = amount`, exactly."""

    kind: Kind
    item: str
    exact: int
    """The amount. Unit: 10^-30 of the currency."""
    since: datetime
    until: datetime
    """The stretch or window it is about, itself excluded."""
    tier: str | None = None
    quantity: Decimal | None = None
    unit: str | None = None
    unit_price: Decimal | None = None
    outcome: str | None = None
    """The one outcome it is about, where that is free; None for all that are charged."""
    note: str | None = None
    corrects: str | None = None
    """The statement whose period it belongs to, where that is an earlier one."""

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two lines the same line of two ratings of one period."""
        return (self.kind, self.item, self.since, self.until, self.tier, self.unit, self.unit_price, self.outcome)
