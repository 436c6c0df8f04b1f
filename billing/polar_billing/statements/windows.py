"""Which prices and terms hold when, for one tenant over one period.

A period is cut into windows in which the plan's terms stay the same, and each window into stretches in which the
rates of a request do. Windows and stretches are half-open and partition the period. Knows no usage.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from polar_billing.errors import PeriodError

if TYPE_CHECKING:
    from datetime import datetime

    from polar_billing.periods import Period
    from polar_billing.price_book import PriceBook
    from polar_billing.pricing.entries import PriceEntry
    from polar_billing.pricing.plans import Terms

__all__ = ["Stretch", "Window", "bounds", "windows_of"]


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
