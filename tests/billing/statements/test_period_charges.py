"""Rating over a period, pure: plans applied to summed usage, held to fractions."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import Counts
from polar_billing.statements.bands import graduated, packages, volume
from polar_billing.statements.charges import Charges, charges_of
from polar_billing.statements.lines import Agreement, ExactLine, PeriodUsage, Phase, Use, phases_of
from polar_billing.values.money import EXACT_SCALE
from polar_billing.values.periods import Period

PERIOD = Period.month("2026-11")
SINCE = datetime(2026, 11, 1, tzinfo=UTC)
UNIT = Fraction(1, 10**EXACT_SCALE)
MULTIPLIERS = {"economy": "0.9", "standard": "1", "premium": "1.25"}
WEIGHTS: dict[str | None, Fraction] = {tier: Fraction(text) for tier, text in MULTIPLIERS.items()}
ENTRY = {
    "effective_from": "2026-01-01T00:00:00Z",
    "per_compute_unit": "0.4",
    "per_request": "0.001",
    "tiers": MULTIPLIERS,
}
tiers = st.sampled_from(["economy", "standard", "premium"])
counts = st.builds(
    Counts,
    requests=st.integers(min_value=1, max_value=10**7),
    flops=st.integers(min_value=0, max_value=10**24),
    tokens_input=st.integers(min_value=0, max_value=10**12),
    tokens_output=st.integers(min_value=0, max_value=10**12),
)


def plan_book(terms: dict[str, Any] | None = None, **changes: Any) -> PriceBook:
    """A book with one customer, acme, on a plan of these terms."""
    content: dict[str, Any] = {"id": "b", "currency": "USD", "prices": [ENTRY]}
    if terms is not None:
        content["plans"] = {"p": {"terms": [{"effective_from": "2026-01-01T00:00:00Z", **terms}]}}
        content["customers"] = [{"tenant": "acme", "plan": "p", "effective_from": "2026-01-01T00:00:00Z"}]
    return PriceBook.model_validate({**content, **changes})


def charge(book: PriceBook, used: list[tuple[str | None, Counts]], outcome: str = "completed", **facts: Any) -> Charges:
    phases = phases_of(book, "acme", PERIOD)
    stretch = phases[0].stretches[0]
    uses = tuple(Use(stretch, tier, outcome, count) for tier, count in used)
    return charges_of(book, PERIOD, phases, PeriodUsage(uses, **facts))


def total(charges: Charges) -> Fraction:
    return sum(line.exact for line in charges.lines) * UNIT


def of_kind(charges: Charges, kind: str) -> list[ExactLine]:
    return [line for line in charges.lines if line.kind == kind]


GRADUATED = {"per": "compute_units", "model": "graduated"}
BANDS = [{"up_to": "100", "unit_price": "0.4"}, {"up_to": "1000", "unit_price": "0.3"}, {"unit_price": "0.2"}]


def banded(units: Fraction) -> Fraction:
    first, second = min(units, Fraction(100)), max(Fraction(0), min(units, Fraction(1000)) - 100)
    third = max(Fraction(0), units - 1000)
    return first * Fraction("0.4") + second * Fraction("0.3") + third * Fraction("0.2")


@given(used=st.lists(st.tuples(tiers, counts), max_size=6))
def test_plain_rates_charge_what_requests_would_have_been_charged(used: list[tuple[str | None, Counts]]) -> None:
    expected = Fraction(0)
    for tier, count in used:
        compute = Fraction(count.flops, 10**12) * Fraction("0.4")
        expected += (compute + count.requests * Fraction("0.001")) * WEIGHTS[tier]
    assert total(charge(plan_book(), used)) == expected


@given(used=st.lists(st.tuples(tiers, counts), max_size=6), pool=st.booleans())
def test_graduated_bands_are_exact_by_tier_and_pooled(used: list[tuple[str | None, Counts]], pool: bool) -> None:
    book = plan_book({"items": [{**GRADUATED, "bands": BANDS, "pool": pool}]})
    charges = charge(book, used)
    units = {tier: Fraction(sum(c.flops for t, c in used if t == tier), 10**12) for tier in WEIGHTS}
    if pool:
        expected = banded(sum((units[tier] * WEIGHTS[tier] for tier in WEIGHTS), Fraction(0)))
    else:
        expected = sum((banded(units[tier]) * WEIGHTS[tier] for tier in WEIGHTS), Fraction(0))
    requests = sum((count.requests * Fraction("0.001") * WEIGHTS[tier] for tier, count in used), Fraction(0))
    assert total(charges) == expected + requests
    for line in charges.lines:
        assert line.quantity is not None
        assert line.unit_price is not None
        assert Fraction(line.quantity) * Fraction(line.unit_price) == line.exact * UNIT


@given(
    steps=st.lists(st.tuples(tiers, st.integers(min_value=0, max_value=10**15)), min_size=2, max_size=8),
    pool=st.booleans(),
)
def test_more_usage_never_costs_less_under_graduated_bands(steps: list[tuple[str, int]], pool: bool) -> None:
    book = plan_book({"items": [{**GRADUATED, "bands": BANDS, "pool": pool}]})
    used: list[tuple[str | None, Counts]] = []
    costs = []
    for tier, flops in steps:
        used.append((tier, Counts(1, flops)))
        costs.append(total(charge(book, used)))
    assert all(less <= more for less, more in pairwise(costs))


def test_volume_and_packages_by_tier_and_pooled() -> None:
    volume = {
        "per": "requests",
        "model": "volume",
        "bands": [{"up_to": "10", "unit_price": "1"}, {"unit_price": "0.5"}],
    }
    package = {"per": "compute_units", "model": "package", "size": "10", "price": "7"}
    used: list[tuple[str | None, Counts]] = [
        ("standard", Counts(8, 15 * 10**12)),
        ("premium", Counts(8, 4 * 10**12)),
    ]
    apart = charge(plan_book({"items": [volume, package]}), used)
    assert total(apart) == 8 * 1 + Fraction("1.25") * 8 + 2 * 7 + Fraction("1.25") * 7
    pooled = charge(plan_book({"items": [{**volume, "pool": True}, {**package, "pool": True}]}), used)
    assert total(pooled) == 18 * Fraction("0.5") + 2 * 7  # 8 + 8 × 1.25 requests; 15 + 5 CU
    assert {line.kind for line in pooled.lines} == {"pool"}


@given(used=st.lists(st.tuples(tiers, counts), max_size=4))
def test_discount_minimum_and_fee(used: list[tuple[str | None, Counts]]) -> None:
    plain = total(charge(plan_book(), used))
    charges = charge(plan_book({"discount_percent": "12.5", "minimum": "1000000", "flat_fee": "19"}), used)
    assert total(charges) == max(plain * Fraction(7, 8), Fraction(1_000_000)) + 19
    assert sum(line.exact for line in of_kind(charges, "discount")) * UNIT == -plain / 8


def test_a_fee_over_a_change_of_terms_is_split_by_time_and_sums_to_itself() -> None:
    terms = {"flat_fee": "10", "minimum": "100"}
    later = {"effective_from": "2026-11-11T00:00:00Z", "flat_fee": "40"}
    content = plan_book(terms).model_dump(mode="json")
    content["plans"]["p"]["terms"].append(later)
    phases = phases_of(PriceBook.model_validate(content), "acme", PERIOD)
    assert [(phase.since.day, phase.until.day) for phase in phases] == [(1, 11), (11, 1)]
    charges = charges_of(PriceBook.model_validate(content), PERIOD, phases, PeriodUsage())
    fees = [line.exact for line in of_kind(charges, "fee")]
    tenth = 10**EXACT_SCALE
    assert fees == [(10 * tenth + 1) // 3, (80 * tenth + 1) // 3]  # 10 and 20 days of 30, to 10^-30
    content["plans"]["p"]["terms"][1]["flat_fee"] = "10"
    same = PriceBook.model_validate(content)
    parts = of_kind(charges_of(same, PERIOD, phases_of(same, "acme", PERIOD), PeriodUsage()), "fee")
    assert sum(line.exact for line in parts) == 10 * tenth


def test_windows_partition_the_period_whatever_changes_within() -> None:
    content = plan_book({"flat_fee": "1"}).model_dump(mode="json")
    content["prices"].append(
        {**ENTRY, "effective_from": "2026-11-05T00:00:00Z", "effective_until": "2026-11-07T00:00:00Z"}
    )
    content["customers"].append({"tenant": "acme", "effective_from": "2026-11-06T00:00:00Z"})
    phases = phases_of(PriceBook.model_validate(content), "acme", PERIOD)
    assert [phase.plan for phase in phases] == ["p", None]
    stretches = [stretch for phase in phases for stretch in phase.stretches]
    assert (stretches[0].since, stretches[-1].until) == (PERIOD.since, PERIOD.until)
    assert all(stretch.until == following.since for stretch, following in pairwise(stretches))
    assert [stretch.entry is None for stretch in stretches] == [False, False, False, True]


PROMISE = {"premium": {"latency_ms_p95_max": 100, "agreement_min": "0.98", "credit_percent": "10"}}


def agreement_of(agreed: int, compared: int, weight: int = 10**12) -> Agreement:
    """Audits, of which the lost ones weigh 1 and the others `weight`."""
    lost = (compared - agreed) * 10**12
    return Agreement(agreed, compared, agreed * weight, agreed * weight + lost)


MISSED = [
    (101, None, True),
    (100, None, False),
    (None, agreement_of(979, 1000), True),
    (None, agreement_of(980, 1000), False),
    (101, agreement_of(1, 1000), True),
    (None, agreement_of(0, 0), False),
    (None, agreement_of(0, 99), False),  # too few to say
    (None, agreement_of(0, 100), True),
    (None, agreement_of(980, 1000, weight=10**12 - 1), True),  # those that agreed stand for fewer requests
    (None, None, False),
]


@pytest.mark.parametrize(("milliseconds", "agreement", "missed"), MISSED)
@pytest.mark.parametrize("pool", [False, True])
def test_a_missed_promise_gives_a_share_of_the_tiers_charges_back_once(
    milliseconds: int | None, agreement: Agreement | None, missed: bool, pool: bool
) -> None:
    item = {"per": "compute_units", "model": "graduated", "pool": pool, "bands": [{"unit_price": "0.4"}]}
    book = plan_book({"discount_percent": "50", "promises": PROMISE, "items": [item]})
    used: list[tuple[str | None, Counts]] = [
        ("standard", Counts(10, 5 * 10**12)),
        ("premium", Counts(10, 8 * 10**12)),
    ]
    charges = charge(
        book,
        used,
        latency_ns_p95={} if milliseconds is None else {(SINCE, "premium"): milliseconds * 10**6},
        agreement={} if agreement is None else {(SINCE, "premium"): agreement},
    )
    assert len(charges.unsettled) == (agreement is not None and agreement.compared < 100)
    given_back = of_kind(charges, "service credit")
    premium = (8 * Fraction("0.4") + 10 * Fraction("0.001")) * Fraction("1.25") / 2
    assert [line.exact * UNIT for line in given_back] == ([-premium / 10] if missed else [])
    assert all(line.tier == "premium" and line.note for line in given_back)


def test_what_has_no_price_is_unrated_and_in_no_line() -> None:
    charges = charge(plan_book(), [("gold", Counts(3, 10)), (None, Counts(2, 10)), ("standard", Counts(1, 10**12))])
    assert charges.unrated == {
        "price book 'b' of 2026-01-01 has no price for tier 'gold'": 3,
        "price book 'b' of 2026-01-01 has no price for a program named by hand": 2,
    }
    assert total(charges) == Fraction("0.401")
    early = Period(datetime(2025, 11, 1, tzinfo=UTC), datetime(2025, 12, 1, tzinfo=UTC))
    phases = phases_of(plan_book(), "acme", early)
    none = charges_of(
        plan_book(), early, phases, PeriodUsage((Use(phases[0].stretches[0], "standard", "completed", Counts(4)),))
    )
    assert none.lines == ()
    assert list(none.unrated.values()) == [4]


def test_a_free_outcome_keeps_its_quantity_and_fills_no_band() -> None:
    book = plan_book({"items": [{**GRADUATED, "bands": BANDS}]}, free_outcomes=["error"])
    charges = charge(book, [("standard", Counts(2, 7 * 10**12))], outcome="error")
    assert [(line.item, line.quantity, line.exact, line.outcome) for line in charges.lines] == [
        ("compute (error, free)", Decimal(7), 0, "error"),
        ("requests (error, free)", Decimal(2), 0, "error"),
    ]


@given(
    used=st.lists(st.tuples(st.sampled_from(["economy", "standard", "premium", "gold", None]), counts), max_size=6),
    data=st.data(),
)
def test_neither_order_nor_batching_of_the_sums_matters(
    used: list[tuple[str | None, Counts]], data: st.DataObject
) -> None:
    book = plan_book({"items": [{**GRADUATED, "bands": BANDS, "pool": True}], "discount_percent": "3.7"})
    shuffled = data.draw(st.permutations(used))
    assert charge(book, list(shuffled)) == charge(book, used)


def test_windows_know_the_plan(book: PriceBook) -> None:
    phase: Phase = phases_of(book, "acme", PERIOD)[0]
    assert phase.plan is None
    assert phase.terms is None


quantities = st.integers(min_value=0, max_value=10**24)
prices = st.integers(min_value=0, max_value=10**18)


@st.composite
def band_lists(draw: st.DrawFn) -> list[tuple[int | None, int]]:
    bounds = sorted(draw(st.sets(st.integers(min_value=1, max_value=10**24), max_size=6)))
    return [(bound, draw(prices)) for bound in [*bounds, None]]


def cost(quantity: int, bands: list[tuple[int | None, int]]) -> int:
    return sum(part * price for part, price in graduated(quantity, bands))


@given(quantity=quantities, bands=band_lists())
def test_graduated_parts_are_what_lies_in_each_band(quantity: int, bands: list[tuple[int | None, int]]) -> None:
    lower, expected = 0, 0
    for bound, price in bands:
        upper = quantity if bound is None else bound
        expected += max(0, min(quantity, upper) - lower) * price
        lower = upper
    assert cost(quantity, bands) == expected
    assert sum(part for part, _ in graduated(quantity, bands)) == quantity


@given(bands=band_lists(), points=st.lists(quantities, min_size=2, max_size=10))
def test_graduated_cost_is_monotone(bands: list[tuple[int | None, int]], points: list[int]) -> None:
    costs = [cost(point, bands) for point in sorted(points)]
    assert all(less <= more for less, more in pairwise(costs))


@given(bands=band_lists(), quantity=quantities)
def test_graduated_cost_is_continuous_also_where_bands_meet(bands: list[tuple[int | None, int]], quantity: int) -> None:
    highest = max(price for _, price in bands)
    for point in [quantity, *(bound for bound, _ in bands if bound is not None)]:
        step = cost(point + 1, bands) - cost(point, bands)
        assert 0 <= step <= highest  # one more unit never costs more than one unit
        assert step in {price for _, price in bands}


@given(bands=band_lists(), parts=st.lists(quantities, min_size=1, max_size=8))
def test_graduated_cost_is_additive_across_splits(bands: list[tuple[int | None, int]], parts: list[int]) -> None:
    def between(start: int, end: int) -> int:
        """A stretch priced by itself, in bands whose bounds are counted from its start."""
        moved = [(None if bound is None else max(0, bound - start), price) for bound, price in bands]
        return cost(end - start, moved)

    ends = [sum(parts[: place + 1]) for place in range(len(parts))]
    assert sum(between(start, end) for start, end in pairwise([0, *ends])) == cost(ends[-1], bands)


@given(bands=band_lists(), quantity=quantities)
def test_volume_gives_everything_the_price_of_the_last_unit(bands: list[tuple[int | None, int]], quantity: int) -> None:
    parts = list(volume(quantity, bands))
    if quantity == 0:
        assert parts == []
        return
    last_unit = cost(quantity, bands) - cost(quantity - 1, bands)
    assert parts == [(quantity, last_unit)]


@given(quantity=quantities, size=st.integers(min_value=1, max_value=10**20))
def test_every_started_package_counts(quantity: int, size: int) -> None:
    blocks = packages(quantity, size)
    assert blocks * size >= quantity
    assert (blocks - 1) * size < quantity or quantity == 0
    assert blocks == -((-Fraction(quantity, size)).__floor__())
