"""Every number of the report is what the records say, and totals tie to receipts and statements."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html import unescape
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from sqlalchemy import text

from polar_billing.budgets.settlement import settle
from polar_billing.errors import QueryError
from polar_billing.ledger.records import ALL_TENANTS, Entry, Selection
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.prices.rating import rate
from polar_billing.reports.csv import report_csv
from polar_billing.reports.html import report_html
from polar_billing.reports.promises import read_promises
from polar_billing.reports.report import Questions, Report, build_report
from polar_billing.reports.text import Amounts, unit_for
from polar_billing.reports.usage_tables import report_view
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import credit_note, issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.money import exact_sum
from polar_billing.values.periods import Period
from polar_sdk.show.tables import show
from polar_sdk.usage import FlopUsage, Outcome, TokenUsage, UsageRecord
from tests.billing.storing import DOLLARS, store_record

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


def test_disputed_use_is_said_in_every_form(ledger: Ledger) -> None:
    with Meter(ledger) as meter:
        for name, tags in {
            "a": {"polar.disputed": "usage"},
            "b": {"polar.disputed": "usage", "team": "x"},
            "c": {"note": '"polar.disputed":'},
            "d": {"polar.disputed": "length"},
        }.items():
            meter.emit(usage_record(name, tenant="globex" if name == "d" else "acme", tags=tags))
    report = build_report(ledger)
    assert report.disputed == {"length": 1, "usage": 2}
    assert build_report(ledger, Selection("acme", tags={"team": "x"})).disputed == {"usage": 1}
    out = io.StringIO()
    show(report_view(report), Console(file=out, width=100))
    assert "2 disputed (usage)" in out.getvalue()
    assert "2 requests disputed" in re.sub("<[^>]+>", "", report_html(report))


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


def test_a_book_may_be_used_for_the_first_time_while_a_report_reads(ledger: Ledger) -> None:
    Meter(ledger).emit(usage_record("before"))

    def meanwhile(stage: str, done: int, _: int) -> None:
        if stage == "single requests" and not done:
            store_record(ledger, usage_record("meanwhile"), DOLLARS)

    report = build_report(ledger, questions=Questions(promises={"standard": 1}), progress=meanwhile)
    assert report.figures.requests == 1
    assert build_report(ledger).figures.requests == 2


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
    (cut,) = build_report(ledger, Selection("globex", Period.month("2026-11", "Asia/Tokyo"))).tenants
    assert (cut.statements, [one.split()[0] for one in cut.statements_cut]) == ((), [statement.id])
    assert {tenant.statements_cut for tenant in report.tenants} == {()}
    html = report_html(report)
    assert statement.id in html
    assert "minimum of growth" in html


def test_what_is_due_in_a_report_is_what_the_statement_and_its_credit_notes_leave(ledger: Ledger) -> None:
    meter, november = Meter(ledger, prices=PriceBook.example(EXAMPLE_PLANS)), Period.month("2026-11")
    meter.emit(usage_record(tenant="initech", tier="premium", flops=FlopUsage(head=10**18, total=10**18)))
    meter.close()
    statement = issue_statement(ledger, "initech", november, now=datetime(2026, 12, 2, tzinfo=UTC)).statement
    assert statement.credits
    notes = [
        credit_note(ledger, "initech", statement.id, Decimal(amount), reason="outage", reference=amount)
        for amount in ("1.5", "0.25")
    ]
    report = build_report(ledger, Selection(ALL_TENANTS, november))
    (tenant,) = report.tenants
    assert tenant.credit_notes == tuple(notes)
    due = statement.due - Decimal("1.75")
    assert [of_statement[2] for of_statement in tenant.statements_due()] == [due]
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert build_report(ledger, Selection("initech", november, "premium")).tenants[0].credit_notes == ()
    html = report_html(report)
    assert re.search(rf">Due</th><td>{re.escape(Amounts.of(report).charges.show(due))}<", html)
    assert html.count("credit note") >= len(notes)


MONTH = Period.month("2026-11")
START = datetime(2026, 11, 3, tzinfo=UTC)
SOME_PATHS: dict[str | None, tuple[int, ...]] = {
    "economy": (0, 1, 4, 5),
    "premium": (0, 1, 2, 2, 3, 4, 5),
    None: (0, 1, 5),
}
PROMISING = """
id = "promising"
currency = "USD"
decimals = 6
[[prices]]
effective_from = 2026-01-01
per_compute_unit = 0.4
untiered = 1
tiers = { economy = 0.9, premium = 1.25 }
[[plans.team.terms]]
effective_from = 2026-01-01
[plans.team.terms.promises.economy]
latency_ms_p95_max = 50
credit_percent = 10
[plans.team.terms.promises.premium]
latency_ms_p95_max = 100000
credit_percent = 20
[[customers]]
tenant = "globex"
plan = "team"
effective_from = 2026-01-01
"""


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    book = PriceBook.from_toml(PROMISING)
    entries = []
    for number in range(60):
        tier = list(SOME_PATHS)[number % 3]
        record = usage_record(
            f"r{number:02d}",
            tenant=("acme", "globex")[number % 2],
            tier=tier,
            path=SOME_PATHS[tier],
            prompt=10 + number,
            output=1 + number % 7,
            outcome=Outcome.CANCELLED if number % 10 == 9 else Outcome.COMPLETED,
            router_flops=1_000_003 if tier else 0,
            started_at=START + timedelta(minutes=number),
        )
        rating = rate(record, book)
        entries.append(Entry(record, "test", book, rating.cost, rating.unrated))
    ledger.append_many(entries, settle)
    return ledger


def queried(ledger: Ledger, what: str, by: str = "tier") -> dict[Any, Any]:
    """A sum by SQL, by hand."""
    with ledger.snapshot() as connection:
        rows = connection.execute(text(f"SELECT {by}, {what} FROM polar_usage GROUP BY {by}")).all()
    return {row[0]: row[1] for row in rows}


def table(html: str, section: str, number: int = 0) -> dict[str, list[str]]:
    """The cells of a table's body, by the first of each row."""
    part = html[html.index(f'aria-labelledby="{section}"') :].partition("</section>")[0]
    body = re.findall(r"<tbody>(.*?)</tbody>", part, re.DOTALL)[number]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body.split("</tr>")[:-1]]
    plain_rows = [[unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in row] for row in rows]
    return {row[0]: row[1:] for row in plain_rows}


