"""A million charges of the smallest unit, in five currencies of 0, 2 and 3 decimals: nothing is lost or made."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from polar_billing.ledger import Ledger
from polar_billing.money import EXACT_SCALE, currency_decimals, exact_sum, from_scaled, round_lines
from polar_billing.periods import Period
from polar_billing.price_book import PriceBook
from polar_billing.rating import Counts
from polar_billing.statements.charges import charges_of
from polar_billing.statements.lines import Facts, Use
from polar_billing.statements.statement import printed
from polar_billing.statements.windows import windows_of

MILLION = 10**6
CURRENCIES = ["JPY", "USD", "EUR", "KWD", "BHD"]
PERIOD = Period.month("2026-11")


def book(currency: str, price: Decimal) -> PriceBook:
    entry = {
        "effective_from": datetime(2026, 1, 1, tzinfo=UTC),
        "per_request": price,
        "tiers": {"standard": Decimal(1)},
    }
    return PriceBook.model_validate({"id": "b", "currency": currency, "prices": [entry]})


@pytest.mark.parametrize("currency", CURRENCIES)
def test_a_million_lines_of_the_smallest_unit_have_residue_0(currency: str) -> None:
    decimals = currency_decimals(currency)
    smallest = 10 ** (EXACT_SCALE - decimals)
    part = MILLION // len(CURRENCIES)
    rounded = round_lines([smallest] * part, decimals)
    assert rounded.residue == 0
    assert rounded.total == from_scaled(part, decimals) == exact_sum(rounded.amounts, decimals)


@pytest.mark.parametrize("currency", CURRENCIES)
@pytest.mark.parametrize("share", ["1", "0.5", "0.333333"])
def test_a_million_charges_on_a_statement_sum_to_their_exact_sum(currency: str, share: str) -> None:
    decimals = currency_decimals(currency)
    price = from_scaled(1, decimals) * Decimal(share)
    prices = book(currency, price)
    windows = windows_of(prices, "acme", PERIOD)
    use = Use(windows[0].stretches[0], "standard", "completed", Counts(MILLION))
    (line,) = charges_of(prices, PERIOD, windows, Facts((use,))).lines
    lines, rounding, total = printed([line], prices)
    assert rounding == 0
    assert total == lines[0].amount == round(price * MILLION, decimals)
    parts = round_lines([line.exact // 1_000] * 1_000, decimals)  # the same in a thousand lines, each rounded
    assert exact_sum((*parts.amounts, parts.residue), decimals) == parts.total == total


def test_the_ledger_books_five_currencies_to_the_last_unit() -> None:
    from polar_billing.postings import Account, Line, balances, post

    with Ledger("sqlite://") as ledger, ledger.transaction() as connection:
        for currency in CURRENCIES:
            unit = from_scaled(1, currency_decimals(currency))
            amount = unit * MILLION
            lines = [Line(Account.RECEIVABLE, amount, currency), Line(Account.REVENUE, -amount + unit, currency)]
            lines.append(Line(Account.ROUNDING, -unit, currency))
            post(connection, "acme", "statement", currency, lines, datetime(2026, 12, 1, tzinfo=UTC))
        found = balances(connection, "acme")
    for currency in CURRENCIES:
        assert exact_sum((value for (_, code), value in found.items() if code == currency), 12) == 0
        assert found[Account.RECEIVABLE, currency] == from_scaled(MILLION, currency_decimals(currency))
