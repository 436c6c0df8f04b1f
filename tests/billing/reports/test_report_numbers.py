"""Every number of the report is what a query on the ledger says, and totals tie to the statement."""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html import unescape
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from polar_billing.budgets.settlement import settle
from polar_billing.errors import QueryError
from polar_billing.ledger.records import ALL_TENANTS, Entry, Selection
from polar_billing.prices.book import PriceBook
from polar_billing.prices.rating import rate
from polar_billing.reports.html import report_html
from polar_billing.reports.promises import read_promises
from polar_billing.reports.report import Questions, Report, build_report
from polar_billing.reports.text import Amounts, unit_for
from polar_billing.statements.draft import draft_statement
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import Outcome

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger

MONTH = Period.month("2026-11")
START = datetime(2026, 11, 3, tzinfo=UTC)
PATHS: dict[str | None, tuple[int, ...]] = {
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
        tier = list(PATHS)[number % 3]
        record = usage_record(
            f"r{number:02d}",
            tenant=("acme", "globex")[number % 2],
            tier=tier,
            path=PATHS[tier],
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


def test_the_compute_of_the_page_is_what_the_database_adds_up(filled: Ledger) -> None:
    cells = table(report_html(build_report(filled, Selection(ALL_TENANTS, MONTH))), "compute")
    columns = [
        ("count(*)", 0, 0),
        ("sum(tokens_input)", 1, 0),
        ("sum(tokens_output)", 2, 0),
        ("sum(flops_total)", 3, 12),
        ("sum(flops_layers_prefill)", 4, 12),
        ("sum(flops_layers_decode + flops_head)", 5, 12),
        ("sum(flops_router)", 6, 12),
        ("sum(identity_flops - flops_total)", 8, 12),
    ]
    for what, column, decimals in columns:
        for tier, value in queried(filled, what).items():
            shown = cells[tier or "by hand"][column].replace(",", "").replace("+", "")
            expected = Decimal(value).scaleb(-decimals)
            assert Decimal(shown) == (round(expected, 4) if decimals else expected), (what, tier)


def test_latencies_of_the_page_are_requests_of_the_database(filled: Ledger) -> None:
    latencies: defaultdict[Any, list[int]] = defaultdict(list)
    with filled.snapshot() as connection:
        query = "SELECT tier, queue_ns + prefill_ns + decode_ns FROM polar_usage WHERE outcome = 'completed'"
        for tier, latency in connection.execute(text(query)):
            latencies[tier].append(latency)
    cells = table(report_html(build_report(filled)), "latency")
    for tier, found in latencies.items():
        ordered = sorted(found)
        for column, percent in ((1, 50), (2, 95), (3, 99)):
            nearest = ordered[-(-len(ordered) * percent // 100) - 1]
            assert cells[tier or "by hand"][column] == f"{nearest / 10**6:,.1f} ms"


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
    with pytest.raises(QueryError, match="is not TIER=MILLISECONDS"):
        read_promises([wrong])
    with pytest.raises(QueryError, match="is promised two latencies"):
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
