"""Stores records as the meter does, without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_billing.budgets.settlement import settle
from polar_billing.errors import ConflictError
from polar_billing.ledger.records import Entry
from polar_billing.prices.rating import rate

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import StoredUsage
    from polar_billing.prices.book import PriceBook
    from polar_sdk.usage import UsageRecord


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
