"""Requests and records as the engine makes and the meter stores them, and ledgers that are changed past the package."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, text

from polar_billing.budgets.settlement import settle
from polar_billing.errors import ConflictError
from polar_billing.ledger.records import Entry
from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import rate
from polar_billing.testing import usage_record
from polar_sdk.usage import FlopUsage, Offer, UsageBound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import StoredUsage
    from polar_sdk.usage import UsageRecord

CU = 10**12
NOON = datetime(2026, 11, 15, 12, tzinfo=UTC)
ONE_DOLLAR_PER_CU = """
id = "one dollar per CU"
currency = "USD"
[[prices]]
effective_from = 2024-01-01
per_compute_unit = 1
tiers = {standard = 1, economy = 1}
"""
"""A price book, at which a compute unit costs as many dollars as it counts; without tier gold."""
DOLLARS = PriceBook.from_toml(ONE_DOLLAR_PER_CU)


def store_record(ledger: Ledger, record: UsageRecord, book: PriceBook, source: str = "polar") -> StoredUsage:
    """Store one record with its receipt, and settle its hold.

    Raises:
        ConflictError: Its id is stored with other content.
    """
    rating = rate(record, book)
    (answer,) = ledger.append_many([Entry(record, source, book, rating.cost, rating.unrated)], settle)
    if isinstance(answer, ConflictError):
        raise answer
    return answer


def bound_of(request_id: str, flops: int = CU, *cheaper: int, tier: str = "standard", **changes: Any) -> UsageBound:
    """A request of acme at noon that may use so many FLOPs, or fewer in the tier economy."""
    offers = [Offer(tier=tier, program="0-5", flops_bound=flops)]
    offers += [Offer(tier="economy", program="0 5", flops_bound=fewer) for fewer in cheaper]
    facts = {"tenant": "acme", "tokens_input": 10, "tokens_output_max": 10, "offers": tuple(offers), "at": NOON}
    return UsageBound(request_id=request_id, **{**facts, **changes})


def use(ledger: Ledger, request_id: str, flops: int, book: PriceBook = DOLLARS, **changes: Any) -> None:
    """Store a request of acme at noon that used so many FLOPs."""
    work = FlopUsage(head=flops, total=flops)
    store_record(ledger, usage_record(request_id, flops=work, **{"started_at": NOON, **changes}), book)


@contextmanager
def unguarded(connection: Connection) -> Iterator[None]:
    """A block in which a connection is in the hands of somebody who knows SQL: nothing refuses."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        triggers = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")).all()
        for name, _ in triggers:
            connection.exec_driver_sql(f"DROP TRIGGER {name}")
        yield
        for _, statement in triggers:
            connection.exec_driver_sql(statement)
        return
    for name in inspect(connection).get_table_names():
        connection.exec_driver_sql(f"ALTER TABLE {name} DISABLE TRIGGER ALL")
    yield
    for name in inspect(connection).get_table_names():
        connection.exec_driver_sql(f"ALTER TABLE {name} ENABLE TRIGGER ALL")
