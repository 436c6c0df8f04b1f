"""Price books, amounts and dates beyond every limit: refused at once, with file, value, limit and fix."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from polar_billing.budgets.budget import Budget
from polar_billing.cli.statement import _agreements
from polar_billing.errors import AmountError, BudgetError, PeriodError, PriceBookError, QueryError
from polar_billing.ledger.books import add_book
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.prices.quote import quote
from polar_billing.testing import usage_record
from polar_billing.values.money import read_amount, to_scaled, to_units
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = 'id = "x"\ncurrency = "USD"\n[[prices]]\neffective_from = 2020-01-01\n'
BOOK = HEAD + "per_compute_unit = 1\ntiers = { standard = 1 }\n"


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Nothing here may cost seconds of CPU."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a." * 50_000 + "a = 1", "a dotted key has more than 16 parts"),
        ("[" + "a." * 50_000 + "a]", "a dotted key has more than 16 parts"),
        ("a = " + "[" * 100_000, "nested more than 64 levels deep"),
        ("a = " + "{a = " * 100_000, "nested more than 64 levels deep"),
        ("a = " + "1" * 4_301, "4300 digits"),
        ("a = 0x" + "f" * 4_301, "more than 100 digits"),
        ("#" * 3_000_000, "larger than the 2,097,152 bytes"),
        (BOOK.replace("= 1\n", "= 0e-999999999\n"), "exponent from -100 to 100"),
        (BOOK.replace("2020-01-01", "9999-12-31T23:59:59-12:00"), "outside the years 1 to 9999"),
        (BOOK.replace("2020-01-01", "2026"), "effective_from = '2026': is not a date"),
        (BOOK.replace("2020-01-01", '"2026"'), "effective_from = '2026': is not a date"),
        (BOOK.replace("2020-01-01", "-1"), "is not a date"),
        (BOOK.replace("2020-01-01", "1.5"), "is not a date"),
        (BOOK.replace("USD", "ZZZ"), "currency = 'ZZZ' is not in use"),
        (BOOK.replace("{ standard", '{ " standard "'), "tier ' standard ' can never match"),
        (BOOK.replace("{ standard", '{ ""'), "tier '' can never match"),
        (
            BOOK.replace("per_compute_unit = 1", "per_request = 1000000").replace("standard = 1", "standard = 10"),
            "per_request = 1000000 × 10 (tier 'standard') is more than a receipt holds, 9223372.036854775807 USD",
        ),
        (BOOK.replace("= 1\n", "= 1000000\nuntiered = 1000\n"), "per_compute_unit = 1000000 × 1000 (untiered)"),
    ],
)
def test_a_book_beyond_a_limit_is_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(PriceBookError) as caught:
        PriceBook.from_toml(text, name="mine.toml")
    assert "price book 'mine.toml'" in str(caught.value)
    assert said in str(caught.value)


def test_rates_of_a_plan_are_checked_as_well() -> None:
    plan = "[[plans.big.prices]]\neffective_from = 2020-01-01\nper_request = 1000000\ntiers = { standard = 10 }\n"
    with pytest.raises(PriceBookError, match=r"plans\.big\.prices from 2020.*per_request"):
        PriceBook.from_toml(BOOK + plan)


def absurd() -> PriceBook:
    """A book whose every request costs more than a receipt holds, made without the check."""
    text = PriceBook.from_toml(BOOK.replace("per_compute_unit = 1", "per_request = 1000000")).document
    return PriceBook.from_document(text.replace('"standard":"1"', '"standard":"10"'))


def test_a_cost_beyond_the_ledger_is_stored_unrated_with_the_reason(ledger_url: str) -> None:
    record = usage_record("r", tier="standard", started_at=datetime(2026, 1, 1, tzinfo=UTC))
    with Meter(ledger_url, prices=absurd()) as meter:
        receipt = meter.emit(record)
        (many,) = meter.emit_many([record.model_copy(update={"request_id": "s"})])
    assert receipt["cost"] is None
    assert "cost 10000000 USD, and a receipt holds at most 9223372.036854775807" in receipt["unrated"]
    with Ledger(ledger_url) as ledger:
        stored = list(ledger.read(Selection(ALL_TENANTS)))
    assert [entry.unrated for entry in stored] == [receipt["unrated"]] * 2
    assert many == stored[1]
    quoted = quote(absurd(), "acme", "standard", 1, 1, 1, record.started_at)
    assert (quoted.amount, quoted.unrated) == (None, receipt["unrated"])


def test_a_book_that_cannot_charge_is_not_put_in_force_but_one_in_force_stays_readable(ledger_url: str) -> None:
    with Ledger(ledger_url) as ledger, pytest.raises(PriceBookError, match="is more than a receipt holds"):
        add_book(ledger, absurd())
    assert absurd().prices[0].per_request == 1_000_000


@pytest.mark.parametrize("text", ["0e999999999", "0e-999999999", "1e999999999", "1e99999999", "9" * 5_000, "x"])
def test_amounts_of_absurd_size_are_refused_at_once(text: str) -> None:
    with pytest.raises(AmountError, match=r"^amount "):
        read_amount(text)
    with pytest.raises(BudgetError, match=r"^limit "):
        Budget("acme", text, "USD")  # type: ignore[arg-type]


def test_integers_of_absurd_size_are_refused_at_once() -> None:
    with pytest.raises(BudgetError, match="more than 100 digits"):
        Budget("acme", 10**5_000, "USD")  # type: ignore[arg-type]


def test_zero_is_zero_whatever_its_exponent_and_what_is_too_large_is_not_counted() -> None:
    for count in (to_scaled, to_units):
        for exponent in ("999999999", "-999999999"):
            assert count(Decimal(f"0e{exponent}"), 12) == 0
            with pytest.raises(AmountError):
                count(Decimal(f"1e{exponent}"), 12)
    with pytest.raises(AmountError, match="more than 2 decimals"):
        to_scaled(Decimal("0.001"), 2)
    assert to_scaled(Decimal("0.010"), 2) == 1


def test_dates_beyond_the_calendar_are_refused() -> None:
    for since, zone in (("0001-01-01", "Asia/Tokyo"), ("9999-12-31T23:00", "America/New_York")):
        with pytest.raises(PeriodError, match="1 to 9999"):
            Period.between(since, None, zone)
    with pytest.raises(PeriodError, match="1 to 9999"):
        Period.month("0001-01", "Asia/Tokyo")


def test_an_agreement_of_absurd_size_is_refused() -> None:
    with pytest.raises(QueryError, match="is not TIER=AGREED/COMPARED"):
        _agreements([f"premium={'9' * 5_000}/{'9' * 5_000}"], None)
    assert _agreements(["premium=970/1000"], None)["premium"].agreed == 970
