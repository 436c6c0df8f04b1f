"""Every figure of the operations page is what the ledger answers elsewhere, such as to `polar report`."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from polar_billing.access.keys import ApiKeys
from polar_billing.budgets.budget import Budget
from polar_billing.budgets.enforcement import Budgets
from polar_billing.dashboard import view as key_uses
from polar_billing.dashboard.charges import Books, Cost
from polar_billing.dashboard.layers import heat_of
from polar_billing.dashboard.service import ledger_health, spool_health
from polar_billing.dashboard.view import LastUses, Looks, keys_of, latest_requests, receipt_of
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.ledger.schema import link_table
from polar_billing.metering.meter import Meter
from polar_billing.metering.spool import spool_folder
from polar_billing.prices.book import PriceBook
from polar_billing.proof.verify import verify_ledger
from polar_billing.reports.report import build_report
from polar_billing.statements.retention import prune
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period, Window
from polar_sdk.usage import Outcome, TokenUsage, VisitUsage
from tests.billing.storing import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import StoredUsage
    from polar_sdk.usage import UsageRecord

NOON = datetime(2026, 11, 15, 12, tzinfo=UTC)
BOOK = """
id = "changing"
currency = "USD"
decimals = 6
free_outcomes = ["error"]
[[prices]]
effective_from = 2026-01-01
per_compute_unit = 0.4
per_request = 0.000123
untiered = 0.5
tiers = { economy = 0.9, standard = 1.0 }
[prices.token_reference]
per_million_input_tokens = 0.08
per_million_output_tokens = 0.16
[[prices]]
effective_from = 2026-11-15T12:17:31Z
per_compute_unit = 0.7
per_million_output_tokens = 3
tiers = { economy = 0.8, standard = 1.1, premium = 1.5 }
[[plans.team.prices]]
effective_from = 2026-01-01
per_compute_unit = 0.1
tiers = { economy = 1, standard = 1, premium = 1 }
[[customers]]
tenant = "globex"
plan = "team"
effective_from = 2026-11-15T13:30:00Z
"""
NOT_IN_SUMS = {
    *("compute_units_prompt", "compute_units_answer", "compute_units_router", "router_share"),
    *("latency_ns_p50", "latency_ns_p95", "latency_ns_p99"),
}
"""Figures that only whole records tell; the page does not show them."""


def records(seed: int, count: int = 60) -> list[UsageRecord]:
    """Requests of two days, around a change of prices in the middle of an hour."""
    chance = random.Random(seed)
    paths = [(0, 1, 4, 5), (0, 1, 2, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)]
    return [
        usage_record(
            f"r{seed}-{number}",
            tenant=chance.choice(["acme", "globex", "initech"]),
            tier=chance.choice(["economy", "standard", "premium", "gold", None]),
            path=chance.choice(paths),
            prompt=chance.randint(1, 400),
            output=chance.randint(1, 90),
            outcome=chance.choice(list(Outcome)),
            started_at=NOON
            + timedelta(seconds=chance.randint(-80_000, 30_000), microseconds=chance.randint(0, 999_999)),
        )
        for number in range(count)
    ]


def figures(group: Any) -> dict[str, Any]:
    return {name: value for name, value in group.figures.model_dump().items() if name not in NOT_IN_SUMS}


def charged(store: Ledger, period: Period) -> Any:
    """The cost of a period on the page, in one currency."""
    with store.snapshot() as connection:
        (charges,) = Cost(Books()).of(connection, ALL_TENANTS, period)
    return charges


@pytest.mark.parametrize(("seed", "zone"), [(1, "UTC"), (2, "Asia/Kathmandu")])
def test_the_cost_of_a_day_is_that_of_the_report_to_the_last_digit(store: Ledger, seed: int, zone: str) -> None:
    Meter(store, prices=PriceBook.from_toml(BOOK)).emit_many(records(seed))
    day = Period.containing(NOON, Window.DAY, zone)
    report, summary = build_report(store, Selection(ALL_TENANTS, day)), charged(store, day)
    assert report.figures.requests < 60
    assert report.figures.unrated
    assert report.figures.charge_full_depth != report.figures.charge
    assert (summary.total, summary.rounding) == (report.total, report.rounding)
    assert figures(summary) == figures(report)
    assert [tenant.tenant for tenant in summary.tenants] == [tenant.tenant for tenant in report.tenants]
    for ours, theirs in zip(summary.tenants, report.tenants, strict=True):
        assert (ours.lines, ours.rounding, ours.total) == (theirs.lines, theirs.rounding, theirs.total)
        assert [(tier.tier, figures(tier)) for tier in ours.tiers] == [
            (tier.tier, figures(tier)) for tier in theirs.tiers
        ]
    assert [(tier.tier, figures(tier)) for tier in summary.tiers] == [
        (tier.tier, figures(tier)) for tier in report.tiers
    ]


def test_a_change_of_prices_within_the_hour_is_seen(ledger: Ledger) -> None:
    """Two requests of one hour that differ in their time alone cost what each is charged by."""
    meter = Meter(ledger, prices=PriceBook.from_toml(BOOK))
    before, after = (
        meter.emit(usage_record(started_at=NOON + timedelta(minutes=minutes), tier="standard")) for minutes in (17, 18)
    )
    assert before["cost"] != after["cost"]
    summary = charged(ledger, Period.containing(NOON, Window.DAY))
    assert {line.unit_price for line in summary.tenants[0].lines if line.item == "compute"} == {
        Decimal("0.4"),
        Decimal("0.77"),
    }


def test_the_next_look_is_as_right_as_the_first(ledger: Ledger) -> None:
    """Also for the tenant that did nothing in between, and over midnight."""
    meter, cost = Meter(ledger, prices=PriceBook.from_toml(BOOK)), Cost(Books())

    def look(day: Period) -> Any:
        with ledger.snapshot() as connection:
            (charges,) = cost.of(connection, ALL_TENANTS, day)
        return charges

    today, tomorrow = (Period.containing(NOON + timedelta(days=days), Window.DAY) for days in (0, 1))
    meter.emit_many(records(11))
    first = look(today)
    assert look(today) == first
    meter.emit(usage_record("more", tenant="acme", started_at=NOON + timedelta(hours=1)))
    meter.emit(usage_record("later", tenant="acme", started_at=NOON + timedelta(days=1)))
    for day in (today, tomorrow, today):
        report, summary = build_report(ledger, Selection(ALL_TENANTS, day)), look(day)
        assert (summary.total, summary.rounding) == (report.total, report.rounding)
        assert figures(summary) == figures(report)
    assert look(today).total != first.total


def test_every_currency_is_by_itself(ledger: Ledger) -> None:
    for currency in ("EUR", "USD"):
        text = f'id = "{currency}"\ncurrency = "{currency}"\n[[prices]]\neffective_from = 2026-01-01\n'
        book = PriceBook.from_toml(text + "per_request = 1\ntiers = { standard = 1 }")
        Meter(ledger, prices=book).emit(usage_record(f"r-{currency}"))
    with ledger.snapshot() as connection:
        found = Cost(Books()).of(connection, ALL_TENANTS, Period.containing(NOON, Window.DAY))
    assert [(charges.currency, charges.total) for charges in found] == [
        ("EUR", Decimal("1.00")),
        ("USD", Decimal("1.00")),
    ]


def programs_ran(store: Ledger) -> None:
    """Requests of an hour: skipped, looped, bridged and filled layers, and two that ended before any layer."""
    chance, visits = random.Random(3), (1, 1, 1, 1, 1, 1)
    texts = {
        "0-5": visits,
        "0-3 5": (1, 1, 1, 1, 0, 1),
        "0-2 3x2 4-5": (1, 1, 1, 2, 1, 1),
        "0-1 [2-3] 4-5": (1, 1, 0, 0, 1, 1),
    }
    texts |= {"0-3 (4-5)": visits, "what is this": visits}
    meter = Meter(store)
    for number in range(40):
        text = chance.choice(list(texts))
        meter.emit(
            usage_record(
                f"r{number}",
                program=text,
                tier=chance.choice(["economy", "standard", None]),
                model=chance.choice(["one", "other"]),
                visits=VisitUsage(prefill=texts[text], decode=tuple(4 * count for count in texts[text])),
                started_at=NOON + timedelta(minutes=chance.randint(-90, 20)),
            )
        )
    ended = VisitUsage(prefill=(), decode=())
    meter.emit(usage_record("none", visits=ended, outcome=Outcome.CANCELLED, tokens=TokenUsage(input=3, output=0)))


def test_the_programs_of_an_hour_are_those_of_the_report(store: Ledger) -> None:
    programs_ran(store)
    hour = Selection(ALL_TENANTS, Period(NOON - timedelta(hours=1), NOON + timedelta(minutes=5)))
    with store.snapshot() as connection:
        heats = heat_of(connection, hour)
    panels = {(panel.model, tier.tier): panel for tier in build_report(store, hour).tiers for panel in tier.depth}
    assert {(heat.model, heat.tier) for heat in heats} == set(panels)
    assert len(heats) == 6
    for heat in heats:
        panel = panels[heat.model, heat.tier]
        assert heat.programs == panel.programs
        assert heat.requests == sum(use.requests for use in panel.programs)
        for layer in range(heat.layers):
            assert sum(counts[layer] for counts in heat.kinds.values()) == heat.readable
            for kind, counts in heat.kinds.items():
                expected = sum(use.requests for use in panel.programs if use.layers and use.layers[layer].kind == kind)
                assert counts[layer] == expected
    assert {kind for heat in heats for kind in heat.kinds} == {"run", "skipped", "looped", "bridged", "filled"}
    assert any(heat.readable < heat.requests for heat in heats)


def test_the_latest_requests_are_those_of_the_ledger(store: Ledger) -> None:
    Meter(store).emit_many(records(5, 30))
    with store.snapshot() as connection:
        found = latest_requests(connection, ALL_TENANTS, 20)
        of_one = latest_requests(connection, "acme", 3)
    assert of_one == list(store.read(Selection("acme"), newest=3))
    assert found == list(store.read(Selection(ALL_TENANTS), newest=20))


def test_a_receipt_is_checked(ledger: Ledger) -> None:
    Meter(ledger).emit_many(records(6, 5))
    with ledger.snapshot() as connection:
        found = receipt_of(connection, ALL_TENANTS, 2)
        assert found is not None
        assert found.check.wrong is None
        assert found.receipt["request_id"] == found.stored.record.request_id
        assert receipt_of(connection, ALL_TENANTS, 6) is None
        assert receipt_of(connection, "nobody", 2) is None
    with ledger.transaction() as connection, unguarded(connection):
        connection.exec_driver_sql("UPDATE polar_usage SET flops_total = flops_total - 1 WHERE seq = 2")
    with ledger.snapshot() as connection:
        changed = receipt_of(connection, ALL_TENANTS, 2)
        other = receipt_of(connection, found.stored.record.tenant, 2)
    assert changed is not None
    assert other == changed
    assert "changed" in (changed.check.wrong or "")


def test_a_request_without_its_link_has_no_receipt(ledger: Ledger) -> None:
    Meter(ledger).emit_many(records(6, 2))
    with ledger.transaction() as connection, unguarded(connection):
        connection.execute(link_table.delete().where(link_table.c.subject == "usage", link_table.c.key == "1"))
    with ledger.snapshot() as connection:
        found = receipt_of(connection, ALL_TENANTS, 1)
    assert found is not None
    assert found.receipt == {}
    assert "no link" in (found.check.wrong or "")


def test_the_last_use_of_a_key_is_its_latest_request(
    store: Ledger, monkeypatch: pytest.MonkeyPatch, put: Callable[[Ledger, UsageRecord], StoredUsage]
) -> None:
    """Also where older records are read bit by bit, and where a tag names the key of another tenant."""
    monkeypatch.setattr(key_uses, "_AT_A_TIME", 3)
    monkeypatch.setattr(key_uses, "_LATE", 1)
    keys = ApiKeys(store)
    used, unused = keys.create("acme", "used")[0], keys.create("acme", "unused")[0]
    put(store, usage_record("first", tags={"key": used.key_id}, started_at=NOON))
    put(store, usage_record("foreign", tenant="globex", tags={"key": unused.key_id}))
    for number in range(8):
        put(store, usage_record(f"r{number}", tags={"key": "other"} if number % 2 else {}))
    uses, now = LastUses(), datetime.now(UTC)

    def look() -> dict[str, tuple[datetime | None, bool]]:
        with store.snapshot() as connection:
            return {use.key.name: (use.last_used, use.is_known) for use in keys_of(connection, ALL_TENANTS, uses, now)}

    assert look() == {"used": (None, False), "unused": (None, False)}
    put(store, usage_record("later", tags={"key": used.key_id}, started_at=NOON + timedelta(hours=1)))
    assert look()["used"] == (NOON + timedelta(hours=1), True)
    for _ in range(4):
        found = look()
    assert found == {"used": (NOON + timedelta(hours=1), True), "unused": (None, True)}


def test_budgets_are_those_of_budget_show(ledger: Ledger) -> None:
    budgets = Budgets(ledger)
    budgets.set(Budget("acme", Decimal("0.5"), "CU", window="day"))  # type: ignore[arg-type]
    budgets.set(Budget("globex", Decimal(3), "USD"))
    Meter(ledger).emit(usage_record(started_at=datetime.now(UTC)))
    view = Looks(ledger).look("UTC", None)
    assert view.budgets == budgets.standings(ALL_TENANTS)
    assert view.budgets[0].spent > 0


def test_health_counts_links_and_what_waits(ledger: Ledger) -> None:
    Meter(ledger).emit_many(records(8, 7))
    ApiKeys(ledger).create("acme", "k")
    verification = verify_ledger(ledger)
    with ledger.snapshot() as connection:
        health = ledger_health(connection)
    tenants = {tenant: head for tenant, head in verification.heads.items() if tenant}
    assert (health.chains, health.links) == (len(tenants), sum(head.number for head in tenants.values()))
    assert health.last_stored == max(stored.stored_at for stored in ledger.read(Selection(ALL_TENANTS)))
    assert spool_health(ledger).well
    folder = spool_folder(ledger.url)
    assert folder is not None
    folder.mkdir()
    (folder / "1-a-1.jsonl").write_text("damaged\n")
    (folder / "rejected.jsonl").write_text("one\ntwo\n")
    found = spool_health(ledger)
    assert (found.waiting, found.rejected, found.well) == (0, 2, False)


def test_what_retention_deleted_still_counts_where_sums_do(ledger: Ledger) -> None:
    """As in `polar usage`: sums by hour outlive the facts."""
    Meter(ledger).emit_many(records(9))
    day = Period.containing(NOON, Window.DAY)
    before = charged(ledger, day)
    with ledger.transaction() as connection:
        prune(connection, "acme", NOON + timedelta(days=1))
    assert charged(ledger, day).total == before.total
