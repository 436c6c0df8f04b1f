from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_billing.errors import PeriodError, QueryError
from polar_billing.exports.stripe import (
    FLOPS_PER_UNIT,
    MeterEvents,
    charging_books,
    check_whole,
    meter_name,
    read_customers,
    whole_months,
)
from polar_billing.ledger.records import ALL_TENANTS, Selection, StoredUsage
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.retention import prune
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import FlopUsage
from tests.billing.exports.conftest import OCTOBER, TIERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger

CUSTOMERS = {"acme": "cus_1", "globex": "cus_2"}
BEGIN = datetime(2026, 10, 1, tzinfo=UTC)
PLAIN = PriceBook.from_toml(
    'id = "plain"\ncurrency = "USD"\n[[prices]]\neffective_from = 2026-01-01\nper_compute_unit = 0.4\nuntiered = 1\n'
    "tiers = { standard = 1 }"
)


def made(ledger: Ledger, period: Period = OCTOBER) -> tuple[list[dict[str, Any]], MeterEvents]:
    events = MeterEvents(charging_books(ledger), CUSTOMERS, period)
    usage = ledger.read(Selection(ALL_TENANTS, whole_months(period)), as_stored=True)
    return list(events.of(usage)), events


def sums(events: Sequence[dict[str, Any]]) -> Counter[tuple[str, str]]:
    totals: Counter[tuple[str, str]] = Counter()
    for event in events:
        totals[event["payload"]["stripe_customer_id"], event["event_name"]] += int(event["payload"]["value"])
    return totals


def test_meters_and_what_is_left_over_are_the_quantities_of_the_statement(billed: Ledger) -> None:
    events, maker = made(billed)
    totals = sums(events)
    left = {(CUSTOMERS[each.tenant], each.meter): each.quantity for each in maker.leftovers()}
    assert maker.unrated == 1
    for tenant, customer in CUSTOMERS.items():
        lines = draft_statement(billed, tenant, OCTOBER).lines
        for tier in TIERS:
            charged = [line for line in lines if line.tier == tier and line.outcome is None and line.quantity]
            compute = sum(line.quantity or 0 for line in charged if line.item.startswith("compute"))
            meter = meter_name("compute", tier)
            in_units = Decimal(totals[customer, meter]) / 1_000
            assert in_units + left.get((customer, meter), 0) == compute
            assert left.get((customer, meter), 0) < Decimal("0.001")
            tokens = sum(line.quantity or 0 for line in charged if line.item.startswith("output tokens"))
            assert totals[customer, meter_name("output tokens", tier)] == tokens * 10**6
    served = {meter_name("requests", tier): 9 for tier in TIERS}  # of four outcomes, errors are free
    assert {name: totals["cus_2", name] for name in served} == served


def test_an_event_is_as_stripe_takes_it(billed: Ledger) -> None:
    events, _ = made(billed)
    assert len({event["identifier"] for event in events}) == len(events) > 100
    for event in events:
        assert set(event) == {"event_name", "identifier", "timestamp", "payload"}
        assert re.fullmatch(r"[1-9]\d*", event["payload"]["value"])
        assert len(event["identifier"]) <= 100
        assert len(event["event_name"]) <= 100
        assert isinstance(event["timestamp"], int)


def test_a_second_run_repeats_every_event_and_late_usage_adds_some(ledger: Ledger) -> None:
    with Meter(ledger, prices=PLAIN) as meter:
        for n in range(50):
            meter.emit(_record(f"r{n}", 1_700_000_001 * n, BEGIN + timedelta(hours=9 * n)))
        first, _ = made(ledger)
        meter.emit(_record("late", 2_999_999_999, BEGIN))
        second, _ = made(ledger)
    assert second[: len(first)] == first
    assert len(second) == len(first) + 1
    third, _ = made(ledger, Period(BEGIN + timedelta(days=5), BEGIN + timedelta(days=7)))
    assert third
    assert all(event in second for event in third)


