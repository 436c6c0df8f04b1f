"""Nothing is lost or made: charges of the smallest unit, and usage in any order, batching and repetition."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_billing.budgets.settlement import settle
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.postings import Account, Line, balances, post
from polar_billing.ledger.records import Entry, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.prices.rating import Counts, rate
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.query import usage_rows
from polar_billing.statements.charges import charges_of
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import issue_statement
from polar_billing.statements.lines import PeriodUsage, Use, phases_of
from polar_billing.statements.statement import rounded_lines
from polar_billing.statements.tracing import recheck
from polar_billing.testing import usage_record
from polar_billing.values.money import currency_decimals, exact_sum, from_scaled, round_lines
from polar_billing.values.periods import Period
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from polar_sdk.usage import UsageRecord

MILLION = 10**6
CURRENCIES = ["JPY", "USD", "KWD"]
PERIOD = Period.month("2026-11")


def book(currency: str, price: Decimal) -> PriceBook:
    entry = {
        "effective_from": datetime(2026, 1, 1, tzinfo=UTC),
        "per_request": price,
        "tiers": {"standard": Decimal(1)},
    }
    return PriceBook.model_validate({"id": f"in {currency}", "currency": currency, "prices": [entry]})


def batches_of(tenant: str, count: int) -> Iterator[list[UsageRecord]]:
    """Records of one tenant, spread over the period."""
    first = usage_record("r0", tenant=tenant, started_at=datetime(2026, 11, 1, tzinfo=UTC))
    step = timedelta(days=30) / count
    for start in range(0, count, 1_000):
        numbers = range(start, min(start + 1_000, count))
        changes = ({"request_id": f"r{n}", "started_at": first.started_at + n * step} for n in numbers)
        yield [first.model_copy(update=change) for change in changes]


@pytest.mark.parametrize("part", [1_000, pytest.param(300_000, marks=[pytest.mark.long, pytest.mark.timeout(3_600)])])
def test_charges_of_the_smallest_unit_from_the_meter_to_the_books(store: Ledger, part: int) -> None:
    for currency in CURRENCIES:  # one tenant for each
        unit = from_scaled(1, currency_decimals(currency))
        meter = Meter(store, prices=book(currency, unit))
        for batch in batches_of(currency, part):
            assert {getattr(receipt, "cost", None) for receipt in meter.emit_many(batch)} == {unit}
        issued = issue_statement(store, currency, PERIOD, now=datetime(2026, 12, 2, tzinfo=UTC)).statement
        assert (issued.total, issued.rounding, issued.requests) == (unit * part, Decimal(0), part)
        with store.snapshot() as connection:
            booked = balances(connection, currency)
        assert booked[Account.RECEIVABLE, currency] == unit * part
        assert exact_sum(booked.values(), 12) == 0
        (row,) = usage_rows(store, Selection(currency), by=["tenant"])
        assert (row.cost, row.currency) == (unit * part, currency)
    assert verify_ledger(store).findings == []  # every statement follows from its usage, with residue 0


@pytest.mark.parametrize("currency", CURRENCIES)
@pytest.mark.parametrize("share", ["1", "0.5", "0.333333"])
def test_a_million_charges_on_a_statement_sum_to_their_exact_sum(currency: str, share: str) -> None:
    decimals = currency_decimals(currency)
    price = from_scaled(1, decimals) * Decimal(share)
    prices = book(currency, price)
    phases = phases_of(prices, "acme", PERIOD)
    use = Use(phases[0].stretches[0], "standard", "completed", Counts(MILLION))
    (line,) = charges_of(prices, PERIOD, phases, PeriodUsage((use,))).lines
    lines, rounding, total = rounded_lines([line], prices)
    assert rounding == 0
    assert total == lines[0].amount == round(price * MILLION, decimals)
    parts = round_lines([line.exact // 1_000] * 1_000, decimals)  # the same in a thousand lines, each rounded
    assert exact_sum((*parts.amounts, parts.residue), decimals) == parts.total == total


def test_the_ledger_books_every_currency_to_the_last_unit() -> None:
    with Ledger("sqlite://") as ledger, ledger.transaction() as connection:
        for currency in CURRENCIES:
            unit = from_scaled(1, currency_decimals(currency))
            amount = unit * MILLION
            lines = [Line(Account.RECEIVABLE, amount, currency), Line(Account.REVENUE, -amount + unit, currency)]
            lines.append(Line(Account.ROUNDING, -unit, currency))
            post(connection, "acme", "statement", currency, lines, datetime(2026, 12, 1, tzinfo=UTC))
        sums = balances(connection, "acme")
    for currency in CURRENCIES:
        assert exact_sum((value for (_, code), value in sums.items() if code == currency), 12) == 0
        assert sums[Account.RECEIVABLE, currency] == from_scaled(MILLION, currency_decimals(currency))


PLANS = PriceBook.example(EXAMPLE_PLANS)

TENANTS = ("globex", "initech", "someone")
NOW = datetime(2026, 12, 2, tzinfo=UTC)


@st.composite
def streams(draw: st.DrawFn) -> list[UsageRecord]:
    """Records of three tenants around one month, each with a request id of its own."""
    records = []
    for number in range(draw(st.integers(min_value=1, max_value=12))):
        total = draw(st.integers(min_value=0, max_value=2**62))
        outcome = draw(st.sampled_from(list(Outcome)))
        records.append(
            usage_record(
                f"r{number}",
                tenant=draw(st.sampled_from(TENANTS)),
                tier=draw(st.sampled_from(["economy", "standard", "premium", "gold", None])),
                outcome=outcome,
                flops=FlopUsage(head=total, total=total),
                tokens=TokenUsage(input=draw(st.integers(0, 10**9)), output=draw(st.integers(0, 10**9))),
                started_at=datetime(2026, 11, 1, tzinfo=UTC) + timedelta(hours=draw(st.integers(-5, 725))),
                decode_ns=draw(st.integers(0, 10**10)),
            )
        )
    return records


def store_batches(ledger: Ledger, batches: Iterable[list[UsageRecord]]) -> None:
    for batch in batches:
        ratings = [(record, rate(record, PLANS)) for record in batch]
        entries = [Entry(record, "test", PLANS, rating.cost, rating.unrated) for record, rating in ratings]
        assert not [receipt for receipt in ledger.append_many(entries, settle) if isinstance(receipt, Exception)]


def batched(data: st.DataObject, stream: list[UsageRecord]) -> list[list[UsageRecord]]:
    """The stream in another order, with repetitions, cut into batches anywhere."""
    repeated = data.draw(st.lists(st.sampled_from(stream), max_size=6))
    shuffled = data.draw(st.permutations([*stream, *repeated]))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(shuffled)), max_size=5)) | {0, len(shuffled)})
    return [list(shuffled[start:end]) for start, end in pairwise(cuts)]


def documents(ledger: Ledger, tenants: Iterable[str]) -> list[str]:
    return [draft_statement(ledger, tenant, PERIOD, book=PLANS).document for tenant in tenants]


@given(stream=streams(), data=st.data())
@settings(max_examples=12)
def test_permuted_repeated_and_rebatched_streams_give_identical_statements(
    stream: list[UsageRecord], data: st.DataObject
) -> None:
    tenants = sorted({record.tenant for record in stream})
    with Ledger("sqlite://") as one, Ledger("sqlite://") as other:
        store_batches(one, [stream])
        store_batches(other, batched(data, stream))
        assert documents(one, tenants) == documents(other, tenants)
        for tenant in tenants:
            first, second = (issue_statement(ledger, tenant, PERIOD, book=PLANS, now=NOW) for ledger in (one, other))
            assert first.statement.document == second.statement.document
            assert recheck(one, first) == recheck(other, second) == []


@pytest.mark.parametrize("order", [1, -1])
def test_every_store_makes_the_same_statement(store: Ledger, order: int) -> None:
    records = [
        usage_record(f"r{n}", tenant="globex", tier=["standard", "premium"][n % 2], decode_ns=n * 10**9)
        for n in range(30)
    ]
    store_batches(store, [records[::order][:7], records[::order]])
    (document,) = documents(store, ["globex"])
    with Ledger("sqlite://") as reference:
        store_batches(reference, [records])
        assert [document] == documents(reference, ["globex"])


@given(stream=streams(), data=st.data())
@settings(max_examples=12)
def test_usage_that_comes_late_is_charged_exactly_once(stream: list[UsageRecord], data: st.DataObject) -> None:
    """However usage is split into on time and late, exact charges add up to those of all of it."""
    split = data.draw(st.integers(0, len(stream)))
    tenants = sorted({record.tenant for record in stream})
    with Ledger("sqlite://") as split_ledger, Ledger("sqlite://") as whole_ledger:
        store_batches(whole_ledger, [stream])
        store_batches(split_ledger, [stream[:split]])
        for tenant in tenants:
            issue_statement(split_ledger, tenant, PERIOD, book=PLANS, now=NOW)
        store_batches(split_ledger, [stream[split:]])
        for tenant in tenants:
            _check_same_sum(split_ledger, whole_ledger, tenant)


def _check_same_sum(split: Ledger, whole: Ledger, tenant: str) -> None:
    following = Period.month("2026-12")
    end = datetime(2027, 1, 2, tzinfo=UTC)
    first = issue_statement(split, tenant, PERIOD, book=PLANS, now=NOW)
    second = issue_statement(split, tenant, following, book=PLANS, now=end)
    late = [line for line in second.statement.lines if line.corrects == first.statement.id]
    everything = draft_statement(whole, tenant, PERIOD, book=PLANS)
    unit = 10**-everything.decimals
    quantities: dict[tuple[object, ...], object] = {}
    for line in (*first.statement.lines, *late):
        key = (line.kind, line.tier, line.item, line.since, line.unit_price)
        quantities[key] = (quantities.get(key) or 0) + (line.quantity or 0)  # type: ignore[operator]
    for line in everything.lines:
        key = (line.kind, line.tier, line.item, line.since, line.unit_price)
        assert quantities.pop(key) == (line.quantity or 0)
    assert not any(quantities.values())
    amounts = sum(line.amount for line in (*first.statement.lines, *late))
    lines = len(first.statement.lines) + len(late) + len(everything.lines)
    assert abs(float(amounts - sum(line.amount for line in everything.lines))) <= lines * unit
