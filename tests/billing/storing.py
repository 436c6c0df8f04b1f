"""Requests and records as the engine makes and the meter stores them, at a price book that is easy to reckon with."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from polar_billing.budgets.settlement import settle
from polar_billing.errors import ConflictError
from polar_billing.ledger.records import Entry
from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import rate
from polar_billing.testing import usage_record
from polar_sdk.usage import FlopUsage, Offer, UsageBound

if TYPE_CHECKING:
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