def test_charges_are_the_receipts_and_tie_to_the_statement(filled: Ledger) -> None:
    report = build_report(filled, Selection(ALL_TENANTS, MONTH))
    join = "(SELECT u.tenant AS tenant, u.tier AS tier, r.cost AS cost FROM polar_usage u JOIN polar_receipt r"
    join += " ON r.usage_seq = u.seq)"
    with filled.snapshot() as connection:
        rows = connection.execute(text(f"SELECT tenant, sum(cost) FROM {join} GROUP BY tenant")).all()
    receipts = {row[0]: row[1] for row in rows}
    for tenant in report.tenants:
        assert abs(tenant.total - Decimal(receipts[tenant.tenant]).scaleb(-12)) <= Decimal("0.000001")
        statement = draft_statement(filled, tenant.tenant, MONTH)
        usage = [line for line in statement.lines if line.kind == "usage"]
        assert [(line.tier, line.quantity, line.amount) for line in usage] == [
            (line.tier, line.quantity, line.amount) for line in tenant.lines
        ]
    unit = Amounts.of(report).charges
    cells = table(report_html(report), "charges")
    for tier in report.tiers:
        assert cells[tier.tier or "by hand"][0] == unit.show(tier.figures.charge)


def test_programs_of_the_depth_strips_are_those_of_the_database(filled: Ledger) -> None:
    report = build_report(filled)
    counted = queried(filled, "count(*)", "program")
    shown = {
        use.program: (use.requests, "".join(layer.kind[0] for layer in use.layers))
        for tier in report.tiers
        for panel in tier.depth
        for use in panel.programs
    }
    assert {program: requests for program, (requests, _) in shown.items()} == counted
    assert shown["0 1 4 5"][1] == "rrssrr"
    assert shown["0 1 2 2 3 4 5"][1] == "rrlrrr"
    html = report_html(report)
    assert html.count('<i class="k-looped">2</i>') == 1
    assert html.count('<i class="k-skipped"></i>') == 2 + 3


