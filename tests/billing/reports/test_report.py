from __future__ import annotations

import csv
import io
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.reports.csv import report_csv
from polar_billing.reports.html import report_html
from polar_billing.reports.report import Report, build_report
from polar_billing.statements.issue import issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.money import exact_sum
from polar_billing.values.periods import Period
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger

PATHS: dict[str | None, tuple[int, ...]] = {
    "economy": (0, 1, 4, 5),
    "standard": (0, 1, 2, 4, 5),
    "premium": (0, 1, 2, 2, 3, 4, 5),
    None: (0, 0, 0, 5),
}


@pytest.fixture
def records(ledger: Ledger) -> list[UsageRecord]:
    """Two tenants, four tiers, all outcomes, one tier without a price."""
    meter = Meter(ledger)
    outcomes = [*Outcome, Outcome.COMPLETED]
    records = [
        usage_record(
            f"{tenant}-{tier}-{n}",
            tenant=tenant,
            tier=tier,
            path=path,
            prompt=7 + 3 * n,
            output=n,
            outcome=outcomes[n % len(outcomes)],
            router_flops=1_000_003,
        )
        for tenant in ("acme", "globex")
        for tier, path in PATHS.items()
        for n in range(11)
    ]
    records.append(usage_record("gold", tenant="globex", tier="gold"))
    for record in records:
        meter.emit(record)
    return records


@pytest.fixture
def report(ledger: Ledger, records: list[UsageRecord]) -> Report:
    """The operator's report over them."""
    return build_report(ledger, now=datetime(2026, 12, 1, tzinfo=UTC))


def test_every_statement_adds_up_to_the_last_unit(report: Report) -> None:
    for tenant in report.tenants:
        amounts = [line.amount for line in tenant.lines]
        assert exact_sum([*amounts, tenant.rounding], report.decimals) == tenant.total
        charges = [tier.figures.charge for tier in tenant.tiers if tier.figures.charge is not None]
        assert exact_sum([*charges, tenant.rounding], report.decimals) == tenant.total
        assert tenant.figures.charge == tenant.total
    assert sum(tenant.total for tenant in report.tenants) == report.total == report.figures.charge
    across = [tier.figures.charge for tier in report.tiers if tier.figures.charge is not None]
    assert exact_sum([*across, report.rounding], report.decimals) == report.total
    for line in (line for tenant in report.tenants for line in tenant.lines):
        assert abs(line.quantity * line.unit_price - line.amount) <= Decimal("0.5E-6")


def test_sums_of_the_report_are_those_of_the_records(report: Report, records: list[UsageRecord]) -> None:
    figures = report.figures
    assert figures.requests == len(records)
    assert figures.outcomes == dict(Counter(str(record.outcome) for record in records))
    assert figures.tokens_input == sum(record.tokens.input for record in records)
    assert figures.tokens_output == sum(record.tokens.output for record in records)
    assert figures.compute_units == Decimal(sum(record.flops.total for record in records)).scaleb(-12)
    assert figures.compute_units_saved == Decimal(sum(record.flops_saved for record in records)).scaleb(-12)
    visits = Counter({tier.tier: sum(sum(panel.visits) for panel in tier.depth) for tier in report.tiers})
    expected: Counter[str | None] = Counter()
    for record in records:
        expected[record.tier] += record.visits.total
    assert visits == expected
    for tenant in report.tenants:
        quantity = sum(line.quantity for line in tenant.lines)
        mine = [record for record in records if record.tenant == tenant.tenant and record.tier != "gold"]
        assert quantity == Decimal(sum(record.flops.total for record in mine)).scaleb(-12)


def test_depth_shows_skips_and_loops(report: Report) -> None:
    depth = {tier.tier: tier.depth[0].visits for tier in report.tiers}
    assert depth["economy"][2:4] == (0, 0)
    assert depth["premium"][2] == 2 * depth["premium"][1]
    assert depth[None][0] == 3 * depth[None][5]


def test_saving_is_signed(report: Report) -> None:
    shares = {tier.tier: tier.figures.saved_share for tier in report.tiers}
    assert shares["economy"] is not None
    assert shares["economy"] > 0
    assert shares["premium"] is not None
    assert shares["premium"] < 0


def test_unrated_use_is_reported_in_no_amount(report: Report) -> None:
    gold = next(tier for tier in report.tiers if tier.tier == "gold")
    assert gold.figures.charge is None
    assert gold.figures.charge_full_depth is None
    assert gold.figures.price_per_1000_requests is None
    assert report.figures.unrated == {"price book 'polar-example' of 2024-01-01 has no price for tier 'gold'": 1}


