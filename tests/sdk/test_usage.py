"""The usage record as a value: what it refuses, how it travels as JSON, and the ids that requests get."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from polar_sdk.usage import (
    FLOPS_PER_COMPUTE_UNIT,
    FlopUsage,
    ListSink,
    NullSink,
    Outcome,
    TokenUsage,
    UsageRecord,
    VisitUsage,
    new_request_id,
)

counts = st.integers(0, 2**60)
names = (
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cf", "Zl", "Zp"]), min_size=1, max_size=50)
    .map(str.strip)
    .filter(bool)
)


@st.composite
def flop_usages(draw: st.DrawFn) -> FlopUsage:
    parts = {name: draw(counts) for name in ("embed", "layers_prefill", "layers_decode", "head", "router")}
    return FlopUsage(**parts, total=sum(parts.values()))


usage_records = st.builds(
    UsageRecord,
    request_id=names,
    tenant=names,
    tags=st.dictionaries(names, names, max_size=3),
    model=names,
    model_fingerprint=names,
    router=names,
    router_version=names,
    tier=st.none() | names,
    program=st.just("0-11 15x2 18-29"),
    outcome=st.sampled_from(Outcome),
    finish_reason=st.sampled_from(["stop", "length", "cancelled", "error", "cached"]),
    tokens=st.builds(TokenUsage, input=st.just(100), cached=st.integers(0, 100), output=counts),
    visits=st.builds(VisitUsage, prefill=st.lists(counts).map(tuple), decode=st.lists(counts).map(tuple)),
    flops=flop_usages(),
    identity_flops=counts,
    started_at=st.datetimes(min_value=datetime(1970, 1, 2), timezones=st.just(UTC)),
    queue_ns=counts,
)


def record(**changes: Any) -> UsageRecord:
    facts: dict[str, Any] = {
        "request_id": "r1",
        "model": "tiny",
        "model_fingerprint": "f" * 64,
        "router": "identity",
        "router_version": "1",
        "program": "0-5",
        "outcome": "completed",
        "finish_reason": "stop",
        "started_at": datetime(2026, 11, 24, tzinfo=UTC),
    }
    return UsageRecord(**{**facts, **changes})


class TestRecord:
    @given(usage_records)
    def test_json_round_trip(self, one: UsageRecord) -> None:
        assert UsageRecord.model_validate_json(one.model_dump_json()) == one

    @given(flop_usages())
    def test_total_is_the_sum(self, flops: FlopUsage) -> None:
        with pytest.raises(ValidationError):
            FlopUsage.model_validate({**flops.model_dump(), "total": flops.total + 1})

    def test_cached_tokens_are_part_of_input(self) -> None:
        assert TokenUsage(input=5, cached=5).cached == 5
        with pytest.raises(ValidationError, match=r"6.*5"):
            TokenUsage(input=5, cached=6)

    def test_accepted_tokens_are_drafted_and_executed_flops_fit(self) -> None:
        with pytest.raises(ValidationError, match=r"6.*5"):
            TokenUsage(drafted=5, accepted=6)
        with pytest.raises(ValidationError):
            FlopUsage(head=2**62, total=2**62, drafts=2**62)
        assert FlopUsage(head=3, total=3, drafts=4).executed == 7

    @pytest.mark.parametrize(
        "wrong",
        [
            {"request_id": " "},
            {"tenant": ""},
            {"tenant": "x" * 201},
            {"outcome": "finished"},
            {"finish_reason": "done"},
            {"started_at": datetime(2026, 11, 24)},  # no zone
            {"identity_flops": -1},
            {"identity_flops": 2**63},
            {"price": "1.00"},
            {"schema_version": 2},
            {"schema_version": 4},
            {"flops": FlopUsage(drafts=1)},
            {"tags": {"a": 1}},
        ],
    )
    def test_what_a_record_refuses(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            record(**wrong)

    def test_a_record_cannot_be_changed(self) -> None:
        with pytest.raises(ValidationError):
            record().tenant = "other"  # type: ignore[misc]

    def test_times_are_utc(self) -> None:
        local = datetime(2026, 11, 24, 1, 30, tzinfo=timezone(timedelta(hours=2)))
        assert record(started_at=local).started_at == local
        assert record(started_at=local).started_at.utcoffset() == timedelta(0)

    def test_derived_figures(self) -> None:
        usage = record(flops=FlopUsage(head=FLOPS_PER_COMPUTE_UNIT, total=FLOPS_PER_COMPUTE_UNIT), identity_flops=5)
        assert usage.compute_units == 1.0
        assert usage.flops_saved == 5 - FLOPS_PER_COMPUTE_UNIT  # negative: it cost more than full depth
        assert VisitUsage(prefill=(1, 0, 2), decode=(3, 0, 6)).total == 12


class TestRequestId:
    def test_version_and_variant_bits(self) -> None:
        for _ in range(200):
            identifier = UUID(new_request_id())
            assert identifier.version == 7
            assert identifier.variant == RFC_4122

    def test_it_begins_with_the_time(self) -> None:
        before = time.time_ns() // 1_000_000
        stamp = UUID(new_request_id()).int >> 80
        assert before <= stamp <= time.time_ns() // 1_000_000

    def test_later_ids_sort_after_earlier_ones(self) -> None:
        stamped: list[tuple[int, str]] = []
        while len({stamp for stamp, _ in stamped}) < 5:  # ids of five different milliseconds
            identifier = new_request_id()
            stamped.append((UUID(identifier).int >> 80, identifier))
        for stamp, identifier in stamped:
            assert all(identifier < other for later, other in stamped if later > stamp)

    def test_no_id_comes_twice(self) -> None:
        assert len({new_request_id() for _ in range(5000)}) == 5000


def test_list_and_null_sinks() -> None:
    kept, dropped = ListSink(), NullSink()
    for sink in (kept, dropped):
        sink.check()
        sink.emit(record())
        sink.close()
    assert kept.records == [record()]
