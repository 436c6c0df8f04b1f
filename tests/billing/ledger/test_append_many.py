"""Many records at once: whatever the order, the batches and the repetitions, the same content is stored."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from polar_billing.budgets.settlement import settle
from polar_billing.errors import ConflictError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Entry, Selection, StoredUsage
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.query import usage_rows
from polar_billing.statements.retention import prune
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import Outcome, UsageRecord

EVERYTHING = Selection(ALL_TENANTS)
START = datetime(2026, 10, 31, 21, tzinfo=UTC)

texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), max_size=5)
records = st.builds(
    usage_record,
    st.integers(min_value=0, max_value=10**6).map(str),
    tenant=st.sampled_from(["acme", "globex"]),
    tier=st.sampled_from(["economy", "standard", "gold", None]),
    path=st.lists(st.integers(min_value=0, max_value=5), max_size=8),
    output=st.integers(min_value=0, max_value=50),
    drafts=st.sampled_from([(0, 0, 0), (3, 1, 10**9), (5, 0, 7), (2, 2, 0)]),
    outcome=st.sampled_from(Outcome),
    tags=st.dictionaries(texts.map(str.strip), texts, max_size=3),
    started_at=st.integers(min_value=0, max_value=500).map(lambda n: START + timedelta(minutes=n, microseconds=n)),
)
streams = st.lists(records, max_size=10, unique_by=lambda record: (record.tenant, record.request_id))
slow = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(records)
@slow
def test_the_content_hash_covers_every_field_of_a_record(record: UsageRecord) -> None:
    text = json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    entry = Entry(record, "polar", PriceBook.example(), None)
    assert entry.content_hash == hashlib.sha256(text.encode()).hexdigest()


def content(ledger: Ledger) -> list[str]:
    return sorted(f"{one.record.model_dump_json()} {one.cost} {one.unrated}" for one in ledger.read(EVERYTHING))


@given(data=st.data(), emitted=streams)
@slow
def test_permuted_repeated_and_rebatched_streams_give_the_same_content(
    data: st.DataObject, emitted: list[UsageRecord]
) -> None:
    repeated = emitted + data.draw(st.lists(st.sampled_from(emitted))) if emitted else []
    found = set()
    for stream in (emitted, data.draw(st.permutations(repeated))):
        with Ledger("sqlite://") as ledger:
            meter = Meter(ledger)
            left = list(stream)
            while left:
                size = data.draw(st.integers(min_value=1, max_value=len(left)))
                meter.emit_many(left[:size])
                left = left[size:]
            assert verify_ledger(ledger).findings == []
            rows = [row.model_dump_json() for row in usage_rows(ledger, EVERYTHING, by=["tenant", "tier", "day"])]
            found.add("\n".join(content(ledger) + rows))
    assert len(found) == 1


@given(
    emitted=streams,
    zone=st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata", "Asia/Kathmandu", "Pacific/Chatham"]),
    cut=st.integers(min_value=0, max_value=500),
    by=st.lists(st.sampled_from(["tenant", "tier", "model", "source", "outcome", "day", "month"]), unique=True),
)
@slow
def test_sums_by_hour_answer_as_usage_itself_does(
    emitted: list[UsageRecord], zone: str, cut: int, by: list[str]
) -> None:
    assume(not any("none" in record.tags for record in emitted))  # or the rows by record would be split by it
    with Ledger("sqlite://") as ledger:
        Meter(ledger).emit_many(emitted)
        for period in (
            Period(zone=zone),
            Period(START + timedelta(minutes=cut), None, zone),
            Period.month("2026-11", zone),
        ):
            for selection in (Selection("acme", period), Selection(ALL_TENANTS, period, "economy")):
                quick = usage_rows(ledger, selection, by=by)
                assert quick == usage_rows(ledger, selection, by=by, rollups=False)
                by_record = usage_rows(ledger, selection, by=[*by, "tag:none"])
                assert [row.model_copy(update={"group": {}}) for row in quick] == [
                    row.model_copy(update={"group": {}}) for row in by_record
                ]


def test_a_conflict_keeps_none_of_the_others_out(store: Ledger) -> None:
    meter = Meter(store)
    meter.emit(usage_record("taken"))
    changed = usage_record("taken", output=9)
    batch = [usage_record("a"), changed, usage_record("a"), usage_record("b"), usage_record("taken")]
    first, refused, again, other, same = meter.emit_many(batch)
    assert isinstance(refused, ConflictError)
    assert first == again
    assert isinstance(other, StoredUsage)
    assert isinstance(same, StoredUsage)
    assert sorted(one.record.request_id for one in store.read(EVERYTHING)) == ["a", "b", "taken"]
    assert store.append_many([], settle) == []


def test_a_pruned_request_is_still_known(store: Ledger) -> None:
    meter = Meter(store)
    old, young = (
        usage_record("old", tags={"secret": "x"}),
        usage_record("young", started_at=datetime(2027, 1, 1, tzinfo=UTC)),
    )
    receipt = meter.emit(old)
    meter.emit_many([young, usage_record("of another", tenant="globex")])
    before = usage_rows(store, EVERYTHING)
    with store.transaction() as connection:
        assert prune(connection, "acme", datetime(2026, 12, 1, tzinfo=UTC)) == 1
        assert prune(connection, "acme", datetime(2026, 12, 1, tzinfo=UTC)) == 0
    assert sorted(one.record.request_id for one in store.read(EVERYTHING)) == ["of another", "young"]
    assert usage_rows(store, EVERYTHING) == before  # totals stay
    assert meter.emit(old) == receipt
    with pytest.raises(ConflictError):
        meter.emit(old.model_copy(update={"decode_ns": 1}))
    assert verify_ledger(store).findings == []
