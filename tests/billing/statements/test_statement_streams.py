"""Any order, duplication and batching of the same usage gives the same statement, to the byte."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_billing.budgets.settlement import settle
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import Entry
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.prices.rating import rate
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import issue_statement
from polar_billing.statements.tracing import recheck
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

PLANS = PriceBook.example(EXAMPLE_PLANS)
PERIOD = Period.month("2026-11")
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