def test_a_missed_promise_lists_the_requests_that_took_longer(filled: Ledger) -> None:
    report = build_report(filled)
    promises = {(promise.tenant, promise.tier): promise for promise in report.promises}
    assert set(promises) == {("globex", "economy"), ("globex", "premium")}  # acme is on no plan
    missed, kept = promises["globex", "economy"], promises["globex", "premium"]
    assert (missed.kept, kept.kept, kept.missed, kept.credit) == (False, True, 0, None)
    with filled.snapshot() as connection:
        query = "SELECT request_id, queue_ns + prefill_ns + decode_ns FROM polar_usage WHERE tenant = 'globex' "
        query += "AND tier = 'economy' AND outcome = 'completed'"
        latencies: dict[str, int] = {row[0]: row[1] for row in connection.execute(text(query))}
    late = {request: latency for request, latency in latencies.items() if latency > 50 * 10**6}
    assert (missed.missed, missed.requests) == (len(late), len(latencies))
    assert {miss.request_id: miss.latency_ns for miss in missed.slowest}.items() <= late.items()
    assert [miss.latency_ns for miss in missed.slowest] == sorted(late.values(), reverse=True)[:10]
    charge = next(
        tier.figures.charge for tenant in report.tenants if tenant.tenant == "globex" for tier in tenant.tiers
    )
    assert charge is not None
    assert missed.credit == round(charge / 10, 6)
    html = report_html(report)
    assert f"request <code>{missed.slowest[0].request_id}</code>" in html
    assert "plan team of promising, 10 % back if missed" in html


def test_a_named_promise_goes_before_the_plans(filled: Ledger) -> None:
    report = build_report(filled, questions=Questions(promises=read_promises(["economy=999", "premium=1"])))
    found = {(promise.tenant, promise.tier): promise for promise in report.promises}
    assert len(found) == 4
    assert found["globex", "economy"].latency_ms_p95_max == 999
    assert found["globex", "premium"].missed == found["globex", "premium"].requests
    assert {promise.credit for promise in report.promises} == {None}
    assert report.what_if is None
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    "wrong", ["economy", "economy=", "=5", "economy=0", "economy=-1", "economy=1.5", "economy=99999999"]
)
def test_a_wrong_promise_is_one_clear_line(wrong: str) -> None:
    with pytest.raises(QueryError):
        read_promises([wrong])
    with pytest.raises(QueryError):
        read_promises(["a=1", "a=2"])


@pytest.mark.parametrize(
    ("amounts", "name", "first"),
    [
        (("12.34", "0.5"), "USD", "12.34"),
        (("0.013000", "0.002"), "mUSD", "13.000"),
        (("0.000013", "0.000002"), "µUSD", "13"),
        (("-0.000013",), "µUSD", "-13"),
        (("0.00",), "USD", "0.00"),
    ],
)
def test_amounts_have_a_unit_that_can_be_read(amounts: tuple[str, ...], name: str, first: str) -> None:
    unit = unit_for(map(Decimal, amounts), "USD")
    assert (unit.name, unit.show(Decimal(amounts[0]))) == (name, first)
    assert unit.show(None) == "–"
    assert unit.show(Decimal("0.000000")) in {"0", "0.000", "0.000000"}
    assert unit.show(Decimal(5), signed=True).startswith("+")
    assert unit_for([], None).show(Decimal(3)) == "3"