def _record(request_id: str, flops: int, moment: datetime, tier: str | None = "standard") -> Any:
    used = FlopUsage(layers_prefill=flops, total=flops)
    return usage_record(request_id, tier=tier, flops=used, started_at=moment)


@given(
    st.lists(
        st.tuples(st.integers(0, 5 * FLOPS_PER_UNIT), st.integers(0, 61 * 24 - 1), st.sampled_from(["standard", None])),
        max_size=40,
    )
)
def test_what_is_cut_off_is_carried(drawn: list[tuple[int, int, str | None]]) -> None:
    usage = [
        StoredUsage(n, "polar", _record(f"r{n}", flops, BEGIN + timedelta(hours=hours), tier), BEGIN, "h", None, None)
        for n, (flops, hours, tier) in enumerate(drawn, start=1)
    ]
    maker = MeterEvents({"h": PLAIN}, CUSTOMERS, Period(BEGIN, BEGIN + timedelta(days=61)))
    totals: Counter[tuple[str, int]] = Counter()
    for event in maker.of(usage):
        month = datetime.fromtimestamp(event["timestamp"], UTC).month
        totals[event["event_name"], month] += int(event["payload"]["value"])
    exact: Counter[tuple[str, int]] = Counter()
    for stored in usage:
        exact[meter_name("compute", stored.record.tier), stored.record.started_at.month] += stored.record.flops.total
    assert totals == Counter({key: flops // FLOPS_PER_UNIT for key, flops in exact.items() if flops >= FLOPS_PER_UNIT})
    left = {(each.meter, int(each.month[-2:])): each.quantity * 10**12 for each in maker.leftovers()}
    assert left == {key: rest for key, flops in exact.items() if (rest := flops % FLOPS_PER_UNIT)}


@given(st.lists(st.text(max_size=60) | st.none(), unique=True, min_size=2, max_size=6))
def test_tiers_that_differ_have_meters_that_differ(tiers: list[str | None]) -> None:
    names = {meter_name("compute", tier) for tier in tiers}
    assert len(names) == len(tiers)
    assert all(len(name) <= 100 and re.fullmatch(r"[a-z0-9_]+", name) for name in names)


def test_a_tenant_without_a_customer_is_named(billed: Ledger, tmp_path: Path) -> None:
    maker = MeterEvents(charging_books(billed), {"acme": "cus_1"}, OCTOBER)
    with pytest.raises(QueryError, match="'globex'"):
        list(maker.of(billed.read(Selection(ALL_TENANTS, OCTOBER), as_stored=True)))
    file = tmp_path / "customers.toml"
    file.write_text('acme = "cus_1"\n"=x" = "cus_2"\n')
    assert read_customers(file) == {"acme": "cus_1", "=x": "cus_2"}
    for content in ("acme = 1", 'acme = "sub_1"', "acme = [", "\x00"):
        file.write_text(content)
        with pytest.raises(QueryError, match=r"customers\.toml"):
            read_customers(file)
    with pytest.raises(QueryError, match=r"absent\.toml"):
        read_customers(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("since", "until", "months"),
    [
        ("2026-10-05", "2026-10-07", ("2026-10-01", "2026-11-01")),
        ("2026-10-01", "2026-11-01", ("2026-10-01", "2026-11-01")),
        ("2026-10-31", "2026-11-02", ("2026-10-01", "2026-12-01")),
        (None, "2026-10-07", (None, "2026-11-01")),
        ("2026-10-05", None, ("2026-10-01", None)),
    ],
)
def test_whole_months(since: str | None, until: str | None, months: tuple[str | None, str | None]) -> None:
    zone = "America/Sao_Paulo"
    assert whole_months(Period.between(since, until, zone)) == Period.between(*months, zone)


def test_a_month_of_which_usage_was_deleted_is_refused(billed: Ledger) -> None:
    with billed.transaction() as connection:
        prune(connection, "acme", datetime(2026, 10, 3, tzinfo=UTC))
    with pytest.raises(PeriodError, match="pruned"):
        check_whole(billed, ALL_TENANTS, OCTOBER)
    check_whole(billed, "globex", OCTOBER)
