"""Rating of one request, and its bound before it runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_billing.errors import AmountError
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.prices.entries import PriceEntry, TokenPrices
from polar_billing.prices.quote import quote
from polar_billing.prices.rating import cost_of, rate
from polar_billing.testing import usage_record
from polar_billing.values.money import EXACT_SCALE, STORED_MAX, STORED_SCALE, exact_sum
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord

START = datetime(2026, 1, 1, tzinfo=UTC)


def decimals(places: int, most: int) -> st.SearchStrategy[Decimal]:
    return st.integers(min_value=0, max_value=most * 10**places).map(lambda units: Decimal(f"{units}E-{places}"))


prices = st.none() | decimals(12, 1000)
entries = st.builds(
    PriceEntry,
    effective_from=st.just(START),
    per_compute_unit=decimals(12, 1000),
    per_million_input_tokens=prices,
    per_million_output_tokens=prices,
    per_request=prices,
    tiers=st.fixed_dictionaries({"standard": decimals(6, 100)}),
    token_reference=st.builds(
        TokenPrices, per_million_input_tokens=decimals(12, 10), per_million_output_tokens=decimals(12, 10)
    ),
)
flops = st.integers(min_value=0, max_value=2**62)
tokens = st.integers(min_value=0, max_value=10**9)


def book_of(*entries: PriceEntry, **changes: object) -> PriceBook:
    return PriceBook.model_validate({"id": "b", "currency": "USD", "prices": entries, **changes})


@given(entry=entries, total=flops, identity=flops, inputs=tokens, outputs=tokens)
def test_amounts_are_exact(entry: PriceEntry, total: int, identity: int, inputs: int, outputs: int) -> None:
    record = usage_record(
        flops=FlopUsage(head=total, total=total),
        identity_flops=identity,
        tokens=TokenUsage(input=inputs, output=outputs),
    )
    rating = rate(record, book_of(entry))

    def price(value: Decimal | None) -> Fraction:
        return Fraction(value or 0)

    other = (
        inputs * price(entry.per_million_input_tokens) / 10**6
        + outputs * price(entry.per_million_output_tokens) / 10**6
        + price(entry.per_request)
    )
    multiplier = Fraction(entry.tiers["standard"])
    unit = Fraction(1, 10**EXACT_SCALE)
    executed = (Fraction(total, 10**12) * price(entry.per_compute_unit) + other) * multiplier
    full_depth = (Fraction(identity, 10**12) * price(entry.per_compute_unit) + other) * multiplier
    most = Fraction(STORED_MAX, 10**STORED_SCALE)
    if rating.unrated is not None:  # only where no receipt can hold the cost, which is then unknown
        assert executed > most
        assert (rating.lines, rating.cost) == ((), None)
        assert cost_of(record, book_of(entry)) == (None, rating.unrated)
        return
    assert round(executed, STORED_SCALE) <= most
    assert sum(line.exact for line in rating.lines) * unit == executed
    assert sum(line.exact for line in rating.full_depth_lines) * unit == full_depth
    assert entry.token_reference is not None
    assert rating.per_token_lines is not None
    assert sum(line.exact for line in rating.per_token_lines) * unit == (
        inputs * price(entry.token_reference.per_million_input_tokens)
        + outputs * price(entry.token_reference.per_million_output_tokens)
    ) / Fraction(10**6)
    for line in rating.lines:
        assert Fraction(line.quantity) * Fraction(line.unit_price) == line.exact * unit
    rounded = rating.rounded
    assert exact_sum([*rounded.amounts, rounded.residue], 12) == rounded.total == rating.cost
    assert cost_of(record, book_of(entry)) == (rating.cost, None)


@given(entry=entries, points=st.lists(flops, min_size=2, max_size=20))
def test_cost_never_falls_when_more_is_executed(entry: PriceEntry, points: list[int]) -> None:
    """A cost beyond what the ledger holds is unknown; it is then beyond it for everything that executes more."""
    book = book_of(entry)
    ratings = [rate(usage_record("r", flops=FlopUsage(head=total, total=total)), book) for total in sorted(points)]
    costs = [rating.cost for rating in ratings if rating.cost is not None]
    assert all(less <= more for less, more in pairwise(costs))
    assert [rating.cost for rating in ratings] == [*costs, *[None] * (len(ratings) - len(costs))]
    assert all("a receipt holds at most" in rating.unrated for rating in ratings if rating.unrated is not None)


def test_tiers_multiply_every_price(book: PriceBook) -> None:
    record = usage_record("r")
    costs = {}
    for tier in book.prices[0].tiers:
        rating = rate(record.model_copy(update={"tier": tier}), book)
        costs[tier] = rating.lines[0].exact
    assert costs["economy"] * 10 == costs["standard"] * 9
    assert costs["premium"] * 4 == costs["standard"] * 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tier": "gold"}, "price book 'polar-example' of 2024-01-01 has no price for tier 'gold'"),
        (
            {"started_at": datetime(2023, 12, 31, 23, tzinfo=UTC)},
            "price book 'polar-example' has no price until 2024-01-01T00:00:00+00:00",
        ),
    ],
)
def test_use_without_a_price_is_unrated_never_free(book: PriceBook, changes: dict[str, Any], reason: str) -> None:
    rating = rate(usage_record(**changes), book)
    assert rating.unrated == reason
    assert rating.cost is None
    assert cost_of(usage_record(**changes), book) == (None, reason)
    assert rating.lines == ()


def test_uses_in_one_gap_share_a_reason() -> None:
    rates: Any = {"per_request": Decimal(1), "tiers": {"standard": Decimal(1)}}
    first = PriceEntry(effective_from=START, effective_until=START + timedelta(days=1), **rates)
    book = book_of(first, PriceEntry(effective_from=START + timedelta(days=9), **rates))
    days = [rate(usage_record("r", started_at=START + timedelta(days=day)), book).unrated for day in range(-2, 10)]
    before, gap = f"until {START.isoformat()}", f"until {(START + timedelta(days=9)).isoformat()}"
    assert [None if day is None else day[-len(gap) :] for day in days] == [before] * 2 + [None] + [gap] * 8 + [None]


def test_a_program_named_by_hand_needs_a_price_of_its_own() -> None:
    entry = PriceEntry(effective_from=START, per_request=Decimal(1), tiers={"standard": Decimal(1)})
    unpriced = rate(usage_record(tier=None), book_of(entry))
    assert unpriced.unrated is not None
    assert "a program named by hand" in unpriced.unrated
    priced = rate(usage_record(tier=None), book_of(entry.model_copy(update={"untiered": Decimal(2)})))
    assert priced.cost == 2


def test_a_free_outcome_keeps_its_quantity_and_costs_nothing(book: PriceBook) -> None:
    record = usage_record(outcome=Outcome.ERROR, error="DeviceError")
    rating = rate(record, book)
    assert [(line.item.name, line.count, line.exact) for line in rating.lines] == [
        ("compute (error, free)", record.flops.total, 0)
    ]
    assert rating.cost == 0
    assert cost_of(record, book) == (Decimal(0), None)
    assert rate(record.model_copy(update={"outcome": Outcome.CANCELLED}), book).cost != 0


def test_the_price_of_the_time_of_use_holds_to_the_microsecond() -> None:
    entry = PriceEntry(effective_from=START, per_request=Decimal(1), tiers={"standard": Decimal(1)})
    change = START + timedelta(days=31)
    book = book_of(entry, entry.model_copy(update={"effective_from": change, "per_request": Decimal(3)}))
    before = usage_record(started_at=change - timedelta(microseconds=1))
    assert rate(before, book).cost == 1
    assert rate(usage_record(started_at=change), book).cost == 3


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
    with pytest.raises(AmountError):
        quote(PLANS, "acme", "standard", *bounds, AT)
