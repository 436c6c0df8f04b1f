"""A tenant whose time zone changes is billed for every instant exactly once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select

from polar_billing.errors import PeriodError
from polar_billing.ledger.books import add_book
from polar_billing.ledger.schema import usage_table
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.statements.books import month_of
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import issue_statement
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.ledger.ledger import Ledger

LATER = datetime(2027, 2, 1, tzinfo=UTC)
MONTHS = [f"2026-{month:02}" for month in range(1, 13)]
FAR_EAST, FAR_WEST = "Pacific/Kiritimati", "Pacific/Pago_Pago"  # 25 hours apart


def book_of(*zones: tuple[str, str]) -> PriceBook:
    """The tenant `someone` is in each zone from a moment on."""
    customers = [{"tenant": "someone", "effective_from": since, "zone": zone} for since, zone in zones]
    return PriceBook.model_validate({**PriceBook.example(EXAMPLE_PLANS).model_dump(), "customers": customers})


@pytest.mark.parametrize(
    "zones",
    [
        [("2026-03-15T00:00:00Z", "America/Los_Angeles")],
        [("2026-01-01T00:00:00Z", "America/New_York"), ("2026-06-17T12:00:00Z", "Asia/Tokyo")],
        [("2026-01-01T00:00:00Z", "Asia/Kolkata"), ("2026-11-01T00:00:00Z", "Europe/Berlin")],
        [("2026-04-02T00:00:00Z", FAR_EAST), ("2026-05-02T00:00:00Z", FAR_WEST), ("2026-06-02T00:00:00Z", FAR_EAST)],
    ],
)
def test_every_instant_is_on_one_statement(
    ledger: Ledger, put: Callable[..., int], zones: list[tuple[str, str]]
) -> None:
    book = book_of(*zones)
    add_book(ledger, book)
    months = [month_of(ledger, "someone", month) for month in MONTHS]
    assert all(one.until == following.since for one, following in pairwise(months))
    used = 0
    for month in MONTHS[1:]:
        noon = Period.month(month).since
        assert noon is not None
        for hours in range(-26, 27):
            put(ledger, f"{month} {hours}", book=book, tier="standard", started_at=noon + timedelta(hours=hours))
            used += 1
    issued = [issue_statement(ledger, "someone", month, now=LATER).statement for month in months]
    assert sum(statement.requests for statement in issued) == used
    with ledger.snapshot() as connection:
        assert connection.execute(select(func.count()).select_from(usage_table)).scalar_one() == used


def test_a_month_without_a_change_is_that_of_its_zone(ledger: Ledger) -> None:
    add_book(ledger, book_of(("2026-01-01T00:00:00Z", "Europe/Berlin")))
    assert month_of(ledger, "someone", "2026-03") == Period.month("2026-03", "Europe/Berlin")
    for month in ("0001-01", "2026-03", "9998-12"):
        assert month_of(ledger, "nobody", month) == Period.month(month)
    other = book_of(("2026-01-01T00:00:00Z", "Asia/Tokyo"))
    assert month_of(ledger, "someone", "2026-03", other) == Period.month("2026-03", "Asia/Tokyo")


@pytest.mark.parametrize("order", [1, -1])
def test_a_gap_between_zones_is_refused_and_the_error_closes_it(
    ledger: Ledger, put: Callable[..., int], order: int
) -> None:
    october, november = Period.month("2026-10", "Asia/Tokyo"), Period.month("2026-11", FAR_WEST)
    assert october.until is not None
    put(ledger, "between", started_at=october.until + timedelta(hours=1))
    first, second = (october, november)[::order]
    issue_statement(ledger, "someone", first, now=LATER)
    with pytest.raises(PeriodError) as caught:
        issue_statement(ledger, "someone", second, now=LATER)
    _, since, _, until = str(caught.value.hint).rstrip(".").rsplit(" ", 3)
    closed = Period.between(since, until, second.zone)
    assert issue_statement(ledger, "someone", closed, now=LATER).statement.requests == 1
    december = Period.month("2026-12", FAR_WEST)
    assert issue_statement(ledger, "someone", december, now=LATER).statement.zone == FAR_WEST
    assert draft_statement(ledger, "someone", Period.month("2027-01")).requests == 0


def test_a_gap_may_be_filled_and_months_may_be_left_out(ledger: Ledger, put: Callable[..., int]) -> None:
    put(ledger, "r")
    issue_statement(ledger, "someone", Period.month("2026-08"), now=LATER)
    issue_statement(ledger, "someone", Period.month("2026-11", FAR_WEST), now=LATER)
    between = Period(Period.month("2026-08").until, Period.month("2026-11", FAR_WEST).since, "Asia/Tokyo")
    issue_statement(ledger, "someone", between, now=LATER)
