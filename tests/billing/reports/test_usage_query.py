from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.errors import CurrencyMixError, QueryError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.reports.query import usage_rows
from polar_billing.reports.report import build_report
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EVERYTHING = Selection(ALL_TENANTS)


def test_sums_are_those_of_the_records(ledger: Ledger) -> None:
    meter = Meter(ledger)
    records = [
        usage_record(
            f"r{n}",
            path=(0, 1, 2, 2, 5),
            output=n,
            outcome=Outcome.CANCELLED if n % 3 == 0 else Outcome.COMPLETED,
        )
        for n in range(10)
    ]
    costs = [Decimal(meter.emit(record)["cost"]) for record in records]
    (row,) = usage_rows(ledger, Selection("acme"), by=["tenant"])
    assert row.group == {"tenant": "acme"}
    assert row.requests == 10
    assert row.outcomes == {"cancelled": 4, "completed": 6}
    assert row.tokens_output == sum(record.tokens.output for record in records)
    assert row.visits == sum(record.visits.total for record in records)
    assert row.flops == sum(record.flops.total for record in records)
    assert row.compute_units == Decimal(row.flops).scaleb(-12)
    assert row.compute_units_saved == Decimal(sum(record.flops_saved for record in records)).scaleb(-12)
    assert row.cost is not None
    assert abs(row.cost - sum(costs)) <= Decimal("0.5E-12") * len(costs)


def test_groups_by_every_dimension(ledger: Ledger) -> None:
    meter = Meter(ledger)
    evening = datetime(2026, 10, 31, 23, 30, tzinfo=UTC)  # already November in Berlin
    meter.emit(usage_record(tier=None, started_at=evening, tags={"team": "search"}))
    meter.emit(usage_record(tier="premium", started_at=evening - timedelta(hours=1), outcome=Outcome.CACHED))
    berlin = Selection(ALL_TENANTS, Period(zone="Europe/Berlin"))

    def groups(*by: str) -> list[tuple[str | None, ...]]:
        return [tuple(row.group.values()) for row in usage_rows(ledger, berlin, by=by)]

    assert groups("month") == [("2026-10",), ("2026-11",)]
    assert groups("day", "tier") == [("2026-10-31", "premium"), ("2026-11-01", None)]
    assert groups("tier") == [("premium",), (None,)]
    assert groups("tag:team") == [("search",), (None,)]
    assert groups("outcome") == [("cached",), ("completed",)]
    assert groups("source", "tenant", "model") == [("polar", "acme", "test-model")]
    assert groups() == [()]
    with pytest.raises(QueryError, match="'colour'"):
        groups("colour")


def test_tiers_are_sorted_from_the_cheapest_up(ledger: Ledger) -> None:
    meter = Meter(ledger)
    for tier in ("premium", "gold", None, "exact", "economy", "standard"):
        meter.emit(usage_record(tier=tier))
    rows = usage_rows(ledger, EVERYTHING, by=["tier"])
    assert [row.group["tier"] for row in rows] == ["economy", "standard", "premium", "exact", "gold", None]


def test_unrated_use_is_counted_and_not_priced(ledger: Ledger) -> None:
    meter = Meter(ledger)
    meter.emit(usage_record(tier="gold"))
    (row,) = usage_rows(ledger, EVERYTHING)
    assert row.cost is None
    assert sum(row.unrated.values()) == row.requests == 1


def test_old_usage_can_be_rated_by_another_book(ledger: Ledger, book: PriceBook) -> None:
    meter = Meter(ledger)
    meter.emit(usage_record(tier="gold"))
    meter.emit(usage_record(tier="standard"))
    golden = PriceBook.from_document(book.document.replace('"exact"', '"gold"'))
    rows = usage_rows(ledger, EVERYTHING, by=["tier"], prices=golden)
    assert [row.cost is not None for row in rows] == [True, True]
    assert ledger.price_books() == {book.content_hash: book}  # asking changes nothing


def test_currencies_are_never_added(ledger: Ledger, book: PriceBook) -> None:
    euros = PriceBook.from_document(book.document.replace('"USD"', '"EUR"'))
    Meter(ledger).emit(usage_record("dollars"))
    Meter(ledger, prices=euros).emit(usage_record("euros"))
    with pytest.raises(CurrencyMixError, match="EUR and USD"):
        usage_rows(ledger, EVERYTHING)
    (row,) = usage_rows(ledger, EVERYTHING, currency="EUR")
    assert (row.requests, row.currency) == (1, "EUR")
    (row,) = usage_rows(ledger, EVERYTHING, prices=book)
    assert (row.requests, row.currency) == (2, "USD")


@pytest.mark.parametrize("by", ["receipts", "book", "report"])
def test_a_record_that_brings_in_its_book_while_usage_is_read(
    ledger: Ledger, book: PriceBook, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of a ledger, for example: another process stores it between the books and the usage."""
    with Meter(ledger) as meter:
        meter.check()

        def after_a_late_record(read: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            def late(*arguments: Any, **named: Any) -> Iterator[Any]:
                meter.emit_many([usage_record("late")])
                return read(*arguments, **named)

            return late

        for name in ("read", "raw_usage", "usage_sums"):
            monkeypatch.setattr(Ledger, name, after_a_late_record(getattr(Ledger, name)))
        if by == "report":
            assert build_report(ledger, EVERYTHING).figures.requests == 1
        else:
            rows = usage_rows(ledger, EVERYTHING, prices=book if by == "book" else None, rollups=False)
            assert [row.requests for row in rows] == [1]
