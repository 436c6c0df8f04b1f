"""What a report shows beside the charges: other price books, effective prices, and issued statements."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from polar_billing.cli import register
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_billing.prices.book import EXAMPLE_PLANS, PriceBook
from polar_billing.prices.rating import rate
from polar_billing.reports.html import report_html
from polar_billing.reports.report import build_report
from polar_billing.reports.usage_tables import report_view
from polar_billing.statements.issue import issue_statement
from polar_billing.testing import usage_record
from polar_billing.values.periods import Period
from polar_sdk.show.tables import show
from polar_sdk.usage import FlopUsage

if TYPE_CHECKING:
    from pathlib import Path

    from polar_billing.ledger.ledger import Ledger

NOVEMBER = Period.month("2026-11")
PLANS = PriceBook.example(EXAMPLE_PLANS)
DEAR = PriceBook.from_document(PLANS.document.replace('"0.0004"', '"0.0008"').replace("example-plans", "dear"))
EUROS = PriceBook.from_document(
    PriceBook.example().document.replace('"USD"', '"EUR"').replace("polar-example", "euros").replace('"exact"', '"top"')
)


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """Two tenants, one of them on a plan."""
    for number, (tenant, tier) in enumerate([("globex", "premium"), ("other", "standard"), ("other", "exact")]):
        flops = FlopUsage(head=10**15, total=10**15)
        record = usage_record(f"r{number}", tenant=tenant, tier=tier, flops=flops)
        ledger.append(record, source="test", book=PLANS, rating=rate(record, PLANS))
    return ledger


def test_the_same_usage_under_other_books_by_tenant_and_in_total(filled: Ledger) -> None:
    report = build_report(filled, compare=[DEAR, EUROS])
    by_tenant = {tenant.tenant: tenant for tenant in report.tenants}
    charge, euros = by_tenant["other"].others
    assert (charge.price_book, charge.charge, charge.unrated) == ("polar-dear", Decimal("2.0000"), 0)
    assert (euros.currency, euros.charge, euros.unrated) == ("EUR", Decimal("0.4"), 1)
    assert [charge.charge for charge in report.others] == [Decimal("3.0000"), Decimal("0.9")]
    assert build_report(filled).others == ()
    assert by_tenant["other"].figures.price_per_1000_requests == Decimal("500.0125")  # (0.4 + 0.6 + 0.000025) / 2


def test_issued_statements_are_in_the_report_of_their_period(filled: Ledger) -> None:
    statement = issue_statement(filled, "globex", NOVEMBER, now=datetime(2026, 12, 2, tzinfo=UTC)).statement
    report = build_report(filled, Selection(ALL_TENANTS, NOVEMBER))
    assert {tenant.tenant: tenant.statements for tenant in report.tenants} == {"globex": (statement,), "other": ()}
    assert json.loads(report.model_dump_json())["tenants"][0]["statements"][0]["id"] == statement.id
    assert build_report(filled, Selection("globex", NOVEMBER, "premium")).tenants[0].statements == ()
    assert build_report(filled, Selection("globex", Period.month("2026-11", "Asia/Tokyo"))).tenants[0].statements == ()


def test_page_and_terminal_show_both(filled: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    statement = issue_statement(filled, "globex", NOVEMBER, now=datetime(2026, 12, 2, tzinfo=UTC)).statement
    report = build_report(filled, compare=[DEAR, EUROS])
    page = report_html(report)
    assert statement.id in page
    assert "minimum of growth" in page
    for text in ("polar-dear", "euros, EUR", "has no price for 1 of these requests", f"{statement.total:f}"):
        assert text in page
    show(report_view(report), Console(width=200, no_color=True))
    out = capsys.readouterr().out
    assert "The same usage under other price books" in out
    assert "polar-dear" in out


@pytest.mark.usefixtures("filled")
def test_the_command_takes_books_to_compare(tmp_path: Path) -> None:
    file = tmp_path / "flat.toml"
    file.write_text(
        'id = "flat"\ncurrency = "USD"\n[[prices]]\neffective_from = 2026-01-01\nper_request = 7\n'
        "tiers = {standard = 1, premium = 1, exact = 1}\n"
    )
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["report", "--json", "--compare", str(file)])
    assert result.exit_code == 0, result.output
    assert [charge["charge"] for charge in json.loads(result.stdout)["others"]] == ["21.00"]
