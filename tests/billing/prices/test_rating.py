from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_billing.prices.book import PriceBook
from polar_billing.prices.entries import PriceEntry, TokenPrices
from polar_billing.prices.rating import cost_of, rate
from polar_billing.testing import usage_record
from polar_billing.values.money import EXACT_SCALE, STORED_MAX, STORED_SCALE, exact_sum
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage

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
            "price book 'polar-example' has no price at 2023-12-31T23:00:00+00:00",
        ),
    ],
)
def test_use_without_a_price_is_unrated_never_free(book: PriceBook, changes: dict[str, Any], reason: str) -> None:
    rating = rate(usage_record(**changes), book)
    assert rating.unrated == reason
    assert rating.cost is None
    assert cost_of(usage_record(**changes), book) == (None, reason)
    assert rating.lines == ()


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
