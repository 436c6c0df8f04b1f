"""Values that trade their type for one of the same letters: each was sound to `polar verify`, and cost somebody money.

Each is found twice: by the type of its cell, and by the hash of its row alone. PostgreSQL keeps no value of another
type.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.ledger.books import add_book
from polar_billing.ledger.chain import Head
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.proof.chain_check import ChainCheck
from polar_billing.proof.verify import verify_in, verify_ledger
from polar_billing.statements.issue import credit_note, issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger

NOON = datetime(2026, 10, 20, 12, tzinfo=UTC)
TENANT = "beefbeefbeefbeefbeefbeefbeefbeef"
"""As `uuid4().hex` makes them; alone in its ledger."""

DISGUISES = {
    "a budget that no request meets": "polar_budget SET name = x''",
    "a credit note that can be booked again": "polar_credit_note SET reference = x'1007'",
    "and its transaction": "polar_transaction SET reference = x'1007' WHERE reference = '1007'",
    "a request that can be charged again": "polar_usage SET request_id = x'deadbeef00'",
    "usage that belongs to nobody": f"polar_usage SET tenant = x'{TENANT}'",
    "a replay that becomes a conflict": "polar_usage SET content_hash = CAST(unhexed(content_hash) AS BLOB)",
    "prices in force that no meter can read": "polar_price_in_force SET price_book_hash = unhexed(price_book_hash)",
    "a transaction that corrects infinity": "polar_transaction SET corrects = 9e999",
}


@pytest.fixture
def filled(store: Ledger) -> Ledger:
    """Names, ids and references in hexadecimal digits."""
    add_book(store, PriceBook.example(), for_all=True)
    Budgets(store).set(Budget(TENANT, Decimal(5), "USD"))
    Meter(store).emit(usage_record("deadbeef00", tenant=TENANT, started_at=NOON, output=500))
    issued = issue_statement(store, TENANT, Period.month("2026-10"), now=datetime(2026, 12, 1, tzinfo=UTC)).statement
    credit_note(store, TENANT, issued.id, issued.total, reason="sorry", reference="1007")
    assert verify_ledger(store).sound
    return store


@pytest.mark.parametrize("change", DISGUISES.values(), ids=DISGUISES)
def test_a_value_in_disguise_is_found_by_its_type_and_by_its_hash(
    filled: Ledger, change: str, unguarded: Callable[[Connection], AbstractContextManager[None]]
) -> None:
    with filled.transaction() as connection:
        taken_back = connection.begin_nested()
        if connection.dialect.name == "postgresql":  # which makes text of bytes, or refuses
            with unguarded(connection), suppress(DBAPIError):
                with connection.begin_nested():
                    connection.exec_driver_sql(f"UPDATE {_on_postgres(change)}")
                assert verify_in(connection).findings
            taken_back.rollback()
            return
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.create_function("unhexed", 1, bytes.fromhex)
        with unguarded(connection):
            assert connection.exec_driver_sql(f"UPDATE {change}").rowcount >= 1
            table, _, column, *_ = change.split()
            findings = [str(finding) for finding in verify_in(connection).findings]
            assert any(f"column {column} of row" in finding and table in finding for finding in findings), findings
            faults = [
                ChainCheck(connection, tenant).first_fault(Head(number, bytes(hash_)))
                for tenant, number, hash_ in connection.execute(text("SELECT * FROM polar_chain_head")).all()
            ]
            assert any(fault is not None and f"of {table}" in fault.what for fault in faults), faults
        taken_back.rollback()


def _on_postgres(change: str) -> str:
    change = change.replace("unhexed(content_hash)", "decode(content_hash, 'hex')").replace("AS BLOB", "AS bytea")
    change = change.replace("unhexed(price_book_hash)", "decode(price_book_hash, 'hex')")
    return change.replace("x'", "bytea '\\x").replace("9e999", "'Infinity'::float8")
