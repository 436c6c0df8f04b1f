"""`quote`: what a request that keeps to its bounds costs is never more, and at the bounds exactly that."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_billing.errors import AmountError
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.prices.quote import quote
from polar_billing.prices.rating import rate
from polar_billing.testing import usage_record
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord

PLANS = PriceBook.example(EXAMPLE_PLANS)
AT = datetime(2026, 11, 15, 12, tzinfo=UTC)


def record(tenant: str, tier: str | None, flops: int, inputs: int, outputs: int, outcome: Outcome) -> UsageRecord:
    return usage_record(
        tenant=tenant,
        tier=tier,
        outcome=outcome,
        started_at=AT,
        flops=FlopUsage(head=flops, total=flops),
        tokens=TokenUsage(input=inputs, output=outputs),
    )


@given(
    tenant=st.sampled_from(["acme", "globex", "initech", "someone"]),
    tier=st.sampled_from(["economy", "standard", "premium", "exact", "gold", None]),
    bounds=st.tuples(*(st.integers(min_value=0, max_value=10**16) for _ in range(3))),
    shares=st.tuples(*(st.integers(min_value=0, max_value=100) for _ in range(3))),
    outcome=st.sampled_from(list(Outcome)),
)
def test_no_request_within_its_bounds_costs_more(
    tenant: str,
    tier: str | None,
    bounds: tuple[int, int, int],
    shares: tuple[int, int, int],
    outcome: Outcome,
) -> None:
    most = quote(PLANS, tenant, tier, *bounds, AT)
    flops, inputs, outputs = (bound * share // 100 for bound, share in zip(bounds, shares, strict=True))
    less = rate(record(tenant, tier, flops, inputs, outputs, outcome), PLANS)
    exactly = rate(record(tenant, tier, *bounds, Outcome.COMPLETED), PLANS)
    assert most.amount == exactly.cost
    assert most.unrated == exactly.unrated
    if most.amount is not None:
        assert less.cost is not None
        assert less.cost <= most.amount


def test_it_covers_every_rate_that_may_be_in_force_when_the_request_runs() -> None:
    change = AT + timedelta(seconds=30)
    first = {"effective_from": "2026-01-01T00:00:00Z", "per_request": "1", "tiers": {"standard": "1"}}
    book = PriceBook.model_validate(
        {
            "id": "b",
            "currency": "USD",
            "prices": [first, {**first, "effective_from": change.isoformat(), "per_request": "3"}],
        }
    )
    assert quote(book, "acme", "standard", 0, 0, 0, AT).amount == 1
    assert quote(book, "acme", "standard", 0, 0, 0, AT, until=change - timedelta(microseconds=1)).amount == 1
    assert quote(book, "acme", "standard", 0, 0, 0, AT, until=change).amount == 3
    ended = PriceBook.model_validate(
        {**book.model_dump(mode="json"), "prices": [{**first, "effective_until": change.isoformat()}]}
    )
    gap = quote(ended, "acme", "standard", 0, 0, 0, AT, until=change)
    assert gap.amount is None
    assert gap.unrated is not None


def test_a_plan_with_rates_of_its_own_is_quoted_by_them() -> None:
    assert quote(PLANS, "initech", "standard", 10**12, 0, 0, AT).amount == Decimal("0.00036")
    assert quote(PLANS, "acme", "standard", 10**12, 0, 0, AT).amount == Decimal("0.00041")
    unpriced = quote(PLANS, "initech", "economy", 10**12, 0, 0, AT)
    assert unpriced.amount is None
    assert "no price for tier 'economy'" in str(unpriced.unrated)


@pytest.mark.parametrize("bounds", [(-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_negative_bounds_are_refused(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(AmountError, match="is negative"):
        quote(PLANS, "acme", "standard", *bounds, AT)
