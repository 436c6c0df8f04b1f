"""Charges of the smallest unit, in currencies of 0, 2 and 3 decimals: nothing is lost or made."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.postings import Account, Line, balances, post
from polar_billing.ledger.records import Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import Counts
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.query import usage_rows
from polar_billing.statements.charges import charges_of
from polar_billing.statements.issue import issue_statement
from polar_billing.statements.lines import PeriodUsage, Use, phases_of
from polar_billing.statements.statement import rounded_lines
from polar_billing.testing import usage_record
from polar_billing.values.money import currency_decimals, exact_sum, from_scaled, round_lines
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.usage import UsageRecord

MILLION = 10**6
CURRENCIES = ["JPY", "USD", "KWD"]
PERIOD = Period.month("2026-11")


def book(currency: str, price: Decimal) -> PriceBook:
    entry = {
        "effective_from": datetime(2026, 1, 1, tzinfo=UTC),
        "per_request": price,
        "tiers": {"standard": Decimal(1)},
    }
    return PriceBook.model_validate({"id": f"in {currency}", "currency": currency, "prices": [entry]})


def batches_of(tenant: str, count: int) -> Iterator[list[UsageRecord]]:
    """Records of one tenant, spread over the period."""
    first = usage_record("r0", tenant=tenant, started_at=datetime(2026, 11, 1, tzinfo=UTC))
    step = timedelta(days=30) / count
    for start in range(0, count, 1_000):
        numbers = range(start, min(start + 1_000, count))
        changes = ({"request_id": f"r{n}", "started_at": first.started_at + n * step} for n in numbers)
        yield [first.model_copy(update=change) for change in changes]


@pytest.mark.parametrize("store", ["sqlite-file", "postgresql"], indirect=True)
@pytest.mark.parametrize("part", [1_000, pytest.param(300_000, marks=[pytest.mark.long, pytest.mark.timeout(3_600)])])
def test_charges_of_the_smallest_unit_from_the_meter_to_the_books(store: Ledger, part: int) -> None:
    for currency in CURRENCIES:  # one tenant for each
        unit = from_scaled(1, currency_decimals(currency))
        meter = Meter(store, prices=book(currency, unit))
        for batch in batches_of(currency, part):
            assert {getattr(receipt, "cost", None) for receipt in meter.emit_many(batch)} == {unit}
        issued = issue_statement(store, currency, PERIOD, now=datetime(2026, 12, 2, tzinfo=UTC)).statement
        assert (issued.total, issued.rounding, issued.requests) == (unit * part, Decimal(0), part)
        with store.snapshot() as connection:
            booked = balances(connection, currency)
        assert booked[Account.RECEIVABLE, currency] == unit * part
        assert exact_sum(booked.values(), 12) == 0
        (row,) = usage_rows(store, Selection(currency), by=["tenant"])
        assert (row.cost, row.currency) == (unit * part, currency)
    assert verify_ledger(store).findings == []  # every statement follows from its usage, with residue 0


@pytest.mark.parametrize("currency", CURRENCIES)
@pytest.mark.parametrize("share", ["1", "0.5", "0.333333"])
def test_a_million_charges_on_a_statement_sum_to_their_exact_sum(currency: str, share: str) -> None:
    decimals = currency_decimals(currency)
    price = from_scaled(1, decimals) * Decimal(share)
    prices = book(currency, price)
    phases = phases_of(prices, "acme", PERIOD)
    use = Use(phases[0].stretches[0], "standard", "completed", Counts(MILLION))
    (line,) = charges_of(prices, PERIOD, phases, PeriodUsage((use,))).lines
    lines, rounding, total = rounded_lines([line], prices)
    assert rounding == 0
    assert total == lines[0].amount == round(price * MILLION, decimals)
    parts = round_lines([line.exact // 1_000] * 1_000, decimals)  # the same in a thousand lines, each rounded
    assert exact_sum((*parts.amounts, parts.residue), decimals) == parts.total == total


def test_the_ledger_books_every_currency_to_the_last_unit() -> None:
    with Ledger("sqlite://") as ledger, ledger.transaction() as connection:
        for currency in CURRENCIES:
            unit = from_scaled(1, currency_decimals(currency))
            amount = unit * MILLION
            lines = [Line(Account.RECEIVABLE, amount, currency), Line(Account.REVENUE, -amount + unit, currency)]
            lines.append(Line(Account.ROUNDING, -unit, currency))
            post(connection, "acme", "statement", currency, lines, datetime(2026, 12, 1, tzinfo=UTC))
        sums = balances(connection, "acme")
    for currency in CURRENCIES:
        assert exact_sum((value for (_, code), value in sums.items() if code == currency), 12) == 0
        assert sums[Account.RECEIVABLE, currency] == from_scaled(MILLION, currency_decimals(currency))
