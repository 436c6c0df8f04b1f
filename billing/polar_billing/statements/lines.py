"""What rating over a period takes in and gives out: summed usage, and lines with exact amounts.

Knows neither prices nor a database.

Which prices and terms hold when, for one tenant over one period.

A period is cut into windows in which the plan's terms stay the same, and each window into stretches in which the
rates of a request do. Windows and stretches are half-open and partition the period. Knows no usage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Final, Literal

from polar_billing.errors import PeriodError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from decimal import Decimal

    from polar_billing.prices.book import PriceBook
    from polar_billing.prices.entries import PriceEntry
    from polar_billing.prices.plans import Terms
    from polar_billing.prices.rating import Counts
    from polar_billing.values.periods import Period


@dataclass(frozen=True)
class Stretch:
    """A part of a period with one entry in force, `since <= t < until`."""

    since: datetime
    until: datetime
    entry: PriceEntry | None
    """None where the book has no price."""


@dataclass(frozen=True)
class Window:
    """A part of a period with one set of terms, `since <= t < until`."""

    since: datetime
    until: datetime
    plan: str | None
    terms: Terms | None
    stretches: tuple[Stretch, ...]


def bounds(period: Period) -> tuple[datetime, datetime]:
    """Both ends of a period.

    Raises:
        PeriodError: It has none on one side; a statement needs both.
    """
    if period.since is None or period.until is None:
        raise PeriodError(f"a statement cannot be over {period.label}.", hint="Give a month, or --since and --until.")
    return period.since, period.until


def windows_of(book: PriceBook, tenant: str, period: Period) -> tuple[Window, ...]:
    """Cut a period where the tenant's plan, terms or rates change.

    Raises:
        PeriodError: The period has no beginning or no end.
    """
    since, until = bounds(period)
    cuts = [since, *(moment for moment in book.changes_of(tenant) if since < moment < until), until]
    parts = [(_terms(book, tenant, one), Stretch(one, end, book.entry_at(one, tenant))) for one, end in pairwise(cuts)]
    grouped = groupby(parts, key=lambda part: part[0])
    return tuple(_window(plan, terms, [stretch for _, stretch in members]) for (plan, terms), members in grouped)


def _terms(book: PriceBook, tenant: str, moment: datetime) -> tuple[str | None, Terms | None]:
    customer = book.customer_at(moment, tenant)
    if customer is None or customer.plan is None:
        return None, None
    return customer.plan, book.plans[customer.plan].terms_at(moment)


def _window(plan: str | None, terms: Terms | None, stretches: list[Stretch]) -> Window:
    merged: list[Stretch] = []
    for stretch in stretches:  # other plans' changes cut nothing
        if merged and merged[-1].entry == stretch.entry:
            merged[-1] = Stretch(merged[-1].since, stretch.until, stretch.entry)
        else:
            merged.append(stretch)
    return Window(merged[0].since, merged[-1].until, plan, terms, tuple(merged))


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
