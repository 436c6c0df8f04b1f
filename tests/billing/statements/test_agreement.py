"""Promises on agreement are settled from audits: credited to the cent, provable, and said where audits are too few."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from sqlalchemy import update

from polar_billing.ledger.audits import Audits
from polar_billing.ledger.postings import Account, balances
from polar_billing.ledger.schema import audit_table
from polar_billing.metering.meter import Meter
from polar_billing.prices.book import PriceBook
from polar_billing.proof.verify import verify_in, verify_ledger
from polar_billing.reports.billing_tables import statement_view
from polar_billing.statements.draft import draft_statement
from polar_billing.statements.issue import issue_statement
from polar_billing.statements.tracing import recheck, usage_of_line
from polar_billing.testing import audit, usage_record
from polar_billing.values.periods import Period
from polar_sdk.usage import FlopUsage
from tests.billing.storing import unguarded

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from polar_billing.statements.statement import Statement

BOOK = PriceBook.from_toml("""
id = "with a promise"
currency = "USD"
decimals = 2
customers = [{tenant = "acme", plan = "pro", effective_from = 2026-01-01}]
[[prices]]
effective_from = 2026-01-01
per_compute_unit = 0.01
tiers = {premium = 1.25, standard = 1}
[plans.pro]
[[plans.pro.terms]]
effective_from = 2026-01-01
discount_percent = 20
promises = {premium = {agreement_min = 0.95, credit_percent = 30}}
""")
MONTHS = ("2026-09", "2026-10", "2026-11")
LATER = datetime(2027, 1, 15, tzinfo=UTC)


def a_month(ledger: Ledger, month: str, lost: set[int], audits: int = 150, weight: float = 1.0) -> None:
    """300 requests of each tier, every second premium one audited, or as many as said."""
    start, meter = datetime.fromisoformat(f"{month}-01T00:00+00:00"), Meter(ledger, prices=BOOK)
    flops = FlopUsage(head=7 * 10**12, total=7 * 10**12)
    for tier in ("premium", "standard"):
        meter.emit_many(
            usage_record(f"{month}-{tier}-{n}", tier=tier, flops=flops, started_at=start + timedelta(hours=2 * n))
            for n in range(300)
        )
    Audits(ledger, meter.source).store(
        [
            audit(f"{month}-premium-{n}", lost=n in lost, weight=weight, at=start + timedelta(hours=2 * n, minutes=5))
            for n in range(audits)
        ]
    )


def printed(statement: Statement) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(statement_view(statement, None))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def credits_of(statement: Statement) -> list[tuple[str | None, Decimal]]:
    return [(line.tier, line.amount) for line in statement.lines if line.kind == "service credit"]


@pytest.fixture
def three_months(store: Ledger) -> Ledger:
    """Promised is that 95 % agree: 8 of 150 audits lost in October is a breach, 7 in September and November is none."""
    for month, lost in zip(MONTHS, (7, 8, 7), strict=True):
        a_month(store, month, set(range(lost)))
    return store


def test_a_known_breach_is_credited_to_the_cent_and_proved(three_months: Ledger) -> None:
    issued = [issue_statement(three_months, "acme", Period.month(month), now=LATER) for month in MONTHS]
    # 300 × 7 CU × 0.01 × 1.25 less 20 % are 21.00 for premium, of which 30 % are given back.
    assert [credits_of(one.statement) for one in issued] == [[], [("premium", Decimal("-6.30"))], []]
    assert [one.statement.total for one in issued] == [Decimal("37.80"), Decimal("31.50"), Decimal("37.80")]
    assert [one.statement.agreement["premium"].model_dump(mode="json") for one in issued] == [
        {"agreed": 143, "compared": 150, "share": "0.953333"},
        {"agreed": 142, "compared": 150, "share": "0.946666"},
        {"agreed": 143, "compared": 150, "share": "0.953333"},
    ]
    assert all(not one.statement.unsettled for one in issued)
    (credit,) = (line for line in issued[1].statement.lines if line.kind == "service credit")
    assert "142 of 150" in str(credit.note)
    assert len(usage_of_line(three_months, issued[1], credit)) == 300
    with three_months.snapshot() as connection:
        assert balances(connection, "acme")[Account.SERVICE_CREDITS, "USD"] == Decimal("6.30")
    assert [recheck(three_months, one) for one in issued] == [[], [], []]
    assert verify_ledger(three_months).sound


@pytest.mark.parametrize("changed", [{"lost": 0, "kept": 20}, {"weight": 1}, {"at": LATER}, {"tier": "standard"}])
def test_one_changed_audit_is_noticed(three_months: Ledger, changed: dict[str, Any]) -> None:
    for month in MONTHS:
        issue_statement(three_months, "acme", Period.month(month), now=LATER)
    with three_months.transaction() as connection, unguarded(connection):
        where = (audit_table.c.request_id == "2026-10-premium-3", audit_table.c.tenant == "acme")
        assert connection.execute(update(audit_table).where(*where).values(changed)).rowcount == 1
        findings = list(map(str, verify_in(connection).findings))
    assert any("polar_audit" in one for one in findings)  # the chain
    assert any("statement st-" in one for one in findings)  # and what follows from it


def test_too_few_audits_settle_nothing_and_the_statement_says_so(store: Ledger) -> None:
    a_month(store, "2026-10", set(range(60)), audits=99)
    a_month(store, "2026-11", set(range(60)), audits=100)
    october, november = (draft_statement(store, "acme", Period.month(month)) for month in MONTHS[1:])
    assert credits_of(october) == []
    assert len(october.unsettled) == 1
    assert {"premium:", "99", "100"} <= set(october.unsettled[0].split())
    assert "Not settled: premium" in printed(october)
    assert credits_of(november) == [("premium", Decimal("-6.30"))]
    assert november.unsettled == ()
    assert "40 of 100 audited answers" in printed(november)


def test_audits_weigh_as_many_requests_as_they_stand_for(store: Ledger) -> None:
    """While more is audited because prompts look strange, audits of strange prompts weigh less."""
    a_month(store, "2026-11", set())
    strange = [audit(f"2026-11-premium-{n}", lost=n < 170, weight=0.05) for n in range(150, 250)]
    Audits(store, "polar").store(strange)
    statement = draft_statement(store, "acme", Period.month("2026-11"))
    found = statement.agreement["premium"]
    assert (found.agreed, found.compared) == (230, 250)  # 92 % of them, but 154 of 155 by weight
    assert found.share == Decimal("0.993548")
    assert credits_of(statement) == []


def test_only_the_tenants_own_audits_of_the_promised_loss_count(store: Ledger) -> None:
    a_month(store, "2026-11", set())
    for change in ({"tenant": "globex"}, {"loss": "strict"}, {"tier": "standard"}):
        fields: dict[str, Any] = {"promise": json.dumps(change).encode().hex()[:40].ljust(64, "0"), **change}
        Audits(store, "polar").store([audit(lost=True, **fields) for _ in range(150)])
    found = draft_statement(store, "acme", Period.month("2026-11"))
    assert (found.agreement["premium"].agreed, found.agreement["premium"].compared) == (150, 150)
    assert credits_of(found) == []


def test_audits_that_are_stored_late_settle_the_earlier_period_on_the_next_statement(store: Ledger) -> None:
    a_month(store, "2026-10", set(), audits=100)
    october = issue_statement(store, "acme", Period.month("2026-10"), now=LATER)
    late = [audit(f"2026-10-premium-{n}", lost=True, at=datetime(2026, 10, 20, tzinfo=UTC)) for n in range(100, 110)]
    Audits(store, "polar").store(late)
    a_month(store, "2026-11", set())
    november = issue_statement(store, "acme", Period.month("2026-11"), now=LATER)
    assert (credits_of(october.statement), october.statement.agreement["premium"].compared) == ([], 100)
    (credit,) = (line for line in november.statement.lines if line.kind == "service credit")
    assert (credit.amount, credit.corrects) == (Decimal("-6.30"), october.statement.id)
    assert november.statement.agreement["premium"].compared == 150
    assert verify_ledger(store).sound
