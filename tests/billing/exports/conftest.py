"""A ledger with two tenants, plain rates and a plan, all tiers and outcomes, and a late request."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from polar_billing.ledger.books import add_book
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.statements.issue import issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger

OCTOBER = Period.month("2026-10")
NOVEMBER = Period.month("2026-11")
TIERS = ("economy", "standard", "premium", None)
BOOK = """
id = "list"
currency = "USD"
decimals = 6
free_outcomes = ["error"]

[[prices]]
effective_from = 2026-01-01
per_compute_unit = 0.40
per_million_output_tokens = 1.5
per_request = 0.00001
untiered = 1.0
tiers = { economy = 0.6, standard = 1.0, premium = 1.7 }

[plans.pro]
[[plans.pro.terms]]
effective_from = 2026-01-01
flat_fee = 12.34
minimum = 20
discount_percent = 10
[[plans.pro.terms.items]]
per = "compute_units"
model = "graduated"
bands = [{ up_to = 0.001, unit_price = 0.4 }, { up_to = 0.005, unit_price = 0.333333333333 }, { unit_price = 0.2 }]
[[plans.pro.terms.items]]
per = "requests"
model = "package"
size = 3
price = 0.01
[[plans.pro.terms.items]]
per = "million_input_tokens"
model = "volume"
pool = true
bands = [{ up_to = 0.0001, unit_price = 2.5 }, { unit_price = 1.5 }]

[[customers]]
tenant = "globex"
plan = "pro"
effective_from = 2026-01-01

[[credits]]
id = "welcome"
tenant = "globex"
amount = 5
effective_from = 2026-01-01
"""


@pytest.fixture
def book() -> PriceBook:
    return PriceBook.from_toml(BOOK)


@pytest.fixture
def billed(ledger: Ledger) -> Ledger:
    """The ledger of `make_usage`."""
    make_usage(ledger)
    return ledger


def make_usage(ledger: Ledger) -> None:
    """Usage of October; the statement of acme is issued, then one request of October comes late."""
    book = PriceBook.from_toml(BOOK)
    add_book(ledger, book)
    begin = datetime(2026, 10, 1, tzinfo=UTC)
    with Meter(ledger, prices=book) as meter:
        number = 0
        for tenant in ("acme", "globex"):
            for tier in TIERS:
                for outcome in Outcome:
                    for output in range(3):
                        number += 1
                        meter.emit(
                            usage_record(
                                f"r{number}",
                                tenant=tenant,
                                tier=tier,
                                outcome=outcome,
                                prompt=7 + number,
                                output=output,
                                drafts=(3, 1, 7_000) if output == 2 and outcome is Outcome.COMPLETED else (0, 0, 0),
                                started_at=begin + timedelta(hours=number),
                            )
                        )
        meter.emit(usage_record("gold", tenant="acme", tier="gold", started_at=begin))
        issue_statement(ledger, "acme", OCTOBER)
        meter.emit(usage_record("late", tenant="acme", started_at=begin, output=9))
        meter.emit(usage_record("next", tenant="acme", started_at=datetime(2026, 11, 2, tzinfo=UTC)))
