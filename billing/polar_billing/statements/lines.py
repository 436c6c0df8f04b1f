"""Input and output of rating over a period: the phases of the period, the usage in them, and exact lines.

A period is divided into phases with constant plan terms, and each phase into stretches with constant rates of a
request. Both are half-open and partition the period. Usage is summed per stretch, and each line is about a stretch or a
phase. Knows neither how a line is priced nor a database.
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


Kind = Literal["usage", "pool", "discount", "minimum", "fee", "service credit"]
"""The kind of a line. `pool`: usage of all tiers counted together."""

USAGE_KINDS: Final = ("usage", "pool")


@dataclass(frozen=True)
class Stretch:
    """A part of a period with one price entry in force, `since <= t < until`."""

    since: datetime
    until: datetime
    entry: PriceEntry | None
    """None if the book has no price."""


@dataclass(frozen=True)
class Phase:
    """A part of a period with one set of terms, `since <= t < until`."""

    since: datetime
    until: datetime
    plan: str | None
    terms: Terms | None
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True)
class Use:
    """Summed usage of one tier and outcome over a stretch of constant rates."""

    stretch: Stretch
    tier: str | None
    """None for programs named by hand."""
    outcome: str
    counts: Counts
    beyond: str | None = None
    """Reason that it is unrated although it has a price: it cost more than a receipt holds."""


@dataclass(frozen=True)
class Agreement:
    """Audited answers of a tier: counts, and their sums by weight, of which the share is taken.

    An audit that was chosen with a larger share than others stands for fewer requests, and weighs less.
    """

    agreed: int
    compared: int
    weight_agreed: int
    """Unit: 10^-12 of an audit of weight 1."""
    weight: int

    def __add__(self, other: Agreement) -> Agreement:
        both = ((self.agreed, other.agreed), (self.compared, other.compared))
        weights = ((self.weight_agreed, other.weight_agreed), (self.weight, other.weight))
        return Agreement(*map(sum, (*both, *weights)))


@dataclass(frozen=True)
class PeriodUsage:
    """Everything about a tenant's use of a period that charges depend on."""

    uses: tuple[Use, ...] = ()
    latency_ns_p95: Mapping[tuple[datetime, str], int] = field(default_factory=dict)
    """By beginning of the phase and tier, where there were completed requests. Unit: nanoseconds."""
    agreement: Mapping[tuple[datetime, str], Agreement] = field(default_factory=dict)
    """Agreement by audits, by beginning of the phase and tier, where a plan promises it."""


@dataclass(frozen=True)
class ExactLine:
    """One line before rounding; where it has a quantity, `quantity × unit_price = amount`, exactly."""

    kind: Kind
    item: str
    exact: int
    """The amount. Unit: 10^-30 of the currency."""
    since: datetime
    until: datetime
    """End of the stretch or phase it is about, excluded."""
    tier: str | None = None
    """None for programs named by hand, and for lines that are not about a single tier."""
    quantity: Decimal | None = None
    unit: str | None = None
    unit_price: Decimal | None = None
    outcome: str | None = None
    """The one outcome it is about, where that is free; None for all outcomes that are charged."""
    note: str | None = None
    corrects: str | None = None
    """The statement whose period it belongs to, where that is an earlier one."""

    @property
    def key(self) -> tuple[object, ...]:
        """Identifies a line across two ratings of one period."""
        return (self.kind, self.item, self.since, self.until, self.tier, self.unit, self.unit_price, self.outcome)


def bounds(period: Period) -> tuple[datetime, datetime]:
    """Both ends of a period.

    Raises:
        PeriodError: One end is missing; a statement needs both.
    """
    if period.since is None or period.until is None:
        raise PeriodError(
            f"a statement cannot cover {period.label}: its period needs a start and an end.",
            hint="Give a month, or --since and --until.",
        )
    return period.since, period.until


def phases_of(book: PriceBook, tenant: str, period: Period) -> tuple[Phase, ...]:
    """Cut a period where the tenant's plan, terms or rates change."""
    since, until = bounds(period)
    cuts = [since, *(moment for moment in book.changes_of(tenant) if since < moment < until), until]
    stretches = [Stretch(begin, end, book.entry_at(begin, tenant)) for begin, end in pairwise(cuts)]
    phases = []
    for (plan, terms), members in groupby(stretches, key=lambda stretch: book.terms_at(stretch.since, tenant)):
        merged: list[Stretch] = []
        for stretch in members:  # changes of other plans cut nothing
            if merged and merged[-1].entry == stretch.entry:
                merged[-1] = Stretch(merged[-1].since, stretch.until, stretch.entry)
            else:
                merged.append(stretch)
        phases.append(Phase(merged[0].since, merged[-1].until, plan, terms, tuple(merged)))
    return tuple(phases)
