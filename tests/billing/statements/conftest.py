"""Usage to make statements of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.testing import usage_record
from polar_sdk.usage import FlopUsage
from tests.billing.storing import store_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.ledger.ledger import Ledger

PLANS = PriceBook.example(EXAMPLE_PLANS)


@pytest.fixture
def put() -> Callable[..., int]:
    """Store a request of some CU of the tenant `someone`; returns its sequence number."""

    def store_request(
        ledger: Ledger, request_id: str, *, book: PriceBook = PLANS, units: int = 1, **changes: Any
    ) -> int:
        flops = FlopUsage(head=units * 10**12, total=units * 10**12)
        record = usage_record(request_id, flops=flops, **{"tenant": "someone", **changes})
        return store_record(ledger, record, book, "test").seq

    return store_request
