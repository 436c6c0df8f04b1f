"""The promises of a ledger, checked on every backend."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.errors import ConflictError
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import rate
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.errors import SinkError
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord, VisitUsage
from tests.billing.storing import store_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import StoredUsage

    Put = Callable[[Ledger, UsageRecord], StoredUsage]

EVERYTHING = Selection(ALL_TENANTS)
NOON = datetime(2026, 11, 15, 12, tzinfo=UTC)
BIG = 2**63 - 1

pytestmark = pytest.mark.parametrize("store", ["sqlite-file", "sqlite-memory", "postgresql"], indirect=True)


def extremes() -> list[UsageRecord]:
    return [
        usage_record("plain"),
        usage_record("by hand", tier=None, path=(0, 1, 2, 2, 5), tags={"team": "search", "ä": 'ö "quoted" \'; --'}),
        usage_record("cached", outcome=Outcome.CACHED, program=""),
        usage_record("error", outcome=Outcome.ERROR, error="DeviceError", visits=VisitUsage()),
        usage_record(
            "largest",
            flops=FlopUsage(head=BIG, total=BIG),
            identity_flops=BIG,
            tokens=TokenUsage(input=BIG, cached=BIG, output=BIG),
            visits=VisitUsage(prefill=(BIG, 0), decode=(0, BIG)),
            kv_bytes_peak=BIG,
            queue_ns=BIG,
            started_at=datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
            tier="unknown",
        ),
        usage_record("earliest", started_at=datetime(1, 1, 1, tzinfo=UTC)),
        usage_record("tenant", tenant="x" * 200, program="0-29 " * 1000),
    ]


def test_a_new_store_is_empty_and_can_be_written(store: Ledger) -> None:
    assert list(store.read(EVERYTHING)) == []
    assert store.price_books() == {}
    store.check()
    assert list(store.read(EVERYTHING)) == []


def test_records_come_back_as_they_went_in(store: Ledger, put: Put) -> None:
    before = datetime.now(UTC)
    written = {record.request_id: put(store, record) for record in extremes()}
    for stored in store.read(EVERYTHING):
        first = written.pop(stored.record.request_id)
        assert stored == first
        assert type(stored.record.outcome) is Outcome
        assert UsageRecord.model_validate_json(stored.record.model_dump_json()) == stored.record
        assert before <= stored.stored_at <= datetime.now(UTC)
    assert not written


def test_a_receipt_stays_with_its_record(store: Ledger, put: Put, book: PriceBook) -> None:
    rated, unrated = put(store, usage_record("a")), put(store, usage_record("b", tier="gold"))
    read = {stored.record.request_id: stored for stored in store.read(EVERYTHING)}
    assert read["a"].cost == rated.cost == rate(rated.record, book).cost
    assert (read["b"].cost, read["b"].unrated) == (None, unrated.unrated)
    assert store.price_books() == {book.content_hash: book}


def test_an_identical_replay_changes_nothing(store: Ledger, put: Put) -> None:
    record = usage_record("same", tags={"a": "1", "b": "2"})
    first = put(store, record)
    again = put(store, usage_record("same", tags={"b": "2", "a": "1"}))
    assert again == first
    assert list(store.read(EVERYTHING)) == [first]


def test_a_replay_keeps_the_receipt_of_the_first_time(store: Ledger, put: Put, book: PriceBook) -> None:
    record = usage_record("same")
    first = put(store, record)
    dearer = book.model_copy(update={"id": "dearer"})
    dearer = PriceBook.model_validate(dearer.model_dump())
    again = store_record(store, record, dearer, "test")
    assert again == first
    assert set(store.price_books()) == {book.content_hash}


@pytest.mark.parametrize(
    "change",
    [
        {"tier": "premium"},
        {"identity_flops": 1},
        {"tags": {"a": "1"}},
        {"started_at": NOON + timedelta(microseconds=1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_same_id_with_other_content_is_a_conflict(store: Ledger, put: Put, change: dict[str, Any]) -> None:
    first = put(store, usage_record("same"))
    with pytest.raises(ConflictError, match="same") as caught:
        put(store, usage_record("same", **change))
    assert isinstance(caught.value, SinkError)
    assert caught.value.exit_code == 2
    assert list(store.read(EVERYTHING)) == [first]


def test_ids_are_unique_per_tenant_and_source_only(store: Ledger, put: Put, book: PriceBook) -> None:
    record = usage_record("same")
    put(store, record)
    put(store, usage_record("same", tenant="globex"))
    store_record(store, record, book, "elsewhere")
    assert len(list(store.read(EVERYTHING))) == 3


def test_seq_rises(store: Ledger, put: Put) -> None:
    seqs = [put(store, usage_record()).seq for _ in range(5)]
    assert seqs == sorted(set(seqs))


def test_a_selection_never_shows_another_tenant(store: Ledger, put: Put) -> None:
    for tenant in ("acme", "globex", "ACME", "acme-"):
        put(store, usage_record(tenant=tenant, request_id=f"of {tenant!r}"))
    assert {stored.record.tenant for stored in store.read(Selection("acme"))} == {"acme"}
    assert list(store.read(Selection("%"))) == []
    assert list(store.read(Selection("' OR 1=1 --"))) == []


def test_a_selection_holds_every_condition(store: Ledger, put: Put) -> None:
    put(store, usage_record("wanted", tags={"team": "search", "x": "y"}))
    put(store, usage_record("tier", tier="premium", tags={"team": "search"}))
    put(store, usage_record("model", model="other", tags={"team": "search"}))
    put(store, usage_record("tag", tags={"team": "support"}))
    put(store, usage_record("before", started_at=NOON - timedelta(microseconds=1), tags={"team": "search"}))
    put(store, usage_record("at the end", started_at=NOON + timedelta(days=1), tags={"team": "search"}))
    period = Period(NOON, NOON + timedelta(days=1))
    found = store.read(Selection("acme", period, "standard", "test-model", {"team": "search"}))
    assert [stored.record.request_id for stored in found] == ["wanted"]


def test_reading_is_in_order_of_service(store: Ledger, put: Put) -> None:
    for minute in (3, 1, 2, 1):
        put(store, usage_record(started_at=NOON + timedelta(minutes=minute), tags={"odd": str(minute % 2)}))
    found = [stored.record.started_at.minute for stored in store.read(EVERYTHING)]
    assert found == [1, 1, 2, 3]
    newest = [stored.record.started_at.minute for stored in store.read(EVERYTHING, newest=2)]
    assert newest == [3, 2]
    odd = Selection(ALL_TENANTS, tags={"odd": "1"})
    assert [stored.record.started_at.minute for stored in store.read(odd, newest=2)] == [3, 1]


def test_a_store_can_be_written_while_it_is_read(store: Ledger, put: Put) -> None:
    put(store, usage_record("a"))
    put(store, usage_record("b"))
    reading = store.read(EVERYTHING)
    next(reading)
    put(store, usage_record("c"))
    assert [stored.record.request_id for stored in reading] == ["b"]  # one state throughout


def test_threads_store_each_record_once(store: Ledger, put: Put) -> None:
    records = [usage_record(f"r{n}") for n in range(15)]
    failures: list[BaseException] = []

    def emit(shift: int) -> None:
        try:
            for n in range(len(records)):
                put(store, records[(n + shift * 2) % len(records)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=emit, args=(shift,)) for shift in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(s.record.request_id for s in store.read(EVERYTHING)) == sorted(r.request_id for r in records)


def test_sums_beyond_64_bits_are_exact(store: Ledger, put: Put) -> None:
    total = 2**62 + 1
    for n in range(5):
        put(store, usage_record(f"r{n}", flops=FlopUsage(head=total, total=total), tier="gold"))
    assert sum(stored.record.flops.total for stored in store.read(EVERYTHING)) == 5 * total
