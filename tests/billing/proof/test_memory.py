"""A ledger is verified in the memory of its largest tenant, however many there are."""

from __future__ import annotations

import tracemalloc
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from polar_billing.budgets.settlement import settle
from polar_billing.ledger.records import Entry
from polar_billing.prices.rating import rate
from polar_billing.proof.verify import verify_ledger
from polar_billing.statements.issue import issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.canonical import canonical_json
from polar_billing.values.periods import Period

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.prices.book import PriceBook

NOON = datetime(2026, 10, 1, 12, tzinfo=UTC)
REQUESTS = {"largest": 2_000, **{f"tenant {n}": 500 for n in range(6)}}


@pytest.mark.parametrize("store", ["sqlite-file", "postgresql"], indirect=True)
def test_the_memory_of_verify_is_bounded_by_the_largest_tenant(store: Ledger, book: PriceBook) -> None:
    for tenant, count in REQUESTS.items():
        records = (usage_record(f"r{n}", tenant=tenant, started_at=NOON + timedelta(minutes=n)) for n in range(count))
        store.append_many([Entry(record, "polar", book, rate(record, book).cost, None) for record in records], settle)
        issue_statement(store, tenant, Period.month("2026-10"), now=NOON + timedelta(days=60))
    with store.snapshot() as connection:
        rows = connection.execute(text("SELECT * FROM polar_usage WHERE tenant = 'largest'")).all()
        stored = sum(len(canonical_json(tuple(row))) for row in rows)
    del rows
    assert verify_ledger(store).sound  # what is built once for all ledgers does not count
    tracemalloc.start()
    try:
        verified = verify_ledger(store)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert verified.links > sum(REQUESTS.values())
    assert peak < 2.5 * stored, f"{peak:,} bytes, and the largest tenant has {stored:,}"
