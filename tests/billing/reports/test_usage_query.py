"""Usage by group, and sums that are rated: they give what rating one by one gives."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import product
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.errors import CurrencyMixError, QueryError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.reports import tier_totals
from polar_billing.reports.query import usage_rows
from polar_billing.reports.report import build_report
from polar_billing.reports.tier_totals import totals_by_tier
from polar_billing.reports.totals import Rater, UsageTotals, accumulate
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import Outcome, VisitUsage

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


BEGIN = datetime(2026, 10, 1, tzinfo=UTC)
BOOK = """
id = "b"
currency = "USD"
free_outcomes = ["error"]
[[prices]]
effective_from = 2026-10-02
effective_until = 2026-10-20
per_compute_unit = 0.4
per_request = 0.001
tiers = { standard = 1.0, economy = 0.7 }
[prices.token_reference]
per_million_input_tokens = 1
per_million_output_tokens = 3
[[prices]]
effective_from = 2026-10-20T13:00:00Z
per_million_input_tokens = 3
tiers = { standard = 1.0 }
untiered = 2.0
[plans.own]
[[plans.own.prices]]
effective_from = 2026-01-01
per_million_output_tokens = 7.123456789012
untiered = 1.0
tiers = { standard = 1.3, economy = 1.1 }
[[customers]]
tenant = "globex"
plan = "own"
effective_from = 2026-10-09T10:00:00Z
"""
OTHER = """
id = "other"
currency = "USD"
charge_drafts = true
[[prices]]
effective_from = 2020-01-01
per_compute_unit = 0.1
untiered = 1.0
tiers = { standard = 2.0 }
"""


def one_by_one(ledger: Ledger, selection: Selection, rater: Rater) -> dict[tier_totals.Key, UsageTotals]:
    return accumulate(ledger.read(selection), rater, lambda stored: (stored.record.tenant, stored.record.tier))


def fill(ledger: Ledger) -> None:
    draw = Random(7)
    with Meter(ledger, prices=PriceBook.from_toml(BOOK)) as meter:
        for n in range(300):
            meter.emit(
                usage_record(
                    f"r{n}",
                    tenant=draw.choice(["acme", "globex"]),
                    tier=draw.choice(["standard", "economy", "gold", None]),
                    model=draw.choice(["a", "b"]),
                    path=draw.choice([(0, 1, 2, 3, 4, 5), (0, 1, 5), (0, 1, 1, 5)]),
                    outcome=draw.choice(list(Outcome)),
                    prompt=draw.randint(1, 99),
                    output=draw.randint(0, 9),
                    router_flops=draw.choice([0, 1_000_003]),
                    drafts=draw.choice([(0, 0, 0), (5, 2, 10**11 + 7)]),
                    queue_ns=draw.choice([0, 2**63 - 1]),
                    started_at=BEGIN + timedelta(minutes=draw.randint(0, 31 * 24 * 60)),
                )
            )
        filled = VisitUsage(prefill=(1, 1), prefill_filled=(0, 1), decode=(3, 3))
        meter.emit(usage_record("filled", visits=filled))
        meter.emit(usage_record("nothing", visits=VisitUsage(), program=""))


def test_sums_are_those_of_rating_one_by_one(store: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    monkeypatch.setattr(tier_totals, "_MAX_WAITING", 3)
    periods = (Period(), Period(BEGIN + timedelta(days=5), BEGIN + timedelta(days=25)))
    for instead, period in product((None, OTHER, BOOK), periods):
        other = None if instead is None else PriceBook.from_toml(instead)
        raters = [Rater(store.price_books, instead=other) for _ in range(2)]
        selection = Selection(ALL_TENANTS, period)
        expected = one_by_one(store, selection, raters[0])
        found = totals_by_tier(store, selection, raters[1])
        for totals in (*expected.values(), *found.values()):
            totals.latencies_ns.sort()
        assert found == expected
        assert raters[0].used.keys() == raters[1].used.keys()


def test_they_are_added_up_first(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(ledger)
    monkeypatch.setattr(tier_totals, "_one_by_one", lambda *_: pytest.fail("one by one"))
    assert totals_by_tier(ledger, Selection("acme"), Rater(ledger.price_books))
    other = PriceBook.from_toml(OTHER)
    assert totals_by_tier(ledger, Selection("acme"), Rater(ledger.price_books, instead=other))


def test_a_request_that_costs_too_much_is_unrated_alone(ledger: Ledger) -> None:
    expensive = PriceBook.from_toml(OTHER.replace("per_compute_unit = 0.1", "per_compute_unit = 9000"))
    with Meter(ledger) as meter:
        meter.emit(usage_record("small"))
        meter.emit(usage_record("large", prompt=40_000_000))
    selection = Selection("acme")
    found = totals_by_tier(ledger, selection, Rater(ledger.price_books, instead=expensive))
    assert found == one_by_one(ledger, selection, Rater(ledger.price_books, instead=expensive))
    assert found["acme", "standard"].rated == 1


def test_tags_are_looked_at(ledger: Ledger) -> None:
    with Meter(ledger) as meter:
        meter.emit(usage_record("a", tags={"team": "x"}))
        meter.emit(usage_record("b"))
    found = totals_by_tier(ledger, Selection("acme", tags={"team": "x"}), Rater(ledger.price_books))
    assert found["acme", "standard"].requests == 1
