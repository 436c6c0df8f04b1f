"""Cells of another type than declared, and values in disguise: found, named, and not read."""

from __future__ import annotations

from contextlib import contextmanager, suppress
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
from polar_billing.ledger.postings import Account, Line, post
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.proof.chain_check import ChainCheck
from polar_billing.proof.receipts import check_receipt, make_receipt
from polar_billing.proof.verify import verify_in, verify_ledger
from polar_billing.statements.issue import credit_note, issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from tests.billing.storing import unguarded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger


NOON = datetime(2026, 11, 15, 12, tzinfo=UTC)
REQUESTS = 120


@pytest.fixture
def filled(store: Ledger) -> Ledger:
    """Requests of two tenants, a payment and a budget."""
    meter = Meter(store)
    meter.emit_many(
        usage_record(f"beef{n:04}", tenant=("acme", "globex")[n % 2], started_at=NOON) for n in range(REQUESTS)
    )
    Budgets(store).set(Budget("acme", Decimal(5), "USD"))
    with store.transaction() as connection:
        lines = [Line(Account.CASH, Decimal(1), "USD"), Line(Account.RECEIVABLE, Decimal(-1), "USD")]
        post(connection, "acme", "payment", "1007", lines, NOON)
    return store


@contextmanager
def changed(ledger: Ledger, statement: str) -> Iterator[Connection]:
    """A transaction in which somebody who knows SQL has changed something; taken back at the end."""
    with ledger.transaction() as connection:
        taken_back = connection.begin_nested()
        with unguarded(connection):
            assert connection.exec_driver_sql(statement).rowcount
            yield connection
        taken_back.rollback()


only_sqlite = pytest.mark.parametrize("store", ["sqlite-file"], indirect=True)


@only_sqlite
@pytest.mark.parametrize(
    ("statement", "named"),
    [
        (
            "polar_chain_link SET digest = 'x' WHERE tenant = 'acme' AND number = 1",
            "column digest of row 'acme', 1 of polar_chain_link",
        ),
        ("polar_chain_link SET digest = 3000000000 WHERE number = 1", "holds an integer, not 32 bytes"),
        ("polar_chain_link SET hash = x'00' WHERE number = 1", "holds bytes of another length, not 32 bytes"),
        ("polar_chain_head SET hash = 3000000000 WHERE tenant = 'acme'", "column hash of row 'acme'"),
        ("polar_usage_hour SET flops_rest = 'x'", "column flops_rest of row "),
        ("polar_usage SET tenant = x'61636d65' WHERE seq = 1", "column tenant of row 1 of polar_usage holds bytes"),
        ("polar_usage SET request_id = x'BEEF0000' WHERE seq = 1", "column request_id of row 1 of polar_usage"),
        ("polar_usage SET model = CAST(x'C328' AS TEXT) WHERE seq = 3", "holds text that is not UTF-8, not text"),
        ("polar_usage SET started_at = 9223372036854775807 WHERE seq = 3", "a moment that no calendar has"),
        ("polar_transaction SET corrects = 9e999", "column corrects of row 1 of polar_transaction"),
        ("polar_transaction SET reference = x'1007'", "column reference of row 1 of polar_transaction"),
        ("polar_budget SET name = x''", "column name of row 1 of polar_budget holds bytes, not text"),
    ],
)
def test_a_cell_of_another_type_is_named(filled: Ledger, statement: str, named: str) -> None:
    with changed(filled, f"UPDATE {statement}") as connection:
        findings = [str(finding) for finding in verify_in(connection).findings]
    assert named in findings[0]
    assert len(findings[0]) < 200


@only_sqlite
def test_the_rest_is_verified_all_the_same(filled: Ledger) -> None:
    changes = "device = CASE seq WHEN 2 THEN 'tpu' ELSE x'BEEF' END"
    with changed(filled, f"UPDATE polar_usage SET {changes} WHERE seq IN (1, 2)") as connection:
        found = {(finding.tenant, finding.number) for finding in verify_in(connection).findings}
        assert {("acme", None), ("acme", 1), ("globex", 1)} <= found
        of_globex = verify_in(connection, "globex").findings
        assert [(finding.tenant, finding.number) for finding in of_globex] == [("globex", 1)]
        # what was hidden is there again
        assert connection.execute(text("SELECT count(*) FROM polar_usage")).scalar() == REQUESTS


@only_sqlite
def test_the_first_rows_are_named_and_the_others_counted(filled: Ledger) -> None:
    with changed(filled, "UPDATE polar_usage SET device = x'BEEF'") as connection:
        cells = [finding.what for finding in verify_in(connection).findings][:101]
    assert cells[0] == "column device of row 1 of polar_usage holds bytes, not text; the row is not read."
    assert cells[100] == f"{REQUESTS - 100} more rows of polar_usage hold such values."


@only_sqlite
def test_a_receipt_whose_row_holds_another_type_does_not_agree(filled: Ledger) -> None:
    with filled.snapshot() as connection:
        receipt = make_receipt(connection, "acme", "beef0000")
        assert check_receipt(connection, receipt).wrong is None
    for statement, column in (
        ("polar_usage SET tags = x'BEEF' WHERE seq = 1", "column tags of row 1 of polar_usage"),
        ("polar_chain_link SET digest = 3000000000 WHERE tenant = 'acme' AND number = 1", "column digest of row"),
    ):
        with changed(filled, f"UPDATE {statement}") as connection:
            assert column in str(check_receipt(connection, receipt).wrong)
            assert check_receipt(connection, {**receipt, "tenant": "none"}).wrong is not None
    for tags in ("[" * 100_000, "x"):
        with changed(filled, f"UPDATE polar_usage SET tags = '{tags}' WHERE seq = 1") as connection:
            assert check_receipt(connection, receipt).wrong is not None


def test_a_moment_that_no_calendar_has_is_found_on_every_store(filled: Ledger) -> None:
    with changed(filled, f"UPDATE polar_usage SET started_at = {2**62} WHERE seq = 1") as connection:
        findings = [str(finding) for finding in verify_in(connection).findings]
        assert "column started_at of row 1 of polar_usage holds a moment that no calendar has" in findings[0]
    assert verify_ledger(filled).sound


def test_entries_beyond_64_bits_in_sum_are_no_balance(filled: Ledger) -> None:
    with changed(filled, f"UPDATE polar_entry SET whole = {2**63 - 1}") as connection:
        findings = [str(finding) for finding in verify_in(connection).findings]
    assert any("transaction 1 does not sum to zero in USD" in finding for finding in findings)


OCTOBER = datetime(2026, 10, 20, 12, tzinfo=UTC)
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
def disguised(store: Ledger) -> Ledger:
    """Names, ids and references in hexadecimal digits."""
    add_book(store, PriceBook.example(), for_all=True)
    Budgets(store).set(Budget(TENANT, Decimal(5), "USD"))
    Meter(store).emit(usage_record("deadbeef00", tenant=TENANT, started_at=OCTOBER, output=500))
    issued = issue_statement(store, TENANT, Period.month("2026-10"), now=datetime(2026, 12, 1, tzinfo=UTC)).statement
    credit_note(store, TENANT, issued.id, issued.total, reason="sorry", reference="1007")
    assert verify_ledger(store).sound
    return store


@pytest.mark.parametrize("change", DISGUISES.values(), ids=DISGUISES)
def test_a_value_in_disguise_is_found_by_its_type_and_by_its_hash(disguised: Ledger, change: str) -> None:
    with disguised.transaction() as connection:
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