def test_the_figures_of_a_small_report_worked_by_hand(ledger: Ledger) -> None:
    text = """
        id = "round numbers"
        currency = "EUR"
        [[prices]]
        effective_from = 2026-01-01
        per_compute_unit = 2.00
        per_request = 0.01
        tiers = {economy = 0.5}
        [prices.token_reference]
        per_million_input_tokens = 1000
        per_million_output_tokens = 3000
    """
    meter = Meter(ledger, prices=PriceBook.from_toml(text))
    for n in range(1, 21):
        meter.emit(
            usage_record(
                f"r{n}",
                tier="economy",
                tokens=TokenUsage(input=80, output=20),
                flops=FlopUsage(head=15 * 10**11, router=5 * 10**11, total=2 * 10**12),
                identity_flops=3 * 10**12,
                prefill_ns=0,
                decode_ns=0,
                queue_ns=n * 1_000_000,
            )
        )
    report = build_report(ledger)
    figures = report.figures
    assert [(line.item, line.quantity, line.unit_price, line.amount) for line in report.tenants[0].lines] == [
        ("compute", Decimal(40), Decimal(1), Decimal("40.00")),
        ("requests", Decimal(20), Decimal("0.005"), Decimal("0.10")),
    ]
    assert (report.currency, report.decimals, report.total) == ("EUR", 2, Decimal("40.10"))
    assert (figures.charge_full_depth, figures.charge_per_token) == (Decimal("60.10"), Decimal("2.80"))
    assert (figures.saved_share, figures.router_share) == (Decimal("0.333333"), Decimal("0.25"))
    assert figures.price_per_1000_requests == Decimal("2005.00")
    assert figures.price_per_million_tokens == Decimal("20050.00")
    latencies = (figures.latency_ns_p50, figures.latency_ns_p95, figures.latency_ns_p99)
    assert latencies == (10_000_000, 19_000_000, 20_000_000)


def test_a_price_change_within_the_period_makes_two_lines(ledger: Ledger) -> None:
    text = """
        id = "changing"
        currency = "JPY"
        [[prices]]
        effective_from = 2026-01-01
        per_request = 1
        tiers = {standard = 1}
        [[prices]]
        effective_from = 2026-11-15T12:00:00Z
        per_request = 3
        tiers = {standard = 1}
    """
    meter = Meter(ledger, prices=PriceBook.from_toml(text))
    for hour in (10, 11, 12):
        meter.emit(usage_record(started_at=datetime(2026, 11, 15, hour, tzinfo=UTC)))
    lines = build_report(ledger).tenants[0].lines
    figures = [(line.quantity, line.unit_price, line.amount) for line in lines]
    assert figures == [(Decimal(2), Decimal(1), Decimal(2)), (Decimal(1), Decimal(3), Decimal(3))]


def test_months_of_a_zone_partition_the_charges(ledger: Ledger) -> None:
    meter = Meter(ledger)
    for day in range(1, 29):
        meter.emit(usage_record(started_at=datetime(2026, day % 12 + 1, day, 23, 59, 59, tzinfo=UTC)))
    months = [Period.month(f"2026-{month:02d}", "Pacific/Auckland") for month in range(1, 13)]
    months.append(Period.month("2027-01", "Pacific/Auckland"))
    parts = [build_report(ledger, Selection(ALL_TENANTS, month)).figures for month in months]
    assert sum(part.requests for part in parts) == 28
    assert sum(part.compute_units for part in parts) == build_report(ledger).figures.compute_units


def test_a_tenants_report_shows_no_other_tenant(ledger: Ledger, records: list[UsageRecord]) -> None:
    report = build_report(ledger, Selection("acme"))
    assert "globex" not in report.model_dump_json()
    assert report.tenant == "acme"


def test_an_empty_period_makes_an_empty_report(ledger: Ledger) -> None:
    report = build_report(ledger)
    assert report.is_empty
    assert report.total == 0
    assert report.tenants == ()


def test_json_keeps_every_digit(report: Report) -> None:
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_csv_sums_to_the_total_and_runs_no_formula(ledger: Ledger, report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(report_csv(report))))
    assert sum(Decimal(row["charge"] or 0) for row in rows) == report.total
    assert sum(int(row["requests"] or 0) for row in rows) == report.figures.requests
    assert [row["kind"] for row in rows if row["tenant"] == "acme"] == ["tier"] * 4 + ["rounding"]
    Meter(ledger).emit(usage_record(tenant="=1+1"))
    assert "'=1+1" in report_csv(build_report(ledger, Selection("=1+1")))


@pytest.mark.parametrize("tenants", [1, 3, 17])
def test_a_tier_that_saves_nothing_costs_what_full_depth_costs(ledger: Ledger, tenants: int) -> None:
    meter = Meter(ledger)
    for number in range(tenants):
        meter.emit(usage_record(tenant=f"tenant-{number}", tier="premium", prompt=5 + number))
    figures = build_report(ledger).tiers[0].figures
    assert figures.compute_units_saved == 0
    assert figures.charge_full_depth == figures.charge


def test_issued_statements_are_in_the_report_of_their_period(ledger: Ledger) -> None:
    meter, november = Meter(ledger, prices=PriceBook.example(EXAMPLE_PLANS)), Period.month("2026-11")
    for tenant, tier in (("globex", "premium"), ("other", "standard")):
        meter.emit(usage_record(tenant=tenant, tier=tier))
    meter.close()
    statement = issue_statement(ledger, "globex", november, now=datetime(2026, 12, 2, tzinfo=UTC)).statement
    report = build_report(ledger, Selection(ALL_TENANTS, november))
    assert {tenant.tenant: tenant.statements for tenant in report.tenants} == {"globex": (statement,), "other": ()}
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert build_report(ledger, Selection("globex", november, "premium")).tenants[0].statements == ()
    assert build_report(ledger, Selection("globex", Period.month("2026-11", "Asia/Tokyo"))).tenants[0].statements == ()
    html = report_html(report)
    assert statement.id in html
    assert "minimum of growth" in html
